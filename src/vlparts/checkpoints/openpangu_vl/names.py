"""Names and shapes of openPangu-VL's published tensors.

The names are those of openPangu-VL-7B's files: `visual.*`, `model.*` for the text model, `lm_head.*`.
Shapes: D width, C channels, T frames and P side of a patch.
"""

import re
from collections.abc import Callable
from functools import partial

from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from ...parts.modeling_windowfree import WindowFreeViTModel
from .._safetensors import StoredTensors
from .._weights import ROTARY_BUFFERS, Slice, own_tensors, published_name
from .config import FAMILY

# Regular expressions of names: tensors that are not the encoder's (mergers, projection, text model), and buffers that
# follow from config.json.
NOT_ENCODER = (r"(visual\.merger|visual\.vision_projection|model|lm_head)\..*",)
BUFFERS = (ROTARY_BUFFERS, r"visual\.rotary_pos_emb\.inv_freq")

_ENCODER = "model.vision_tower."
_PATCH_EMBEDDING = f"{_ENCODER}patch_embedding.projection.weight"
_BLOCK = r"model\.vision_tower\.layers\.(\d+)\."
_MERGER = r"model\.projector\.projection\.merger\.mergers\.(\d+)\."
# Name in the composed model, and published name.
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
# Prefixes that transformers writes when it saves the published model, and the published ones.
_NESTED = {"model.visual.": "visual.", "model.language_model.": "model."}


def without_nesting(name: str) -> str:
    """A name with the published prefix instead of the one that transformers writes."""
    for nested, published in _NESTED.items():
        if name.startswith(nested):
            return published + name.removeprefix(nested)
    return name


def get_stored_slices(model: PreTrainedModel, stored: StoredTensors) -> dict[str, Slice]:
    """The part of a model that each published tensor holds; queries, keys and values fused or split as in a folder.

    Args:
        model: A [`WindowFreeViTModel`] or the composed model, on any device.
        stored: The folder's tensors.
    """
    found = stored.tensors.keys()
    return get_slices(model, lambda name: name not in found and not found.isdisjoint(_split_names(name)))


def get_slices(model: PreTrainedModel, is_split: Callable[[str], bool]) -> dict[str, Slice]:
    """The part of a model that each published tensor holds, by published name.

    Args:
        model: As in [`get_stored_slices`].
        is_split: Whether the files have queries, keys and values one by one instead of the tensor with this published
            name.
    """
    prefix = _ENCODER if isinstance(model, WindowFreeViTModel) else ""
    vision = model.config if prefix else model.config.vision_config
    patch = (vision.num_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    slices: dict[str, Slice] = {}
    for name in own_tensors(model):
        published = published_name(prefix + name, _NAMES, FAMILY)
        if prefix + name == _PATCH_EMBEDDING:
            slices[published] = Slice(name, partial(_unflatten, shape=patch))
        elif _QKV.fullmatch(published) and is_split(published):
            for index, part in enumerate(_split_names(published)):
                slices[part] = Slice(name, partial(_third, index=index))
        else:
            slices[published] = Slice(name)
    return slices


def _split_names(name: str) -> list[str]:
    """The names of queries, keys and values, from the name of the fused tensor; [] for other names."""
    match = _QKV.fullmatch(name)
    return [] if match is None else [f"{match[1]}{part}{match[2]}" for part in "qkv"]


def _unflatten(weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Patch weights `(D, C*T*P*P)` as `(D, C, T, P, P)`."""
    return weight.unflatten(1, shape)


def _third(fused: Tensor, index: int) -> Tensor:
    """Queries, keys or values, from weight or bias `(3D, ...)`."""
    return fused.chunk(3)[index]
