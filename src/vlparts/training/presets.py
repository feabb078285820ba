"""Named configurations for training: presets of the parts of vlparts, and small native text models."""

from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from ..parts.part_configs import PART_CONFIGS, config_from_dict

_NATIVE_TEXTS: dict[str, dict[str, Any]] = {
    "qwen3:tiny": {
        "model_type": "qwen3",
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
}


def preset_names(argument: str) -> list[str]:
    """Return the names of all presets, such as "navit:tiny" (a part and its preset).

    Args:
        argument: "vision" or "text".
    """
    names = list(_NATIVE_TEXTS) if argument == "text" else []
    for model_type, config in PART_CONFIGS.items():
        is_vision = getattr(config, "base_config_key", "") == "vision_config"
        if is_vision == (argument == "vision"):
            names += [f"{model_type.removeprefix('vlparts_')}:{name}" for name in config.presets()]
    return names


def config_from_preset(name: str, fields: dict[str, Any], argument: str) -> PreTrainedConfig:
    """Build the configuration of a preset with some fields overridden.

    Args:
        name: One of [`preset_names`].
        fields: Fields that override those of the preset.
        argument: "vision" or "text", the setting that holds the name.

    Raises:
        ValueError: If there is no such preset.
    """
    if name not in preset_names(argument):
        raise ValueError(f"`{argument}` preset must be one of {', '.join(preset_names(argument))}, got {name!r}.")
    if name in _NATIVE_TEXTS:
        return config_from_dict({**_NATIVE_TEXTS[name], **fields}, argument)
    part, _, preset = name.partition(":")
    return PART_CONFIGS[f"vlparts_{part}"].from_preset(preset, **fields)
