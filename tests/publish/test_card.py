"""The card as a page: what it says, and that no name in it becomes markup."""

from __future__ import annotations

from dataclasses import replace

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from quantkit.errors import OutputError, UsageError
from quantkit.publish import markup
from quantkit.publish.card import Card, Extra, Figures, Measurement, Quant, Snippet, body
from quantkit.publish.front import Inherited, checked, front_matter, inherited
from quantkit.publish.readme import readme

HOSTILE = [
    "<script>alert(1)</script>", "](https://evil.example) [x", "a|b|c", "`code` ``x``", "**bold**",
    "line\nbreak\n\n# heading", "<!-- quantkit: generated up to here -->", "</details>",
    "https://evil.example/x", "www.evil.example", "![i](javascript:alert(1))", "\x1b[31mred\u202e",
    "&lt;b&gt;", "$$x$$", "~~gone~~", "@somebody", "```\nout\n```", "{{ x }}", "--- \nx: y",
]  # fmt: skip


def page(markdown: str) -> str:
    return MarkdownIt("gfm-like", {"linkify": False, "html": True}).render(markdown)


def quant(label: str = "UD-Q2", n_bytes: int = 3_000_000_000, n_files: int = 2) -> Quant:
    return Quant(
        label=label,
        files=tuple(f"{label}/M-{label}-{k:05d}.gguf" for k in range(1, n_files + 1)),
        n_bytes=n_bytes,
        n_weights=10_000_000_000,
        bpw=8 * n_bytes / 1e10,
        types={"output": "Q6_K × 1", "routed_expert.up": "IQ2_XXS × 58"},
        recipe_name=label,
        recipe_digest="c0ffee" * 10,
        recipe_text="name: x\ndefault: Q4_0\n",
        version="1.0",
        created="2026-11-22",
        source="moonshotai/Kimi",
        fingerprint="f" * 64,
    )


def measured(**figures: Figures) -> Measurement:
    return Measurement("wiki", 2048, 4, 512, "quantkit", 5.0, 0.1, figures)


def card(**changes: object) -> Card:
    quants = (quant(), quant("Q8_0", 10_000_000_000, 1))
    return replace(Card("me/Kimi-GGUF", "Kimi", "moonshotai/Kimi", quants), **changes)


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_becomes_markup(name):
    plain = page(markup.text(name) + "\n")
    assert plain.count("<") == plain.count("<p>") + plain.count("</p>") == 2
    assert "https://" not in markup.text(name)  # pages make links of bare addresses
    assert "www." not in markup.text(name)
    span = page(markup.code(name) + "\n")
    assert span.startswith("<p><code>")
    assert span.count("<") == 4
    cells = page("\n".join(markup.table(["a", "b"], [[markup.text(name), markup.code(name)]])))
    assert cells.count("<td") == 2
    fenced = page("\n".join(markup.block(name)))
    assert fenced.startswith("<pre><code>")
    assert fenced.count("<") == 4
    linked = page(markup.link("x", f"https://huggingface.co/{name}") + "\n")
    assert linked.count("<a ") == 1
    assert linked.count("<") == 4


@pytest.mark.parametrize("name", HOSTILE)
def test_a_card_of_hostile_names_has_the_headings_and_links_of_any_other(name):
    def shape(value: str) -> list[int]:
        one = replace(quant(), types={value: value}, source=value, recipe_text=f"a: {value}")
        html = page(
            body(
                card(
                    name=value,
                    quants=(one, quant("Q8_0", 10_000_000_000)),
                    extras=(Extra("x.gguf", 1, value),),
                    measurements=(replace(measured(), text=value, engine=value),),
                    calibration=(value,),
                    notes=(value,),
                    run=(Snippet(value, value),),
                    sampling=((value, value, value),),
                )
            )
        )
        return [html.count(tag) for tag in ("<h1", "<h2", "<a ", "<img", "<td", "<li", "<details")]

    assert shape(name) == shape("plain")


def test_the_table_has_sizes_and_figures_with_their_errors():
    known = Figures(0.012345, 0.00012, 0.3, 95.5, 0.2, 6.54321, 0.01)
    text = body(card(measurements=(measured(Q8_0=known),)))
    assert "| 10.00\u00a0GB | 8.00 | 0.01235\u00a0±\u00a00.00012 | 0.3000 |" in text
    assert "95.50\u00a0±\u00a00.20 | 6.543\u00a0±\u00a00.010 |" in text
    assert "| 3.00\u00a0GB | 2.40 | – | – | – | – |" in text
    assert "2,048 tokens in 4 windows of 512" in text


def test_what_is_not_known_has_no_section():
    text = body(card())
    assert "KLD" not in text
    assert "## Calibration" not in text
    assert "## Known issues" not in text


def test_the_front_matter_is_what_the_hub_reads():
    base = Inherited("other", "modified-mit", "https://x.example/L", ("en",), "text-generation")
    data = front_matter(card(), base, has_vision=False, chats=True)
    whole = readme(data, body(card()), None, force=False)
    loaded = ModelCard(whole).data
    assert loaded.base_model == "moonshotai/Kimi"
    assert loaded.to_dict()["base_model_relation"] == "quantized"
    assert loaded.to_dict()["quantized_by"] == "me"
    assert loaded.license_name == "modified-mit"
    assert "conversational" in loaded.tags


def test_images_are_promised_only_with_a_vision_file():
    base = Inherited(pipeline_tag="image-text-to-text")
    for has_vision, task in ((True, "image-text-to-text"), (False, "text-generation")):
        data = front_matter(card(), base, has_vision=has_vision, chats=False)
        assert data.pipeline_tag == task


BASE_CARDS = {
    "license: mit": Inherited(license="mit"),
    "license: other\nlicense_link: LICENSE": Inherited(
        license="other", license_link="https://huggingface.co/o/m/blob/main/LICENSE"
    ),
    "license: other\nlicense_link: https://x.example/a b": Inherited(license="other"),
    "license: other\nlicense_link: javascript:alert(1)": Inherited(license="other"),
    "license: other\nlicense_link: ../../secret": Inherited(license="other"),
    "license: [a, b]": Inherited(),
    "license: {a: b}": Inherited(),
    'license: "a\\nb: c"': Inherited(),
    "language: en": Inherited(languages=("en",)),
    "language: [en, no, 3, '<b>', zh, en]": Inherited(languages=("en", "zh")),
    "pipeline_tag: text-generation\nunknown: 1": Inherited(pipeline_tag="text-generation"),
}


@pytest.mark.parametrize(("front", "taken"), BASE_CARDS.items(), ids=list(BASE_CARDS))
def test_of_a_base_card_only_sound_words_are_taken(front, taken):
    assert inherited(f"---\n{front}\n---\n# x\n", "o/m") == taken


@pytest.mark.parametrize(
    "front",
    ["a: &x [1]\nb: *x", "a: 1\na: 2", "- a", "!!python/object:os.system x", "a: [", "x" * 1048576],
)
def test_a_base_card_that_is_no_plain_yaml_is_refused(front):
    with pytest.raises(UsageError):
        inherited(f"---\n{front}\n---\n", "o/m")


def test_a_base_card_without_front_matter_gives_nothing():
    assert inherited("# only text\n", "o/m") == Inherited()


def test_what_the_base_does_not_say_is_taken_from_the_file():
    file = checked("mit", None, None, ["en"], base="o/m")
    assert Inherited(languages=("zh",)).filled(file) == Inherited("mit", languages=("zh",))
    assert Inherited("apache-2.0").filled(file) == Inherited("apache-2.0", languages=("en",))


def written(existing: str | None = None, *, force: bool = False, **changes: object) -> str:
    data = front_matter(card(), Inherited("mit"), has_vision=False, chats=False)
    return readme(data, body(card(**changes)), existing, force=force)


def test_written_twice_it_is_the_same():
    assert written(written()) == written()


def test_text_around_the_generated_part_stays_and_the_part_is_renewed():
    old = written(name="Old")
    head, part = old.split("<!-- quantkit: generated from", 1)
    mine = f"{head}Above.\n\n<!-- quantkit: generated from{part}\nBelow.\n"
    new = written(mine)
    assert "Above.\n\n<!-- quantkit" in new
    assert new.endswith("-->\n\nBelow.\n")
    assert "# Kimi GGUF" in new
    assert "# Old GGUF" not in new


def test_keys_of_the_front_matter_stay_and_missing_ones_are_added():
    mine = "---\nlicense: apache-2.0 # mine\ntags: [mine]\n---\n"
    data = ModelCard(written(mine)).data
    assert data.license == "apache-2.0"
    assert data.tags[:2] == ["mine", "gguf"]
    assert data.base_model == "moonshotai/Kimi"
    whole = written()
    commented = whole.replace("license: mit", "license: mit # checked by me")
    assert "# checked by me" in written(commented)  # nothing is missing, so nothing is rewritten


def test_an_edit_of_the_generated_part_is_kept_unless_forced():
    edited = written().replace("## Which file", "## My files")
    with pytest.raises(OutputError, match="has been edited"):
        written(edited)
    assert "## My files" not in written(edited, force=True)


def test_a_card_of_other_making_is_kept_even_when_forced():
    with pytest.raises(OutputError, match="not made by quantkit"):
        written("# Mine\n")
    forced = written("# Mine\n", force=True)
    assert "# Mine\n" in forced
    assert "# Kimi GGUF" in forced


@pytest.mark.parametrize("front", ["a: [", "- a", "just words"])
def test_a_front_matter_that_is_none_is_not_replaced(front):
    with pytest.raises(OutputError, match="front matter"):
        written(f"---\n{front}\n---\n", force=True)


def test_a_recipe_cannot_end_the_generated_part():
    evil = "tensor: '<!-- quantkit: generated up to here -->'\n"
    first = written(quants=(replace(quant(), recipe_text=evil),))
    second = written(first + "\nMine.\n", quants=(replace(quant(), recipe_text=evil),))
    assert second == first + "\nMine.\n"
