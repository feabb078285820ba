"""Table of the configurations that composed models can hold, by model type.

As remote code, a part's configuration is not registered with `AutoConfig`; this table resolves it.
"""

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .configuration_moge import MoGEConfig
from .configuration_navit import NaViTConfig
from .configuration_pangu_embedded import PanguEmbeddedConfig
from .configuration_windowfree import WindowFreeViTConfig

PART_CONFIGS: dict[str, type[PreTrainedConfig]] = {
    config.model_type: config for config in (NaViTConfig, WindowFreeViTConfig, PanguEmbeddedConfig, MoGEConfig)
}


def config_from_dict(fields: dict, argument: str) -> PreTrainedConfig:
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
