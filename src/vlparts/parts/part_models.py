"""The models that composed models can hold, by model type.

The rows of the table are those of `part_configs`.
"""

from transformers import AutoModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from .modeling_deepencoder import DeepEncoderModel
from .modeling_fused_vision import FusedVisionModel
from .modeling_moge import MoGEModel
from .modeling_navit import NaViTModel
from .modeling_pangu_embedded import PanguEmbeddedModel
from .modeling_windowfree import WindowFreeViTModel
from .vlm_towers import VISION_TOWERS, native_encoder_from_config, native_model_class

PART_MODELS: dict[str, type[PreTrainedModel]] = {
    model.config_class.model_type: model
    for model in (
        NaViTModel,
        WindowFreeViTModel,
        DeepEncoderModel,
        FusedVisionModel,
        PanguEmbeddedModel,
        MoGEModel,
    )
}


def model_from_config(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model with new weights: a part by its model type, any other model through `AutoModel`."""
    if config.model_type in PART_MODELS:
        return PART_MODELS[config.model_type]._from_config(config)
    native = native_model_class(config)
    return AutoModel.from_config(config) if native is None else native._from_config(config)


def vision_tower_from_config(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the vision encoder of a composed model with new weights, without modules that it does not use."""
    native = config.model_type in VISION_TOWERS
    return native_encoder_from_config(config) if native else model_from_config(config)
