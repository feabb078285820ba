"""The config.json of POINTS1.5 to the configuration of a composed model and back.

"llm_config" has the fields of transformers' Qwen2 (POINTS-Reader), or those of the published class `CustomLlama` (the
chat model with 7B parameters). All fields that decide what is computed are required: the defaults of `CustomLlama` are
not those of its checkpoint.
"""

import os
from pathlib import Path
from typing import Any, cast

from transformers import LlamaConfig, Qwen2Config

from ...parts.configuration_vlm import VisionLanguageConfig
from ...parts.configuration_windowfree import WindowFreeViTConfig
from .. import _folder
from ..qwen_vl.config import get_vision_config

PathLike = str | os.PathLike[str]

FAMILY = "POINTS1.5"
MODEL_TYPE = "pointsv1.5_chat"
ARCHITECTURE = "POINTSV15ChatModel"
PROJECTOR = "points_merger"
QWEN2, CUSTOM_LLAMA = "qwen2", "custom_llama"
LAYOUTS = (QWEN2, CUSTOM_LLAMA)
VISION_TYPE = "qwen2_vl"
VISION_PRESET = "qwen2_vl_vit"

# Published name: our name, by layout.
_TEXT_FIELDS = {
    QWEN2: {
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_hidden_layers": "num_hidden_layers",
        "num_attention_heads": "num_attention_heads",
        "num_key_value_heads": "num_key_value_heads",
        "rms_norm_eps": "rms_norm_eps",
        "max_position_embeddings": "max_position_embeddings",
        "vocab_size": "vocab_size",
        "tie_word_embeddings": "tie_word_embeddings",
    },
    CUSTOM_LLAMA: {
        "hidden_size": "hidden_size",
        "ffn_hidden_size": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "num_attention_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "layernorm_epsilon": "rms_norm_eps",
        "max_position_embeddings": "max_position_embeddings",
        "vocab_size": "vocab_size",
        "tie_word_embeddings": "tie_word_embeddings",
    },
}
_NOT_INTEGERS = ("rms_norm_eps", "layernorm_epsilon", "tie_word_embeddings")
_OPTIONAL_TEXT_FIELDS = ("initializer_range", "bos_token_id", "eos_token_id", "pad_token_id")
_THETA = {QWEN2: "rope_theta", CUSTOM_LLAMA: "rotary_emb_base"}
_ACTIVATION = {QWEN2: "silu", CUSTOM_LLAMA: "swiglu"}
# Options with one value that the text model has. Those of Qwen2 may be left out.
_FIXED: dict[str, dict[str, Any]] = {
    QWEN2: {"use_sliding_window": False, "rope_scaling": None},
    CUSTOM_LLAMA: {
        "rotary_pct": 1,
        "rotary_compress": 1,
        "out_proj_bias": False,
        "mlp_fc1_bias": False,
        "mlp_fc2_bias": False,
    },
}
# The published file is not known; the sizes are those of Qwen2.5-7B-Instruct and Qwen2.5-3B-Instruct.
_QWEN2_5 = {
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "eos_token_id": 151645,
}
_PRESETS: dict[str, dict[str, Any]] = {
    "points_1_5_7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "points_reader": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
}
IMAGE_TOKEN, IMAGE_TOKEN_ID = "<|image_pad|>", 151655


def points15_presets() -> tuple[str, ...]:
    """Return the names of the presets of [`points15_config`]."""
    return tuple(_PRESETS)


def points15_config(name: str) -> VisionLanguageConfig:
    """Build the configuration of a complete POINTS1.5, for new weights.

    "points_1_5_7b" is POINTS1.5 with Qwen2.5-7B-Instruct (arXiv 2412.08443), "points_reader" is POINTS-Reader with
    Qwen2.5-3B-Instruct. The sizes are those of the encoder and the text models that the publications name.

    Args:
        name: One of [`points15_presets`].

    Raises:
        ValueError: If there is no preset of this name.
    """
    if name not in _PRESETS:
        raise ValueError(f"`name` must be one of {', '.join(_PRESETS)}, got {name!r}.")
    return VisionLanguageConfig(
        vision_config=WindowFreeViTConfig.from_preset(VISION_PRESET),
        text_config=Qwen2Config(**_QWEN2_5, **_PRESETS[name]),
        projector_type=PROJECTOR,
        image_token_id=IMAGE_TOKEN_ID,
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json.

    Raises:
        ValueError: If there is none, or if it belongs to another model or to quantized weights.
    """
    return _folder.read_config(folder, MODEL_TYPE, (ARCHITECTURE,))


def get_layout(config: dict[str, Any]) -> str:
    """The layout of the text model's fields and tensors, one of `LAYOUTS`.

    Args:
        config: The published fields, from [`read_config`].

    Raises:
        ValueError: If "llm_config" is missing or of another model type.
    """
    fields = config.get("llm_config")
    if not isinstance(fields, dict):
        raise ValueError(f"`folder` must have a config.json whose llm_config is an object, got {fields!r}.")
    _folder.require_known(fields, "llm_config", "model_type", LAYOUTS)
    return str(fields["model_type"])


def get_text_config(config: dict[str, Any]) -> Qwen2Config | LlamaConfig:
    """Build the text model's configuration: Qwen2's, or Llama's for attention without biases.

    Args:
        config: The published fields, from [`read_config`].

    Raises:
        ValueError: If a field is missing, or if the text model has an option that the native models do not have.
    """
    layout = get_layout(config)
    fields, names, fixed = config["llm_config"], _TEXT_FIELDS[layout], _FIXED[layout]
    required = [*names, _THETA[layout], "hidden_act"]
    if layout == CUSTOM_LLAMA:
        required += [*fixed, "qkv_proj_bias"]
    elif fields.get("rope_parameters") is not None:
        fields = fields | _rotary_fields(fields["rope_parameters"])
    _folder.require_fields(fields, "llm_config", *required)
    _folder.require_numbers(
        fields, "llm_config", *(name for name in names if name not in _NOT_INTEGERS), integers=True
    )
    _folder.require_numbers(fields, "llm_config", _THETA[layout], "rms_norm_eps", "layernorm_epsilon")
    if layout == CUSTOM_LLAMA:
        _check_norm(fields)
    for name, value in {**fixed, "hidden_act": _ACTIVATION[layout]}.items():
        if fields.get(name, value) != value:
            raise ValueError(
                f"`folder` must have a config.json with {name} {value!r} in llm_config, got {fields[name]!r}."
            )
    for name in ("tie_word_embeddings", "qkv_proj_bias"):
        if not isinstance(fields.get(name, True), bool):
            raise ValueError(
                f"`folder` must have a config.json whose {name} is true or false in llm_config, got {fields[name]!r}."
            )
    _folder.get_head_dim(fields, "llm_config")
    known = {ours: fields[published] for published, ours in names.items()}
    heads, groups = known["num_attention_heads"], known["num_key_value_heads"]
    if groups < 1 or heads % groups:
        raise ValueError(
            "`folder` must have a config.json whose number of key and value heads divides that of the queries in "
            f"llm_config, got {groups} and {heads}."
        )
    has_biases = layout == QWEN2 or fields["qkv_proj_bias"]
    # A token that the file does not name is none, not that of Llama's defaults.
    optional = {name: fields.get(name) for name in _OPTIONAL_TEXT_FIELDS if name != "initializer_range"}
    if fields.get("initializer_range") is not None:
        optional["initializer_range"] = fields["initializer_range"]
    return _folder.build_config(
        Qwen2Config if has_biases else LlamaConfig,
        "llm_config",
        **known,
        **optional,
        hidden_act="silu",
        rope_parameters={"rope_type": "default", "rope_theta": float(fields[_THETA[layout]])},
    )


def _rotary_fields(rope: Any) -> dict[str, Any]:
    """The published fields of transformers' newer "rope_parameters"."""
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"`folder` must have a config.json whose rope_parameters are the default ones in llm_config, got {rope!r}."
        )
    return {"rope_theta": rope.get("rope_theta")}


def _check_norm(fields: dict[str, Any]) -> None:
    """Check that "rms_norm", which takes precedence, or "norm_type" is that of an RMS normalization."""
    name = "norm_type" if fields.get("rms_norm") is None else "rms_norm"
    _folder.require_fields(fields, "llm_config", name)
    if fields[name] not in ("rms_norm", True):
        raise ValueError(f"`folder` must have a text model with RMS normalization, got {name} {fields[name]!r}.")


def get_composed_config(config: dict[str, Any], image_token_id: int, **changes: Any) -> VisionLanguageConfig:
    """Build the configuration of the composed model.

    Args:
        config: The published fields, from [`read_config`].
        image_token_id: Id of the image placeholder, which config.json does not have.
        **changes: Fields of the encoder that other files decide.

    Raises:
        ValueError: If a field is missing, or if the model has an option that ours does not have.
    """
    return _folder.build_config(
        VisionLanguageConfig,
        "",
        vision_config=get_vision_config(VISION_TYPE, config.get("vision_config"), **changes),
        text_config=get_text_config(config),
        projector_type=PROJECTOR,
        image_token_id=image_token_id,
    )


def published_config(config: VisionLanguageConfig, layout: str, merger_width: int) -> dict[str, Any]:
    """The fields of config.json.

    Args:
        config: The composed model's.
        layout: One of `LAYOUTS`.
        merger_width: Output width of the encoder's unused merger.

    Raises:
        ValueError: If the model has parts or options that POINTS1.5 does not have; names them.
    """
    vision, text = cast(Any, config.vision_config), cast(Any, config.text_config)
    if not isinstance(vision, WindowFreeViTConfig) or type(text) not in (Qwen2Config, LlamaConfig):
        raise ValueError(
            "`model` must be composed of a WindowFreeViTModel and a Qwen2 or Llama model, got configurations "
            f"{type(vision).__name__} and {type(text).__name__}."
        )
    _folder.check_config(config, {"projector_type": PROJECTOR, "vision_feature_layer": -1}, FAMILY)
    _folder.check_config(config, {"tie_word_embeddings": text.tie_word_embeddings}, FAMILY)
    options = config.projector_options or {}
    if options.get("eps", 1e-6) != 1e-6:
        raise ValueError(f"`model` must have `projector_options` with eps 1e-6 for {FAMILY}, got {options}.")
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vision_config": _published_vision_config(vision, merger_width),
        "llm_config": _published_text_config(text, layout),
    }


def _published_vision_config(vision: WindowFreeViTConfig, merger_width: int) -> dict[str, Any]:
    preset = WindowFreeViTConfig.from_preset(VISION_PRESET)
    fixed = (
        "norm_type",
        "rms_norm_eps",
        "final_norm",
        "gated_mlp",
        "qkv_bias",
        "mlp_bias",
        "patch_bias",
        "position_grid_size",
        "attention_pattern",
        "feature_layers",
        "pooling",
    )
    _folder.check_config(vision, {name: getattr(preset, name) for name in fixed}, FAMILY)
    ratio, left = divmod(vision.intermediate_size, vision.hidden_size)
    if left:
        raise ValueError(
            f"`model` must have an encoder whose `intermediate_size` is a multiple of its `hidden_size` for {FAMILY}, "
            f"got {vision.intermediate_size} and {vision.hidden_size}."
        )
    return {
        "model_type": VISION_TYPE,
        "depth": vision.num_hidden_layers,
        "embed_dim": vision.hidden_size,
        "hidden_size": merger_width,
        "hidden_act": vision.hidden_act,
        "mlp_ratio": ratio,
        "num_heads": vision.num_attention_heads,
        "in_channels": vision.num_channels,
        "patch_size": vision.patch_size,
        "spatial_merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "initializer_range": vision.initializer_range,
        **({} if vision.rotary_theta == 10000.0 else {"rope_parameters": _rope(vision.rotary_theta)}),
    }


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "axial", "rope_theta": theta}


def _published_text_config(text: Qwen2Config | LlamaConfig, layout: str) -> dict[str, Any]:
    expected = {"hidden_act": "silu", "attention_dropout": 0.0}
    if isinstance(text, LlamaConfig):
        expected |= {"attention_bias": False, "mlp_bias": False}
        expected |= {"head_dim": text.hidden_size // text.num_attention_heads}
        if layout == QWEN2:
            raise ValueError(
                "`layout` must be 'custom_llama' for a text model without biases in its attention, got 'qwen2'."
            )
    else:
        expected |= {"use_sliding_window": False}
    _folder.check_config(text, expected, FAMILY)
    theta = _folder.get_rope_theta(text, FAMILY)
    fields = {published: getattr(text, ours) for published, ours in _TEXT_FIELDS[layout].items()}
    optional = {name: getattr(text, name) for name in _OPTIONAL_TEXT_FIELDS if getattr(text, name) is not None}
    own: dict[str, Any] = {_THETA[layout]: theta, "hidden_act": _ACTIVATION[layout], **_FIXED[layout]}
    if layout == CUSTOM_LLAMA:
        own |= {"norm_type": "rms_norm", "qkv_proj_bias": isinstance(text, Qwen2Config)}
    return {"model_type": layout, **fields, **optional, **own}
