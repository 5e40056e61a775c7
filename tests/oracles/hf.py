"""Hugging Face transformers as an oracle: an f32 forward of a *source* checkpoint.

Nothing here shares code with quantkit. Stored weights are expanded by other hands
(compressed-tensors for INT4, torch for FP8) and put into transformers' own classes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized import (  # type: ignore[import-untyped]
    PackedQuantizationCompressor,
)
from compressed_tensors.quantization import (  # type: ignore[import-untyped]
    QuantizationArgs,
    QuantizationScheme,
)
from numpy.typing import NDArray
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
)
from transformers.models.kimi_k25.configuration_kimi_k25 import (
    Kimi_K25Config,
    Kimi_K25VisionConfig,
)
from transformers.models.kimi_k25.modeling_kimi_k25 import (
    Kimi_K25MultimodalProjection,
    Kimi_K25VisionModel,
)

Tensors = dict[str, torch.Tensor]

# transformers' own class for a family that needs nothing expanded reads these by itself.
_DEEPSEEK_V3 = {"kimi_k25", "kimi_k2", "deepseek_v3"}


def reference_logits(
    checkpoint_dir: Path | str, token_ids: Any, *, latent_eps: float | None = None
) -> NDArray[np.float32]:
    """Logits of every position, computed in f32 with eager attention.

    `token_ids` is [n_tok], giving f32 [n_tok, n_vocab], or [n_seq, n_tok] of independent sequences,
    giving f32 [n_seq, n_tok, n_vocab]. `latent_eps` sets the epsilon of the norms inside MLA
    (q_a_layernorm, kv_a_layernorm): transformers leaves it at 1e-6 whatever the configuration
    says, llama.cpp, vLLM and SGLang use rms_norm_eps. Pass rms_norm_eps to compare with them.
    """
    model: Any = load(checkpoint_dir, latent_eps=latent_eps)
    ids = np.asarray(token_ids, dtype=np.int64)
    with torch.no_grad():
        rows = [
            model(input_ids=torch.as_tensor(sequence)[None], use_cache=False).logits[0].numpy()
            for sequence in np.atleast_2d(ids)
        ]
    return np.stack(rows) if ids.ndim == 2 else rows[0]


def load(checkpoint_dir: Path | str, *, latent_eps: float | None = None) -> PreTrainedModel:
    """The text model in f32, eager attention, ready to call."""
    folder = Path(checkpoint_dir)
    model: PreTrainedModel
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] in _DEEPSEEK_V3:
        model = _deepseek_v3(folder, config)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
    if latent_eps is not None:
        for name, module in model.named_modules():
            if name.endswith(("q_a_layernorm", "kv_a_layernorm")):
                module.variance_epsilon = latent_eps
    model.train(False)
    return model


def vision_reference(checkpoint_dir: Path | str, image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Image embeddings f32 [n_tok, text hidden size] of K2.5's MoonViT tower and projector.

    `image` is u8 RGB [height, width, 3] with sides that are multiples of patch size times merge
    size, so that no resizing is involved.
    """
    folder = Path(checkpoint_dir)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    processing = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    vision, projector = _moonvit(folder, config)
    patches, grid = _patches(image, processing["media_proc_cfg"])
    with torch.no_grad():
        pooled = vision(patches, grid_thw=grid).pooler_output
        embeddings: NDArray[np.float32] = projector(pooled).squeeze(1).numpy()
    return embeddings


def expanded_tensors(checkpoint_dir: Path | str) -> Tensors:
    """All tensors of a checkpoint by name, F32, INT4 groups and FP8 blocks expanded.

    The `language_model.` prefix is dropped; a quantised weight appears under its plain name
    (`...down_proj.weight`).
    """
    folder = Path(checkpoint_dir)
    stored: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            stored.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    result: Tensors = {}
    for name, tensor in stored.items():
        stem, _, leaf = name.rpartition(".")
        plain = name.removeprefix("language_model.")
        if leaf == "weight_packed":
            scale, shape = stored[f"{stem}.weight_scale"], stored[f"{stem}.weight_shape"]
            weight = f"{stem}.weight".removeprefix("language_model.")
            result[weight] = _expand_int4(tensor, scale, shape)
        elif leaf == "weight" and f"{name}_scale_inv" in stored:
            result[plain] = _expand_fp8(tensor, stored[f"{name}_scale_inv"])
        elif leaf not in ("weight_scale", "weight_shape", "weight_scale_inv"):
            result[plain] = tensor.float()
    return result


def _expand_int4(packed: torch.Tensor, scale: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(num_bits=4, group_size=32, strategy="group", symmetric=True),
    )
    # The result has the scale's type: in F32 the products are exact, in BF16 they are not.
    state = {"weight_packed": packed, "weight_scale": scale.float(), "weight_shape": shape}
    weight: torch.Tensor = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    return weight


def _expand_fp8(weight: torch.Tensor, scale_inv: torch.Tensor) -> torch.Tensor:
    rows, cols = weight.shape
    scale = scale_inv.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]
    return weight.float() * scale.float()


def _deepseek_v3(folder: Path, config: dict[str, Any]) -> PreTrainedModel:
    text = {**config.get("text_config", config)}
    for key in ("architectures", "model_type", "quantization_config", "dtype", "auto_map"):
        text.pop(key, None)
    rope = {"rope_type": "default", "rope_theta": text.pop("rope_theta", 10000.0)}
    scaling = {
        **(text.pop("rope_scaling", None) or {}),
        **(text.pop("rope_parameters", None) or {}),
    }
    if scaling:
        rope |= {"rope_type": scaling.pop("type", scaling.get("rope_type")), **scaling}
    eager: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**text, **eager, rope_parameters=rope))
    weights = {
        name: tensor
        for name, tensor in expanded_tensors(folder).items()
        if name.startswith(("model.", "lm_head."))
    }
    if model.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(_fuse_experts(weights), strict=True)
    return model


_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def _fuse_experts(weights: Tensors) -> Tensors:
    """transformers stacks experts: [E, 2I, D], gate rows before up rows, and [E, D, I]."""
    fused: Tensors = {}
    experts: dict[str, dict[int, Tensors]] = {}
    for name, tensor in weights.items():
        if match := _EXPERT.fullmatch(name):
            stem, index, part = match[1], int(match[2]), match[3]
            experts.setdefault(stem, {}).setdefault(index, {})[part] = tensor
        else:
            fused[name] = tensor
    for stem, by_id in experts.items():
        ordered = [by_id[i] for i in range(len(by_id))]
        gate_up = [torch.cat([expert["gate"], expert["up"]]) for expert in ordered]
        fused[f"{stem}.gate_up_proj"] = torch.stack(gate_up)
        fused[f"{stem}.down_proj"] = torch.stack([expert["down"] for expert in ordered])
    return fused


def _moonvit(
    folder: Path, config: dict[str, Any]
) -> tuple[Kimi_K25VisionModel, Kimi_K25MultimodalProjection]:
    stored = config["vision_config"]
    fields: dict[str, Any] = {
        "patch_size": stored["patch_size"],
        "pos_emb_height": stored["init_pos_emb_height"],
        "pos_emb_width": stored["init_pos_emb_width"],
        "pos_emb_time": stored["init_pos_emb_time"],
        "num_attention_heads": stored["vt_num_attention_heads"],
        "num_hidden_layers": stored["vt_num_hidden_layers"],
        "hidden_size": stored["vt_hidden_size"],
        "intermediate_size": stored["vt_intermediate_size"],
        "merge_kernel_size": tuple(stored["merge_kernel_size"]),
        "rope_parameters": {"rope_type": "axial", "rope_theta": 10000.0},
        "attn_implementation": "eager",
    }
    vision_config = Kimi_K25VisionConfig(**fields)
    joint = Kimi_K25Config(
        vision_config=vision_config,
        text_config={"model_type": "deepseek_v3", "hidden_size": stored["text_hidden_size"]},
        projection_hidden_size=stored["mm_hidden_size"],
        projection_layer_norm_eps=stored["projector_ln_eps"],
    )
    vision = Kimi_K25VisionModel(vision_config)
    projector = Kimi_K25MultimodalProjection(joint)  # type: ignore[no-untyped-call]
    tower: Tensors = {}
    head: Tensors = {}
    for name, tensor in expanded_tensors(folder).items():
        if name.startswith("vision_tower."):
            tower |= _vision_names(name, tensor, vision_config.num_attention_heads)
        elif name.startswith("mm_projector."):
            short = name.removeprefix("mm_projector.")
            head[short.replace("proj.0", "in_proj").replace("proj.2", "out_proj")] = tensor
    vision.load_state_dict(tower, strict=True)
    projector.load_state_dict(head, strict=True)
    return vision.train(False), projector.train(False)


_BLOCK_NAMES = {
    "norm0": "norm1",
    "norm1": "norm2",
    "mlp.fc0": "mlp.fc1",
    "mlp.fc1": "mlp.fc2",
    "wo": "attn.proj",
}


def _vision_names(name: str, tensor: torch.Tensor, n_heads: int) -> Tensors:
    """transformers' names of a MoonViT tensor; its rope wants q and k rows half-split per head."""
    short = name.removeprefix("vision_tower.").removeprefix("encoder.")
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", short)
    if block is None:
        return {short.replace("pos_emb.weight", "pos_emb.position_embeddings"): tensor}
    index, part, leaf = block.groups()
    if part != "wqkv":
        return {f"layers.{index}.{_BLOCK_NAMES[part]}.{leaf}": tensor}

    def half_split(rows: torch.Tensor) -> torch.Tensor:
        pairs = rows.reshape(n_heads, -1, 2, *rows.shape[1:])
        return pairs.transpose(1, 2).reshape_as(rows)

    q, k, v = tensor.chunk(3)
    stem = f"layers.{index}.attn"
    return {
        f"{stem}.q_proj.{leaf}": half_split(q),
        f"{stem}.k_proj.{leaf}": half_split(k),
        f"{stem}.v_proj.{leaf}": v,
    }


def _patches(image: NDArray[np.uint8], media: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised patches f32 [n_patch, 3, p, p] in row order, and their grid [[1, h, w]]."""
    size = media["patch_size"]
    height, width, _ = image.shape
    unit = size * media["merge_kernel_size"]
    if height % unit or width % unit:
        raise ValueError(f"image sides must be multiples of {unit}, got {height} x {width}")
    mean, std = torch.tensor(media["image_mean"]), torch.tensor(media["image_std"])
    pixels = ((torch.from_numpy(image).float() / 255 - mean) / std).permute(2, 0, 1)
    grid = pixels.reshape(3, height // size, size, width // size, size)
    patches = grid.permute(1, 3, 0, 2, 4).flatten(0, 1)
    return patches, torch.tensor([[1, height // size, width // size]])
