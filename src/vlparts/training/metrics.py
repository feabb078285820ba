"""Scalars of a training run for Trainer's log: losses by task and answer length, speed, packing and router load.

| entry | value since the last log entry, over all processes |
|---|---|
| `loss_by_task/NAME` | mean cross-entropy of the tokens with loss of one file of records, if there are several |
| `loss_by_length/RANGE` | likewise, of the samples whose number of tokens with loss is in a range of [`LENGTHS`] |
| `speed/tokens_per_second` | tokens of samples, image tokens included and padding excluded |
| `speed/images_per_second` | images |
| `speed/data_wait` | share of the time that was spent waiting for data, of the process that waited longest |
| `packing/fill` | mean tokens of a pack, divided by the capacity |
| `packing/samples` | mean number of samples of a pack |
| `router/*` | the values of [`RouterLoadCallback`][vlparts.training.router_callback.RouterLoadCallback] |

Seconds are those of optimizer steps with their data: evaluation and saving do not count.
"""

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from ..losses.causal_lm import next_token_losses
from ..losses.normalizer import gather_over_processes
from ..parts.utils import IGNORE_INDEX
from .encoding import Sample
from .router_callback import RouterLoads

__all__ = ["LENGTHS", "MetricsCollator", "RunMetrics", "task_names"]

LENGTHS = ("1-16", "17-64", "65-256", "257+")
"""Ranges of the number of tokens with loss of a sample, by which losses are logged."""
FACTS = "run_facts"
"""Entry of a batch that is for [`RunMetrics`] and not for the model."""
_BOUNDS = (16, 64, 256)


def task_names(paths: Sequence[Path]) -> list[str]:
    """Names of the files of records in the log: their stems, or their paths without suffix if stems are not unique."""
    stems = [path.stem for path in paths]
    return stems if len(set(stems)) == len(stems) else [path.with_suffix("").as_posix() for path in paths]


class MetricsCollator:
    """Wraps a collator of packs and adds what [`RunMetrics`] needs to its batches.

    Args:
        collator: Collates packs of samples.
    """

    def __init__(self, collator: Callable[[list[list[Sample]]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, batch: list[list[Sample]]) -> dict[str, Any]:
        """Return the collator's batch, with the numbers of packs, samples, tokens and images, and a group per token.

        The groups are `(B, S)` int64, task and range of length of the sample of each token; anything at padding.
        """
        row = self.collator(batch)
        samples = [sample for pack in batch for sample in pack]
        facts: dict[str, Any] = {
            "packs": len(batch),
            "samples": len(samples),
            "tokens": sum(map(len, samples)),
            "images": sum(sample.image_count for sample in samples),
        }
        if row.get("labels") is not None:
            groups = torch.tensor([_group(sample) for sample in samples])
            flat = groups.repeat_interleave(torch.tensor([len(sample.input_ids) for sample in samples]))
            shape = row["labels"].shape
            facts["groups"] = flat.view(shape) if flat.numel() == shape.numel() else groups[:, None].expand(shape)
        return {**row, FACTS: facts}


def _group(sample: Sample) -> int:
    targets = int((sample.labels[1:] != IGNORE_INDEX).sum())
    return sample.task * len(LENGTHS) + bisect_left(_BOUNDS, targets)


class RunMetrics(TrainerCallback):
    """Accumulates the scalars of a run between two log entries.

    It reads what the Trainer computes and changes nothing: losses and gradients are equal to the bit without it. The
    losses by group need the cross-entropy of the tokens with loss once more, without gradients.

    Args:
        tasks: Names of the files of records, see [`task_names`].
        capacity: Tokens of a pack.
    """

    def __init__(self, tasks: Sequence[str], capacity: int) -> None:
        self.tasks, self.capacity = tasks, capacity
        self._routers: RouterLoads | None = None
        self._groups: deque[Tensor] = deque()
        self._reset()

    def _reset(self) -> None:
        self._totals = dict.fromkeys(("packs", "samples", "tokens", "images"), 0)
        self._seconds = self._waited = 0.0
        self._losses: Tensor | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Start anew, and count the choices of the model's routers."""
        self.on_train_end(args, state, control)
        self._routers = RouterLoads(model, scores=False)
        self._reset()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the time of an optimizer step."""
        self._seconds += time.perf_counter() - self._began

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop counting the choices of routers."""
        if self._routers is not None:
            self._routers.remove()

    def watch(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield the batches of an optimizer step without [`FACTS`], which are counted, as is the time they take."""
        self._began = time.perf_counter()
        self._groups.clear()
        return self._watch(batches)

    def _watch(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - asked
            if batch is None:
                return
            facts = batch[FACTS]
            for name in self._totals:
                self._totals[name] += facts[name]
            if "groups" in facts:
                self._groups.append(facts["groups"])
            yield without_facts(batch)

    @torch.no_grad()
    def add_losses(self, logits: Tensor | None, labels: Tensor | None, loss_weights: Tensor | None = None) -> None:
        """Add the losses of the next micro-batch of the step; batches outside of a step are not counted.

        Args:
            logits: `(B, S, V)`; None if the model does not return them, then nothing is counted.
            labels: `(B, S)`, not shifted; None likewise.
            loss_weights: `(B, S)`; tokens without weight are not counted.
        """
        if not self._groups:
            return
        groups = self._groups.popleft()
        if logits is None or labels is None:
            return
        losses, counted = next_token_losses(logits, labels, loss_weights)
        # No sample begins at a token with loss, so the group of a token is that of the one before.
        groups = groups.to(losses.device)[counted]
        sums = losses.new_zeros(len(self.tasks) * len(LENGTHS), 2)
        sums.index_add_(0, groups, torch.stack([losses, counted.to(losses)], -1)[counted])
        self._losses = sums if self._losses is None else self._losses + sums

    def compute(self, device: torch.device) -> dict[str, float]:
        """Compute the entries of the log over all processes, and start anew.

        Args:
            device: Device of the process group's backend.
        """
        losses = torch.zeros(len(self.tasks) * len(LENGTHS), 2) if self._losses is None else self._losses.cpu()
        own = torch.tensor([self._seconds, self._waited, *self._totals.values()], dtype=torch.float64)
        values_here = torch.cat([own, losses.double().flatten()])
        gathered = gather_over_processes(values_here, device=device)
        found = values_here[None] if gathered is None else gathered
        seconds, waited = found[:, 0].clamp(min=1e-9), found[:, 1]
        totals = found[:, 2:].sum(0)
        packs, samples, tokens, images = totals[:4].tolist()
        values = {
            "speed/tokens_per_second": tokens / float(seconds.max()),
            "speed/images_per_second": images / float(seconds.max()),
            "speed/data_wait": float((waited / seconds).max()),
            "packing/fill": tokens / (max(packs, 1) * self.capacity),
            "packing/samples": samples / max(packs, 1),
        }
        by_group = totals[4:].view(len(self.tasks), len(LENGTHS), 2)
        if len(self.tasks) > 1:
            values |= _means("loss_by_task", self.tasks, by_group.sum(1))
        values |= _means("loss_by_length", LENGTHS, by_group.sum(0))
        if self._routers is not None and self._routers.statistics:
            values |= self._routers.compute()
        self._reset()
        return values


def without_facts(batch: dict[str, Any]) -> dict[str, Any]:
    """The inputs of the model in a batch."""
    return {name: value for name, value in batch.items() if name != FACTS}


def _means(prefix: str, names: Sequence[str], sums: Tensor) -> dict[str, float]:
    """Means by name of sums and counts `(names, 2)`, for the names with a count."""
    return {
        f"{prefix}/{name}": total / count for name, (total, count) in zip(names, sums.tolist(), strict=True) if count
    }
