"""Activations are rounded to the bit as ggml's CPU backend rounds them on x86."""

from __future__ import annotations

import ctypes as ct
import platform

import numpy as np
import pytest
import torch

from quantkit.forward.rounding import rounded
from quantkit.quantize.codec import encodable
from quantkit.types import GgmlType
from tests.quantize.ggml import library_path

Q8_0, Q8_1, Q8_K = 8, 9, 15  # ggml's numbers; the latter two are no types of a file

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="rounds as the vector code of x86"
)


class Traits(ct.Structure):
    _fields_ = (
        ("from_float", ct.CFUNCTYPE(None, ct.c_void_p, ct.c_void_p, ct.c_int64)),
        ("vec_dot", ct.c_void_p),
        ("vec_dot_type", ct.c_int),
        ("nrows", ct.c_int64),
    )


@pytest.fixture(scope="module")
def traits():
    """traits(type) -> what the CPU backend does with a type."""
    base = library_path()
    if base is None:
        pytest.skip("needs libggml-python")
    lib = ct.CDLL(str(base.with_name("libggml-cpu.so")))
    lib.ggml_get_type_traits_cpu.restype = ct.POINTER(Traits)
    lib.ggml_get_type_traits_cpu.argtypes = [ct.c_int]
    lib.ggml_cpu_init()
    return lambda type_: lib.ggml_get_type_traits_cpu(int(type_)).contents


def ggml_rounded(traits, x: np.ndarray, type_: int) -> np.ndarray:
    """x f32[n] through blocks of the type and back."""
    block, n_bytes, begin = {Q8_0: (32, 34, 2), Q8_K: (256, 292, 4)}[type_]
    out = np.zeros((x.size // block, n_bytes), np.uint8)
    traits(type_).from_float(x.ctypes.data, out.ctypes.data, x.size)
    d = out[:, :begin].copy().view(np.float16 if begin == 2 else np.float32).astype(np.float32)
    with np.errstate(invalid="ignore"):
        values: np.ndarray = d * out[:, begin : begin + block].view(np.int8)
    return values.ravel()


def inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(1 << 16, np.float32)
    ties = rng.integers(-254, 255, (1 << 9, 32)).astype(np.float32) / 2
    ties[:, 0] = 127  # so that a code is the number itself, and halves are ties
    outliers = x.copy()
    outliers[::500] *= 1000
    equal = np.where(x > 0, np.float32(3), np.float32(-3))
    return {
        "random": x,
        "ties": ties.ravel(),
        "outliers": outliers,
        "equal magnitudes": equal,
        "zeros": np.zeros(512, np.float32),
        "some blocks of zeros": np.where(np.arange(1 << 16) // 256 % 2 == 1, x, 0),
        "subnormal": x * np.float32(1e-40),
        "scale overflows": x * np.float32(1e-37),
        "large": x * np.float32(1e5),
        "d is infinite in f16": x * np.float32(1e37),
    }


@pytest.mark.parametrize(
    ("weights", "blocks"), [(GgmlType.Q8_0, Q8_0), (GgmlType.Q4_K, Q8_K)], ids=["Q8_0", "Q8_K"]
)
@pytest.mark.parametrize("kind", inputs())
def test_blocks_hold_the_values_of_ggml(weights, blocks, kind, traits):
    x = inputs()[kind]
    ours = rounded(torch.from_numpy(x).view(2, -1), weights).ravel().numpy()
    np.testing.assert_array_equal(ours, ggml_rounded(traits, x, blocks))


@pytest.mark.parametrize("weights", sorted(encodable()), ids=lambda t: t.name)
def test_every_weight_type_meets_activations_of_ggmls_choice(weights, traits):
    x = torch.from_numpy(inputs()["random"])
    meets = traits(weights).vec_dot_type
    meets = Q8_0 if meets == Q8_1 else meets
    match meets:
        case GgmlType.F32:
            expected = x.numpy()
        case GgmlType.F16:
            expected = x.numpy().astype(np.float16).astype(np.float32)
        case GgmlType.BF16:
            expected = x.bfloat16().float().numpy()
        case _:
            expected = ggml_rounded(traits, x.numpy(), meets)
    np.testing.assert_array_equal(rounded(x, weights).numpy(), expected)
