"""Names and shapes of POINTS1.5's published tensors in both layouts.

POINTS-Reader has the text model's tensors under transformers' names ("qwen2"), the chat model with 7B parameters those
of its own class ("custom_llama"), which fuses several of them. Shapes: G groups, n fused tensors, R rows of one.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...parts.modeling_vlm import VisionLanguageForConditionalGeneration
from .._safetensors import StoredTensors
from .._weights import Slice, own_tensors, published_name
from ..qwen_vl.names import get_slices as get_encoder_slices
from .config import CUSTOM_LLAMA, FAMILY, QWEN2, VISION_TYPE

# Regular expressions of names: buffers that follow from config.json, and the encoder's merger, which is not used.
BUFFERS = (
    r"llm\.(model|lm)\.(layers\.\d+\.(self_attn|attention)\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)",
    r"vision_encoder\.rotary_pos_emb\.inv_freq",
)
MERGER = r"vision_encoder\.merger\..+"
HEADS = {QWEN2: "llm.lm_head.weight", CUSTOM_LLAMA: "llm.embed_out.weight"}
EMBEDDINGS = {QWEN2: "llm.model.embed_tokens.weight", CUSTOM_LLAMA: "llm.lm.embed_in.weight"}

_ENCODER, _PUBLISHED_ENCODER = "model.vision_tower.", "vision_encoder."
_TEXT_LAYER = r"model\.language_model\.layers\.(\d+)\."
# Name in the composed model, and published name.
_PROJECTOR = (
    (r"model\.projector\.projection\.norm\.(.+)", r"vision_projector.ln_q.\1"),
    (r"model\.projector\.projection\.fc1\.(.+)", r"vision_projector.mlp.0.\1"),
    (r"model\.projector\.projection\.fc2\.(.+)", r"vision_projector.mlp.2.\1"),
)
_NAMES = {
    QWEN2: (
        *_PROJECTOR,
        (r"model\.language_model\.(.+)", r"llm.model.\1"),
        (r"lm_head\.(.+)", r"llm.lm_head.\1"),
    ),
    CUSTOM_LLAMA: (
        *_PROJECTOR,
        (r"model\.language_model\.embed_tokens\.(.+)", r"llm.lm.embed_in.\1"),
        (_TEXT_LAYER + r"self_attn\.q_proj\.(.+)", r"llm.lm.layers.\1.attention.query_dense.\2"),
        (_TEXT_LAYER + r"self_attn\.o_proj\.(.+)", r"llm.lm.layers.\1.attention.dense.\2"),
        (_TEXT_LAYER + r"mlp\.down_proj\.(.+)", r"llm.lm.layers.\1.mlp.dense_4h_to_h.\2"),
        (_TEXT_LAYER + r"((?:input|post_attention)_layernorm\..+)", r"llm.lm.layers.\1.\2"),
        (r"model\.language_model\.norm\.(.+)", r"llm.lm.final_layer_norm.\1"),
        (r"lm_head\.(.+)", r"llm.embed_out.\1"),
    ),
}


class Fused(NamedTuple):
    """Tensors of the model that are one published tensor: in each of G groups, the rows of one after the other.

    Attributes:
        names: The names of the model's tensors, `(R, ...)` each.
        groups: G; the published tensor `(n * R, ...)` has G groups of n times R / G rows.
    """

    names: tuple[str, ...]
    groups: int

    def split(self, fused: Tensor, index: int) -> Tensor:
        """One of the model's tensors, from the published one."""
        return fused.unflatten(0, (self.groups, len(self.names), -1))[:, index].flatten(0, 1)

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The published tensor, from the model's."""
        parts = [tensors[name] for name in self.names]
        kinds = {part.dtype for part in parts}
        if len(kinds) > 1:
            raise ValueError(f"`model` must have {' and '.join(self.names)} in one dtype, got {kinds}.")
        return torch.stack([part.unflatten(0, (self.groups, -1)) for part in parts], 1).flatten(0, 2)


class Names(NamedTuple):
    """The parts of a composed model by published name.

    Attributes:
        slices: Published tensors that are one of the model's.
        fused: Published tensors that are several of the model's.
    """

    slices: dict[str, Slice]
    fused: dict[str, Fused]

    def of(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """The published tensor of a name, from the model's tensors."""
        return self.slices[name].of(tensors) if name in self.slices else self.fused[name].join(tensors)

    def meta(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The published tensors on the meta device."""
        on_meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
        return {name: self.of(name, on_meta) for name in (*self.slices, *self.fused)}

    def split_slices(self) -> dict[str, Slice]:
        """The slices of all tensors, those of fused ones by [`part_name`]."""
        parts = {
            part_name(name, index): Slice(one)
            for name, fused in self.fused.items()
            for index, one in enumerate(fused.names)
        }
        return self.slices | parts


@dataclass
class SplitTensors(StoredTensors):
    """The tensors of a folder, with the parts of fused tensors in their place.

    Attributes:
        views: The part of the stored tensor, for the names of parts.
    """

    views: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Read tensors and parts file by file, as [`StoredTensors.read`] does."""
        for name, tensor in super().read(names):
            yield name, self.views[name](tensor) if name in self.views else tensor


def part_name(name: str, index: int) -> str:
    """The name of one of the tensors that a published tensor fuses."""
    return f"{name}[{index}]"


def split_tensors(stored: StoredTensors, fused: Mapping[str, Fused]) -> SplitTensors:
    """Put the parts of fused tensors in their place.

    Args:
        stored: The folder's tensors, with the shapes that the model needs.
        fused: Fused tensors by published name.
    """
    split = SplitTensors(stored.folder, {}, stored.absent)
    for name, tensor in stored.tensors.items():
        if name not in fused:
            split.tensors[name] = tensor
            continue
        count = len(fused[name].names)
        shape = (tensor.shape[0] // count, *tensor.shape[1:])
        for index in range(count):
            split.tensors[part_name(name, index)] = tensor._replace(shape=shape)
            split.views[part_name(name, index)] = partial(fused[name].split, index=index)
    return split


def get_names(model: VisionLanguageForConditionalGeneration, layout: str) -> Names:
    """The published names of a composed model's tensors.

    Args:
        model: The model, on any device.
        layout: "qwen2" or "custom_llama".

    Raises:
        ValueError: If the model has a tensor for which POINTS1.5 has no name.
    """
    encoder = get_encoder_slices(model.model.vision_tower, VISION_TYPE, _PUBLISHED_ENCODER)
    slices = {name: Slice(_ENCODER + part.name, part.get_view) for name, part in encoder.items()}
    own = own_tensors(model)
    fused = _get_fused(model, own) if layout == CUSTOM_LLAMA else {}
    done = {part.name for part in slices.values()} | {name for one in fused.values() for name in one.names}
    for name in own:
        if name not in done:
            slices[published_name(name, _NAMES[layout], FAMILY)] = Slice(name)
    return Names(slices, fused)


def _get_fused(model: VisionLanguageForConditionalGeneration, own: Collection[str]) -> dict[str, Fused]:
    """The fused tensors of the layout "custom_llama"."""
    text: Any = model.config.text_config
    heads, groups = text.num_attention_heads, text.num_key_value_heads
    attention: tuple[str, Sequence[str], int] = ("attention.key_value_dense", ("k_proj", "v_proj"), groups)
    if groups == heads:
        attention = ("attention.query_key_value", ("q_proj", "k_proj", "v_proj"), heads)
    fused = {}
    for layer in range(text.num_hidden_layers):
        prefix = f"model.language_model.layers.{layer}."
        published, parts, count = attention
        for kind in ("weight", "bias"):
            names = tuple(f"{prefix}self_attn.{part}.{kind}" for part in parts)
            if names[0] in own:
                fused[f"llm.lm.layers.{layer}.{published}.{kind}"] = Fused(names, count)
        # The gate is second: up * silu(gate).
        names = (f"{prefix}mlp.up_proj.weight", f"{prefix}mlp.gate_proj.weight")
        fused[f"llm.lm.layers.{layer}.mlp.dense_h_to_4h.weight"] = Fused(names, 1)
    return fused
