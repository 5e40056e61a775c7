"""What goes where: weights, cache and buffers against VRAM, RAM and disk. All sizes are bytes.

llama.cpp's own rules: layers go to the device from the last one backwards (`-ngl`), the token
embedding stays in RAM, routed experts can be left in RAM tensor by tensor (`-ot`). Weights in RAM
are mapped from the file, so a file larger than memory runs too, from disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from quantkit.errors import UsageError
from quantkit.guide.model import NOT_ON_CUDA, Held, Model, Shape
from quantkit.types import GgmlType

DEFAULT_CTX = 98_304  # what is suggested for Kimi K2.5
N_UBATCH = 512  # llama.cpp's default
_CELLS = 256  # cache cells are allocated in steps of so many
_MARGIN = 1 << 30  # llama.cpp's --fit-target: left free on the device
_HOST = 4 << 30  # the system and llama.cpp itself


@dataclass(frozen=True, slots=True)
class Machine:
    """Memory of one device (0 without one), of the host, and free space; None if not told."""

    vram: int
    ram: int
    disk: int | None = None

    def __post_init__(self) -> None:
        if self.ram <= 0:
            raise UsageError("a machine has more than 0 bytes of RAM", where="--ram")


class Place(StrEnum):
    """Where a token's weights are read from."""

    VRAM = "vram"
    RAM = "ram"
    DISK = "disk"
    NOWHERE = "nowhere"  # the machine cannot run it at all


@dataclass(frozen=True, slots=True)
class Use:
    """What one memory has to hold. `compute` and `other` are estimates."""

    weights: int = 0
    cache: int = 0
    compute: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.compute + self.other


@dataclass(frozen=True, slots=True)
class Fit:
    """How a model lies in a machine.

    `n_gpu_layers` counts as llama.cpp does, from the last layer and the output as one more.
    `in_ram` are the expert tensors that stay in RAM although their layer is on the device.
    `active_ram` and `active_vram` are the bytes of weights that one token reads.
    """

    place: Place
    n_ctx: int
    cache_type: GgmlType
    n_gpu_layers: int
    in_ram: tuple[Held, ...]
    vram: Use
    ram: Use
    active_vram: int
    active_ram: int


def cache_bytes(shape: Shape, n_ctx: int, type_: GgmlType = GgmlType.F16) -> int:
    """KV cache of all layers. `UsageError` where rows do not divide into blocks of `type_`."""
    return sum(_cache_by_layer(shape, n_ctx, type_))


def compute_bytes(shape: Shape, n_ctx: int, n_ubatch: int = N_UBATCH) -> int:
    """Estimate of llama.cpp's compute buffer with flash attention, on the large side.

    Of one micro-batch: logits and activations in f32, the attention mask in f16.
    """
    return n_ubatch * (4 * (shape.n_vocab + 8 * shape.hidden) + 2 * n_ctx)


def context(shape: Shape, n_ctx: int | None) -> int:
    """The context to run with: as asked, else 98,304 or what the model was trained for."""
    if n_ctx is None:
        return min(DEFAULT_CTX, shape.n_ctx)
    if n_ctx > shape.n_ctx:
        raise UsageError(
            f"a context of {n_ctx:,} tokens is more than the model's {shape.n_ctx:,}",
            where="--ctx",
        )
    return n_ctx


def fit(model: Model, machine: Machine, n_ctx: int, cache_type: GgmlType = GgmlType.F16) -> Fit:
    """Lay `model` into `machine`: as much on the device as fits, layers before experts."""
    load = _Load(model, n_ctx, cache_type)
    n_gpu, in_ram = load.split(machine.vram - _MARGIN - load.mmproj - load.compute)
    first = load.n_layers + 1 - n_gpu  # layers from here on are on the device
    left = set(in_ram)
    device = [t for t in model.tensors if n_gpu and _reaches(t, first) and t not in left]
    on_device = set(device)
    host = [t for t in model.tensors if t not in on_device]
    tied, small = load.tied, 4 * N_UBATCH * 8 * model.shape.hidden
    n_host = sum(t.n_bytes for t in host)
    if n_gpu:
        weights = sum(t.n_bytes for t in device) + tied
        spare = load.staging if in_ram or first else 0
        cache = sum(load.cache[first:])
        vram = Use(weights, cache, load.compute + spare, _MARGIN + load.mmproj)
        ram = Use(n_host, sum(load.cache[:first]), small, _HOST)
    else:
        vram = Use()
        ram = Use(n_host, sum(load.cache), load.compute, _HOST + load.mmproj)
    return Fit(
        place=_place(model, machine, ram, all_on_device=first == 0 and not in_ram),
        n_ctx=n_ctx,
        cache_type=cache_type,
        n_gpu_layers=n_gpu,
        in_ram=in_ram,
        vram=vram,
        ram=ram,
        active_vram=_active(device, model.shape) + (tied if n_gpu else 0),
        active_ram=_active(host, model.shape) + (0 if n_gpu else tied),
    )


def longest_ctx(model: Model, machine: Machine, cache_type: GgmlType = GgmlType.F16) -> int:
    """The longest context, in steps of 1024, with which all layers are on the device; else 0."""

    def fits(n_ctx: int) -> bool:
        return fit(model, machine, n_ctx, cache_type).n_gpu_layers > model.shape.n_layers

    low, high = 0, model.shape.n_ctx // 1024
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(1024 * middle) else (low, middle - 1)
    return 1024 * low


class _Load:
    """The model as amounts to distribute; caches and layers without experts in order."""

    def __init__(self, model: Model, n_ctx: int, cache_type: GgmlType) -> None:
        self.n_layers = model.shape.n_layers
        self.cache = _cache_by_layer(model.shape, n_ctx, cache_type)
        self.compute = compute_bytes(model.shape, n_ctx)
        self.mmproj = model.mmproj[1] if model.mmproj else 0
        self.experts = model.experts
        self.layers = [0] * self.n_layers
        self.tied = 0  # the device has its own copy of an embedding that is the head as well
        if not any(t.name == "output.weight" for t in model.tensors):
            self.tied = sum(t.n_bytes for t in model.tensors if t.name == "token_embd.weight")
        self.output = self.tied
        for tensor in model.tensors:
            layer = tensor.layer
            if layer is None or layer >= self.n_layers:
                self.output += 0 if tensor.is_input else tensor.n_bytes
            elif tensor.expert is None:
                self.layers[layer] += tensor.n_bytes
        # Prompts are computed on the device: what lies in RAM is copied there, one at a time.
        movable = [t.n_bytes for t in model.tensors if not t.is_input]
        experts = [t.n_bytes for t in self.experts]
        self.staging = max(experts or movable, default=0)

    def split(self, free: int) -> tuple[int, tuple[Held, ...]]:
        """`n_gpu_layers`, and the experts of those layers that stay in RAM."""
        dense = self.output + sum(self.layers) + sum(self.cache)
        clumsy = any(t.type in NOT_ON_CUDA for t in self.experts)
        if not clumsy and dense + sum(t.n_bytes for t in self.experts) <= free:
            return self.n_layers + 1, ()
        free -= self.staging
        if self.experts and dense <= free:
            return self.n_layers + 1, self._left_behind(free - dense)
        n_gpu, free = 0, free - self.output
        while free >= 0:
            n_gpu += 1
            layer = self.n_layers - n_gpu
            if layer < 0:
                break
            free -= self.layers[layer] + self.cache[layer]
        first = self.n_layers + 1 - n_gpu
        return n_gpu, tuple(t for t in self.experts if (t.layer or 0) >= first)

    def _left_behind(self, free: int) -> tuple[Held, ...]:
        """Experts that do not fit into `free`: the first layers', and a part of one more."""
        left = list(self.experts)
        for layer in sorted({t.layer or 0 for t in left}, reverse=True):
            here = [t for t in left if t.layer == layer]
            for kind in sorted({t.expert or "" for t in here}):
                tensors = [t for t in here if t.expert == kind]
                need = sum(t.n_bytes for t in tensors)
                if need <= free and not any(t.type in NOT_ON_CUDA for t in tensors):
                    free -= need
                    left = [t for t in left if t not in tensors]
            if any(t.layer == layer for t in left):
                break
        return tuple(left)


def _place(model: Model, machine: Machine, ram: Use, *, all_on_device: bool) -> Place:
    on_disk = model.n_bytes + (model.mmproj[1] if model.mmproj else 0)
    if machine.disk is not None and on_disk > machine.disk:
        return Place.NOWHERE
    if ram.total - ram.weights > machine.ram:  # only weights can be mapped from the file
        return Place.NOWHERE
    if ram.total > machine.ram:
        return Place.DISK
    return Place.VRAM if all_on_device else Place.RAM


def _reaches(tensor: Held, first: int) -> bool:
    """Whether `-ngl` takes the tensor to the device, if that starts at layer `first`."""
    return not tensor.is_input and (tensor.layer is None or tensor.layer >= first)


def _cache_by_layer(shape: Shape, n_ctx: int, type_: GgmlType) -> list[int]:
    n_cells = -(-n_ctx // _CELLS) * _CELLS
    if any(width % type_.block_size for rows in shape.cache_rows for width in rows):
        raise UsageError(f"this model's cache cannot be {type_.name}")
    return [n_cells * sum(map(type_.row_bytes, rows)) for rows in shape.cache_rows]


def _active(tensors: list[Held], shape: Shape) -> int:
    """Bytes that one token reads: all of a matrix, of experts those that are used."""
    total = 0
    for tensor in tensors:
        if tensor.expert and shape.n_experts:
            total += tensor.n_bytes * shape.n_used // shape.n_experts
        elif not tensor.is_input:
            total += tensor.n_bytes
    return total
