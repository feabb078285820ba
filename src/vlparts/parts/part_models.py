"""The models that composed models can hold: a table by model type, and the initialization of their weights.

The rows of the table are those of `part_configs`.
"""

from collections.abc import Iterator
from typing import Any

from transformers import AutoModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from .modeling_deepencoder import DeepEncoderModel
from .modeling_moge import MoGEModel
from .modeling_navit import NaViTModel
from .modeling_pangu_embedded import PanguEmbeddedModel
from .modeling_windowfree import WindowFreeViTModel
from .vlm_towers import VISION_TOWERS, native_model_class

PART_MODELS: dict[str, type[PreTrainedModel]] = {
    model.config_class.model_type: model
    for model in (NaViTModel, WindowFreeViTModel, DeepEncoderModel, PanguEmbeddedModel, MoGEModel)
}


def model_from_config(config: PreTrainedConfig, **arguments: Any) -> PreTrainedModel:
    """Build a model with new weights: a part by its model type, any other model through `AutoModel`.

    Args:
        config: The configuration.
        **arguments: Arguments of a native model class, such as `add_pooling_layer`.
    """
    if config.model_type in PART_MODELS:
        return PART_MODELS[config.model_type]._from_config(config)
    native = native_model_class(config)
    return AutoModel.from_config(config, **arguments) if native is None else native._from_config(config, **arguments)


def vision_tower_from_config(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the vision encoder of a composed model with new weights, without modules that it does not use."""
    tower = VISION_TOWERS.get(config.model_type)
    return model_from_config(config, **({} if tower is None else tower.arguments))


class SubmodelInitializationMixin:
    """Initialize the models that a composed model holds as they initialize themselves.

    transformers initializes all modules of a model by the rules of the outermost class. Under a class from outside
    transformers it skips modules without weights of their own, although the rule of a native model may compute weights
    and buffers of their children there: these would stay uninitialized where a file does not hold them.
    """

    def initialize_weights(self) -> None:
        """Initialize all weights and buffers that were not loaded."""
        for submodel in _submodels(self):
            submodel.initialize_weights()
        super().initialize_weights()  # type: ignore[misc]


def _submodels(module: Any) -> Iterator[PreTrainedModel]:
    """Return the outermost models inside of a module."""
    for child in module.children():
        if isinstance(child, PreTrainedModel):
            yield child
        else:
            yield from _submodels(child)
