"""What the weights of a whole optimiser step are divided by, over micro-batches and processes."""

from typing import Any

import torch
from torch import Tensor

from ._distributed import sum_over_processes
from .weights import IGNORE_INDEX, resolve_mix, weigh_next_tokens, weigh_tokens


class LossNormalizer:
    """Adds up the denominators of a step, so that its loss is the same however its samples are packed and spread.

    First [`add`] the labels of each micro-batch, then [`all_reduce`] where there are several processes; then pass it
    to [`weighted_cross_entropy`] as `normalizer` for each micro-batch. The losses of all micro-batches and processes
    add up to the loss of the step; where gradients are averaged over processes, as DistributedDataParallel does,
    multiply them by the number of processes.

    Samples are whole: none may be split between micro-batches.

    Args:
        preset: As for [`weigh_tokens`].
        mix: As for [`weigh_tokens`].
        length_exponent: As for [`weigh_tokens`].
        ignore_index: Label of tokens without loss.

    Raises:
        ValueError: As for [`resolve_mix`].
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
        """Begin a new step."""
        self._totals = torch.zeros(2, dtype=torch.float64)
        self._reduced = False

    @property
    def samples(self) -> Tensor:
        """A: the importance of all samples with tokens, a float64 scalar."""
        return self._totals[0]

    @property
    def tokens(self) -> Tensor:
        """C: the weights of all tokens, by importance and length, a float64 scalar."""
        return self._totals[1]

    @property
    def options(self) -> dict[str, Any]:
        """What [`weighted_cross_entropy`] takes beside labels and weights."""
        return {
            "mix": self.mix,
            "length_exponent": self.length_exponent,
            "normalizer": self,
            "ignore_index": self.ignore_index,
        }

    def add(
        self,
        labels: Tensor,
        *,
        sample_weights: Tensor | None = None,
        token_weights: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        sample_ids: Tensor | None = None,
        next_tokens: bool = False,
    ) -> None:
        """Count a micro-batch.

        Args:
            labels: As for [`weigh_tokens`].
            sample_weights: As for [`weigh_tokens`].
            token_weights: As for [`weigh_tokens`].
            cu_seqlens: As for [`weigh_tokens`].
            sample_ids: As for [`weigh_tokens`].
            next_tokens: Whether the loss shifts these labels, so that [`weigh_next_tokens`] makes its weights.

        Raises:
            ValueError: As for [`weigh_tokens`].
            RuntimeError: After [`all_reduce`]; [`reset`] begins a new step.
        """
        self._check_open()
        weights = (weigh_next_tokens if next_tokens else weigh_tokens)(
            labels,
            mix=self.mix,
            length_exponent=self.length_exponent,
            sample_weights=sample_weights,
            token_weights=token_weights,
            cu_seqlens=cu_seqlens,
            sample_ids=sample_ids,
            ignore_index=self.ignore_index,
            dtype=torch.float64,
        )
        totals = torch.stack([weights.total_samples, weights.total_tokens]).detach()
        self._totals = self._totals.to(totals.device) + totals

    def all_reduce(self, group: Any = None, device: torch.device | str | None = None) -> None:
        """Sum over the processes of torch.distributed, once for each step; without it, nothing is to be summed.

        Args:
            group: The process group; the default one where None.
            device: Where the group's backend works (NCCL and HCCL: the accelerator); where the labels were, if None.

        Raises:
            RuntimeError: If it was called in this step already; [`reset`] begins a new one.
        """
        self._check_open()
        self._totals = sum_over_processes(self._totals, group, device)
        self._reduced = True

    def _check_open(self) -> None:
        if self._reduced:
            raise RuntimeError("This step is summed over its processes already; `reset` begins a new one.")
