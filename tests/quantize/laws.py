"""What holds for every codec, as functions that a family's tests call for each of its types."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from quantkit.quantize import decode, encode
from quantkit.types import GgmlType
from tests.quantize.ggml import ggml_decode, ggml_encode, ggml_valid
from tests.quantize.naive.levels import decoded_levels

F32 = npt.NDArray[np.float32]
COLS = 1024


def gauss(rows: int, cols: int = COLS, seed: int = 1) -> F32:
    return (np.random.default_rng(seed).standard_normal((rows, cols)) * 0.02).astype(np.float32)


def student(rows: int, cols: int = COLS, seed: int = 2) -> F32:
    return (np.random.default_rng(seed).standard_t(4, (rows, cols)) * 0.02).astype(np.float32)


def lattice(rows: int, cols: int = COLS, seed: int = 3) -> F32:
    """Codes -7..7 (all blocks reach 7) times a bf16 scale per 32 weights, as K2.5 is published."""
    rng = np.random.default_rng(seed)
    codes = np.clip(np.rint(rng.standard_normal((rows, cols // 32, 32)) * 3), -7, 7)
    codes[:, :, 0] = rng.choice([-7, 7], (rows, cols // 32))
    scale = np.exp(rng.standard_normal((rows, cols // 32, 1))).astype(np.float32) * 0.01
    scale = (scale.view(np.uint32) & 0xFFFF0000).view(np.float32)
    return (codes.astype(np.float32) * scale).reshape(rows, cols)


def positive(rows: int, cols: int = COLS, seed: int = 4) -> F32:
    return (1 + 0.1 * np.random.default_rng(seed).standard_normal((rows, cols))).astype(np.float32)


def log_normal(cols: int = COLS, seed: int = 5) -> F32:
    return np.exp(np.random.default_rng(seed).standard_normal(cols)).astype(np.float32)


DATA = {"gauss": gauss, "student": student, "lattice": lattice}


def error(x: F32, decoded: F32, importance: F32 | None) -> float:
    """sum w (x - x^)^2 / sum w x^2, w = 1 without importance."""
    w = np.ones(x.shape[1]) if importance is None else importance.astype(np.float64)
    return float(
        (w * (x.astype(np.float64) - decoded) ** 2).sum() / (w * x.astype(float) ** 2).sum()
    )


def error_ratio(type_: GgmlType, x: F32, importance: F32 | None, effort: str = "default") -> float:
    """Our error over ggml's; 1 where both are exact."""
    theirs = error(x, ggml_decode(ggml_encode(x, type_, importance), type_), importance)
    ours = error(x, decode(encode(x, type_.name, importance, effort), type_.name), importance)
    return 1.0 if max(ours, theirs) < 1e-13 else ours / max(theirs, 1e-13)


def check_decodes_like_ggml(type_: GgmlType) -> None:
    """Random blocks, and blocks that were encoded, decode to ggml's floats, bit for bit."""
    rng = np.random.default_rng(6)
    blocks = rng.integers(0, 256, (200, type_.row_bytes(COLS)), np.uint8)
    with np.errstate(all="ignore"):
        ours, theirs = decode(blocks, type_.name), ggml_decode(blocks, type_)
    same = ours.view(np.uint32) == theirs.view(np.uint32)
    assert (same | np.isnan(ours) & np.isnan(theirs)).all()
    for importance in (None, log_normal()):
        encoded = encode(gauss(8), type_.name, importance)
        ours, theirs = decode(encoded, type_.name), ggml_decode(encoded, type_)
        assert np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))


def check_rows_are_independent(type_: GgmlType) -> None:
    """The bytes are the same for tiles of 1, 7 and 64 rows and for two threads."""
    x, q = student(64), log_normal()
    whole = encode(x, type_.name, q)
    for height in (1, 7):
        tiles = [encode(x[i : i + height], type_.name, q) for i in range(0, 64, height)]
        assert np.array_equal(np.concatenate(tiles), whole)
    with ThreadPoolExecutor(2) as pool:
        halves = pool.map(lambda part: encode(part, type_.name, q), (x[:32], x[32:]))
        assert np.array_equal(np.concatenate(list(halves)), whole)
    assert np.array_equal(encode(np.asfortranarray(x), type_.name, q), whole)


def hostile_rows(cols: int = COLS) -> dict[str, F32]:
    """Finite weights that break careless scales."""
    rng = np.random.default_rng(7)
    usual = gauss(1, cols)[0]
    at = np.arange(cols)
    rows = {
        "zero": np.zeros(cols),
        "negative zero": -np.zeros(cols),
        "outlier": np.where(at == 5, 1e30, usual),
        "both ends of f32": np.where(at == 5, 3.4e38, np.where(at == 9, -3.4e38, usual)),
        "largest": np.full(cols, np.finfo(np.float32).max),
        "denormal": usual * 1e-38,
        "smallest": np.full(cols, 1e-45),
        "beyond f16": usual * 1e8,
        "below f16": usual * 1e-6,
        "constant": np.full(cols, -0.02),
        "one": np.where(at == 7, 1.0, 0.0),
        "ties": np.round(usual * 100) / 2 + 0.25,
        "alternating": np.where(at % 2, 0.5, -0.5),
        "every magnitude": usual * np.exp2(rng.integers(-120, 120, cols)),
    }
    return {name: row.astype(np.float32) for name, row in rows.items()}


def hostile_importance(cols: int = COLS) -> dict[str, F32 | None]:
    rng = np.random.default_rng(8)
    cases: dict[str, npt.NDArray[np.floating]] = {
        "zero": np.zeros(cols),
        "zero blocks": np.where(np.arange(cols) % 512 < 256, 0.0, 1.0),
        "few columns": (rng.random(cols) < 0.02).astype(float),
        "every magnitude": np.exp(rng.uniform(-80, 80, cols)),
        "denormal": np.full(cols, 1e-44),
        "huge": np.full(cols, 3e38),
    }
    return {"none": None, **{name: q.astype(np.float32) for name, q in cases.items()}}


def check_hostile_rows_stay_finite(type_: GgmlType, effort: str) -> None:
    """Whatever finite weights come in: valid blocks, finite floats, and zeros stay zeros."""
    rows = hostile_rows()
    x = np.stack(list(rows.values()))
    for name, importance in hostile_importance().items():
        for weighting in ("importance", "ggml"):
            blocks = encode(x, type_.name, importance, effort, weighting)
            decoded = decode(blocks, type_.name)
            bad = [
                row
                for row, values in zip(rows, decoded, strict=True)
                if not np.isfinite(values).all()
            ]
            assert not bad, (name, weighting)
            assert ggml_valid(blocks, type_), (name, weighting)
            assert not decoded[:2].any(), (name, weighting)


def check_codes_are_nearest(type_: GgmlType, effort: str) -> None:
    """No weight has a nearer level among those that its block's stored scales offer."""
    x = np.concatenate([gauss(4), student(4), positive(2)])
    blocks = encode(x, type_.name, log_normal(), effort)
    levels = decoded_levels(blocks, type_).astype(np.float64)
    reached = np.abs(decode(blocks, type_.name) - x.astype(np.float64))
    possible = np.abs(levels - x).min(axis=0)
    assert (reached <= possible + 1e-5 * np.abs(x) + 1e-9).all()


def check_effort_pays(type_: GgmlType) -> None:
    """More effort, no more error."""
    x, q = gauss(32), log_normal()
    fast, default, best = (
        error(x, decode(encode(x, type_.name, q, effort), type_.name), q)
        for effort in ("fast", "default", "best")
    )
    assert best <= default * 1.0005
    assert default <= fast * 1.0005


def check_weighting_is_switchable(type_: GgmlType, c: float, span: int) -> None:
    """`weighting="ggml"` wins under llama.cpp's weights, "importance" under the imatrix alone."""
    x, q = student(32), log_normal()
    mean = np.square(x.reshape(len(x), -1, span), dtype=np.float64).mean(axis=2)
    theirs = q * np.sqrt(c * np.repeat(mean, span, axis=1) + x.astype(np.float64) ** 2)
    plain = np.broadcast_to(q, x.shape).astype(np.float64)

    def loss(weighting: str, w: npt.NDArray[np.float64]) -> float:
        decoded = decode(encode(x, type_.name, q, "default", weighting), type_.name)
        return float((w * (x.astype(np.float64) - decoded) ** 2).sum())

    assert loss("ggml", theirs) < loss("importance", theirs)
    assert loss("importance", plain) < loss("ggml", plain)
