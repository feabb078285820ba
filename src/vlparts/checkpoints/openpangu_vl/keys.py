"""Names and shapes: which tensors of a published openPangu-VL are which tensors of our parts.

The published names are those of openPangu-VL-7B's files: `visual.*`, `model.*` for the text model, `lm_head.*`.
Shapes: D width, C channels, T frames and P side of a patch.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from ...parts.modeling_windowfree import WindowFreeViTModel
from .._filling import own_tensors

TOWER = "model.vision_tower."
PATCHES = f"{TOWER}patch_embedding.projection.weight"
# What an encoder is not made of: mergers, projection and text model.
BESIDE_THE_ENCODER = ("visual.merger.", "visual.vision_projection.", "model.", "lm_head.")

_BLOCK = r"model\.vision_tower\.layers\.(\d+)\."
_MERGER = r"model\.projector\.projection\.merger\.mergers\.(\d+)\."
# Ours, in the composed model, and published.
_NAMES = (
    (r"model\.vision_tower\.patch_embedding\.projection\.(.+)", r"visual.patch_embed.proj.\1"),
    (_BLOCK + r"self_attn\.qkv\.(.+)", r"visual.blocks.\1.attn.qkv.\2"),
    (_BLOCK + r"self_attn\.o_proj\.(.+)", r"visual.blocks.\1.attn.proj.\2"),
    (_BLOCK + r"((?:norm1|norm2|mlp)\..+)", r"visual.blocks.\1.\2"),
    (r"model\.vision_tower\.norm\.(.+)", r"visual.final_layernorm.\1"),
    (_MERGER + r"norm\.(.+)", r"visual.merger.\1.ln_q.\2"),
    (_MERGER + r"fc1\.(.+)", r"visual.merger.\1.mlp.0.\2"),
    (_MERGER + r"fc2\.(.+)", r"visual.merger.\1.mlp.2.\2"),
    (r"model\.projector\.projection\.output\.fc\.(.+)", r"visual.vision_projection.fc1.\1"),
    (r"model\.language_model\.(.+)", r"model.\1"),
    (r"(lm_head\..+)", r"\1"),
)
_QKV = re.compile(r"(visual\.blocks\.\d+\.attn\.)qkv(\..+)")
# The beginnings that transformers gives to the names when it saves the published model.
_NESTED = {"model.visual.": "visual.", "model.language_model.": "model."}


class Target(NamedTuple):
    """One of our tensors, and what it is made of.

    Attributes:
        name: Its name in the part's state dict.
        sources: The published names, without the beginnings of nested models; three where queries, keys and values are
            split.
        shape: The published shape of each of them.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]


def flat_name(name: str) -> str:
    """A published name without the beginning of a nested model."""
    for nested, flat in _NESTED.items():
        if name.startswith(nested):
            return flat + name.removeprefix(nested)
    return name


def published_name(name: str) -> str:
    """The published name of a tensor of our composed model.

    Raises:
        ValueError: If it has none.
    """
    for pattern, published in _NAMES:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(published)
    raise ValueError(f"`model` has a tensor {name!r}, for which openPangu-VL has no name.")


def get_targets(model: PreTrainedModel, is_split: Callable[[str], bool]) -> list[Target]:
    """What each tensor of a model is made of.

    Args:
        model: A [`WindowFreeViTModel`] or the composed model, on any device.
        is_split: Whether the queries, keys and values with the published name of the fused tensor are split.
    """
    root = TOWER if isinstance(model, WindowFreeViTModel) else ""
    vision = model.config if root else model.config.vision_config
    patch = (vision.num_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    targets = []
    for name, tensor in own_tensors(model).items():
        published, shape = published_name(root + name), tuple(tensor.shape)
        if root + name == PATCHES:
            shape = (shape[0], *patch)
        sources = split_names(published) if is_split(published) else (published,)
        if len(sources) > 1:
            shape = (shape[0] // len(sources), *shape[1:])
        targets.append(Target(name, sources, shape))
    return targets


def split_names(name: str) -> tuple[str, ...]:
    """The names of queries, keys and values that are split; other tensors keep theirs."""
    match = _QKV.fullmatch(name)
    return (name,) if match is None else tuple(f"{match[1]}{part}{match[2]}" for part in "qkv")


def join_sources(parts: list[Tensor], name: str) -> Tensor:
    """Make one of our tensors from its sources; `(D, C, T, P, P)` patch weights become `(D, C*T*P*P)`."""
    tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
    return tensor.flatten(1) if PATCHES.endswith(name) else tensor
