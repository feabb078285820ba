"""The one table of our parts that a composed model can hold without the Auto classes knowing them.

As remote code, a part's configuration is not registered with `AutoConfig`; this table finds it by its model_type.
"""

from transformers import AutoModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .configuration_moge import MoGEConfig
from .configuration_navit import NaViTConfig
from .configuration_pangu_embedded import PanguEmbeddedConfig
from .configuration_windowfree import WindowFreeViTConfig
from .modeling_moge import MoGEModel
from .modeling_navit import NaViTModel
from .modeling_pangu_embedded import PanguEmbeddedModel
from .modeling_windowfree import WindowFreeViTModel

OWN_PARTS: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    NaViTConfig.model_type: (NaViTConfig, NaViTModel),
    WindowFreeViTConfig.model_type: (WindowFreeViTConfig, WindowFreeViTModel),
    PanguEmbeddedConfig.model_type: (PanguEmbeddedConfig, PanguEmbeddedModel),
    MoGEConfig.model_type: (MoGEConfig, MoGEModel),
}


def config_from_dict(fields: dict, argument: str) -> PreTrainedConfig:
    """Build the configuration that a dictionary with a "model_type" describes.

    Args:
        fields: Fields of the configuration.
        argument: Name of the argument that holds it, for the error message.

    Raises:
        ValueError: If the dictionary has no "model_type", or an unknown one.
    """
    model_type = fields.get("model_type")
    if model_type in OWN_PARTS:
        return OWN_PARTS[model_type][0](**fields)
    if model_type in CONFIG_MAPPING:
        return CONFIG_MAPPING[model_type](**fields)
    raise ValueError(f"`{argument}` must have a 'model_type' that transformers or vlparts knows, got {model_type!r}.")


def model_from_config(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model with new weights: one of our parts by its model_type, anything else through `AutoModel`."""
    if config.model_type in OWN_PARTS:
        return OWN_PARTS[config.model_type][1]._from_config(config)
    return AutoModel.from_config(config)
