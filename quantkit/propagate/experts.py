"""A mixture of experts passed by teacher and student, experts quantised one by one."""

from __future__ import annotations

import torch

from quantkit.errors import UsageError
from quantkit.forward import blocks
from quantkit.forward.hyper import Moe
from quantkit.propagate.layer import Pair, Quantiser
from quantkit.propagate.moments import Moments

Tensor = torch.Tensor

# An expert with as many tokens as its input is wide, times this, is rounded by its own inputs.
_OWN = 4


class ExpertLayer:
    """A routed layer. Both runs take the experts that the teacher chooses."""

    def __init__(self, pair: Pair, quantiser: Quantiser, layer: int) -> None:
        moe, outs = pair.teacher.hyper.moe, [s.spare for s in pair.streams if s.spare is not None]
        if moe is None:
            raise UsageError(f"layer {layer} has experts, the metadata has none")
        self._moe: Moe = moe
        self._pair, self._quantiser, self._layer, self._outs = pair, quantiser, layer, outs
        self._prefix = f"blk.{layer}.ffn"

    def run(self) -> None:
        """Quantise its weights and advance both streams."""
        pair, moe = self._pair, self._moe
        shared = self._see_all()
        router = f"{self._prefix}_gate_inp.weight"
        if self._quantiser.wants(router):
            self._quantiser.take(router, 0, shared, 0)
        chosen, gates = self._route()
        for stream, out in zip(pair.streams, self._outs, strict=True):
            for begin, end in stream.token_blocks():
                out.write(begin, stream.hidden.read(begin, end))
        for expert in range(moe.n_experts):
            places, slots = torch.nonzero(chosen == expert).T
            self._expert(expert, places, [gate[places, slots] for gate in gates], gates, shared)
        if f"{self._prefix}_gate_shexp.weight" in pair.teacher.matrices:
            self._shared_expert(shared)
        for stream, out in zip(pair.streams, self._outs, strict=True):
            stream.hidden, stream.spare = out, stream.hidden

    def _inputs(self, index: Tensor) -> list[Tensor]:
        """What some tokens bring to the experts, teacher's and student's f32[n, hidden]."""
        return [s.ffn_input(self._layer, s.take(index)) for s in self._pair.streams]

    def _blocks(self, index: Tensor) -> list[Tensor]:
        return [index[part] for part in _split(len(index), self._pair.student.n_block)]

    def _all(self) -> Tensor:
        return torch.arange(len(self._pair.held))

    def _see_all(self) -> Moments:
        student_run = self._pair.student
        moments = Moments(1, student_run.hyper.hidden, device=student_run.device)
        for part in self._blocks(self._all()):
            x, student = self._inputs(part)
            moments.add(self._pair.held[part], x[:, None], student[:, None])
        return moments

    def _route(self) -> tuple[Tensor, list[Tensor]]:
        """The teacher's experts i64[n_tok, n_used], and weights f32[n_tok, n_used] in both runs."""
        chosen, gates = [], []
        for part in self._blocks(self._all()):
            x, student = self._inputs(part)
            pair, moe, layer = self._pair, self._moe, self._layer
            ids, weights = blocks.route(pair.teacher.matrices, moe, layer, x)
            _, theirs = blocks.route(pair.student.matrices, moe, layer, student, ids)
            chosen.append(ids.cpu())
            gates.append((weights.cpu(), theirs.cpu()))
        both = [torch.cat([pair[k] for pair in gates]) for k in range(2)]
        return torch.cat(chosen), both

    def _expert(
        self,
        expert: int,
        places: Tensor,
        share: list[Tensor],
        gates: list[Tensor],
        shared: Moments,
    ) -> None:
        prefix, pair = self._prefix, self._pair
        names = [f"{prefix}_{part}_exps.weight" for part in ("gate", "up", "down")]
        self._take_inputs(names[:2], expert, places, share[1], shared)
        parts = _split(len(places), pair.student.n_block)
        inner = [self._inner("_exps", places[part], expert) for part in parts]
        if self._quantiser.wants(names[2]):
            rows, width = pair.student.matrices.weights.shape(names[2])[-2:]
            moments = Moments(1, width, rows, device=pair.student.device)
            squares = gates[1][places].square().sum(1)
            for part, (x, student) in zip(parts, inner, strict=True):
                index = places[part]
                # A token's residual error is shared among its experts by what they can do about
                # it; in units of the expert's own output, which is multiplied by its gate.
                gate = share[1][part].clamp_min(1e-12)
                r = self._outs[0].take(index) - self._outs[1].take(index)
                r = r * (gate / squares[part].clamp_min(1e-24))[:, None]
                wanted = x * (share[0][part] / gate)[:, None].to(x.device)
                moments.add(pair.held[index], wanted[:, None], student[:, None], r, gate.square())
            self._lean(moments, expert, len(places), gates[1])
            self._quantiser.take(names[2], expert, moments, 0)
        for part, both in zip(parts, inner, strict=True):
            for stream, out, x, gate in zip(pair.streams, self._outs, both, share, strict=True):
                y = stream.matrices.apply(names[2], x, expert)
                out.add(places[part], (y * gate[part, None].to(y.device)).cpu())
        for name in names:
            self._quantiser.forget(name, expert)

    def _lean(self, moments: Moments, expert: int, n_own: int, gates: Tensor) -> None:
        """Let an expert that saw few tokens lean on what a sample of all would have brought.

        They count as much as `width` tokens of its own, and ask for nothing but what the weights
        are: hidden units of other experts could not stand in for its own.
        """
        if n_own >= _OWN * moments.width:
            return
        student, hidden = self._pair.student, self._pair.student.hyper.hidden
        n_all = len(self._pair.held)
        n = min(n_all, 2 * moments.width)
        index = torch.arange(n) * n_all // n
        x = student.matrices.swiglu_inner(
            self._prefix, "_exps", student.ffn_input(self._layer, student.take(index)), expert
        )
        weight = torch.full((n,), float(gates.square().mean()) * moments.width / n)
        fitted = torch.zeros(n, dtype=torch.bool)
        moments.add(fitted, x[:, None], x[:, None], torch.zeros(n, hidden), weight)

    def _take_inputs(
        self, names: list[str], expert: int, places: Tensor, gate: Tensor, shared: Moments
    ) -> None:
        wanted = [name for name in names if self._quantiser.wants(name)]
        if not wanted:
            return
        moments, hidden = shared, self._pair.student.hyper.hidden
        if len(places) >= _OWN * hidden:
            moments = Moments(1, hidden, device=self._pair.student.device)
            for part in _split(len(places), self._pair.student.n_block):
                x, student = self._inputs(places[part])
                held = self._pair.held[places[part]]
                moments.add(held, x[:, None], student[:, None], None, gate[part].square())
        for name in wanted:
            self._quantiser.take(name, expert, moments, 0)

    def _inner(self, suffix: str, index: Tensor, expert: int | None) -> list[Tensor]:
        """What goes into a down projection, in both runs."""
        return [
            stream.matrices.swiglu_inner(self._prefix, suffix, x, expert)
            for stream, x in zip(self._pair.streams, self._inputs(index), strict=True)
        ]

    def _shared_expert(self, shared: Moments) -> None:
        pair, prefix = self._pair, self._prefix
        for part in ("gate", "up"):
            name = f"{prefix}_{part}_shexp.weight"
            if self._quantiser.wants(name):
                self._quantiser.take(name, 0, shared, 0)
        down = f"{prefix}_down_shexp.weight"
        if self._quantiser.wants(down):
            rows, width = pair.student.matrices.weights.shape(down)
            moments = Moments(1, width, rows, device=pair.student.device)
            for index in self._blocks(self._all()):
                x, student = self._inner("_shexp", index, None)
                r = self._outs[0].take(index) - self._outs[1].take(index)
                moments.add(pair.held[index], x[:, None], student[:, None], r)
            self._quantiser.take(down, 0, moments, 0)
        for index in self._blocks(self._all()):
            both = self._inner("_shexp", index, None)
            for stream, out, x in zip(pair.streams, self._outs, both, strict=True):
                out.add(index, stream.matrices.apply(down, x).cpu())


def _split(n: int, step: int) -> list[slice]:
    return [slice(begin, min(begin + step, n)) for begin in range(0, n, step)]
