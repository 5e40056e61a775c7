"""Attention and feed-forward of one layer, over the GGUF tensors of that layer.

`attention` and `ffn` speak of a block of whole sequences or of any tokens; who calls them adds the
residual. Formulas: DeepSeek-V2 (arXiv 2405.04434) 2.1 for MLA, here in its absorbed form as
llama.cpp runs it; DeepSeek-V3 (arXiv 2412.19437) 2.1.2 for routing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quantkit.forward.hyper import Hyper, Mla, Moe
from quantkit.forward.matrices import Matrices
from quantkit.forward.rotary import Angles, Turns, rotate

_SCORE_BYTES = 4 << 20  # attention scores at once: what a cache of a CPU about holds


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def attention(
    m: Matrices, hyper: Hyper, layer: int, x: torch.Tensor, lengths: Sequence[int], turns: Turns
) -> torch.Tensor:
    """Normed x f32[n_tok, hidden] of whole sequences in a row, to f32[n_tok, hidden]."""
    blk = f"blk.{layer}."
    if hyper.mla:
        mixed = _latent_attention(m, hyper, hyper.mla, blk, x, lengths, turns.full)
    else:
        mixed = _grouped_attention(m, hyper, layer, x, lengths, turns)
    name = f"{blk}attn_output.weight"
    _observe(m, (name,), mixed)
    return normed(m, f"{blk}post_attention_norm.weight", hyper, layer, m.apply(name, mixed))


def ffn_norm(m: Matrices, layer: int) -> str:
    """The norm before the feed-forward; GLM's and gpt-oss's is called after what precedes it."""
    name = f"blk.{layer}.ffn_norm.weight"
    return name if name in m else f"blk.{layer}.post_attention_norm.weight"


def normed(m: Matrices, name: str, hyper: Hyper, layer: int, y: torch.Tensor) -> torch.Tensor:
    """y as it is added to the hidden states: as it is, or where `name` is a norm of it, normed."""
    if name not in m or name == ffn_norm(m, layer):
        return y
    return rms_norm(y, m.vector(name), hyper.eps)


def _grouped_attention(
    m: Matrices, hyper: Hyper, layer: int, x: torch.Tensor, lengths: Sequence[int], turns: Turns
) -> torch.Tensor:
    blk, window = f"blk.{layer}.", hyper.window_of(layer)
    q, k, v = _queries_keys_values(m, hyper, blk, x)
    sinks = f"{blk}attn_sinks.weight"
    sink = m.vector(sinks) if sinks in m else None
    parts = []
    for span in _spans(lengths):
        angles = _until(turns.local if window else turns.full, span)
        q_s, k_s = rotate(q[span], angles), rotate(k[span], angles)
        mixed = _attend(m, hyper, q_s, k_s, v[span], window, sink)
        parts.append(mixed.transpose(0, 1).flatten(1))
    return torch.cat(parts)


def _queries_keys_values(
    m: Matrices, hyper: Hyper, blk: str, x: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values f32[n_tok, heads, dim], normed but not yet rotated."""
    counts = (hyper.n_heads, hyper.n_kv_heads, hyper.n_kv_heads)
    dims = (hyper.k_dim, hyper.k_dim, hyper.v_dim)
    fused = f"{blk}attn_qkv.weight"
    if fused in m:
        _observe(m, (fused,), x)
        widths = [n * dim for n, dim in zip(counts, dims, strict=True)]
        flat = list(m.apply(fused, x).split(widths, -1))
    else:
        names = tuple(f"{blk}attn_{part}.weight" for part in "qkv")
        _observe(m, names, x)
        flat = [m.apply(name, x) for name in names]
    for i, part in enumerate("qk"):
        name = f"{blk}attn_{part}_norm.weight"
        if name in m:  # of each head, or of all at once
            weight = m.vector(name)
            flat[i] = rms_norm(flat[i].unflatten(-1, (-1, len(weight))), weight, hyper.eps)
            flat[i] = flat[i].flatten(-2)
    return tuple(y.unflatten(-1, (n, dim)) for y, n, dim in zip(flat, counts, dims, strict=True))


def _latent_attention(
    m: Matrices,
    hyper: Hyper,
    mla: Mla,
    blk: str,
    x: torch.Tensor,
    lengths: Sequence[int],
    turns: Angles,
) -> torch.Tensor:
    q_a, kv_a = f"{blk}attn_q_a.weight", f"{blk}attn_kv_a_mqa.weight"
    q_b = f"{blk}attn_q_b.weight" if q_a in m else f"{blk}attn_q.weight"
    if q_a in m:
        _observe(m, (q_a, kv_a), x)
        low = rms_norm(m.apply(q_a, x), m.vector(f"{blk}attn_q_a_norm.weight"), mla.eps)
        _observe(m, (q_b,), low)
        q = m.apply(q_b, low)
    else:
        _observe(m, (q_b, kv_a), x)
        q = m.apply(q_b, x)
    q = q.unflatten(-1, (hyper.n_heads, mla.n_nope + mla.n_rope))
    latent, k_rope = m.apply(kv_a, x).split((mla.latent, mla.n_rope), -1)
    latent = rms_norm(latent, m.vector(f"{blk}attn_kv_a_norm.weight"), mla.eps)
    k_b, v_b = f"{blk}attn_k_b.weight", f"{blk}attn_v_b.weight"
    absorb, expand = m.heads(k_b), m.heads(v_b)
    parts = []
    for span in _spans(lengths):
        angles = _until(turns, span)
        nope, q_rope = q[span].split((mla.n_nope, mla.n_rope), -1)
        _observe(m, (k_b,), nope.flatten(1))
        absorbed = m.per_head(k_b, absorb, nope).transpose(0, 1)
        q_s = torch.cat((rotate(q_rope, angles), absorbed), -1)
        v_s = latent[span][:, None]
        k_s = torch.cat((rotate(k_rope[span][:, None], angles), v_s), -1)
        mixed = _attend(m, hyper, q_s, k_s, v_s).transpose(0, 1)
        _observe(m, (v_b,), mixed.flatten(1))
        parts.append(m.per_head(v_b, expand, mixed).transpose(0, 1).flatten(1))
    return torch.cat(parts)


def _attend(
    m: Matrices,
    hyper: Hyper,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int = 0,
    sink: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal, one sequence: q, k, v f32[n_tok, heads, dim] to f32[heads, n_tok, dim].

    A block of queries meets the keys that it can see only, and all heads that share keys are one
    product. `sink` f32[heads] is one more logit, whose share goes to nothing.
    """
    if m.compute.activations == "llama.cpp":  # its cache holds f16, and a product rounds both sides
        q, k, v = (part.half().float() for part in (q, k, v))
    n, n_shared = len(q), hyper.n_heads // hyper.n_kv_heads
    q = (q * hyper.scale).transpose(0, 1).unflatten(0, (-1, n_shared))
    k, v = k.permute(1, 2, 0), v.transpose(0, 1)
    step = max(16, _SCORE_BYTES // (4 * hyper.n_heads * n))
    mixed = q.new_empty(*q.shape[:3], v.shape[-1])
    places = torch.arange(n, device=q.device)
    for begin in range(0, n, step):
        end = min(begin + step, n)
        first = max(0, begin - window + 1) if window else 0
        keys, values = k[..., first:end], v[:, first:end]
        scores = (q[:, :, begin:end].flatten(1, 2) @ keys).unflatten(1, (n_shared, -1))
        if hyper.score_cap:
            scores = hyper.score_cap * torch.tanh(scores / hyper.score_cap)
        back = places[begin:end, None] - places[None, first:end]
        hidden = (back < 0) | (back >= window) if window else back < 0
        weights = _softmax(scores.masked_fill_(hidden, float("-inf")), sink)
        mixed[:, :, begin:end] = (weights.flatten(1, 2) @ values).unflatten(1, (n_shared, -1))
    return mixed.flatten(0, 1)


def _softmax(scores: torch.Tensor, sink: torch.Tensor | None) -> torch.Tensor:
    """Over the last axis of f32[kv_heads, n_shared, n_tok, n_keys]."""
    if sink is None:
        return scores.softmax(-1)
    column = sink.view(*scores.shape[:2], 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat((scores, column), -1).softmax(-1)[..., :-1]


def is_routed(m: Matrices, layer: int) -> bool:
    """Whether a layer's feed-forward is a mixture of experts."""
    return f"blk.{layer}.ffn_gate_inp.weight" in m


def dense_ffn(m: Matrices, hyper: Hyper, layer: int, x: torch.Tensor) -> torch.Tensor:
    """The gated MLP of a dense layer."""
    y = m.swiglu(f"blk.{layer}.ffn", "", x)
    return normed(m, f"blk.{layer}.post_ffw_norm.weight", hyper, layer, y)


def shared_ffn(m: Matrices, layer: int, x: torch.Tensor) -> torch.Tensor:
    """The experts that every token passes; zeros where there are none."""
    if f"blk.{layer}.ffn_gate_shexp.weight" not in m:
        return torch.zeros_like(x)
    return m.swiglu(f"blk.{layer}.ffn", "_shexp", x)


def route(
    m: Matrices, moe: Moe, layer: int, x: torch.Tensor, chosen: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chosen experts i64[n_tok, n_used], ascending, and their weights f32[n_tok, n_used].

    Given `chosen`, only their weights are computed.
    """
    name = f"blk.{layer}.ffn_gate_inp.weight"
    _observe(m, (name,), x)
    logits = m.apply(name, x)
    scores = logits.sigmoid() if moe.gating == "sigmoid" else logits.softmax(-1)
    if chosen is None:
        bias = f"blk.{layer}.exp_probs_b.bias"
        choice = scores + m.vector(bias) if bias in m else scores
        if moe.n_groups > 1:
            choice = _within_groups(choice, moe)
        chosen = choice.topk(moe.n_used, -1).indices.sort(-1).values
    weights = scores.gather(-1, chosen)
    if moe.renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return chosen, weights * moe.scale


def _within_groups(choice: torch.Tensor, moe: Moe) -> torch.Tensor:
    """Experts outside the best groups are out; a group counts by the sum of its two best."""
    groups = choice.unflatten(-1, (moe.n_groups, -1))
    best = groups.topk(2, -1).values.sum(-1).topk(moe.n_groups_used, -1).indices
    kept = torch.zeros(groups.shape[:-1], dtype=torch.bool, device=choice.device)
    kept.scatter_(-1, best, True)
    return groups.masked_fill(~kept[..., None], float("-inf")).flatten(-2)


def _observe(m: Matrices, names: tuple[str, ...], x: torch.Tensor) -> None:
    if m.observer:
        m.observer.see(names, x)


def _spans(lengths: Sequence[int]) -> list[slice]:
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [slice(end - n, end) for n, end in zip(lengths, ends, strict=True)]


def _until(turns: Angles, span: slice) -> Angles:
    return turns.until(span.stop - span.start)
