"""The student's weights: what was put decodes, the rest is what becomes of the teacher's."""

from __future__ import annotations

import numpy as np
import pytest

from quantkit.propagate.student import StudentWeights
from quantkit.quantize.codec import How, codec_of
from quantkit.types import GgmlType
from tests.forward.support import ArrayWeights

RNG = np.random.default_rng(0)
ARRAYS = {
    "stack": RNG.standard_normal((3, 4, 64), np.float32),
    "matrix": RNG.standard_normal((5, 64), np.float32),
    "norm": RNG.standard_normal((64,), np.float32),
}


@pytest.fixture
def calls() -> list[tuple[str, int, int]]:
    return []


@pytest.fixture
def student(calls) -> StudentWeights:
    """What is not put is halved, and every call of that noted as (name, rows, matrix)."""

    def halved(name: str, rows: np.ndarray, matrix: int) -> np.ndarray:
        calls.append((name, len(rows), matrix))
        return rows / 2

    return StudentWeights(ArrayWeights({}, ARRAYS), halved)


def blocks_of(x: np.ndarray) -> np.ndarray:
    return codec_of(GgmlType.Q4_0).encode(x, None, How())


def test_what_is_put_decodes_and_the_rest_goes_through_nearest(student, calls):
    blocks = blocks_of(ARRAYS["stack"][1])
    student.put("stack", 1, GgmlType.Q4_0, blocks)
    rows = student.read("stack", 0, 12)
    np.testing.assert_array_equal(rows[4:8], codec_of(GgmlType.Q4_0).decode(blocks))
    np.testing.assert_array_equal(rows[:4], ARRAYS["stack"][0] / 2)
    np.testing.assert_array_equal(rows[8:], ARRAYS["stack"][2] / 2)
    assert calls == [("stack", 4, 0), ("stack", 4, 2)]


@pytest.mark.parametrize(("begin", "end"), [(0, 1), (3, 5), (4, 8), (5, 7), (2, 11), (6, 6)])
def test_any_rows_can_be_read(student, begin, end):
    for matrix in range(3):
        student.put("stack", matrix, GgmlType.Q4_0, blocks_of(ARRAYS["stack"][matrix]))
    whole = np.concatenate(
        [codec_of(GgmlType.Q4_0).decode(blocks_of(part)) for part in ARRAYS["stack"]]
    )
    found = student.read("stack", begin, end) if end > begin else np.empty((0, 64))
    np.testing.assert_array_equal(found, whole[begin:end])


def test_a_vector_is_one_row(student):
    np.testing.assert_array_equal(student.read("norm", 0, 1), ARRAYS["norm"][None] / 2)


@pytest.mark.parametrize("how", ["forget", "clear"])
def test_what_is_forgotten_is_the_teachers_again(student, how):
    student.put("stack", 2, GgmlType.Q4_0, blocks_of(ARRAYS["stack"][2]))
    student.put("matrix", 0, GgmlType.Q4_0, blocks_of(ARRAYS["matrix"]))
    if how == "forget":
        student.forget("stack", 2)
        student.forget("stack", 0)  # was never put
    else:
        student.clear()
        np.testing.assert_array_equal(student.read("matrix", 0, 5), ARRAYS["matrix"] / 2)
    np.testing.assert_array_equal(student.read("stack", 8, 12), ARRAYS["stack"][2] / 2)


def test_it_looks_like_the_teacher(student):
    assert "stack" in student
    assert "other" not in student
    assert student.shape("stack") == (3, 4, 64)
    assert student.type("stack") is GgmlType.F32
    assert student.kvs == {}
