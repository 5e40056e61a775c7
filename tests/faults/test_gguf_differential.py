"""The GGUF reader against ggml's own: what it accepts, ggml accepts and understands alike.

ggml runs in another process, for some of these files crash it. Where ggml accepts and the reader
does not, the reason must be one of STRICTER; there is no difference in the other direction.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from quantkit.container.kv import CODES
from quantkit.container.layout import padded
from quantkit.container.reader import GgufFile, read_gguf
from quantkit.errors import GgufError
from quantkit.types import GgmlType, KvType
from tests.builders.gguf import ARRAY, STRING, array, gguf_bytes, info, kv, text
from tests.container.hostile import HOSTILE, aligned_to
from tests.faults.ggml_child import CRASHED, REFUSED, GgmlChild

# Part of quantkit's message -> why ggml's leniency is not shared.
STRICTER = {
    "its data ends at": "ggml looks at the data's extent only when it loads them",
    "behind the last": "likewise; bytes that belong to nothing hide something",
    "not UTF-8": "ggml takes text for bytes",
    "NUL": "names end there for some readers and go on for others",
    "empty name": "nobody can ask for a tensor without a name",
    "no truth value": "ggml takes any byte but 0 for true",
    "a name of": "keys beyond 64 KiB",
    "cannot be stored": "empty tensors, and products that wrap",
    "more than a file can have": "sizes that wrap",
    "0 dimensions": "a scalar, which nothing writes",
    "unknown tensor type": "types of activations, which no file holds",
    "cannot be in": "arrays beyond any vocabulary",
    "than any model has": "more tensors or KVs than memory has room for",
    "power of two up to": "an alignment that no page has",
    "overlaps": "behind sizes that wrapped",
    "leaves a gap": "likewise",
}

TYPES = [GgmlType.F32, GgmlType.F16, GgmlType.I8, GgmlType.Q4_0, GgmlType.Q8_0, GgmlType.F64]
EXTREME = [0, 1, 2, 13, 31, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**61, 2**63 - 1, 2**63, 2**64 - 1]

names = st.text("abc._", min_size=1, max_size=8)
scalars = st.sampled_from([t for t in KvType if t in CODES])


@st.composite
def values(draw) -> tuple[int, bytes]:
    """A type and the bytes of a value of it."""
    kind = draw(st.sampled_from(["scalar", "text", "array", "texts"]))
    if kind == "text":
        return STRING, text(draw(st.text(max_size=6)))
    if kind == "texts":
        items = draw(st.lists(st.text(max_size=4), max_size=3))
        return ARRAY, array(STRING, len(items), b"".join(map(text, items)))
    type_ = draw(scalars)
    n = 1 if kind == "scalar" else draw(st.integers(0, 5))
    size = struct.calcsize("<" + CODES[type_])
    most = 1 if type_ is KvType.BOOL else 255
    raw = bytes(draw(st.lists(st.integers(0, most), min_size=n * size, max_size=n * size)))
    return (int(type_), raw) if kind == "scalar" else (ARRAY, array(int(type_), n, raw))


@st.composite
def sound_files(draw) -> tuple[bytes, int]:
    """A file that ggml's own writer could have made, and the length of its header."""
    kvs = [kv(k, *draw(values())) for k in draw(st.lists(names, max_size=4, unique=True))]
    alignment = draw(st.sampled_from([32, 32, 1, 8, 64, 4096]))
    if alignment != 32 or draw(st.booleans()):
        kvs.insert(draw(st.integers(0, len(kvs))), aligned_to(alignment))
    infos, data = [], b""
    for name in draw(st.lists(names, max_size=3, unique=True)):
        type_ = draw(st.sampled_from(TYPES))
        ne = [type_.block_size * draw(st.integers(1, 3))]
        ne += draw(st.lists(st.integers(1, 3), max_size=3))
        infos.append(info(name, ne, type_, len(data)))
        n_rows = 1
        for n in ne[1:]:
            n_rows *= n
        n_bytes = type_.row_bytes(ne[0]) * n_rows
        data += bytes(padded(n_bytes, alignment))
    head = gguf_bytes(kvs, infos, alignment=alignment)
    return head + data, len(head)


@st.composite
def broken_files(draw) -> bytes:
    """One to three numbers of a sound file's header replaced, bytes cut out or put in, or a cut."""
    content, n_header = draw(sound_files())
    raw = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        if not raw:
            break
        at = draw(st.integers(0, min(n_header, len(raw)) - 1))
        how = draw(st.sampled_from(["byte", "number", "nudge", "splice", "cut"]))
        if how == "byte":
            raw[at] = draw(st.integers(0, 255))
        elif how == "splice":
            raw[at : at + draw(st.integers(0, 9))] = draw(st.binary(max_size=9))
        elif how == "cut":
            del raw[max(at, 1) :]
        else:
            width = draw(st.sampled_from([4, 8]))
            old = int.from_bytes(raw[at : at + width], "little")
            new = (
                draw(st.sampled_from(EXTREME))
                if how == "number"
                else old + draw(st.integers(-2, 2))
            )
            raw[at : at + width] = (new % 2 ** (8 * width)).to_bytes(width, "little")
    return bytes(raw)


@pytest.fixture(scope="module")
def ggml():
    child = GgmlChild()
    yield child
    child.close()


def as_ggml_says(file: GgufFile) -> tuple[int, list, list]:
    kvs = [[k.encode().hex(), int(kv.type), _item(kv)] for k, kv in file.kvs.items()]
    tensors = [
        [t.name.encode().hex(), int(t.type), [*t.shape[::-1], 1, 1, 1][:4], t.begin, t.n_bytes]
        for t in file.tensors
    ]
    return file.alignment, kvs, tensors


def _item(kv) -> int | None:
    return None if kv.item is None else int(kv.item)


def assert_same_verdict(ggml: GgmlChild, path: Path, content: bytes) -> None:
    path.write_bytes(content)
    theirs = ggml.parse(content)
    try:
        ours = read_gguf(path)
    except GgufError as error:
        lenient = theirs not in (REFUSED, CRASHED)
        assert not lenient or any(part in error.message for part in STRICTER), error.message
    else:
        assert theirs not in (REFUSED, CRASHED)
        assert json.loads(json.dumps(theirs)) == json.loads(json.dumps(as_ggml_says(ours)))


relaxed = settings(deadline=None, suppress_health_check=list(HealthCheck))


@settings(relaxed, max_examples=400)
@given(case=sound_files())
def test_what_a_sound_tool_would_write_is_read_the_same(ggml, tmp_path, case):
    path = tmp_path / "file.gguf"
    path.write_bytes(case[0])
    theirs = ggml.parse(case[0])
    assert theirs not in (REFUSED, CRASHED)
    assert json.loads(json.dumps(as_ggml_says(read_gguf(path)))) == list(theirs)


@settings(relaxed, max_examples=2000)
@given(content=broken_files())
def test_a_damaged_file_is_judged_the_same_or_more_strictly(ggml, tmp_path, content):
    assert_same_verdict(ggml, tmp_path / "file.gguf", content)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # some 15 minutes of a core
@settings(relaxed, max_examples=100_000)
@given(content=broken_files())
def test_very_many_damaged_files_are(ggml, tmp_path, content):
    assert_same_verdict(ggml, tmp_path / "file.gguf", content)


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_that_breaks_one_rule_is_too(ggml, tmp_path, case):
    assert_same_verdict(ggml, tmp_path / "file.gguf", HOSTILE[case][0])
