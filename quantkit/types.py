"""The nouns that stages hand to each other. Frozen; nothing imported but the standard library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from math import prod
from typing import Any


class GgmlType(IntEnum):
    """Tensor types that llama.cpp stores; values are ggml's ids, names as in the `gguf` package."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41
    Q2_0 = 42

    @property
    def block_size(self) -> int:
        """Weights per block; a row's length must be a multiple of it."""
        return _BLOCKS[self][0]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return _BLOCKS[self][1]

    @property
    def bpw(self) -> float:
        """Bits per weight."""
        return 8 * self.block_bytes / self.block_size

    def row_bytes(self, n_cols: int) -> int:
        """Bytes of a row of `n_cols` weights; the caller has checked divisibility."""
        return n_cols // self.block_size * self.block_bytes


_BLOCKS: dict[GgmlType, tuple[int, int]] = {
    GgmlType.F32: (1, 4),
    GgmlType.F16: (1, 2),
    GgmlType.BF16: (1, 2),
    GgmlType.F64: (1, 8),
    GgmlType.I8: (1, 1),
    GgmlType.I16: (1, 2),
    GgmlType.I32: (1, 4),
    GgmlType.I64: (1, 8),
    GgmlType.Q4_0: (32, 18),
    GgmlType.Q4_1: (32, 20),
    GgmlType.Q5_0: (32, 22),
    GgmlType.Q5_1: (32, 24),
    GgmlType.Q8_0: (32, 34),
    GgmlType.Q2_K: (256, 84),
    GgmlType.Q3_K: (256, 110),
    GgmlType.Q4_K: (256, 144),
    GgmlType.Q5_K: (256, 176),
    GgmlType.Q6_K: (256, 210),
    GgmlType.IQ2_XXS: (256, 66),
    GgmlType.IQ2_XS: (256, 74),
    GgmlType.IQ2_S: (256, 82),
    GgmlType.IQ3_XXS: (256, 98),
    GgmlType.IQ3_S: (256, 110),
    GgmlType.IQ1_S: (256, 50),
    GgmlType.IQ1_M: (256, 56),
    GgmlType.IQ4_NL: (32, 18),
    GgmlType.IQ4_XS: (256, 136),
    GgmlType.TQ1_0: (256, 54),
    GgmlType.TQ2_0: (256, 66),
    GgmlType.MXFP4: (32, 17),
    GgmlType.NVFP4: (64, 36),
    GgmlType.Q1_0: (128, 18),
    GgmlType.Q2_0: (64, 18),
}


@dataclass(frozen=True, slots=True)
class TensorRef:
    """One stored tensor: where its bytes lie. `begin`/`end` are absolute in `file`."""

    name: str
    dtype: str  # as safetensors spells it: BF16, F16, F32, I32, ...; of a GGUF file a GgmlType
    shape: tuple[int, ...]
    file: str  # base name inside the checkpoint folder
    begin: int
    end: int

    @property
    def n_bytes(self) -> int:
        """Stored size."""
        return self.end - self.begin


class WeightFormat(StrEnum):
    """How a logical weight is stored in the checkpoint."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    INT4_G32 = "int4-g32"  # compressed-tensors pack-quantized, symmetric, group 32
    INT4 = "int4"  # the same with other groups, zero points or an order of columns
    INT8 = "int8"  # integers of 8 bits, packed or plain, of compressed-tensors or bitsandbytes
    INT = "int"  # packed integers of another width
    FP8_BLOCK = "fp8-block"  # F8_E4M3 with a multiplier per 128x128 block
    FP8 = "fp8"  # F8_E4M3 with a multiplier per row, tensor or group
    MXFP4 = "mxfp4"  # E2M1 in groups of 32 with a power of two each
    NVFP4 = "nvfp4"  # E2M1 in groups of 16 with an F8_E4M3 scale each
    GPTQ = "gptq"
    AWQ = "awq"
    BNB_4BIT = "bnb-4bit"  # bitsandbytes NF4 and FP4
    GGUF = "gguf"  # blocks of the type that `data.dtype` names


@dataclass(frozen=True, slots=True)
class Weight:
    """One logical weight of the model, however many stored tensors make it up.

    `name` has no `.weight` suffix games: it is the checkpoint name of the plain tensor
    (`...down_proj.weight`), also when what is stored are `weight_packed` and friends.
    `shape` is the expanded shape in checkpoint order, rows first.
    """

    name: str
    format: WeightFormat
    shape: tuple[int, ...]
    data: TensorRef
    scale: TensorRef | None = None
    layout: Any = None  # what else the format's reader has to know: see quantkit.source.formats
    others: tuple[TensorRef, ...] = ()  # whatever must be read besides: zero points, group indices

    @property
    def n_rows(self) -> int:
        """Rows when all leading axes are flattened; a vector is one row."""
        return prod(self.shape[:-1])

    @property
    def n_cols(self) -> int:
        """Length of the last axis."""
        return self.shape[-1] if self.shape else 1

    @property
    def n_bytes(self) -> int:
        """Bytes that have to be read to have all of it."""
        others = self.others if self.scale is None else (self.scale, *self.others)
        return self.data.n_bytes + sum(ref.n_bytes for ref in others)


class SlabOp(StrEnum):
    """What happens to the rows of a slab between the checkpoint and the GGUF tensor."""

    COPY = "copy"
    TRANSPOSE = "transpose"  # [r, c] -> [c, r]
    PLUS_ONE = "plus-one"  # w -> 1 + w
    EVEN_ROWS = "even-rows"  # [2r, c] -> [r, c]
    ODD_ROWS = "odd-rows"
    EVEN_COLUMNS = "even-columns"  # [r, 2c] -> [r, c]
    ODD_COLUMNS = "odd-columns"
    EVEN_COLUMNS_AS_ROWS = "even-columns-as-rows"  # [r, 2c] -> [c, r]
    ODD_COLUMNS_AS_ROWS = "odd-columns-as-rows"
    INTERLEAVE = "interleave"  # half-split rope rows -> adjacent pairs: out 2j+s <- in s*n/2+j
    SPLIT_2D = (
        "split-2d"  # interleaved 2-D rope rows [n/4, 2, 2] -> first axis's pairs, then the second's
    )

    @property
    def keeps_rows_whole(self) -> bool:
        """Whether it only chooses rows and their order, so that stored rows can be moved as is."""
        return self in (self.COPY, self.EVEN_ROWS, self.ODD_ROWS, self.INTERLEAVE, self.SPLIT_2D)


@dataclass(frozen=True, slots=True)
class Slab:
    """Consecutive rows of one GGUF tensor that come from consecutive rows of one weight.

    The rows of a vector are its elements: a bias is the one column of its matrix.
    """

    weight: Weight
    row_begin: int
    row_end: int
    op: SlabOp = SlabOp.COPY


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A GGUF tensor as the architecture wants it, before a type is chosen.

    `shape` is in checkpoint order (the reverse of ggml's `ne`). Either `slabs` fill it from top
    to bottom, each with the same number of output rows, or `constant` holds its values.
    `keep` is the type of a tensor that no recipe may change (norms, router, biases).
    """

    name: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    slabs: tuple[Slab, ...] = ()
    constant: tuple[float, ...] = ()
    keep: GgmlType | None = None

    @property
    def n_weights(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns when leading axes are flattened; a vector is one column."""
        if len(self.shape) == 1:
            return self.shape[0], 1
        return prod(self.shape[:-1]), self.shape[-1]


class KvType(IntEnum):
    """GGUF metadata value types."""

    U8 = 0
    I8 = 1
    U16 = 2
    I16 = 3
    U32 = 4
    I32 = 5
    F32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    U64 = 10
    I64 = 11
    F64 = 12


@dataclass(frozen=True, slots=True)
class Kv:
    """A typed metadata value; `item` is the element type where `type` is ARRAY."""

    type: KvType
    value: Any
    item: KvType | None = None


Kvs = Mapping[str, Kv]


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A GGUF tensor with everything decided: type, file, place, and how it is cut into tiles.

    `wanted` is what the recipe asked for; `type` differs from it where the row length or a
    protected role forbids it. `repack` marks sources whose blocks are copied bit by bit.
    `begin` is the absolute offset in shard number `shard` (from 0).
    """

    spec: TensorSpec
    type: GgmlType
    wanted: GgmlType
    repack: bool
    shard: int
    begin: int
    n_bytes: int
    slab_rows: int
    tile_rows: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.type.row_bytes(self.spec.grid[1])

    @property
    def tiles_per_slab(self) -> int:
        """Tiles of one slab; only the last may be shorter."""
        return -(-self.slab_rows // self.tile_rows)

    @property
    def n_slabs(self) -> int:
        """Slabs; a constant counts as one."""
        return max(1, len(self.spec.slabs))

    @property
    def n_tiles(self) -> int:
        """Tiles of the tensor, numbered slab by slab."""
        return self.n_slabs * self.tiles_per_slab

    def tile(self, number: int) -> tuple[int, int, int]:
        """Slab number and the row range within the slab's output rows."""
        slab, k = divmod(number, self.tiles_per_slab)
        first = k * self.tile_rows
        return slab, first, min(first + self.tile_rows, self.slab_rows)


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """One output file: its final name, its size, and the bytes before the first tensor."""

    file: str
    n_bytes: int
    header: bytes


@dataclass(frozen=True)
class Plan:
    """What a conversion will do, decided from metadata alone.

    `digest` identifies it: same source, same recipe, same layout.
    """

    stem: str
    arch: str
    recipe_name: str
    tensors: tuple[PlannedTensor, ...]
    shards: tuple[PlannedShard, ...]
    kvs: Kvs
    digest: str

    @property
    def n_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.n_bytes for shard in self.shards)

    @property
    def n_weights(self) -> int:
        """Weights of all tensors."""
        return sum(tensor.spec.n_weights for tensor in self.tensors)

    @property
    def bpw(self) -> float:
        """Bits per weight of the tensor data."""
        return 8 * sum(tensor.n_bytes for tensor in self.tensors) / max(1, self.n_weights)

    @property
    def n_source_bytes(self) -> int:
        """Bytes that will be read from the checkpoint."""
        weights = {
            slab.weight.name: slab.weight for tensor in self.tensors for slab in tensor.spec.slabs
        }
        return sum(weight.n_bytes for weight in weights.values())
