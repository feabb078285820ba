"""Table of the models that composed models can hold, by model type; its rows are those of `part_configs`."""

from transformers import AutoModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from .modeling_deepencoder import DeepEncoderModel
from .modeling_moge import MoGEModel
from .modeling_navit import NaViTModel
from .modeling_pangu_embedded import PanguEmbeddedModel
from .modeling_windowfree import WindowFreeViTModel

PART_MODELS: dict[str, type[PreTrainedModel]] = {
    model.config_class.model_type: model
    for model in (NaViTModel, WindowFreeViTModel, DeepEncoderModel, PanguEmbeddedModel, MoGEModel)
}


def model_from_config(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model with new weights: a part by its model type, any other model through `AutoModel`."""
    if config.model_type in PART_MODELS:
        return PART_MODELS[config.model_type]._from_config(config)
    return AutoModel.from_config(config)
