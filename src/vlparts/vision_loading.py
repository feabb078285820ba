"""The vision encoder that `compose` takes from a model, a configuration or a folder."""

import os
from typing import Any

from transformers import AutoConfig, AutoModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from .parts.part_models import vision_tower_from_config
from .parts.vlm_towers import VISION_TOWERS, leave_out_unused, native_model_class


def load_vision(vision: Any, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return the vision encoder of a model, a configuration, or the folder of a checkpoint.

    Modules that a composed model does not use, such as pooling heads, are left out of an encoder that is built here.

    Args:
        vision: A vision encoder or a model that contains one (CLIP, Qwen2.5-VL); the configuration of either, which
            gives new weights; or the folder of either.
        trust_remote_code: Passed to `from_pretrained` of a folder.

    Raises:
        ValueError: If it is something else, or a native model without a vision encoder that composed models can hold.
    """
    if isinstance(vision, PreTrainedConfig):
        config = _vision_config(vision)
        _check_native(config)
        if "pooling" in config.to_dict():  # The pooled output would not be used.
            config = type(config)(**{**config.to_dict(), "pooling": "none"})
        return vision_tower_from_config(leave_out_unused(config))
    if isinstance(vision, (str, os.PathLike)):
        return _load_folder(vision, trust_remote_code)
    if not isinstance(vision, PreTrainedModel):
        raise ValueError(f"`vision` must be a model, a configuration or a folder, got {type(vision).__name__}.")
    return _part_of(vision)


def _load_folder(folder: str | os.PathLike[str], trust_remote_code: bool) -> PreTrainedModel:
    whole = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    config = _vision_config(whole)
    _check_native(config)
    tower = VISION_TOWERS.get(config.model_type)
    if tower is None:
        return _part_of(AutoModel.from_pretrained(folder, trust_remote_code=trust_remote_code))
    for name, value in tower.without.items():
        setattr(config, name, value)
    if whole is not config:
        return _part_of(AutoModel.from_pretrained(folder, config=whole, trust_remote_code=trust_remote_code))
    model_class = native_model_class(config) or AutoModel
    return _part_of(model_class.from_pretrained(folder, config=config, **tower.arguments))


def _vision_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration of the vision encoder inside that of a whole model, or the configuration itself."""
    while config.model_type not in VISION_TOWERS:
        # The encoders of SAM 2 and 3 add a neck for masks to their backbone.
        has_neck = config.model_type in ("sam2_vision_model", "sam3_vision_model")
        name = "backbone_config" if has_neck else "vision_config"
        inner = getattr(config, name, None)
        if not isinstance(inner, PreTrainedConfig):
            break
        config = inner
    return config


def _check_native(config: PreTrainedConfig) -> None:
    if type(config).__module__.startswith("transformers.") and config.model_type not in VISION_TOWERS:
        raise ValueError(
            f"`vision` {type(config).__name__} of type {config.model_type!r} is no vision encoder of composed models; "
            f"expected one of type {', '.join(sorted(VISION_TOWERS))}, a vision encoder of vlparts, or your own model "
            "with its code."
        )


def _part_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the vision encoder of a whole model, in the class that loading a composed model builds."""
    config = _vision_config(model.config)
    _check_native(config)
    expected = native_model_class(config) or MODEL_MAPPING.get(type(config), PreTrainedModel)
    for part in model.modules():
        if isinstance(part, expected) and type(part.config) is type(config):
            return part
    raise ValueError(
        f"`vision` {type(model).__name__} has no {expected.__name__}, the encoder of type {config.model_type!r}."
    )
