"""The config.json of openPangu-VL as configurations of our parts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub.errors import StrictDataclassError

from ...parts.configuration_pangu_embedded import PanguEmbeddedConfig
from ...parts.configuration_vlm import VisionLanguageConfig
from ...parts.configuration_windowfree import WindowFreeViTConfig
from .._safetensors import read_json
from .fields import (
    ARCHITECTURES,
    DEFAULT_TAPS,
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

ConfigT = TypeVar("ConfigT")


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json.

    Raises:
        ValueError: If there is none, or if it is another model's or that of quantised weights.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"`folder` must be a local folder with a config.json, got {str(folder)!r}.")
    config = read_json(folder / "config.json")
    if config.get("model_type") != MODEL_TYPE:
        raise ValueError(f"`folder` must have the model_type {MODEL_TYPE!r}, got {config.get('model_type')!r}.")
    named = config.get("architectures") or ARCHITECTURES[:1]
    if not set(named) <= set(ARCHITECTURES):
        raise ValueError(f"`folder` must have one of the architectures {', '.join(ARCHITECTURES)}, got {named}.")
    if config.get("quantization_config") is not None:
        raise ValueError(
            "`folder` must have weights that are not quantised, got a config.json with quantization_config."
        )
    return config


def get_vision_config(config: dict[str, Any], **changes: Any) -> WindowFreeViTConfig:
    """The encoder's configuration.

    Args:
        config: What [`read_config`] returned.
        **changes: Fields that other files decide.

    Raises:
        ValueError: If a field is missing, or if the encoder has what ours has not.
    """
    fields = config.get("vision_config")
    if not isinstance(fields, dict):
        raise ValueError("`folder` must have a config.json with a 'vision_config'.")
    channels = {"in_channels": fields.get("in_chans", fields.get("in_channels"))}
    fields = fields | {name: value for name, value in channels.items() if value is not None}
    _require(fields, "vision_config", *VISION_FIELDS, "in_channels", "window_size", "fullatt_block_indexes")
    taps = fields.get("mm_unit_vision_select_layer") or DEFAULT_TAPS
    check_taps(taps, "folder")
    full, depth = fields["fullatt_block_indexes"], fields["depth"]
    if not isinstance(full, list) or not isinstance(depth, int):
        raise ValueError(
            "`folder` must have a config.json with a number as depth and a list as fullatt_block_indexes, got "
            f"{depth!r} and {full!r}."
        )
    pattern = {"window_size": fields["window_size"], "full_attention_layers": full}
    return _build(
        WindowFreeViTConfig,
        "vision_config",
        **{ours: fields[theirs] for theirs, ours in VISION_FIELDS.items()},
        num_channels=fields["in_channels"],
        gated_mlp=fields["hidden_act"] == GATED,
        attention_pattern="full" if set(full) == set(range(depth)) else pattern,
        feature_layers=list(taps),
        rotary_theta=ROTARY_THETA,
        **changes,
    )


def get_text_config(config: dict[str, Any]) -> PanguEmbeddedConfig:
    """The text model's configuration, from fields at the top or under "text_config".

    Args:
        config: What [`read_config`] returned.

    Raises:
        ValueError: If a field is missing, or if the text model has what ours has not.
    """
    inner = config.get("text_config") or {}
    if not isinstance(inner, dict):
        raise ValueError(f"`folder` must have a config.json whose text_config is an object, got {inner!r}.")
    fields = config | inner
    rope = "rope_parameters" if fields.get("rope_parameters") else "rope_scaling"
    _require(fields, "text_config", *TEXT_FIELDS, rope, *(["rope_theta"] if rope == "rope_scaling" else []))
    if fields.get("use_sliding_window"):
        raise ValueError("`folder` must have a text model without `use_sliding_window`, got true.")
    optional = {name: fields[name] for name in OPTIONAL_TEXT_FIELDS if name in fields}
    if optional.get("head_dim") is None:
        optional["head_dim"] = _head_dim(fields["hidden_size"], fields["num_attention_heads"])
    if rope == "rope_scaling":
        optional["rope_theta"] = fields["rope_theta"]
    return _build(
        PanguEmbeddedConfig,
        "text_config",
        **{ours: fields[theirs] for theirs, ours in TEXT_FIELDS.items()},
        **optional,
        **{rope: fields[rope]},
        tie_word_embeddings=bool(fields.get("tie_word_embeddings", False)),
    )


def get_composed_config(config: dict[str, Any], **changes: Any) -> VisionLanguageConfig:
    """The whole model's configuration.

    Args:
        config: What [`read_config`] returned.
        **changes: Fields of the encoder's that other files decide.

    Raises:
        ValueError: If a field is missing, or if the model has what ours has not.
    """
    vision, text = get_vision_config(config, **changes), get_text_config(config)
    _require(config, "", *TOKEN_IDS)
    _require(config["vision_config"], "vision_config", "out_hidden_size")
    options = {"hidden_size": config["vision_config"]["out_hidden_size"]}
    if vision.rms_norm_eps != MERGER_EPS:
        options["eps"] = vision.rms_norm_eps
    return _build(
        VisionLanguageConfig,
        "",
        vision_config=vision,
        text_config=text,
        projector_type=PROJECTOR,
        projector_options=options,
        tie_word_embeddings=text.tie_word_embeddings,
        **{name: config[name] for name in TOKEN_IDS},
    )


def _head_dim(hidden_size: Any, heads: Any) -> int:
    if not isinstance(hidden_size, int) or not isinstance(heads, int) or heads < 1 or hidden_size % heads:
        raise ValueError(
            "`folder` must have a config.json whose num_attention_heads divides hidden_size in text_config, got "
            f"{heads!r} and {hidden_size!r}."
        )
    return hidden_size // heads


def _require(fields: dict[str, Any], where: str, *names: str) -> None:
    lacking = [name for name in names if fields.get(name) is None]
    if lacking:
        place = f" in {where}" if where else ""
        raise ValueError(f"`folder` must have a config.json with {', '.join(lacking)}{place}, got none.")


def _build(kind: Callable[..., ConfigT], where: str, **fields: Any) -> ConfigT:
    try:
        return kind(**fields)
    except (StrictDataclassError, ValueError, TypeError) as error:
        place = where or "fields"
        # Strict configurations wrap what their checks raise.
        raise ValueError(f"`folder` has a config.json whose {place} do not fit: {error.__cause__ or error}") from error
