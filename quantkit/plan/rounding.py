"""Which weights of a plan are rounded with feedback, and what that will take."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from quantkit.quantize.layout import supports
from quantkit.types import GgmlType, Plan, PlannedTensor, TensorSpec

# Heads of MLA have inputs of their own behind the whole of attention, which would have to be
# computed once more. From here on there is too little to gain.
_HEADS_BELOW_BPW = 6.0
_HEADS = ("attention.k_b", "attention.v_b")
_WIDEST = 8192  # columns of a matrix beyond these are taken in parts, see propagate.layer


def rounded_by_inputs(plan: Plan) -> dict[str, GgmlType]:
    """Tensors of a plan that are rounded by what their inputs are, and their types."""
    found = {t.spec.name: t.type for t in plan.tensors if _is_rounded(t)}
    if any(type_.block_size > 1 for type_ in found.values()):
        return found
    return {}  # routers alone have nothing to follow


def _is_rounded(tensor: PlannedTensor) -> bool:
    spec = tensor.spec
    if spec.role == "router" and len(spec.shape) > 1:
        return True
    if not supports(tensor.type) or tensor.repack or spec.keep is not None or len(spec.shape) == 1:
        return False
    if spec.role in _HEADS:
        return tensor.type.bpw < _HEADS_BELOW_BPW
    return spec.layer is not None or spec.role == "output"


@dataclass(frozen=True, slots=True)
class Work:
    """What rounding with feedback takes beyond an encoder's search.

    `n_weights` are rounded, with inputs `widest` columns wide at most. `token_flops` is for running
    two models on a token, `round_flops` for feedback and later passes, in multiplications and
    additions. `n_bytes` is the memory for moments and factors, `n_token_bytes` the disk or memory
    for what two runs keep of a token.
    """

    n_weights: int
    widest: int
    token_flops: float
    round_flops: float
    n_bytes: int
    n_token_bytes: int


def work(plan: Plan, n_experts_used: int) -> Work:
    """Estimate for a plan; `n_experts_used` routed experts see a token.

    A first pass is half a product of each row with its Gram matrix, coordinate descent a whole
    one, a refit another; factors are a third of n^3 each, in two precisions of damping or more.
    """
    names = rounded_by_inputs(plan)
    rounded = [t for t in plan.tensors if t.spec.name in names]
    token = 0.0
    for tensor in plan.tensors:
        spec = tensor.spec
        if len(spec.shape) > 1 and spec.layer is not None:
            n_experts = spec.shape[0] if spec.role.startswith("routed_expert") else 1
            token += 2 * spec.n_weights / n_experts * min(n_experts, max(1, n_experts_used))
    flops = sum(2 * t.spec.n_weights * 2.5 * t.spec.grid[1] for t in rounded)
    flops += sum(6 * n_cols**3 / 3 * 2 for n_cols in _factors(rounded))
    widest = max((min(t.spec.grid[1], _WIDEST) for t in rounded), default=0)
    hidden = max(
        (t.spec.shape[-2] for t in rounded if t.spec.role == "attention.output"), default=0
    )
    writes = max((t.spec.grid[1] for t in rounded if _writes(t.spec)), default=0)
    return Work(
        sum(t.spec.n_weights for t in rounded),
        widest,
        2 * token,
        flops,
        # Two folds of Gram, drift and residual moments; systems, factors and solutions in f64.
        4 * 2 * (2 * widest**2 + hidden * widest) + 8 * 7 * widest**2,
        2 * 4 * (2 * hidden + writes),
    )


@dataclass(frozen=True, slots=True)
class Forecast:
    """What it takes on this machine, without a GPU."""

    work: Work
    n_tokens: int
    seconds: float


# Weights a second and thread that searches and both passes get through, beside the products: from
# 0.7e6 of IQ1_M to 3e6 of the k-quants (benchmarks/feedback.py, two cores of an EPYC).
_SEARCHED = 1.2e6


def forecast(plan: Plan, n_tokens: int, n_threads: int) -> Forecast:
    """Time from the speed of a product of matrices, measured now; good to a factor of two."""
    used = plan.kvs.get(f"{plan.arch}.expert_used_count")
    todo = work(plan, int(used.value) if used else 0)
    flops = todo.token_flops * n_tokens + todo.round_flops
    seconds = flops / _flops_per_second() + todo.n_weights / (_SEARCHED * n_threads)
    return Forecast(todo, n_tokens, seconds)


def _flops_per_second() -> float:
    a = np.ones((1024, 1024), np.float32)
    n, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < 0.2:
        a @ a
        n += 1
    return n * 2 * 1024**3 / (time.perf_counter() - begun)


def _writes(spec: TensorSpec) -> bool:
    return spec.role in {"attention.output", "dense_ffn.down"}


def _factors(tensors: list[PlannedTensor]) -> list[int]:
    """Widths of all Gram matrices that have to be factored."""
    shared: set[tuple[int | None, int]] = set()
    own = []
    for tensor in tensors:
        spec = tensor.spec
        if spec.role == "routed_expert.down" or spec.role in _HEADS:
            own += [spec.shape[-1]] * spec.shape[0]
        else:
            shared.add((spec.layer, spec.shape[-1]))
    return own + [n for _, n in shared]
