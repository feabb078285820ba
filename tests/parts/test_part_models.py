"""Weights and buffers of native models inside composed models."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import FalconH1Config, PreTrainedConfig, PreTrainedModel

from tests.tiny import SIZES, tokenizer, vision_config
from vlparts import (
    NaViTDualEncoder,
    NaViTDualEncoderConfig,
    VisionLanguageConfig,
    VisionLanguageForConditionalGeneration,
)
from vlparts.parts.modeling_vlm import VisionLanguageModel


def falcon_config() -> PreTrainedConfig:
    """A hybrid decoder, whose layers have buffers that no file holds and that only the model itself can compute."""
    mamba = {"mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
    return FalconH1Config(**SIZES, num_key_value_heads=1, vocab_size=len(tokenizer()), ssm_in_multiplier=0.5, **mamba)


def composed_config(model_class: type[PreTrainedModel], vision: str) -> PreTrainedConfig:
    if model_class is NaViTDualEncoder:
        return NaViTDualEncoderConfig(vision_config=vision_config(vision), text_config=falcon_config())
    return VisionLanguageConfig(vision_config=vision_config(vision), text_config=falcon_config(), image_token_id=3)


COMPOSED = [NaViTDualEncoder, VisionLanguageModel, VisionLanguageForConditionalGeneration]


def equal_tensors(model: PreTrainedModel, other: PreTrainedModel) -> None:
    tensors = dict((*other.named_parameters(), *other.named_buffers()))
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        torch.testing.assert_close(tensors.pop(name), value, rtol=0, atol=0, msg=name)
    assert not tensors


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("model_class", COMPOSED)
def test_buffers_of_a_native_model_survive_saving(model_class: type[PreTrainedModel], tmp_path: Path) -> None:
    model = model_class(composed_config(model_class, "navit"))
    assert any("mup_vector" in name for name, _ in model.named_buffers())
    model.save_pretrained(tmp_path)
    equal_tensors(model, model_class.from_pretrained(tmp_path))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("model_class", COMPOSED)
@pytest.mark.parametrize("vision", ["navit", "clip", "siglip2"])
def test_absent_weights_are_drawn_as_in_a_new_model(model_class: type[PreTrainedModel], vision: str) -> None:
    config = composed_config(model_class, vision)
    torch.manual_seed(0)
    new = model_class(copy.deepcopy(config))
    loaded = model_class.from_pretrained(None, config=copy.deepcopy(config), state_dict={})
    stds = {name: value.float().std() for name, value in new.named_parameters() if value.numel() > 1}
    for name, value in (*loaded.named_parameters(), *loaded.named_buffers()):
        assert value.isfinite().all(), name
        if name in stds:
            torch.testing.assert_close(value.float().std(), stds[name], rtol=0.5, atol=1e-6, msg=name)
