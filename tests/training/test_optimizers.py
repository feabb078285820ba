"""Muon with AdamW: which parameters go where, schedules, and states that come back."""

import copy

import torch
from torch import nn

import vlparts
from tests.tiny import navit_config, text_config, tokenizer
from vlparts.training.optimizers import MuonWithAdamW, muon_with_adamw


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        model(inputs).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_every_parameter_is_in_one_group_and_matrices_of_layers_go_to_muon() -> None:
    model = vlparts.compose(vision=navit_config(), text=text_config("qwen3", tokenizer()))
    optimizer = muon_with_adamw(model, 0.1, 0.01)
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(grouped) == len(set(map(id, grouped))) == len(list(model.parameters()))
    muon = {id(one) for group in optimizer.parts[1].param_groups for one in group["params"]}
    names = {name for name, one in model.named_parameters() if id(one) in muon}
    assert "model.language_model.layers.0.self_attn.q_proj.weight" in names
    assert "model.vision_tower.layers.0.mlp.fc1.weight" in names
    assert not [name for name in names if "embed_tokens" in name or "lm_head" in name or name.endswith("bias")]


def test_frozen_parameters_are_left_out() -> None:
    model = small()
    model[0].requires_grad_(False)
    before = copy.deepcopy(model[0].state_dict())
    optimizer = muon_with_adamw(model, 0.1, 0.1)
    train(model, optimizer, 2)
    assert all(torch.equal(before[name], value) for name, value in model[0].state_dict().items())


def test_it_is_muon_and_adamw_side_by_side() -> None:
    ours, theirs = small(), small()
    optimizer = muon_with_adamw(ours, 0.05, 0.02)
    matrices = [one for one in theirs.parameters() if one.ndim == 2]
    vectors = [one for one in theirs.parameters() if one.ndim == 1]
    muon = torch.optim.Muon(matrices, lr=0.05, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(vectors, lr=0.05, weight_decay=0.0)
    for step in range(3):
        train(ours, optimizer, 1, step)
        inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        theirs(inputs).pow(2).mean().backward()
        for one in (muon, adamw):
            one.step()
            one.zero_grad()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_a_schedule_reaches_both() -> None:
    model = small()
    optimizer = muon_with_adamw(model, 0.1, 0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    train(model, optimizer, 1)
    schedule.step()
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, 1, 1)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert {group["lr"] for part in optimizer.parts for group in part.param_groups} == {0.0}


def test_a_restored_state_goes_on_to_the_bit() -> None:
    whole, halves = small(), small()
    train(whole, muon_with_adamw(whole, 0.05, 0.01), 6)
    first = muon_with_adamw(halves, 0.05, 0.01)
    train(halves, first, 3)
    second = muon_with_adamw(halves, 0.5, 0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(halves, second, 3, 3)
    for mine, other in zip(whole.parameters(), halves.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_it_can_do_without_matrices() -> None:
    bias = nn.Parameter(torch.ones(3))
    optimizer = MuonWithAdamW([], [{"params": [bias], "lr": 0.1, "weight_decay": 0.0}])
    bias.sum().backward()
    optimizer.step()
    assert (bias < 1).all()
