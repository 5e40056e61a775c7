"""An assignment as a recipe: text to read and edit that gives the same types when it is planned."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import yaml

from quantkit.allocate.solve import Allocation
from quantkit.container.layout import tensor_n_bytes
from quantkit.recipe import Recipe, parse_recipe
from quantkit.run.events import size
from quantkit.types import GgmlType, TensorSpec

Types = Mapping[str, GgmlType]
Specs = Sequence[TensorSpec]

_PLAIN = re.compile(r"[A-Za-z_][\w.-]*(\.\*)?", re.ASCII)
_OWN_KEYS = {"name", "description", "file_type", "default", "rules"}


def as_recipe(specs: Specs, types: Types, name: str, **settings: Any) -> Recipe:
    """The recipe that `as_yaml` writes, parsed."""
    return parse_recipe(as_yaml(specs, types, name, **settings), where=f"recipe {name}")


def allocated_yaml(
    specs: Specs,
    allocation: Allocation,
    name: str,
    *,
    target: str,
    unit: str = "",
    **settings: Any,
) -> str:
    """The text of an allocation's recipe, with what was asked for and what it should cost.

    `target` is what the user asked for, `unit` that of costs, such as `nats of KL`; `settings` as
    in `as_yaml`.
    """
    least = f"less than {allocation.bound:.6g}" if allocation.gap else "less"
    about = (
        f"Allocated for {target}.",
        f"Predicted cost: {f'{allocation.cost:.6g} {unit}'.strip()}; "
        f"no assignment of this size has {least}.",
    )
    return as_yaml(specs, allocation.types(), name, about=about, **settings)


def as_yaml(
    specs: Specs,
    types: Types,
    name: str,
    *,
    description: str = "",
    about: Sequence[str] = (),
    like: Recipe | None = None,
) -> str:
    """A recipe's text that gives every tensor of `specs` its type in `types`.

    `specs` are all tensors of the model, `types` holds those that a recipe may change. Rules go by
    role and layers, exceptions first; each has a comment that says what of the model it decides.
    `about` are lines for the head; `like` is a recipe whose other settings (effort, gain,
    sampling, ...) are taken over.
    """
    free = [spec for spec in specs if spec.keep is None]
    n_bytes = sum(_n_bytes(s, types[s.name] if s.keep is None else s.keep) for s in specs)
    bpw = 8 * n_bytes / max(1, sum(spec.n_weights for spec in specs))
    head = (f"{name}: {bpw:.3f} bits per weight, {size(n_bytes)} of tensors.", *about)
    lines = [f"# {_one_line(line)}" for line in head]
    lines.append(f"name: {_scalar(name)}")
    if description:
        lines.append(f"description: {_scalar(description)}")
    lines.append(f"default: {_default(free, types).name}")
    if like is not None:
        kept = like.model_dump(mode="json", exclude=_OWN_KEYS, exclude_defaults=True)
        lines += yaml.safe_dump(kept, sort_keys=False).splitlines() if kept else []
    rules = list(_rules(free, types))
    lines.append("rules:" if rules else "rules: []")
    for rule in rules:
        lines += [f"  # {rule.comment()}", f"  - {rule.yaml()}"]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True)
class _Rule:
    """What it asks for, the tensors that it decides, and how many there are of their kind."""

    type: GgmlType
    decides: tuple[TensorSpec, ...]
    n_alike: int
    role: str | None = None
    layers: str | None = None
    tensor: str | None = None

    def yaml(self) -> str:
        """One line, as a flow mapping."""
        given = {"role": self.role, "layers": self.layers, "tensor": self.tensor}
        pairs = [f"{key}: {_scalar(value)}" for key, value in given.items() if value is not None]
        return f"{{{', '.join([*pairs, f'type: {self.type.name}'])}}}"

    def comment(self) -> str:
        """What it decides: how many tensors, how large."""
        n, what = len(self.decides), self.role or "tensor"
        n_bytes = sum(_n_bytes(spec, self.type) for spec in self.decides)
        count = what if n == self.n_alike == 1 else f"{n} of {self.n_alike} {what}"
        if n == self.n_alike > 1:
            count = f"all {n} {what}"
        return f"{count}: {size(n_bytes)}, {self.type.bpw:g} bits per weight"


def _rules(free: Specs, types: Types) -> Iterator[_Rule]:
    by_family: dict[str, list[TensorSpec]] = {}
    for spec in free:
        by_family.setdefault("".join(spec.role.partition(".")[:2]), []).append(spec)
    for family, specs in by_family.items():
        yield from _family_rules(family, specs, types)


def _family_rules(family: str, specs: Specs, types: Types) -> Iterator[_Rule]:
    """Rules of the roles that begin with `family`, which ends in a dot unless it is a role itself.

    The last rule is for all of them if several have its type as their usual one.
    """
    bundles = _bundles(family, specs, types)
    usual = {pattern: _usual(members, types) for pattern, members in bundles.items()}
    common, n_bundles = _most(usual.values())
    rest: list[TensorSpec] = []
    for pattern, members in bundles.items():
        yield from _exceptions(pattern, members, usual[pattern], types)
        plain = tuple(spec for spec in members if types[spec.name] is usual[pattern])
        if n_bundles > 1 and usual[pattern] is common:
            rest += plain
        else:
            yield _Rule(usual[pattern], plain, len(members), role=pattern)
    if rest:
        yield _Rule(common, tuple(rest), len(specs), role=f"{family}*")


def _bundles(family: str, specs: Specs, types: Types) -> dict[str, list[TensorSpec]]:
    """The tensors of a family by a glob: roles that have the same types in all layers are one."""
    by_role: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        by_role.setdefault(spec.role, []).append(spec)
    alike: dict[Hashable, list[str]] = {}
    for role, members in by_role.items():
        alike.setdefault(frozenset((s.layer, types[s.name]) for s in members), []).append(role)
    bundles = {}
    for roles in alike.values():
        pattern = _glob(family, roles, [role for role in by_role if role not in roles])
        for name in [pattern] if pattern else roles:
            bundles[name] = [s for s in specs if s.role == name or (pattern and s.role in roles)]
    return bundles


def _glob(family: str, roles: Sequence[str], others: Sequence[str]) -> str | None:
    """One pattern for `roles` and none of `others`; None where initials do not tell."""
    if len(roles) == 1:
        return roles[0]
    if not others:
        return f"{family}*"
    initials = sorted({role[len(family)] for role in roles})
    if any(role[len(family)] in initials for role in others):
        return None
    return f"{family}[{''.join(initials)}]*"


def _exceptions(role: str, members: Specs, usual: GgmlType, types: Types) -> Iterator[_Rule]:
    """Rules for the members of a role that have another type than the usual one."""
    cells: dict[int | None, list[TensorSpec]] = {}
    for spec in members:
        cells.setdefault(spec.layer, []).append(spec)
    by_type: dict[GgmlType, list[TensorSpec]] = {}
    for layer, cell in cells.items():
        alike = len({types[spec.name] for spec in cell}) == 1
        for spec in cell:
            type_ = types[spec.name]
            if type_ is usual:
                continue
            if alike and layer is not None:
                by_type.setdefault(type_, []).append(spec)
            else:  # role and layer do not tell them apart
                pattern = f"^{re.escape(spec.name)}$"
                yield _Rule(type_, (spec,), len(members), role=role, tensor=pattern)
    layers = sorted(layer for layer in cells if layer is not None)
    for type_ in sorted(by_type, key=lambda t: (-t.bpw, t.name)):
        decides = tuple(by_type[type_])
        inside = {spec.layer for spec in decides}
        text = _ranges(layers, inside)
        yield _Rule(type_, decides, len(members), role=role, layers=text)


def _ranges(layers: Sequence[int], inside: set[int | None]) -> str:
    """`inside` as a list of ranges; layers that a role does not have may lie in a range."""
    parts = []
    for chosen, run in groupby(layers, key=lambda layer: layer in inside):
        if chosen:
            first, *others = run
            parts.append(f"{first}-{others[-1]}" if others else f"{first}")
    return ",".join(parts)


def _usual(members: Specs, types: Types) -> GgmlType:
    return _most(types[spec.name] for spec in members)[0]


def _default(free: Specs, types: Types) -> GgmlType:
    weights: Counter[GgmlType] = Counter()
    for spec in free:
        weights[types[spec.name]] += spec.n_weights
    return max(weights, key=lambda t: (weights[t], t.name), default=GgmlType.F16)


def _most(types: Iterable[GgmlType]) -> tuple[GgmlType, int]:
    """The most frequent type and how often it comes; names decide between equals."""
    return max(Counter(types).items(), key=lambda item: (item[1], item[0].name))


def _n_bytes(spec: TensorSpec, type_: GgmlType) -> int:
    return tensor_n_bytes(spec.shape, type_, where=spec.name)


def _one_line(text: str) -> str:
    return "".join(c for c in " ".join(text.split()) if c.isprintable())


def _scalar(text: str) -> str:
    if _PLAIN.fullmatch(text) and yaml.safe_load(text) == text:
        return text
    return yaml.safe_dump(text, default_style='"', width=1 << 30).strip()
