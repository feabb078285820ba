"""Names of the published tensors of Qwen2-VL's, Qwen2.5-VL's and Qwen3-VL's vision towers.

Shapes: D width, C channels, T frames and P side of a patch.
"""

import re
from functools import partial

from torch import Tensor

from ...parts.modeling_windowfree import WindowFreeViTModel
from .._weights import Slice, own_tensors

# Regular expressions of the names of tensors that are not the encoder's.
MERGERS = r"visual\.(merger|deepstack_merger_list\.\d+)\..+"
TEXT_MODEL = r"(model|language_model|lm_head)\..+"
# A buffer of old exports that follows from config.json.
BUFFER = r"visual\.rotary_pos_emb\.inv_freq"
# Prefix that transformers writes, and the published one.
_NESTED, _PUBLISHED = "model.visual.", "visual."
_PATCH_EMBEDDING = "patch_embedding.projection.weight"
# Our name, and published name.
_NAMES = (
    (r"patch_embedding\.projection\.(.+)", r"patch_embed.proj.\1"),
    (r"position_table\.(.+)", r"pos_embed.\1"),
    (r"layers\.(\d+)\.self_attn\.qkv\.(.+)", r"blocks.\1.attn.qkv.\2"),
    (r"layers\.(\d+)\.self_attn\.o_proj\.(.+)", r"blocks.\1.attn.proj.\2"),
    (r"layers\.(\d+)\.(.+)", r"blocks.\1.\2"),
)
# Published names of the layers of an MLP; the others have ours.
_MLP = {
    "qwen2_vl": {"up_proj": "fc1", "down_proj": "fc2"},
    "qwen3_vl": {"up_proj": "linear_fc1", "down_proj": "linear_fc2"},
    "qwen3_vl_moe": {"up_proj": "linear_fc1", "down_proj": "linear_fc2"},
}
# Published names of the parts of a merger, by those of a `BlockMerger`.
_MERGER = {
    "qwen2_vl": {"norm": "ln_q", "fc1": "mlp.0", "fc2": "mlp.2"},
    "qwen2_5_vl": {"norm": "ln_q", "fc1": "mlp.0", "fc2": "mlp.2"},
    "qwen3_vl": {"norm": "norm", "fc1": "linear_fc1", "fc2": "linear_fc2"},
    "qwen3_vl_moe": {"norm": "norm", "fc1": "linear_fc1", "fc2": "linear_fc2"},
}


def without_nesting(name: str) -> str:
    """A name with the published prefix instead of the one that transformers writes."""
    return _PUBLISHED + name.removeprefix(_NESTED) if name.startswith(_NESTED) else name


def get_slices(model: WindowFreeViTModel, model_type: str, prefix: str = _PUBLISHED) -> dict[str, Slice]:
    """The part of an encoder that each published tensor holds, by published name.

    Args:
        model: The encoder, on any device.
        model_type: The published model's.
        prefix: Prefix of the published names.
    """
    config = model.config
    patch = (config.num_channels, config.temporal_patch_size, config.patch_size, config.patch_size)
    slices = {}
    for name in own_tensors(model):
        view = partial(_unflatten, shape=patch) if name == _PATCH_EMBEDDING else None
        slices[prefix + _published_name(name, model_type)] = Slice(name, view)
    return slices


def get_merger_names(model_type: str) -> dict[str, str]:
    """The published name of the tensors of the merger, by their names in a [`BlockMerger`]."""
    tensors = ["norm.weight", *(["norm.bias"] if model_type != "qwen2_5_vl" else [])]
    tensors += [f"{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")]
    published = {}
    for name in tensors:
        part, _, kind = name.partition(".")
        published[name] = f"{_PUBLISHED}merger.{_MERGER[model_type][part]}.{kind}"
    return published


def _published_name(name: str, model_type: str) -> str:
    for pattern, published in _NAMES:
        match = re.fullmatch(pattern, name)
        if match:
            name = match.expand(published)
            break
    for ours, theirs in _MLP.get(model_type, {}).items():
        name = name.replace(f".mlp.{ours}.", f".mlp.{theirs}.")
    return name


def _unflatten(weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Patch weights `(D, C*T*P*P)` as `(D, C, T, P, P)`."""
    return weight.unflatten(1, shape)
