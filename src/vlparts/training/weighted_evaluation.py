"""The weighted loss over a whole evaluation set, added up batch by batch."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..losses.causal_lm import weighted_causal_lm_loss
from ..losses.normalizer import sum_over_processes
from ..losses.weights import weigh_tokens
from .weighted_inputs import WeightedLabels


class _Undivided(NamedTuple):
    """Denominators that leave sums as they are."""

    samples: Tensor
    tokens: Tensor


class EvaluationSums:
    """Adds up both parts of the weighted loss, and what they are divided by in the end.

    Args:
        mix: m of [`weigh_tokens`].
        length_exponent: p of [`weigh_tokens`].
    """

    def __init__(self, mix: float, length_exponent: float) -> None:
        self.mix, self.length_exponent = mix, length_exponent
        self._sums = torch.zeros(4, dtype=torch.float64)

    def add(self, logits: Tensor, found: WeightedLabels, shifted: bool = False) -> None:
        """Count a batch.

        Args:
            logits: `(B, S, V)`.
            found: Its labels and weights.
            shifted: Whether the labels are shifted already.
        """
        one = torch.ones((), dtype=torch.float64)
        undivided = _Undivided(one, one)
        for place, mix in enumerate((1.0, 0.0)):
            weights = weigh_tokens(
                found.labels,
                mix=mix,
                length_exponent=self.length_exponent,
                normalizer=undivided,
                dtype=torch.float64,
                **found.options,
            )
            if mix == self.mix or 0 < self.mix < 1:
                loss = weighted_causal_lm_loss(
                    logits,
                    None if shifted else found.labels,
                    logits.shape[-1],
                    shift_labels=found.labels if shifted else None,
                    loss_weights=weights.weights.view(found.labels.shape),
                )
                self._sums[place] += loss.detach().cpu()
            self._sums[place + 2] += weights.total_samples if mix else weights.total_tokens

    def all_reduce(self, device: torch.device) -> None:
        """Sum over processes.

        Args:
            device: Where the process group works.
        """
        self._sums = sum_over_processes(self._sums, device=device)

    def compute(self) -> float:
        """The loss of all that was added; 0 where nothing has weight."""
        by_sample, by_token, samples, tokens = self._sums.tolist()
        loss = self.mix * by_sample / samples if samples else 0.0
        return loss + ((1 - self.mix) * by_token / tokens if tokens else 0.0)
