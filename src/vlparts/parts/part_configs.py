"""Table of the configurations that composed models can hold, by model type.

As remote code, a part's configuration is not registered with `AutoConfig`; this table resolves it.
"""

from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .configuration_deepencoder import DeepEncoderConfig
from .configuration_fused_vision import FusedVisionConfig
from .configuration_moge import MoGEConfig
from .configuration_navit import NaViTConfig
from .configuration_pangu_embedded import PanguEmbeddedConfig
from .configuration_windowfree import WindowFreeViTConfig

PART_CONFIGS: dict[str, type[PreTrainedConfig]] = {
    config.model_type: config
    for config in (
        NaViTConfig,
        WindowFreeViTConfig,
        DeepEncoderConfig,
        FusedVisionConfig,
        PanguEmbeddedConfig,
        MoGEConfig,
    )
}


def config_from_dict(fields: dict[str, Any], argument: str) -> PreTrainedConfig:
    """Build the configuration that a dictionary with a "model_type" describes.

    Args:
        fields: Fields of the configuration.
        argument: Name of the argument that holds the dictionary, for the error message.

    Raises:
        ValueError: If the dictionary has no "model_type", or an unknown one.
    """
    model_type = fields.get("model_type")
    if model_type in PART_CONFIGS:
        return PART_CONFIGS[model_type](**fields)
    if model_type in CONFIG_MAPPING:
        return CONFIG_MAPPING[model_type](**fields)
    raise ValueError(f"`{argument}` must have a 'model_type' that transformers or vlparts knows, got {model_type!r}.")


def resolve_config(
    config: PreTrainedConfig | dict[str, Any] | None, argument: str, default: dict[str, Any]
) -> PreTrainedConfig:
    """Return a field of a composed configuration as a configuration.

    Args:
        config: A configuration, its fields, or None for the default.
        argument: Name of the field, for the error message.
        default: Fields of the default, with a "model_type".

    Raises:
        ValueError: If a dictionary has no "model_type", or an unknown one.
    """
    fields = default if config is None else config
    return config_from_dict(fields, argument) if isinstance(fields, dict) else fields
