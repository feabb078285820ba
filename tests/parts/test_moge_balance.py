"""The balance loss of Pangu Pro MoE against loops, and its share in the loss."""

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from tests.parts.test_moge import RELATIVES, moge, tokens
from vlparts import MoGEConfig


def balance_in_loops(router_logits: Tensor, config: MoGEConfig, kept: list[bool]) -> float:
    """Equation 8 of one layer, token by token."""
    size, experts = config.num_experts // config.num_expert_groups, range(config.num_experts)
    chosen, scores = [0.0] * config.num_experts, [0.0] * config.num_experts
    for row, real in zip(router_logits.double().softmax(-1).tolist(), kept, strict=True):
        if not real:
            continue
        for expert in experts:
            scores[expert] += row[expert] / sum(kept)
        for start in range(0, config.num_experts, size):
            best = sorted(range(start, start + size), key=lambda expert: -row[expert])
            for expert in best[: config.num_experts_per_tok // config.num_expert_groups]:
                chosen[expert] += config.num_experts / (config.num_experts_per_tok * sum(kept))
    return sum(chosen[expert] * scores[expert] for expert in experts)


def test_the_balance_loss_is_that_of_the_real_tokens() -> None:
    model, input_ids = moge(), tokens()
    mask = torch.ones_like(input_ids)
    mask[0, :4] = 0
    inputs = {"input_ids": input_ids, "attention_mask": mask, "output_router_logits": True}
    outputs = model(**inputs, labels=input_ids)
    assert [tuple(one.shape) for one in outputs.router_logits] == [(18, 8)] * 2
    kept = mask.flatten().bool().tolist()
    expected = sum(balance_in_loops(one, model.config, kept) for one in outputs.router_logits) / 2
    assert float(outputs.aux_loss.detach()) == pytest.approx(expected, rel=1e-5)
    other = input_ids.masked_fill(mask == 0, 5)
    assert torch.equal(model(**{**inputs, "input_ids": other}).aux_loss, outputs.aux_loss)
    # The coefficient is 0 here.
    torch.testing.assert_close(outputs.loss, model(input_ids, attention_mask=mask, labels=input_ids).loss)


@pytest.mark.parametrize("asked", [True, False])
def test_the_coefficient_weights_the_balance_loss(asked: bool) -> None:
    model, input_ids = moge(router_aux_loss_coef=0.3), tokens()
    outputs = model(input_ids, labels=input_ids, output_router_logits=asked)
    plain = moge()(input_ids, labels=input_ids)
    torch.testing.assert_close(outputs.loss, plain.loss + 0.3 * outputs.aux_loss)
    assert (outputs.router_logits is not None) == asked
    assert plain.aux_loss is None
    assert model(input_ids).aux_loss is None
    gate = model.model.layers[1].mlp.gate.weight
    assert torch.autograd.grad(outputs.aux_loss, gate)[0].abs().max() > 0


def test_the_balance_loss_is_mixtrals_by_experts_per_token() -> None:
    model, input_ids = moge(**RELATIVES["mixtral"], num_hidden_layers=1, router_aux_loss_coef=0.3), tokens()
    mask = torch.ones_like(input_ids)
    mask[1, :2] = 0
    outputs = model(input_ids, attention_mask=mask, output_router_logits=True)
    theirs = load_balancing_loss_func(outputs.router_logits, 8, 4, mask)
    torch.testing.assert_close(outputs.aux_loss, theirs / 4)


def test_without_experts_there_is_nothing_to_balance() -> None:
    model = moge(mlp_only_layers=[0, 1], router_aux_loss_coef=0.3)
    outputs = model(tokens(), labels=tokens(), output_router_logits=True)
    assert float(outputs.aux_loss) == 0.0
    assert outputs.router_logits == ()


def test_chosen_experts_are_equally_many_in_each_group() -> None:
    model = moge()
    found = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, outputs: found.append(outputs[2]))
    outputs = model(tokens(), output_router_logits=True)
    for logits, indices in zip(outputs.router_logits, found, strict=True):
        assert torch.equal(model.get_chosen_experts(logits), indices)
        assert torch.equal(indices // 2, torch.arange(4).expand(18, -1))
