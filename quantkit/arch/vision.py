"""Kimi K2.5's MoonViT tower and projector as an mmproj file (GGUF `clip`, projector `kimik25`).

Q and K rows are stored for an interleaved 2-D rope; llama.cpp wants the first axis's pairs, then
the second's, head by head. V stays, and the three stay fused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from quantkit.arch.base import Config, Model, SideFiles, WeightMap, norm, protected, whole
from quantkit.container.kv import boolean, f32, f32s, string, u32
from quantkit.errors import SourceError, UnsupportedError
from quantkit.types import GgmlType, Kv, Slab, SlabOp, TensorSpec, Weight

ARCH = "clip"
_MIN_PATCHES = 8  # the smallest image that llama.cpp's converter allows
PREFIXES = ("vision_tower.", "mm_projector.")
# checkpoint name inside a block -> GGUF name, and whether it is a norm
_BLOCK = (("norm0", "ln1", True), ("norm1", "ln2", True), ("wo", "attn_out", False),
          ("mlp.fc0", "ffn_up", False), ("mlp.fc1", "ffn_down", False))  # fmt: skip


def has_tower(config: Config, names: Iterable[str]) -> bool:
    """Whether a checkpoint with these weights brings a vision tower that this module can write."""
    is_kimi = "KimiK25" in str(config.raw.get("architectures"))
    return is_kimi and any(name.startswith(PREFIXES) for name in names)


class _Tower:
    """Dimensions of the tower, from `vision_config` (raw JSON; class defaults never apply)."""

    def __init__(self, config: Config) -> None:
        vision = config.section("vision_config")
        if vision is None:
            raise UnsupportedError("the checkpoint has no vision tower", where="config.json")
        self.hidden = vision.count("vt_hidden_size")
        self.width = vision.count("vt_intermediate_size")
        self.n_heads = vision.count("vt_num_attention_heads")
        self.n_layers = vision.count("vt_num_hidden_layers")
        self.patch = vision.count("patch_size")
        self.grid = (vision.count("init_pos_emb_height"), vision.count("init_pos_emb_width"))
        self.n_frames = vision.count("init_pos_emb_time")
        self.text_hidden = vision.count("text_hidden_size", config.count("hidden_size"))
        self.eps = vision.number("projector_ln_eps", 1e-5)
        self.gelu = vision.string("projector_hidden_act", "gelu") == "gelu"
        merge = vision.text.get("merge_kernel_size", [2, 2])
        if not (isinstance(merge, list) and len(merge) == 2 and merge[0] == merge[1]):
            raise UnsupportedError(f"merge_kernel_size {merge!r}", where="config.json")
        self.merge = int(merge[0])
        if not self.n_heads or self.hidden % (4 * self.n_heads):
            raise SourceError(
                f"vt_hidden_size {self.hidden} does not split over {self.n_heads} 2-D rope heads",
                where="config.json",
            )


def describe_vision(config: Config, weights: WeightMap, files: SideFiles) -> Model:
    """Every tensor and `clip.*` KV of the mmproj file."""
    tower = _Tower(config)
    for name in weights.names():
        if not name.startswith(PREFIXES):
            weights.ignore(name, "text model")
    tensors = tuple(_tensors(tower, weights))
    weights.refuse_leftovers("Kimi K2.5 vision")
    return Model(ARCH, tensors, _kvs(tower, _preprocessing(files)), ignored=weights.ignored)


def _tensors(tower: _Tower, weights: WeightMap) -> Iterator[TensorSpec]:
    hidden, embed = tower.hidden, "vision_tower.patch_embed."
    patches = weights.take(f"{embed}proj.weight", hidden, 3, tower.patch, tower.patch)
    yield TensorSpec(
        "v.patch_embd.weight", "vision.patch_embd", None, patches.shape, whole(patches)
    )
    yield protected(
        "v.patch_embd.bias", "vision.patch_embd", None, weights.take(f"{embed}proj.bias", hidden)
    )
    table = weights.take(f"{embed}pos_emb.weight", *tower.grid, hidden)
    yield TensorSpec(
        "v.position_embd.weight", "vision.position_embd", None, table.shape, whole(table),
        keep=GgmlType.F32,
    )  # fmt: skip
    shapes = {
        "wo": (hidden, hidden),
        "mlp.fc0": (tower.width, hidden),
        "mlp.fc1": (hidden, tower.width),
    }
    for i in range(tower.n_layers):
        hf, blk = f"vision_tower.encoder.blocks.{i}.", f"v.blk.{i}."
        yield _qkv(
            tower, f"{blk}attn_qkv.weight", i, weights.take(f"{hf}wqkv.weight", 3 * hidden, hidden)
        )
        yield _qkv(tower, f"{blk}attn_qkv.bias", i, weights.take(f"{hf}wqkv.bias", 3 * hidden))
        for source, target, is_norm in _BLOCK:
            shape = (hidden,) if is_norm else shapes[source]
            yield from _linear(weights, hf + source, blk + target, f"vision.{target}", i, shape)
    yield from _linear(
        weights, "vision_tower.encoder.final_layernorm", "v.post_ln", "norm", None, (hidden,)
    )
    merged = hidden * tower.merge**2
    yield from _linear(weights, "mm_projector.pre_norm", "mm.input_norm", "norm", None, (hidden,))
    yield from _linear(weights, "mm_projector.proj.0", "mm.1", "projector", None, (merged, merged))
    yield from _linear(
        weights, "mm_projector.proj.2", "mm.2", "projector", None, (tower.text_hidden, merged)
    )


def _linear(
    weights: WeightMap, hf: str, name: str, role: str, layer: int | None, shape: tuple[int, ...]
) -> Iterator[TensorSpec]:
    weight = weights.take(f"{hf}.weight", *shape)
    if len(shape) == 1:
        role = "norm"
        yield norm(f"{name}.weight", layer, weight)
    else:
        yield TensorSpec(f"{name}.weight", role, layer, weight.shape, whole(weight))
    yield protected(f"{name}.bias", role, layer, weights.take(f"{hf}.bias", shape[0]))


def _qkv(tower: _Tower, name: str, layer: int, weight: Weight) -> TensorSpec:
    per_head = tower.hidden // tower.n_heads
    slabs = tuple(
        Slab(
            weight, row, row + per_head, SlabOp.SPLIT_2D if row < 2 * tower.hidden else SlabOp.COPY
        )
        for row in range(0, 3 * tower.hidden, per_head)
    )
    keep = GgmlType.F32 if len(weight.shape) == 1 else None
    return TensorSpec(name, "vision.attn_qkv", layer, weight.shape, slabs, keep=keep)


def _preprocessing(files: SideFiles) -> Config:
    raw = files.read_json("preprocessor_config.json")
    if not isinstance(raw, dict):
        raise SourceError(
            "preprocessor_config.json is missing",
            where="checkpoint",
            hint="copy it from the model's repository, or pass --mmproj none",
        )
    nested = raw.get("media_proc_cfg")
    return Config({**raw, **nested} if isinstance(nested, dict) else raw)


def _kvs(tower: _Tower, preprocessing: Config) -> dict[str, Kv]:
    n_pixels = tower.patch**2
    kvs = {
        "clip.has_vision_encoder": boolean(True),
        "clip.projector_type": string("kimik25"),
        "clip.use_gelu": boolean(tower.gelu),
        "clip.vision.projection_dim": u32(tower.text_hidden),
        "clip.vision.image_size": u32(tower.grid[0] * tower.patch),
        "clip.vision.patch_size": u32(tower.patch),
        "clip.vision.embedding_length": u32(tower.hidden),
        "clip.vision.feed_forward_length": u32(tower.width),
        "clip.vision.block_count": u32(tower.n_layers),
        "clip.vision.attention.head_count": u32(tower.n_heads),
        "clip.vision.attention.layer_norm_epsilon": f32(tower.eps),
        "clip.vision.projector.scale_factor": u32(tower.merge),
        "clip.vision.image_min_pixels": u32(_MIN_PATCHES * n_pixels),
        "clip.vision.image_max_pixels": u32(
            preprocessing.count("in_patch_limit", 16384) * n_pixels
        ),
        "vision.pos_emb_height": u32(tower.grid[0]),
        "vision.pos_emb_width": u32(tower.grid[1]),
        "vision.pos_emb_time": u32(tower.n_frames),
    }
    for key in ("image_mean", "image_std"):
        values = preprocessing.text.get(key)
        if not (isinstance(values, list) and len(values) == 3):
            raise SourceError(f"{key} should be three numbers", where="preprocessor_config.json")
        kvs[f"clip.vision.{key}"] = f32s([float(value) for value in values])
    return kvs
