"""Corpus files: what they may say, which documents they hold, and the order of those."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quantkit.errors import SourceError, UsageError
from quantkit.text.chat import ChatTemplate
from quantkit.text.corpus import load_corpus, shipped_corpora
from quantkit.text.documents import Document, Refused, documents
from tests.text.support import chat, corpus_file, jsonl

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DATASET = {"dataset": "someone/some-set", "revision": COMMIT, "split": "train"}
PLAIN = ChatTemplate(
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}",
    {"eos_token": "</s>"},
)


def texts(path: str, template: ChatTemplate | None = PLAIN, **options: Any) -> list[str]:
    return [document.text for document in documents(load_corpus(path), template, **options)]


@pytest.mark.parametrize("name", shipped_corpora())
def test_shipped_corpora_load_and_pin_what_they_use(name: str) -> None:
    corpus = load_corpus(name)
    assert corpus.name == name
    assert corpus.description
    assert all(stream.path is not None or stream.source.revision for stream in corpus.streams)


def test_the_built_in_corpus_is_sound_in_every_document() -> None:
    seen = Counter(document.source for document in documents(load_corpus("core"), PLAIN))
    assert seen.keys() == {stream.name for stream in load_corpus("core").streams}
    assert {"core/chat.jsonl", "core/prose.txt"} <= seen.keys()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "give either file or dataset"),
        ({"file": "a.txt", "dataset": "x/y"}, "give either file or dataset"),
        ({"file": "a.txt", "colour": "red"}, "unknown key sources.0.colour"),
        ({"file": "../a.txt"}, "not a path below"),
        ({"file": "b/../../a.txt"}, "not a path below"),
        ({"file": "/etc/passwd"}, "not a path below"),
        ({"file": "C:a.txt"}, "not a path below"),
        ({"file": "b\\a.txt"}, "not a path below"),
        ({"file": ""}, "not a path below"),
        ({"file": "**a.txt"}, r"\*\*a.txt"),
        ({"file": "missing.txt"}, "no file matches 'missing.txt'"),
        ({"file": "a.txt", "split": "train"}, "belong to a dataset"),
        ({"file": "a.txt", "weight": 0}, "weight"),
        ({"file": "a.txt", "weight": -1}, "weight"),
        ({"file": "a.txt", "weight": float("inf")}, "weight"),
        ({"file": "a.txt", "weight": float("nan")}, "weight"),
        ({"file": "a.txt", "kind": "csv"}, "kind"),
        ({"file": "a.txt", "columns": {"answer": "x"}}, "unknown key sources.0.columns.answer"),
        (DATASET | {"revision": "main"}, "revision"),
        (DATASET | {"revision": None}, "needs revision"),
        (DATASET | {"split": None}, "needs revision"),
        (DATASET | {"dataset": "../secrets"}, "dataset"),
        (DATASET | {"dataset": "a/b/c"}, "dataset"),
        (DATASET | {"kind": "jsonl"}, "of kind text or chat"),
        (DATASET | {"trust_remote_code": True}, "unknown key"),
    ],
)
def test_sources_that_cannot_be_meant_are_refused(
    tmp_path: Path, source: dict[str, Any], message: str
) -> None:
    path = corpus_file(tmp_path, [source], {"a.txt": "a"})
    with pytest.raises(UsageError, match=message) as caught:
        load_corpus(path)
    assert caught.value.where == path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "corpusfile"),
        ("name: x\nsources: []", "sources"),
        ("name: ../x\nsources: [{file: a.txt}]", "name"),
        ("name: x\nname: y\nsources: [{file: a.txt}]", "given twice"),
        ("name: &n x\ndescription: *n\nsources: [{file: a.txt}]", "aliases"),
        ("name: x\nextra: 1\nsources: [{file: a.txt}]", "unknown key extra"),
        ("name: x\nsources: [{file: a.txt}, {file: '*.txt'}]", "named by two sources"),
        ("name: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("name: x\nsources: [", "not valid YAML"),
    ],
)
def test_files_that_are_no_corpus_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.txt").write_text("a")
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        load_corpus(str(path))


@pytest.mark.parametrize("name", ["no-such", "../core", "core/chat", "quantkit/corpora/core", ""])
def test_an_unknown_name_is_told_the_shipped_ones(name: str) -> None:
    with pytest.raises(UsageError, match="no corpus is called") as caught:
        load_corpus(name)
    assert "core" in caught.value.hint


def test_a_text_file_is_one_document_without_its_last_line_end(tmp_path: Path) -> None:
    path = tmp_path / "[wiki]*.test.raw"
    path.write_bytes(b"\xef\xbb\xbf\n = One = \r\n\n <|im_end|> \xe5\x8c\x97\n\n")
    (document,) = documents(load_corpus(str(path)), None)
    assert document == Document(
        "\ufeff\n = One = \r\n\n <|im_end|> 北\n", "[wiki]*.test.raw", parse_special=False
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\n<<<>>>\nb\n", ["a\n", "b\n"]),
        ("<<<>>>\na\n<<<>>>\n<<<>>>\n\nb\n\nc\n\n<<<>>>", ["a\n", "b\n\nc\n"]),
        ("a <<<>>>\nb", ["a <<<>>>\nb"]),
        ("<<<>>> \nb", ["<<<>>> \nb"]),
        ("  a\n<<<>>>\n\tb", ["  a\n", "\tb\n"]),
    ],
)
def test_lines_of_the_mark_alone_cut_a_text_into_documents(
    tmp_path: Path, text: str, expected: list[str]
) -> None:
    (tmp_path / "a.txt").write_text(text)
    assert texts(str(tmp_path / "a.txt")) == expected


def test_jsonl_lines_are_texts_or_chats(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(jsonl({"text": "plain"}, chat("Hi", "Ho")) + "\n\n" + jsonl(chat("?")))
    given_ = list(documents(load_corpus(str(path)), PLAIN))
    assert given_ == [
        Document("plain", "a.jsonl", parse_special=False),
        Document("[user]Hi</s>[assistant]Ho</s>", "a.jsonl", parse_special=True),
        Document("[user]?</s>", "a.jsonl", parse_special=True),
    ]


def test_without_a_template_a_chat_is_its_contents(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(jsonl(chat("Hi", "Ho")))
    assert list(documents(load_corpus(str(path)), None)) == [
        Document("Hi\n\nHo\n", "a.jsonl", parse_special=False)
    ]


def test_a_source_says_what_special_tokens_mean_and_what_its_fields_are(tmp_path: Path) -> None:
    sources = [
        {"file": "a.txt", "parse_special": True},
        {"file": "b.jsonl", "parse_special": False, "columns": {"messages": "turns"}},
    ]
    line = {"turns": chat("Hi")["messages"], "text": 5}
    path = corpus_file(tmp_path, sources, {"a.txt": "A", "b.jsonl": jsonl(line)})
    found = {d.text: d.parse_special for d in documents(load_corpus(path), PLAIN)}
    assert found == {"A": True, "[user]Hi</s>": False}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not a line of JSON"),
        (b"\xff", "not a line of JSON"),
        (b"[" * 100_000, "not a line of JSON"),
        (b"[]", "expected an object, got list"),
        (b"{}", "has no text 'text' or a list 'messages'"),
        (b'{"text": 1}', "has no text"),
        (b'{"messages": "x"}', "has no text"),
        (b'{"messages": ["x"]}', "a message has no role"),
        (b'{"messages": [{"content": "x"}]}', "a message has no role"),
        (b'{"messages": [], "tools": {}}', "tools is not a list"),
        (b'{"text": "\\ud800"}', "half a surrogate"),
        (b'"' + b"x" * (17 << 20) + b'"', "a line of more than"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(SourceError, match=message) as caught:
        texts(str(path))
    assert "a.jsonl" in caught.value.where


@pytest.mark.parametrize(("kind", "line"), [("chat", {"text": "x"}), ("text", {"messages": []})])
def test_a_row_of_the_other_kind_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, line: dict[str, Any]
) -> None:
    fake_hub(monkeypatch, [line])
    path = corpus_file(tmp_path, [DATASET | {"kind": kind}], {})
    with pytest.raises(SourceError, match="row 0"):
        texts(path)


def test_a_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    with pytest.raises(SourceError, match="not UTF-8 at byte 2"):
        texts(str(tmp_path / "a.txt"))


def test_calls_are_given_as_objects_or_as_json_whichever_the_template_takes(
    tmp_path: Path,
) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}
    row = {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]}
    (tmp_path / "a.jsonl").write_text(jsonl(row))
    path = str(tmp_path / "a.jsonl")
    arguments = "messages[0].tool_calls[0].function.arguments"
    takes_objects = ChatTemplate("{{ messages[0].content }}{{ " + arguments + ".a[0] + 1 }}", {})
    takes_text = ChatTemplate("{{ 'args: ' + " + arguments + " }}", {})
    assert texts(path, takes_objects) == ["2"]
    assert texts(path, takes_text) == ['args: {"a": [1]}']


def test_chats_with_tools_use_the_template_for_tools(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(jsonl(chat("x"), chat("y", tools=[{"name": "f"}])))
    template = ChatTemplate("plain", {}, with_tools="{{ tools[0].name }}")
    assert texts(str(tmp_path / "a.jsonl"), template) == ["plain", "f"]


NO_SYSTEM = ChatTemplate(
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}ok", {}
)


def test_chats_that_the_template_refuses_are_left_out_and_counted(tmp_path: Path) -> None:
    system = {"messages": [{"role": "system", "content": "x"}]}
    (tmp_path / "a.jsonl").write_text(jsonl(system, chat("x"), system))
    refused = Refused()
    assert texts(str(tmp_path / "a.jsonl"), NO_SYSTEM, refused=refused) == ["ok"]
    assert refused.counts == {"a.jsonl": 2}
    assert "no system role" in refused.reason


def test_a_source_whose_chats_are_all_refused_is_an_error(tmp_path: Path) -> None:
    system = {"messages": [{"role": "system", "content": "x"}]}
    (tmp_path / "a.jsonl").write_text(jsonl(system, system))
    with pytest.raises(SourceError, match=r"refuses all 2 chats: .*no system role"):
        texts(str(tmp_path / "a.jsonl"), NO_SYSTEM)


def test_an_empty_source_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(SourceError, match="holds no document"):
        texts(str(tmp_path / "a.jsonl"))


def fake_hub(monkeypatch: pytest.MonkeyPatch, rows: list[Any] | Exception) -> list[Any]:
    """A `datasets` package that answers with these rows and keeps the calls."""
    calls: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        if isinstance(rows, Exception):
            raise rows
        return iter(rows)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_data_sets_of_the_hub_are_streamed_at_the_pinned_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [{"role": "user", "content": "Hi", "tool_calls": None, "name": None}]
    calls = fake_hub(monkeypatch, [{"conversation": messages}])
    columns = {"messages": "conversation"}
    source = DATASET | {"config": "en", "kind": "chat", "columns": columns}
    show = ChatTemplate("{{ messages | tojson }}", {})
    (text,) = texts(corpus_file(tmp_path, [source], {}), show)
    assert json.loads(text) == [{"role": "user", "content": "Hi"}]
    assert calls == [
        (
            ("someone/some-set",),
            {"name": "en", "split": "train", "revision": COMMIT, "streaming": True},
        )
    ]


def test_what_the_hub_says_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, ConnectionError("offline"))
    with pytest.raises(SourceError, match="offline") as caught:
        texts(corpus_file(tmp_path, [DATASET], {}))
    assert caught.value.where == "someone/some-set:train"


def test_without_the_datasets_package_only_hub_sources_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    path = corpus_file(tmp_path, [DATASET], {})
    with pytest.raises(UsageError, match="datasets") as caught:
        texts(path)
    assert "quantkit[datasets]" in caught.value.hint


def test_a_real_data_set_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "someone" / "some-set"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text(jsonl({"text": "one"}, {"text": "two"}))
    path = corpus_file(tmp_path, [DATASET], {})
    monkeypatch.chdir(tmp_path)
    assert texts(path) == ["one", "two"]


def files_of(sizes: dict[str, list[int]]) -> dict[str, str]:
    return {
        name: jsonl(*({"text": f"{name}{i}".ljust(n, "x")[:n]} for i, n in enumerate(lengths)))
        for name, lengths in sizes.items()
    }


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["a.jsonl", "b.jsonl", "c.jsonl"]),
        st.tuples(st.floats(0.1, 10), st.lists(st.integers(1, 50), min_size=1, max_size=30)),
        min_size=1,
    )
)
@example({"a.jsonl": (3.85, [18, 32, 49, 1]), "b.jsonl": (3.85, [1, 1, 22, 50, 25, 1])})
def test_mixing_gives_every_document_once_and_stays_near_the_weights(
    tmp_path_factory: pytest.TempPathFactory, given_: dict[str, tuple[float, list[int]]]
) -> None:
    folder = tmp_path_factory.mktemp("mix")
    sources = [{"file": name, "weight": weight} for name, (weight, _) in given_.items()]
    path = corpus_file(folder, sources, files_of({k: v[1] for k, v in given_.items()}))
    mixed = list(documents(load_corpus(path), None))
    assert mixed == list(documents(load_corpus(path), None))
    for name, (_, lengths) in given_.items():
        assert [len(d.text) for d in mixed if d.source == name] == lengths
    had = dict.fromkeys(given_, 0.0)
    left = {name: len(lengths) for name, (_, lengths) in given_.items()}
    for document in mixed:
        # Never ahead of any other that still has documents by more than its last document.
        mine = had[document.source]
        assert all(mine <= had[name] for name in given_ if left[name])
        had[document.source] += len(document.text) / given_[document.source][0]
        left[document.source] -= 1


def test_the_caller_may_measure_in_tokens(tmp_path: Path) -> None:
    files = {"a.jsonl": jsonl(*[{"text": "aa"}] * 3), "b.jsonl": jsonl(*[{"text": "b"}] * 3)}
    path = corpus_file(tmp_path, [{"file": name} for name in files], files)
    assert texts(path) == ["aa", "b", "b", "aa", "b", "aa"]
    assert texts(path, cost=lambda _: 1) == ["aa", "b"] * 3


def test_files_of_a_glob_are_sorted_and_share_its_weight_by_size(tmp_path: Path) -> None:
    files = {"s/b.txt": "b" * 30, "s/a.txt": "a" * 10, "s/c.md": "c"}
    path = corpus_file(tmp_path, [{"file": "s/*.txt", "weight": 2}], files)
    found = [(stream.name, stream.weight) for stream in load_corpus(path).streams]
    assert found == [("s/a.txt", 0.5), ("s/b.txt", 1.5)]


def test_the_digest_follows_files_and_settings(tmp_path: Path) -> None:
    def digest(text: str = "a", **settings: Any) -> str:
        return load_corpus(
            corpus_file(tmp_path, [{"file": "a.txt"} | settings], {"a.txt": text})
        ).digest()

    same = digest()
    assert same == digest()
    assert len({same, digest("b"), digest(weight=2), digest(parse_special=True)}) == 4
