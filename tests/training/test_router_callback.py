"""Logging of router loads by transformers' Trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from vlparts.moe.statistics import RouterLoad, RouterStatistics
from vlparts.parts.moe_losses import balance_loss
from vlparts.parts.moe_router import GroupedTopKRouter
from vlparts.training.router_callback import RouterLoadCallback

WIDTH, EXPERTS, LENGTH, BATCH = 4, 8, 6, 2
NAMES = ("imbalance_score", "max_violation", "load_entropy", "dead_experts", "tokens")


class Routed(nn.Module):
    """Two routers, whose load is all that is trained; it remembers what they chose."""

    def __init__(self, masked: str = "keyword") -> None:
        super().__init__()
        torch.manual_seed(0)
        grouped = GroupedTopKRouter(WIDTH, EXPERTS, 2, grouping="equal", num_expert_groups=2)
        self.layers = nn.ModuleList([grouped, GroupedTopKRouter(WIDTH, EXPERTS, 2)])
        self.masked = masked
        self.seen: list[list[tuple[Tensor, Tensor | None]]] = []

    def forward(self, hidden: Tensor, mask: Tensor) -> dict[str, Tensor]:
        loss, seen = hidden.new_zeros(()), []
        for router in self.layers:
            if self.masked == "keyword":
                logits, _, indices = router(hidden, token_mask=mask)
            elif self.masked == "positional":
                logits, _, indices = router(hidden, mask)
            else:
                logits, _, indices = router(hidden)
            flat = None if self.masked == "no" else mask.flatten()
            loss = loss + balance_loss(logits, indices, token_mask=flat)
            seen.append((indices, flat))
        if self.training:
            self.seen.append(seen)
        return {"loss": loss}


class Tokens(Dataset):
    """Random tokens, some of them padding."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        return dict(hidden=torch.randn(LENGTH, WIDTH, generator=generator), mask=torch.arange(LENGTH) < 3 + index % 4)


def trained(model: nn.Module, folder: Path, *callbacks: TrainerCallback, **arguments: Any) -> Trainer:
    """Train for four steps, with a line in the log after every second one."""
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        logging_steps=2,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **arguments,
    )
    data = Tokens()
    trainer = Trainer(model=model, args=args, train_dataset=data, eval_dataset=data, callbacks=list(callbacks))
    trainer.train()
    return trainer


def counted(steps: list[list[tuple[Tensor, Tensor | None]]], layer: int, groups: int) -> RouterLoad:
    """The load of one layer over some steps."""
    statistics = RouterStatistics(EXPERTS, groups)
    for step in steps:
        indices, mask = step[layer]
        statistics.update(indices, token_mask=mask)
    return statistics.compute()


def lines_of(trainer: Trainer) -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("masked", ["keyword", "positional", "no"])
def test_figures_of_the_steps_since_the_last_line(masked: str, tmp_path: Path) -> None:
    model = Routed(masked)
    lines = lines_of(trained(model, tmp_path, RouterLoadCallback(), eval_strategy="steps", eval_steps=1))
    assert [line["step"] for line in lines] == [2, 4]
    assert len(model.seen) == 4
    for line, steps in zip(lines, (model.seen[:2], model.seen[2:]), strict=True):
        loads = [counted(steps, 0, 2), counted(steps, 1, EXPERTS)]
        expected = dict(
            imbalance_score=sum(load.batch_imbalance_score for load in loads) / 2,
            max_violation=sum(load.batch_max_violation for load in loads) / 2,
            load_entropy=sum(load.load_entropy for load in loads) / 2,
            dead_experts=sum(len(load.dead_experts) for load in loads),
            tokens=sum(load.tokens for load in loads) / 2,
        )
        assert {name: line[f"router/{name}"] for name in NAMES} == pytest.approx(expected)
        assert loads[0].batch_imbalance_score == 0 < loads[1].batch_imbalance_score


def test_layers_and_devices(tmp_path: Path) -> None:
    model = Routed()
    lines = lines_of(trained(model, tmp_path, RouterLoadCallback(num_devices=4, per_layer=True)))
    for line, steps in zip(lines, (model.seen[:2], model.seen[2:]), strict=True):
        for layer in range(2):
            load = counted(steps, layer, 4)
            assert line[f"router/layers.{layer}/imbalance_score"] == pytest.approx(load.batch_imbalance_score)
            assert line[f"router/layers.{layer}/max_violation"] == pytest.approx(load.batch_max_violation)


def test_training_is_the_same_and_hooks_are_removed(tmp_path: Path) -> None:
    watched, plain = Routed(), Routed()
    trained(watched, tmp_path / "watched", RouterLoadCallback())
    trained(plain, tmp_path / "plain")
    for own, other in zip(watched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(own, other)
    assert not any(module._forward_hooks for module in watched.modules())


def test_recomputation_changes_the_number_of_tokens_only(tmp_path: Path) -> None:
    class Recomputed(Routed):
        def forward(self, hidden: Tensor, mask: Tensor) -> dict[str, Tensor]:
            return {"loss": checkpoint(super().forward, hidden, mask, use_reentrant=False)["loss"]}

    lines = []
    for model in (Routed(), Recomputed()):
        found = lines_of(trained(model, tmp_path, RouterLoadCallback()))
        lines.append([{name: line[f"router/{name}"] for name in NAMES} for line in found])
    for once, again in zip(*lines, strict=True):
        assert once.pop("tokens") < again.pop("tokens")
        assert once == pytest.approx(again)


def test_later_callbacks_see_the_figures(tmp_path: Path) -> None:
    lines: list[dict[str, float]] = []

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            lines.append(dict(logs))

    trained(Routed(), tmp_path, RouterLoadCallback(), Reporter())
    assert ["router/max_violation" in line for line in lines] == [True, True, False]


@pytest.mark.parametrize(
    ("model", "callback", "message"),
    [
        (nn.Linear(2, 2), RouterLoadCallback(), "`model` must contain a GroupedTopKRouter, got Linear without one"),
        (Routed(), RouterLoadCallback(num_devices=3), "`num_groups` must divide `num_experts`=8, got 3"),
        (Routed(), RouterLoadCallback(num_devices=0), "`num_groups` must be an integer of at least 1, got 0"),
    ],
)
def test_what_cannot_be_watched_is_refused(
    model: nn.Module, callback: RouterLoadCallback, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        trained(model, tmp_path, callback)
