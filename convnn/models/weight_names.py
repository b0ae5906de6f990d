"""The names that torchvision and Hugging Face give to the weights of ResNets and ViTs, and timm's names for them.

Both directions of timm's own renames (older timm files, DINOv2's first files, VGG) are timm's: see ``weights``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

State = dict[str, Tensor]
Renamed = str | None
"""timm's name of a weight; None: timm has no such weight."""

_RULES = list[tuple[str, Renamed]]

_TORCHVISION_VIT: _RULES = [
    (r"class_token", "cls_token"),
    (r"conv_proj\.(.+)", r"patch_embed.proj.\1"),
    (r"encoder\.pos_embedding", "pos_embed"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.ln_(\d)\.(.+)", r"blocks.\1.norm\2.\3"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.in_proj_(.+)", r"blocks.\1.attn.qkv.\2"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.out_proj\.(.+)", r"blocks.\1.attn.proj.\2"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:0|linear_1)\.(.+)", r"blocks.\1.mlp.fc1.\2"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:3|linear_2)\.(.+)", r"blocks.\1.mlp.fc2.\2"),
    (r"encoder\.ln\.(.+)", r"norm.\1"),
    (r"heads\.head\.(.+)", r"{head}.\1"),
]
"""torchvision's ``VisionTransformer``; its ResNets and their relatives have timm's names."""

_HF_EMBEDDINGS: _RULES = [
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.distillation_token", "dist_token"),
    (r"embeddings\.mask_token", None),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.(.+)", r"patch_embed.proj.\1"),
    (r"layernorm\.(.+)", r"norm.\1"),
    (r"pooler\..+", None),
    (r"(?:cls_)?classifier\.(.+)", r"{head}.\1"),
    (r"distillation_classifier\.(.+)", r"head_dist.\1"),
    (r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(.+)", r"blocks.\1.attn.\2.\3"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(.+)", r"blocks.\1.attn.proj.\2"),
]

_HF_VIT: _RULES = [
    *_HF_EMBEDDINGS,
    (r"encoder\.layer\.(\d+)\.layernorm_before\.(.+)", r"blocks.\1.norm1.\2"),
    (r"encoder\.layer\.(\d+)\.layernorm_after\.(.+)", r"blocks.\1.norm2.\2"),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.(.+)", r"blocks.\1.mlp.fc1.\2"),
    (r"encoder\.layer\.(\d+)\.output\.dense\.(.+)", r"blocks.\1.mlp.fc2.\2"),
]
"""``ViTModel`` and ``DeiTModel`` of transformers, with and without a classifier."""

_HF_DINOV2: _RULES = [
    *_HF_EMBEDDINGS,
    (r"embeddings\.register_tokens", "reg_token"),
    (r"encoder\.layer\.(\d+)\.norm(\d)\.(.+)", r"blocks.\1.norm\2.\3"),
    (r"encoder\.layer\.(\d+)\.layer_scale(\d)\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"encoder\.layer\.(\d+)\.mlp\.(?:fc1|weights_in)\.(.+)", r"blocks.\1.mlp.fc1.\2"),
    (r"encoder\.layer\.(\d+)\.mlp\.(?:fc2|weights_out)\.(.+)", r"blocks.\1.mlp.fc2.\2"),
]
"""``Dinov2Model`` and ``Dinov2WithRegistersModel``."""

_HF_RESNET: _RULES = [
    (r"embedder\.embedder\.convolution\.(.+)", r"conv1.\1"),
    (r"embedder\.embedder\.normalization\.(.+)", r"bn1.\1"),
    (r"encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.convolution\.(.+)", r"layer{1+1}.\2.downsample.0.\3"),
    (r"encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.normalization\.(.+)", r"layer{1+1}.\2.downsample.1.\3"),
    (r"encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.convolution\.(.+)", r"layer{1+1}.\2.conv{3+1}.\4"),
    (r"encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.normalization\.(.+)", r"layer{1+1}.\2.bn{3+1}.\4"),
    (r"classifier\.1\.(.+)", r"{head}.\1"),
]
"""``ResNetModel`` of transformers, with and without a classifier."""

_HF_PREFIXES = ("vit.", "deit.", "dinov2.", "dinov2_with_registers.", "resnet.")


def timm_names(state: Mapping[str, Tensor], head: str) -> tuple[State, str]:
    """Return weights under timm's names, and whose names they had.

    Args:
        state: as a file has it, without wrappers; other names than those known here are left as they are.
        head: timm's name of the classifier.

    Returns:
        The weights, and ``timm``, ``torchvision`` or ``Hugging Face``.
    """
    if "encoder.pos_embedding" in state:
        return _renamed(state, _TORCHVISION_VIT, head), "torchvision"
    bare = {_without(name, _HF_PREFIXES): tensor for name, tensor in state.items()}
    if any(name.startswith("encoder.stages.0.layers.0.layer.0.convolution.") for name in bare):
        return _renamed(bare, _HF_RESNET, head), "Hugging Face"
    if "embeddings.patch_embeddings.projection.weight" not in bare:
        return dict(state), "timm"
    dino = any(name.endswith(".layer_scale1.lambda1") for name in bare)
    found = _joined(_renamed(bare, _HF_DINOV2 if dino else _HF_VIT, head))
    if "reg_token" in found:  # as timm has it: positions for the patches alone, that of CLS in the token
        found["cls_token"] = found["cls_token"] + found["pos_embed"][:, :1]
        found["pos_embed"] = found["pos_embed"][:, 1:]
    return found, "Hugging Face"


def _without(name: str, prefixes: tuple[str, ...]) -> str:
    return next((name[len(prefix) :] for prefix in prefixes if name.startswith(prefix)), name)


def _renamed(state: Mapping[str, Tensor], rules: _RULES, head: str) -> State:
    """Return a state with the names that the first fitting rule gives; names that none fits stay."""
    out: State = {}
    for name, tensor in state.items():
        for pattern, new in rules:
            found = re.fullmatch(pattern, name)
            if found:
                if new is not None:
                    out[found.expand(_counted(new, found)).replace("{head}", head)] = tensor
                break
        else:
            out[name] = tensor
    return out


def _counted(new: str, found: re.Match[str]) -> str:
    """Return a template whose ``{1+1}`` is the first group's number plus one."""
    one_more: Callable[[re.Match[str]], str] = lambda at: str(int(found.group(int(at.group(1)))) + 1)  # noqa: E731
    return re.sub(r"\{(\d)\+1\}", one_more, new)


def _joined(state: State) -> State:
    """Return a state whose queries, keys and values are one projection each, as timm has them."""
    out: State = {}
    for name, tensor in state.items():
        found = re.fullmatch(r"(blocks\.\d+\.attn)\.(query|key|value)\.(.+)", name)
        if not found:
            out[name] = tensor
            continue
        parts = [state.get(f"{found.group(1)}.{part}.{found.group(3)}") for part in ("query", "key", "value")]
        if any(part is None for part in parts):
            out[name] = tensor  # told as a name that timm lacks
        elif found.group(2) == "query":
            out[f"{found.group(1)}.qkv.{found.group(3)}"] = torch.cat([part for part in parts if part is not None])
    return out
