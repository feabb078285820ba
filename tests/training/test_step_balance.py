"""The balance loss of experts in a step of several micro-batches: their mean, or that of the whole step."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from tests.parts.test_moge import config_of
from tests.tiny import SIZES, order_one, vision_config
from tests.training.making import losses, settings, weights
from tests.training.weighted_making import (
    VOCABULARY,
    Rows,
    arguments,
    assert_same,
    expected_loss,
    llama,
    one_row,
    one_row_by_positions,
    padded,
    padded_left,
)
from vlparts import MoGEForCausalLM, compose
from vlparts.training.train import train
from vlparts.training.weighted_inputs import WeightedCollator
from vlparts.training.weighted_loss import WeightedLossTrainer

COEFFICIENT = 0.3
MICRO_BATCHES = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}
NATIVE = {
    **SIZES,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": COEFFICIENT,
    "output_router_logits": True,
}
TEXTS: dict[str, Any] = {
    "mixtral": MixtralConfig(**NATIVE, num_local_experts=4, sliding_window=None),
    "moge": config_of(router_aux_loss_coef=COEFFICIENT, pad_token_id=0),
    "sequences": config_of(router_aux_loss_coef=COEFFICIENT, router_aux_loss_form="sequence", pad_token_id=0),
}
HEADS = {"mixtral": MixtralForCausalLM, "moge": MoGEForCausalLM, "sequences": MoGEForCausalLM}
MODELS = ["mixtral", "moge", "composed mixtral", "composed moge"]


def model_of(name: str) -> nn.Module:
    """A small model with experts, with weights of order one."""
    text = copy.deepcopy(TEXTS[name.split()[-1]])
    model = compose(vision=vision_config("navit"), text=text) if "composed" in name else HEADS[name](text)
    model = order_one(model.double())
    model.set_experts_implementation("eager")
    return model


def step(
    folder: Path, name: str, balance_over: str, collator: Any = padded, **changes: Any
) -> tuple[float, dict[str, Tensor]]:
    """The loss of one step of gradient descent, and the gradients."""
    model = model_of(name)
    before = {key: one.detach().clone() for key, one in model.named_parameters()}
    trainer = WeightedLossTrainer(
        model=model,
        args=arguments(folder, learning_rate=0.01, **changes),
        train_dataset=Rows(),
        data_collator=WeightedCollator(collator),
        preset="square",
        balance_over=balance_over,
    )
    loss = trainer.train().training_loss
    assert trainer.state.global_step == 1
    after = dict(model.named_parameters())
    return loss, {key: (one - after[key].detach()) / 0.01 for key, one in before.items()}


def balance_of(model: nn.Module, rows: range) -> Tensor:
    batch = padded([Rows()[index] for index in rows])
    return model(**batch, output_router_logits=True).aux_loss


@pytest.mark.parametrize("name", MODELS)
def test_the_balance_loss_is_the_mean_over_the_micro_batches(tmp_path: Path, name: str) -> None:
    model = model_of(name)
    loss = expected_loss(model, [Rows()[index] for index in range(8)], "square")
    parts = [balance_of(model, rows) for rows in (range(3), range(3, 6), range(6, 8))]
    loss = loss + COEFFICIENT * torch.stack(parts).mean()
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    wanted = loss.item(), dict(zip(names, gradients, strict=True))
    assert_same(step(tmp_path, name, "micro_batch", **MICRO_BATCHES), wanted)


@pytest.mark.parametrize("name", MODELS)
def test_the_balance_loss_of_a_step_is_that_of_one_batch(tmp_path: Path, name: str) -> None:
    model = model_of(name)
    loss = expected_loss(model, [Rows()[index] for index in range(8)], "square") + COEFFICIENT * balance_of(
        model, range(8)
    )
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    wanted = loss.item(), dict(zip(names, gradients, strict=True))
    for changes in ({}, MICRO_BATCHES):
        assert_same(step(tmp_path, name, "step", **changes), wanted)
    mean = step(tmp_path, name, "micro_batch", **MICRO_BATCHES)
    assert abs(mean[0] - wanted[0]) > 1e-4


@pytest.mark.parametrize("balance_over", ["micro_batch", "step"])
@pytest.mark.parametrize("collator", [padded, padded_left, one_row, one_row_by_positions])
@pytest.mark.parametrize("name", ["sequences", "composed sequences"])
def test_the_balance_loss_of_sequences_is_their_mean(
    tmp_path: Path, name: str, collator: Any, balance_over: str
) -> None:
    """Over all sequences of a step, whatever micro-batches they are in: 3, 3 and 2."""
    model = model_of(name)
    samples = [Rows()[index] for index in range(8)]
    balance = [model(sample["input_ids"][None], output_router_logits=True).aux_loss for sample in samples]
    loss = expected_loss(model, samples, "square") + COEFFICIENT * torch.stack(balance).mean()
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    wanted = loss.item(), dict(zip(names, gradients, strict=True))
    assert_same(step(tmp_path, name, balance_over, collator, **MICRO_BATCHES), wanted)


@pytest.mark.parametrize(
    ("model", "balance_over", "message"),
    [
        (llama, "step", "`balance_over='step'` requires a model with a balance loss.*got LlamaForCausalLM"),
        (llama, "batch", "`balance_over` must be 'micro_batch' or 'step', got 'batch'"),
        (
            lambda: MixtralForCausalLM(MixtralConfig(**{**NATIVE, "output_router_logits": False})),
            "step",
            "`output_router_logits=True`, got MixtralForCausalLM",
        ),
    ],
)
def test_a_model_without_a_balance_loss_raises(tmp_path: Path, model: Any, balance_over: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightedLossTrainer(model(), arguments(tmp_path), data_collator=padded, balance_over=balance_over)


@pytest.mark.parametrize("form", ["batch", "sequence"])
def test_a_packed_run_has_the_mean_of_its_packs(tmp_path: Path, form: str) -> None:
    """The command's Trainer of the mean over tokens, against the weighted one with the same mean."""
    text = {"preset": "moge:tiny", "router_aux_loss_coef": COEFFICIENT, "router_aux_loss_form": form}
    text |= {"experts_implementation": "eager"}
    options = {"capacity": 100, "gradient_accumulation_steps": 3, "max_steps": 2, "max_items": 2}
    options |= {"text": text, "eval_data": tmp_path / "train.jsonl", "trainer": {"max_grad_norm": 0.0}}
    found, wanted = (
        train(settings(tmp_path, output=tmp_path / str(loss), loss=loss, **options)) for loss in (None, "token")
    )
    for key in ("loss", "eval_loss"):
        torch.testing.assert_close(losses(found, key), losses(wanted, key), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(weights(tmp_path / "None"), weights(tmp_path / "token"), atol=1e-4, rtol=1e-4)
