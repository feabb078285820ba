"""The config.json of openPangu-VL to configurations of our parts and back."""

from pathlib import Path
from typing import Any

from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ...parts.configuration_pangu_embedded import PanguEmbeddedConfig
from ...parts.configuration_vlm import VisionLanguageConfig
from ...parts.configuration_windowfree import WindowFreeViTConfig
from .. import _folder

FAMILY = "openPangu-VL"
MODEL_TYPE = "openpangu_vl"
# The name that the published config.json and vLLM have, and the one in openPangu's own code.
ARCHITECTURES = ("OpenPanguVLForConditionalGeneration", "OpenPanguVL")

# Published name: our name.
_VISION_FIELDS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "hidden_act": "hidden_act",
    "rms_norm_eps": "rms_norm_eps",
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "spatial_merge_size": "spatial_merge_size",
}
_TEXT_FIELDS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "hidden_act": "hidden_act",
    "rms_norm_eps": "rms_norm_eps",
    "max_position_embeddings": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "bias": "attention_bias",
}
_OPTIONAL_TEXT_FIELDS = (
    "attention_dropout",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "head_dim",
)
# The last two are not fields of VisionLanguageConfig, which keeps them as extra attributes.
TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_PROJECTOR = "multi_tap_merger"
# The default of the projector; the published mergers have the encoder's.
_MERGER_EPS = 1e-6
# The default of the published code for "mm_unit_vision_select_layer", which the published config.json does not have.
_MERGER_LAYERS = [-1, -3]
# Fixed in the published code.
_ROTARY_THETA = 10000.0
# Fields of rotary parameters that are no numbers.
_ROPE_OPTIONS = {"rope_type", "type", "mrope_section", "mrope_interleaved", "short_factor", "long_factor", "truncate"}
# The activation with which the published MLP has a gate.
_GATED = "silu"
# Window side in merged blocks, written for encoders in which no layer has windows.
_WINDOW_BLOCKS = 4
# Written for other readers. openPangu-VL's own positions do not count seconds.
_TOKENS_PER_SECOND = 2


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json.

    Raises:
        ValueError: If there is none, or if it belongs to another model or to quantized weights.
    """
    return _folder.read_config(folder, MODEL_TYPE, ARCHITECTURES)


def get_vision_config(config: dict[str, Any], **changes: Any) -> WindowFreeViTConfig:
    """Build the encoder's configuration.

    Args:
        config: The published fields, from [`read_config`].
        **changes: Fields that other files decide.

    Raises:
        ValueError: If a field is missing, or if the encoder has an option that ours does not have.
    """
    fields = config.get("vision_config")
    if not isinstance(fields, dict):
        raise ValueError("`folder` must have a config.json with a 'vision_config'.")
    channels = {"in_channels": fields.get("in_chans", fields.get("in_channels"))}
    fields = fields | {name: value for name, value in channels.items() if value is not None}
    required = (*_VISION_FIELDS, "in_channels", "window_size", "fullatt_block_indexes")
    _folder.require_fields(fields, "vision_config", *required)
    _folder.require_numbers(fields, "vision_config", "depth", "num_heads", "in_channels", integers=True)
    _folder.require_numbers(fields, "vision_config", "rms_norm_eps")
    _folder.require_known(fields, "vision_config", "hidden_act", ACT2FN)
    layers = fields.get("mm_unit_vision_select_layer") or _MERGER_LAYERS
    _check_merger_layers(layers, "folder")
    full, depth = fields["fullatt_block_indexes"], fields["depth"]
    if not isinstance(full, list) or not all(type(layer) is int for layer in full):
        raise ValueError(
            f"`folder` must have a config.json with a list of integers as fullatt_block_indexes, got {full!r}."
        )
    pattern = {"window_size": fields["window_size"], "full_attention_layers": full}
    return _folder.build_config(
        WindowFreeViTConfig,
        "vision_config",
        **{ours: fields[published] for published, ours in _VISION_FIELDS.items()},
        num_channels=fields["in_channels"],
        gated_mlp=fields["hidden_act"] == _GATED,
        attention_pattern="full" if set(full) == set(range(depth)) else pattern,
        feature_layers=list(layers),
        rotary_theta=_ROTARY_THETA,
        **changes,
    )


def get_text_config(config: dict[str, Any]) -> PanguEmbeddedConfig:
    """Build the text model's configuration, from fields at the top level or under "text_config".

    Args:
        config: The published fields, from [`read_config`].

    Raises:
        ValueError: If a field is missing, or if the text model has an option that ours does not have.
    """
    inner = config.get("text_config") or {}
    if not isinstance(inner, dict):
        raise ValueError(f"`folder` must have a config.json whose text_config is an object, got {inner!r}.")
    fields = config | inner
    rope = ("rope_parameters",) if fields.get("rope_parameters") else ("rope_scaling", "rope_theta")
    _folder.require_fields(fields, "text_config", *_TEXT_FIELDS, *rope)
    _folder.require_numbers(fields, "text_config", "rms_norm_eps", "initializer_range", "attention_dropout")
    _folder.require_known(fields, "text_config", "hidden_act", ACT2FN)
    if fields.get("use_sliding_window"):
        raise ValueError("`folder` must have a text model without `use_sliding_window`, got true.")
    optional = {name: fields[name] for name in _OPTIONAL_TEXT_FIELDS if name in fields}
    if optional.get("head_dim") is None:
        optional["head_dim"] = _folder.get_head_dim(fields, "text_config")
    text = _folder.build_config(
        PanguEmbeddedConfig,
        "text_config",
        **{ours: fields[published] for published, ours in _TEXT_FIELDS.items()},
        **optional,
        **{name: fields[name] for name in rope},
        tie_word_embeddings=bool(fields.get("tie_word_embeddings", False)),
    )
    # From any of the published forms.
    parameters = text.rope_parameters or {}
    _folder.require_fields(parameters, "rope_parameters", "rope_theta")
    _folder.require_numbers(parameters, "rope_parameters", *parameters.keys() - _ROPE_OPTIONS)
    _folder.require_known(parameters, "rope_parameters", "rope_type", {"default", *ROPE_INIT_FUNCTIONS})
    return text


def get_composed_config(config: dict[str, Any], **changes: Any) -> VisionLanguageConfig:
    """Build the configuration of the composed model.

    Args:
        config: The published fields, from [`read_config`].
        **changes: Fields of the encoder that other files decide.

    Raises:
        ValueError: If a field is missing, or if the model has an option that ours does not have.
    """
    vision, text = get_vision_config(config, **changes), get_text_config(config)
    _folder.require_fields(config, "", *TOKEN_IDS)
    _folder.require_numbers(config, "", *TOKEN_IDS, integers=True)
    _folder.require_fields(config["vision_config"], "vision_config", "out_hidden_size")
    _folder.require_numbers(config["vision_config"], "vision_config", "out_hidden_size", integers=True)
    options = {"hidden_size": config["vision_config"]["out_hidden_size"]}
    if vision.rms_norm_eps != _MERGER_EPS:
        options["eps"] = vision.rms_norm_eps
    return _folder.build_config(
        VisionLanguageConfig,
        "",
        vision_config=vision,
        text_config=text,
        projector_type=_PROJECTOR,
        projector_options=options,
        tie_word_embeddings=text.tie_word_embeddings,
        **{name: config[name] for name in TOKEN_IDS},
    )


def published_config(config: VisionLanguageConfig | WindowFreeViTConfig) -> dict[str, Any]:
    """The fields of config.json for a composed model, or for an encoder alone.

    Raises:
        ValueError: If the model has parts or options that openPangu-VL does not have; names them.
    """
    fields: dict[str, Any] = {"architectures": list(ARCHITECTURES[:1]), "model_type": MODEL_TYPE}
    if isinstance(config, WindowFreeViTConfig):
        return fields | {"vision_config": _published_vision_config(config)}
    vision, text = config.vision_config, config.text_config
    if not isinstance(vision, WindowFreeViTConfig) or not isinstance(text, PanguEmbeddedConfig):
        raise ValueError(
            "`model` must be composed of a WindowFreeViTModel and a PanguEmbeddedModel, got configurations "
            f"{type(vision).__name__} and {type(text).__name__}."
        )
    _folder.check_config(config, {"projector_type": _PROJECTOR, "vision_feature_layer": -1}, FAMILY)
    missing = [name for name in TOKEN_IDS if getattr(config, name, None) is None]
    if missing:
        raise ValueError(f"`model` must have {', '.join(missing)} in its configuration for {FAMILY}, got none.")
    return {
        **fields,
        **_published_text_config(text),
        **{name: getattr(config, name) for name in TOKEN_IDS},
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "vision_config": {**_published_vision_config(vision), "out_hidden_size": _merger_width(config, vision)},
    }


def _published_vision_config(vision: WindowFreeViTConfig) -> dict[str, Any]:
    """The fields of an encoder's "vision_config"."""
    gated = vision.hidden_act == _GATED
    expected = {"qkv_bias": True, "mlp_bias": True, "rotary_theta": _ROTARY_THETA, "gated_mlp": gated}
    _folder.check_config(vision, expected, FAMILY)
    depth = vision.num_hidden_layers
    layers = [layer % depth - depth for layer in vision.feature_layers]
    _check_merger_layers(layers, "model")
    pattern = vision.attention_pattern
    if isinstance(pattern, str):
        pattern = {
            "window_size": _WINDOW_BLOCKS * vision.patch_size * vision.spatial_merge_size,
            "full_attention_layers": list(range(depth)),
        }
    return {
        **{published: getattr(vision, ours) for published, ours in _VISION_FIELDS.items()},
        "in_chans": vision.num_channels,
        "spatial_patch_size": vision.patch_size,
        "window_size": pattern["window_size"],
        "fullatt_block_indexes": sorted(pattern["full_attention_layers"]),
        "mm_unit_vision_select_layer": layers,
        "tokens_per_second": _TOKENS_PER_SECOND,
    }


def _published_text_config(text: PanguEmbeddedConfig) -> dict[str, Any]:
    """The fields of a text model, which are at the top level of config.json."""
    _folder.check_config(text, {"mlp_bias": False}, FAMILY)
    rope = dict(text.rope_parameters or {})
    theta = rope.pop("rope_theta")
    optional = {name: getattr(text, name) for name in _OPTIONAL_TEXT_FIELDS}
    if text.head_dim * text.num_attention_heads == text.hidden_size:  # the default of the published code
        del optional["head_dim"]
    if optional["pad_token_id"] == PanguEmbeddedConfig.pad_token_id:
        del optional["pad_token_id"]
    return {
        **{published: getattr(text, ours) for published, ours in _TEXT_FIELDS.items()},
        **optional,
        "max_window_layers": text.num_hidden_layers,
        "rope_theta": theta,
        "rope_scaling": {**rope, "type": rope.get("rope_type", "default")},
        "use_sliding_window": False,
    }


def _merger_width(config: VisionLanguageConfig, vision: WindowFreeViTConfig) -> int:
    """The output width of the mergers."""
    options = {"eps": _MERGER_EPS, **(config.projector_options or {})}
    if options.get("hidden_size") is None or options["eps"] != vision.rms_norm_eps:
        raise ValueError(
            "`model` must have `projector_options` with a hidden_size, and with the encoder's rms_norm_eps "
            f"{vision.rms_norm_eps} as eps, for {FAMILY}, got {options}."
        )
    return int(options["hidden_size"])


def _check_merger_layers(layers: Any, argument: str) -> None:
    """Check the layers whose features the mergers take: negative indices, the deepest layer first.

    The published code counts them from the end, and gives its first merger the deepest layer whatever their order.

    Args:
        layers: The layers.
        argument: The argument that they come from, for the error message.
    """
    valid = isinstance(layers, list) and all(type(layer) is int and layer < 0 for layer in layers)
    if not valid or layers != sorted(set(layers), reverse=True):
        raise ValueError(
            f"`{argument}` must have merger layers that are negative, unique and in descending order, got {layers}."
        )
