"""The config.json of Qwen2-VL, Qwen2.5-VL and Qwen3-VL to the configuration of our encoder."""

import math
from pathlib import Path
from typing import Any, NamedTuple

from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig

from ...parts.configuration_windowfree import WindowFreeViTConfig
from .. import _folder


class _Model(NamedTuple):
    """What the folders of a model type have: the configuration of the tower, our preset, and architectures."""

    vision_config: type[PreTrainedConfig]
    preset: str
    architectures: tuple[str, ...]


# The vision towers of the models with experts are those of the others.
MODELS = {
    "qwen2_vl": _Model(Qwen2VLVisionConfig, "qwen2_vl_vit", ("Qwen2VLForConditionalGeneration", "Qwen2VLModel")),
    "qwen2_5_vl": _Model(
        Qwen2_5_VLVisionConfig, "qwen2_5_vl_vit", ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLModel")
    ),
    "qwen3_vl": _Model(Qwen3VLVisionConfig, "qwen3_vl_vit", ("Qwen3VLForConditionalGeneration", "Qwen3VLModel")),
    "qwen3_vl_moe": _Model(
        Qwen3VLVisionConfig, "qwen3_vl_vit", ("Qwen3VLMoeForConditionalGeneration", "Qwen3VLMoeModel")
    ),
}
# Published name: our name.
_FIELDS = {
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "in_channels": "num_channels",
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "spatial_merge_size": "spatial_merge_size",
    "hidden_act": "hidden_act",
    "initializer_range": "initializer_range",
}
_INTEGERS = ("depth", "num_heads", "in_channels", "patch_size", "temporal_patch_size", "spatial_merge_size")
_WIDTHS = ("hidden_size", "embed_dim", "mlp_ratio", "intermediate_size", "window_size", "num_position_embeddings")


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json.

    Raises:
        ValueError: If there is none, or if it belongs to another model or to quantized weights.
    """
    path = folder / _folder.CONFIG
    # Without a file, the call below raises the error.
    model_type = _folder.read_json(path).get("model_type") if path.is_file() else "qwen2_vl"
    if model_type not in tuple(MODELS):
        raise ValueError(f"`folder` must have one of the model_types {', '.join(MODELS)}, got {model_type!r}.")
    return _folder.read_config(folder, model_type, MODELS[model_type].architectures)


def get_vision_config(model_type: str, fields: Any, **changes: Any) -> WindowFreeViTConfig:
    """Build the encoder's configuration.

    Args:
        model_type: One of `MODELS`.
        fields: The published "vision_config"; fields that are left out have transformers' values.
        **changes: Fields that other files decide.

    Raises:
        ValueError: If a field does not fit, or if the encoder has an option that ours does not have.
    """
    if not isinstance(fields, dict):
        raise ValueError("`folder` must have a config.json with a 'vision_config'.")
    inner = fields.get("model_type")
    if inner not in (None, model_type, f"{model_type}_vision"):
        raise ValueError(f"`folder` must have a vision_config of the model_type {model_type!r}, got {inner!r}.")
    # Old files name the channels otherwise.
    channels = {} if fields.get("in_chans") is None else {"in_channels": fields["in_chans"]}
    known = {name: value for name, value in {**channels, **fields}.items() if name not in ("model_type", "in_chans")}
    native = _folder.build_config(MODELS[model_type].vision_config, "vision_config", **known)
    values = native.to_dict()
    _folder.require_fields(values, "vision_config", *_FIELDS)
    _folder.require_numbers(values, "vision_config", *_INTEGERS, *_WIDTHS, integers=True)
    _folder.require_known(values, "vision_config", "hidden_act", ACT2FN)
    return _folder.build_config(
        WindowFreeViTConfig.from_preset,
        "vision_config",
        name=MODELS[model_type].preset,
        **{ours: values[published] for published, ours in _FIELDS.items()},
        rotary_theta=_get_rotary_theta(values),
        **_get_own_fields(native),
        **changes,
    )


def _get_own_fields(native: Any) -> dict[str, Any]:
    """The fields that not all of the family have."""
    if isinstance(native, Qwen2VLVisionConfig):
        width = native.embed_dim
        return {"hidden_size": width, "intermediate_size": width * native.mlp_ratio}
    sizes = {"hidden_size": native.hidden_size, "intermediate_size": native.intermediate_size}
    if isinstance(native, Qwen2_5_VLVisionConfig):
        full = list(native.fullatt_block_indexes)
        pattern = {"window_size": native.window_size, "full_attention_layers": full}
        return {**sizes, "attention_pattern": "full" if set(full) == set(range(native.depth)) else pattern}
    side = math.isqrt(max(native.num_position_embeddings, 0))
    if side**2 != native.num_position_embeddings:
        raise ValueError(
            "`folder` must have a config.json whose num_position_embeddings is a square in vision_config, got "
            f"{native.num_position_embeddings}."
        )
    return {**sizes, "position_grid_size": side, "feature_layers": [-1, *native.deepstack_visual_indexes]}


def _get_rotary_theta(values: dict[str, Any]) -> float:
    rope = values.get("rope_parameters")
    if not isinstance(rope, dict) or rope.get("rope_type") != "axial" or rope.keys() != {"rope_type", "rope_theta"}:
        raise ValueError(
            "`folder` must have a config.json whose rope_parameters are axial, with a rope_theta alone, in "
            f"vision_config, got {rope!r}."
        )
    _folder.require_numbers(rope, "rope_parameters", "rope_theta")
    return float(rope["rope_theta"])
