"""Named configurations in training, by the example of a text model with experts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.training.making import losses, settings
from vlparts import MoGEForCausalLM
from vlparts.training.building import build
from vlparts.training.presets import config_from_preset, preset_names
from vlparts.training.train import train


def test_presets_are_offered_where_they_belong() -> None:
    assert {"qwen3:tiny", "moge:tiny", "moge:small", "pangu_embedded:tiny_mrope"} <= set(preset_names("text"))
    assert {"navit:tiny", "windowfree:hybrid_tiny"} <= set(preset_names("vision"))
    assert not set(preset_names("text")) & set(preset_names("vision"))


@pytest.mark.parametrize("packing", [True, False])
def test_a_text_model_with_experts_learns(tmp_path: Path, packing: bool) -> None:
    """And its vocabulary is the tokenizer's."""
    text: Any = {"preset": "moge:tiny", "router_aux_loss_coef": 0.1}
    result = train(settings(tmp_path, text=text, packing=packing, max_steps=8, learning_rate=3e-3))
    assert losses(result)[-1] < losses(result)[0]
    assert result.model.config.text_config.model_type == "vlparts_moge"
    assert result.model.config.text_config.vocab_size == len(result.processor.tokenizer) != 512


def test_the_balance_loss_is_part_of_the_training_loss(tmp_path: Path) -> None:
    """The first step's, before any weight moves, with two coefficients."""
    found = []
    for coefficient in (0.0, 100.0):
        text = {"preset": "moge:tiny", "router_aux_loss_coef": coefficient}
        result = train(settings(tmp_path, output=tmp_path / str(coefficient), text=text, max_steps=1))
        found.append(losses(result)[0])
    # The new router spreads tokens almost evenly, which is 1, and can never be below it by much.
    assert 80 < found[1] - found[0] < 400


def test_the_name_alone_is_enough(tmp_path: Path) -> None:
    model, _ = build(settings(tmp_path, vision="navit:tiny", text="moge:tiny"), ["cat"])
    assert model.config.text_config.num_expert_groups == 4


def test_a_token_passes_as_many_parameters_as_in_the_demos_dense_model() -> None:
    sizes = {"vocab_size": 300}
    with torch.device("meta"):
        dense = AutoModelForCausalLM.from_config(config_from_preset("qwen3:tiny", sizes, "text"))
        mixture = MoGEForCausalLM(config_from_preset("moge:small", sizes, "text"))
    assert mixture.num_activated_parameters() == pytest.approx(dense.num_parameters(), rel=0.02)
    assert mixture.num_parameters() > 1.3 * dense.num_parameters()
