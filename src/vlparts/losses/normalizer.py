"""Denominators of a loss over all micro-batches and processes of an optimiser step."""

from typing import Any

import torch
from torch import Tensor

from ..parts.utils import IGNORE_INDEX
from .weights import resolve_mix, weigh_next_tokens, weigh_tokens

__all__ = ["LossNormalizer", "gather_over_processes", "sum_over_processes"]


class LossNormalizer:
    """Sums the denominators of a step, so that its loss does not depend on packing, micro-batches and ranks.

    Call [`add`] with the labels of each micro-batch, then [`all_reduce`] if there are several processes, then pass the
    normalizer to [`weighted_cross_entropy`] for each micro-batch. The losses of all micro-batches and processes add up
    to the loss of the step. If gradients are averaged over processes, as DistributedDataParallel does, multiply the
    losses by the number of processes.

    Samples must not be split between micro-batches.

    Args:
        preset: "token", "sample", "square" or "openpangu_mix", instead of `mix` and `length_exponent`.
        mix: Share of sample averaging, between 0 and 1. Default: 0.5.
        length_exponent: Length exponent, at least 0. Default: 0.
        ignore_index: Label of tokens without loss.

    Raises:
        ValueError: As [`resolve_mix`].
    """

    def __init__(
        self,
        preset: str | None = None,
        mix: float | None = None,
        length_exponent: float | None = None,
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        self.mix, self.length_exponent = resolve_mix(preset, mix, length_exponent)
        self.ignore_index = ignore_index
        self.reset()

    def reset(self) -> None:
        """Start a new step."""
        self._totals = torch.zeros(2, dtype=torch.float64)
        self._reduced = False

    @property
    def samples(self) -> Tensor:
        """A, the sum of the importance of samples with labels: a float64 scalar."""
        return self._totals[0]

    @property
    def tokens(self) -> Tensor:
        """C, the sum of the weights of tokens, scaled by importance and length: a float64 scalar."""
        return self._totals[1]

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of [`weighted_cross_entropy`]: mix, length exponent, normalizer and ignored label."""
        return {
            "mix": self.mix,
            "length_exponent": self.length_exponent,
            "normalizer": self,
            "ignore_index": self.ignore_index,
        }

    def add(self, labels: Tensor, *, next_tokens: bool = False, **weighting: Any) -> None:
        """Add a micro-batch.

        Args:
            labels: `(S,)` or `(B, S)` integers.
            next_tokens: Whether the loss shifts these labels, so that [`weigh_next_tokens`] computes its weights.
            **weighting: `sample_weights`, `token_weights`, `cu_seqlens` and `sample_ids` of [`weigh_tokens`].

        Raises:
            ValueError: As [`weigh_tokens`].
            RuntimeError: After [`all_reduce`]; call [`reset`] to start a new step.
        """
        self._check_open()
        weights = (weigh_next_tokens if next_tokens else weigh_tokens)(
            labels,
            mix=self.mix,
            length_exponent=self.length_exponent,
            ignore_index=self.ignore_index,
            dtype=torch.float64,
            **weighting,
        )
        totals = torch.stack([weights.total_samples, weights.total_tokens]).detach()
        self._totals = self._totals.to(totals.device) + totals

    def all_reduce(self, group: Any = None, device: torch.device | str | None = None) -> None:
        """Sum over the processes of torch.distributed, once per step; without torch.distributed, do nothing.

        Args:
            group: The process group. Default: the default group.
            device: Device of the group's backend (the accelerator for NCCL and HCCL). Default: that of the labels.

        Raises:
            RuntimeError: On a second call in one step; call [`reset`] to start a new one.
        """
        self._check_open()
        self._totals = sum_over_processes(self._totals, group, device)
        self._reduced = True

    def _check_open(self) -> None:
        if self._reduced:
            raise RuntimeError("This step has already been summed over processes; call `reset` to start a new one.")


def sum_over_processes(values: Tensor, group: Any = None, device: torch.device | str | None = None) -> Tensor:
    """Sum float64 values over processes, also with backends and devices without float64.

    Args:
        values: float64 with one axis, of the same length in each process.
        group: The process group. Default: the default group.
        device: Device of the group's backend (the accelerator for NCCL and HCCL). Default: that of `values`.

    Returns:
        float64 on the device of `values`, the same in each process; `values` if torch.distributed is not initialised.
    """
    gathered = gather_over_processes(values, group, device)
    return values if gathered is None else gathered.sum(0)


def gather_over_processes(
    values: Tensor, group: Any = None, device: torch.device | str | None = None
) -> Tensor | None:
    """Gather float64 values of all processes, of shape `(processes, n)`, as [`sum_over_processes`] does.

    Without torch.distributed the result is None.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    bits = values.view(torch.int32).to(device or values.device)  # not every accelerator has float64
    gathered = [torch.empty_like(bits) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(gathered, bits, group=group)
    return torch.stack([part.to(values.device).view(torch.float64) for part in gathered])
