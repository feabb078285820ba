"""Configurations of our parts as the config.json of openPangu-VL."""

from typing import Any

from ...parts.configuration_pangu_embedded import PanguEmbeddedConfig
from ...parts.configuration_vlm import VisionLanguageConfig
from ...parts.configuration_windowfree import WindowFreeViTConfig
from .fields import (
    ARCHITECTURES,
    GATED,
    MERGER_EPS,
    MODEL_TYPE,
    OPTIONAL_TEXT_FIELDS,
    PROJECTOR,
    ROTARY_THETA,
    TEXT_FIELDS,
    TOKEN_IDS,
    VISION_FIELDS,
    check_taps,
)

# Side of a window in merged blocks, for files of encoders in which no layer has windows.
_WINDOW_CELLS = 4
# Written because others read it. openPangu-VL's own positions do not count seconds.
_TOKENS_PER_SECOND = 2


def published_vision_config(vision: WindowFreeViTConfig) -> dict[str, Any]:
    """The fields of an encoder's "vision_config".

    Raises:
        ValueError: If the encoder has what openPangu-VL cannot say; names the field.
    """
    gated = vision.hidden_act == GATED
    wanted = {"qkv_bias": True, "mlp_bias": True, "rotary_theta": ROTARY_THETA, "gated_mlp": gated}
    _refuse(vision, wanted)
    layers = vision.num_hidden_layers
    taps = [layer % layers - layers for layer in vision.feature_layers]
    check_taps(taps, "model")
    pattern = vision.attention_pattern
    if isinstance(pattern, str):
        pattern = {
            "window_size": _WINDOW_CELLS * vision.patch_size * vision.spatial_merge_size,
            "full_attention_layers": list(range(layers)),
        }
    return {
        **{theirs: getattr(vision, ours) for theirs, ours in VISION_FIELDS.items()},
        "in_chans": vision.num_channels,
        "spatial_patch_size": vision.patch_size,
        "window_size": pattern["window_size"],
        "fullatt_block_indexes": sorted(pattern["full_attention_layers"]),
        "mm_unit_vision_select_layer": taps,
        "tokens_per_second": _TOKENS_PER_SECOND,
    }


def published_text_config(text: PanguEmbeddedConfig) -> dict[str, Any]:
    """The fields of a text model, which stand at the top of config.json.

    Raises:
        ValueError: If the text model has what openPangu-VL cannot say; names the field.
    """
    _refuse(text, {"mlp_bias": False, "head_dim": text.hidden_size // text.num_attention_heads})
    rope = dict(text.rope_parameters or {})
    theta = rope.pop("rope_theta")
    optional = {name: getattr(text, name) for name in OPTIONAL_TEXT_FIELDS if name != "head_dim"}
    if optional["pad_token_id"] == PanguEmbeddedConfig.pad_token_id:
        del optional["pad_token_id"]
    return {
        **{theirs: getattr(text, ours) for theirs, ours in TEXT_FIELDS.items()},
        **optional,
        "max_window_layers": text.num_hidden_layers,
        "rope_theta": theta,
        "rope_scaling": {**rope, "type": rope.get("rope_type", "default")},
        "use_sliding_window": False,
    }


def published_config(config: VisionLanguageConfig | WindowFreeViTConfig) -> dict[str, Any]:
    """The fields of config.json for a composed model, or for an encoder alone.

    Raises:
        ValueError: If the model has parts or options of which openPangu-VL knows nothing; names them.
    """
    fields: dict[str, Any] = {"architectures": list(ARCHITECTURES[:1]), "model_type": MODEL_TYPE}
    if isinstance(config, WindowFreeViTConfig):
        return fields | {"vision_config": published_vision_config(config)}
    vision, text = config.vision_config, config.text_config
    if not isinstance(vision, WindowFreeViTConfig) or not isinstance(text, PanguEmbeddedConfig):
        raise ValueError(
            "`model` must be made of a WindowFreeViTModel and a PanguEmbeddedModel, got configurations "
            f"{type(vision).__name__} and {type(text).__name__}."
        )
    _refuse(config, {"projector_type": PROJECTOR, "vision_feature_layer": -1})
    lacking = [name for name in TOKEN_IDS if getattr(config, name, None) is None]
    if lacking:
        raise ValueError(f"`model` must have {', '.join(lacking)} in its configuration for openPangu-VL, got none.")
    return {
        **fields,
        **published_text_config(text),
        **{name: getattr(config, name) for name in TOKEN_IDS},
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "vision_config": {**published_vision_config(vision), "out_hidden_size": _merged_width(config, vision)},
    }


def _merged_width(config: VisionLanguageConfig, vision: WindowFreeViTConfig) -> int:
    """The width of the mergers' sum."""
    options = {"eps": MERGER_EPS, **(config.projector_options or {})}
    if options.get("hidden_size") is None or options["eps"] != vision.rms_norm_eps:
        raise ValueError(
            "`model` must have `projector_options` with a hidden_size, and with the encoder's rms_norm_eps "
            f"{vision.rms_norm_eps} as eps, for openPangu-VL, got {options}."
        )
    return int(options["hidden_size"])


def _refuse(config: Any, wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"`model` must have `{name}` = {value!r} for openPangu-VL, got {getattr(config, name)!r}."
            )
