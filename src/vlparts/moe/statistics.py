"""Statistics of a router's load: counts over batches and processes, and the published measures of balance.

Shapes: `T` tokens, `E` experts, `K` experts per token, `D` devices or groups of consecutive experts.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ..parts.distributed import resolve_group
from ..parts.moe_losses import normalized_scores
from ..parts.moe_routing import check_token_mask, expert_counts
from ..parts.utils import positive_integer

__all__ = ["RouterLoad", "RouterStatistics"]


@dataclass(frozen=True)
class RouterLoad:
    """Measures of balance, computed by [`RouterStatistics`]. Without tokens they are zero.

    Attributes:
        tokens: Number of tokens, padding excluded.
        tokens_per_expert: `(E,)` int64 on CPU.
        tokens_per_group: `(D,)` int64 on CPU, token-expert pairs of each device or group.
        imbalance_score: `(max - min) / tokens` of `tokens_per_group` (arXiv 2505.21411, eq. 3 and 4).
        batch_imbalance_score: Mean imbalance score of single updates, which determines the time of a step. The score
            of the whole stream is lower, since batches average out.
        max_violation: `(max - mean) / mean` of `tokens_per_expert`, "MaxVio" (arXiv 2408.15664).
        batch_max_violation: Mean of `max_violation` over single updates.
        load_cv2: Variance of `tokens_per_expert` divided by its squared mean (arXiv 1701.06538).
        load_entropy: Entropy of `tokens_per_expert` divided by log E: 1 for an even load, 0 for a single expert.
        dead_experts: Experts that no token chose.
        importance_cv2: Variance of the summed scores of experts divided by their squared mean; None without scores.
        score_entropy: Mean over tokens of the entropy of their scores, divided by log E: near 0 if the router is
            confident; None without scores.
    """

    tokens: int
    tokens_per_expert: Tensor
    tokens_per_group: Tensor
    imbalance_score: float
    batch_imbalance_score: float
    max_violation: float
    batch_max_violation: float
    load_cv2: float
    load_entropy: float
    dead_experts: tuple[int, ...]
    importance_cv2: float | None
    score_entropy: float | None


class RouterStatistics:
    """Accumulates a router's choices over batches and processes.

    Updates do not wait for the device. Sums are int64 and float64, on the device of the latest update.

    Args:
        num_experts: E.
        num_groups: D, number of blocks of consecutive experts: the router's groups, or the devices of the experts.

    Raises:
        ValueError: If a number is not a positive integer, or D does not divide E.
    """

    def __init__(self, num_experts: int, num_groups: int) -> None:
        self.num_experts = positive_integer(num_experts, "num_experts")
        self.num_groups = positive_integer(num_groups, "num_groups")
        if self.num_experts % self.num_groups:
            raise ValueError(f"`num_groups` must divide `num_experts`={num_experts}, got {num_groups}.")
        self.reset()

    def reset(self) -> None:
        """Set all counts to zero."""
        # Counts: E choices per expert, tokens, tokens with scores, updates with tokens.
        # Sums: E scores per expert, entropy, imbalance score per update, violation per update.
        self._counts = torch.zeros(self.num_experts + 3, dtype=torch.int64)
        self._sums = torch.zeros(self.num_experts + 3, dtype=torch.float64)

    @property
    def tokens_per_expert(self) -> Tensor:
        """`(E,)` int64 counts so far, on the device, as `balance_loss` and `update_selection_bias` take them."""
        return self._counts[: self.num_experts].clone()

    @torch.no_grad()
    def update(self, indices: Tensor, scores: Tensor | None = None, token_mask: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            indices: `(T, K)` int64, the chosen experts.
            scores: `(T, E)` non-negative scores of all experts, normalised per token here. None to count choices
                only.
            token_mask: `(T,)` bool, false for padding, whose values may be anything.

        Raises:
            ValueError: If a shape or type does not fit.
        """
        self._check(indices, scores)
        check_token_mask(token_mask, len(indices))
        self._counts, self._sums = self._counts.to(indices.device), self._sums.to(indices.device)
        counts = expert_counts(indices, self.num_experts, token_mask)
        tokens = counts.new_tensor(len(indices)) if token_mask is None else token_mask.sum()
        scored = tokens if scores is not None else torch.zeros_like(tokens)
        self._counts += torch.cat([counts, torch.stack([tokens, scored, (tokens > 0).long()])])
        batch = [_imbalance(self._by_group(counts), tokens), _violation(counts)]
        self._sums[-2:] += torch.stack(batch)
        if scores is not None:
            shares = normalized_scores(scores.double(), None, token_mask)
            self._sums[: self.num_experts] += shares.sum(dim=0)
            self._sums[self.num_experts] += torch.special.entr(shares).sum()

    def merge(self, other: "RouterStatistics") -> None:
        """Add the counts of another instance.

        Raises:
            ValueError: If its numbers of experts or groups differ.
        """
        expected, got = (self.num_experts, self.num_groups), (other.num_experts, other.num_groups)
        if expected != got:
            raise ValueError(f"`other` must have {expected} experts and groups, got {got}.")
        self._counts = self._counts + other._counts.to(self._counts.device)
        self._sums = self._sums + other._sums.to(self._sums.device)

    def all_reduce(self, group: Any = None) -> None:
        """Sum over processes in place. Call it once, after the last update and before `compute`.

        Args:
            group: The process group; None for the default group if there is one, "local" for this process alone.

        Raises:
            ValueError: If `group` is not a group of this process.
        """
        process_group = resolve_group(group)
        if process_group is not None:
            dist.all_reduce(self._counts, group=process_group)
            dist.all_reduce(self._sums, group=process_group)

    def compute(self) -> RouterLoad:
        """Compute the measures; waits for the device."""
        counts, sums = self._counts.cpu(), self._sums.cpu()
        per_expert, (tokens, scored, updates) = counts[: self.num_experts].clone(), counts[self.num_experts :]
        per_group = self._by_group(per_expert)
        steps, max_entropy = max(int(updates), 1), math.log(self.num_experts) if self.num_experts > 1 else 1.0
        shares = per_expert.double() / per_expert.sum().clamp_min(1)
        has_scores = int(scored) > 0
        return RouterLoad(
            tokens=int(tokens),
            tokens_per_expert=per_expert,
            tokens_per_group=per_group,
            imbalance_score=float(_imbalance(per_group, tokens)),
            batch_imbalance_score=float(sums[-2]) / steps,
            max_violation=float(_violation(per_expert)),
            batch_max_violation=float(sums[-1]) / steps,
            load_cv2=_squared_variation(per_expert.double()),
            load_entropy=float(torch.special.entr(shares).sum()) / max_entropy,
            dead_experts=tuple((per_expert == 0).nonzero().flatten().tolist()),
            importance_cv2=_squared_variation(sums[: self.num_experts]) if has_scores else None,
            score_entropy=float(sums[self.num_experts] / scored) / max_entropy if has_scores else None,
        )

    def _by_group(self, counts: Tensor) -> Tensor:
        return counts.view(self.num_groups, -1).sum(dim=1)

    def _check(self, indices: Tensor, scores: Tensor | None) -> None:
        if indices.ndim != 2 or indices.dtype != torch.int64:
            raise ValueError(
                f"`indices` must be int64 with shape (tokens, chosen), got {indices.dtype} {tuple(indices.shape)}."
            )
        if scores is not None and (scores.shape != (len(indices), self.num_experts) or not scores.is_floating_point()):
            raise ValueError(
                f"`scores` must be floating point with shape ({len(indices)}, {self.num_experts}), got "
                f"{scores.dtype} {tuple(scores.shape)}."
            )


def _imbalance(per_group: Tensor, tokens: Tensor) -> Tensor:
    return (per_group.max() - per_group.min()).double() / tokens.clamp_min(1)


def _violation(per_expert: Tensor) -> Tensor:
    mean = per_expert.double().mean()
    return torch.where(mean > 0, per_expert.max() / mean.clamp_min(torch.finfo(mean.dtype).tiny) - 1, 0.0)


def _squared_variation(values: Tensor) -> float:
    mean = float(values.mean())
    return float(values.var(correction=0)) / mean**2 if mean else 0.0
