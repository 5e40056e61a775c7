"""Which of llama.cpp's splitters a tokenizer.json asks for.

llama.cpp has its splitters built in and picks one by `tokenizer.ggml.pre`. A tokenizer.json spells
its splitting out, so it is looked up by that spelling: the same steps in the same order, or
nothing. The reference converter tells tokenizers apart by a hash of the ids of a test text, which
also separates vocabularies that split alike; here such vocabularies share one name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from quantkit.errors import UnsupportedError

_FILE = "tokenizer.json"

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
_LOWER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_NOT_HAN = r"&&[^\p{Han}]"


def _cased_words(suffix: str, without: str = "") -> str:
    """Words that end where capitals follow small letters, as in Hello|World."""
    upper, lower = _UPPER + without, _LOWER + without
    return (
        rf"[^\r\n\p{{L}}\p{{N}}]?[{upper}]*[{lower}]+{suffix}"
        rf"|[^\r\n\p{{L}}\p{{N}}]?[{upper}]+[{lower}]*{suffix}"
    )


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"  # what the Digits step with individual_digits does
_LLAMA3 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
)
QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_TAIL}"
)
_TEKKEN = rf"{_cased_words('')}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
_O200K = (
    rf"{_cased_words(_CONTRACTION + '?')}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
)
KIMI = (
    rf"[\p{{Han}}]+|{_cased_words(_CONTRACTION + '?', _NOT_HAN)}|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
)
_DEEPSEEK_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_LETTERS = (
    r"\s?[A-Za-z"
    "\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5"
    "\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3"
    "\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115"
    "\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149"
    "\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06"
    "\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
    "]+"
)
_DEEPSEEK_PUNCTUATION = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_DEEPSEEK3_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK3_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + _TAIL
)

# Splitting steps -> `tokenizer.ggml.pre`.
_NAMES: dict[tuple[str, ...], str] = {
    (_GPT2,): "gpt-2",
    (_DIGIT, _GPT2): "smollm",
    (_LLAMA3,): "llama-bpe",
    (QWEN2,): "qwen2",
    (_QWEN35,): "qwen35",
    (_TEKKEN,): "tekken",
    (_O200K,): "gpt-4o",
    (KIMI,): "kimi-k2",
    (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_HAN, _DIGIT): "deepseek-coder",
    (
        r"[\r\n]",
        _DEEPSEEK_LETTERS,
        _DEEPSEEK_PUNCTUATION,
        r"\s+$",
        _DEEPSEEK_HAN,
        _DIGIT,
    ): "deepseek-llm",
    (r"\p{N}{1,3}", _DEEPSEEK3_KANA, _DEEPSEEK3_WORDS): "deepseek-v3",
}

# A whole word that is a token stays one, merges or not (`ignore_merges`): llama.cpp ties that to
# the name, and only for this regex has it a name without.
_WITHOUT_IGNORE_MERGES = {"llama-bpe": "smaug-bpe"}


def recognise(raw: Mapping[str, Any], *, ignore_merges: bool) -> str:
    """`tokenizer.ggml.pre` for the normalizer and pre_tokenizer of a byte-level tokenizer.json.

    NFC is let through although llama.cpp does not normalise: composed text gives the same ids.
    Anything else that llama.cpp has no splitter for is refused, never replaced by a similar one.
    """
    if unknown := [step for step in _flat(raw.get("normalizer")) if step.get("type") != "NFC"]:
        raise UnsupportedError(
            f"llama.cpp cannot normalise text by {json.dumps(unknown)[:400]}",
            where=_FILE,
            hint="Byte-level BPE tokenizers are supported without normalizer or with NFC.",
        )
    steps = tuple(_steps(raw.get("pre_tokenizer")))
    name = _NAMES.get(steps)
    if name is None:
        shown = json.dumps(raw.get("pre_tokenizer"), ensure_ascii=False)[:2000]
        raise UnsupportedError(
            f"unknown pre-tokenizer {shown}",
            where=_FILE,
            hint="If llama.cpp has a splitter for it, add the steps and its name to "
            "quantkit/arch/tokenizer/pretokenizers.py. "
            f"Known: {', '.join(sorted(_NAMES.values()))}.",
        )
    return name if ignore_merges else _WITHOUT_IGNORE_MERGES.get(name, name)


def _flat(step: Any) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer or pre_tokenizer, nested sequences unrolled."""
    todo = [] if step is None else [step]
    while todo:
        each = todo.pop()
        each = each if isinstance(each, Mapping) else {"type": repr(each)}
        inner = each.get("normalizers", each.get("pretokenizers"))
        if each.get("type") == "Sequence" and isinstance(inner, list):
            todo += reversed(inner)
        else:
            yield each


def _steps(pre_tokenizer: Any) -> Iterator[str]:
    """Each splitting step as the regex whose matches it isolates; a step that is none as JSON."""
    for step in _flat(pre_tokenizer):
        kind = step.get("type")
        pattern = step.get("pattern")
        if kind == "ByteLevel" and not step.get("add_prefix_space", True):
            if step.get("use_regex", True):
                yield _GPT2
        elif kind == "Digits" and step.get("individual_digits"):
            yield _DIGIT
        elif (
            kind == "Split"
            and isinstance(pattern, Mapping)
            and "Regex" in pattern
            and (
                # Both keep every match: as a piece of its own, or as what is left between removals.
                (step.get("behavior"), bool(step.get("invert")))
                in {("Isolated", False), ("Removed", True)}
            )
        ):
            yield str(pattern["Regex"]).replace("\r", r"\r").replace("\n", r"\n")
        else:
            yield json.dumps(step)
