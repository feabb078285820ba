"""Options of a mixture-of-experts router and their checks.

`E` experts form `num_expert_groups` groups of adjacent experts of equal size; a token chooses `K` of them.
"""

import math
from dataclasses import dataclass
from typing import Any

from .utils import positive_integer

__all__ = ["BALANCE_FORMS", "GROUPINGS", "GROUP_MASKS", "GROUP_SCORES", "SCORINGS", "RoutingOptions"]

SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus", "softmax_over_chosen")
GROUPINGS = ("none", "equal", "limited")
GROUP_SCORES = ("max", "top2_sum", "topm_sum")
GROUP_MASKS = ("exclude", "zero")
ROUTER_DTYPES = ("float32", "float64")
BALANCE_FORMS = ("batch", "sequence", "global")


@dataclass(frozen=True)
class RoutingOptions:
    """Options for choosing and weighting experts.

    Args:
        num_experts: E.
        num_experts_per_tok: K.
        scoring: How logits become scores: "softmax" over all experts, "sigmoid" or "sqrtsoftplus" of each expert, or
            "softmax_over_chosen", where experts are chosen by logits and weights are a softmax over the K chosen.
        grouping: "none"; "equal", K / groups experts in every group (mixture of grouped experts, arXiv 2505.21411,
            eq. 5 to 7); or "limited", the K best experts of the `num_limited_groups` best groups (DeepSeek-V2 and V3,
            arXiv 2405.04434 and 2412.19437).
        num_expert_groups: Number of groups, if there is a grouping.
        num_limited_groups: Number of groups that a token may use, for "limited" only.
        group_score: Score of a group, for "limited" only: "max" of its scores, "top2_sum" of its two best scores, or
            "topm_sum" of its m best scores with m = K / `num_limited_groups`.
        group_mask: Scores of the other groups, for "limited" only: "exclude" (the default) sets them to minus
            infinity, "zero" to 0, as the code of DeepSeek-V2 and the remote code of V3 do. With "zero", an expert of
            another group is chosen before an expert of the best groups whose biased score is negative.
        selection_bias: Whether a bias is added to the scores for the choice, but not for the weights (arXiv
            2408.15664).
        renormalize: Whether the weights of a token are divided by their sum.
        renormalize_eps: Constant added to that sum; 1e-20 does not change float32 sums above 1e-12.
        routed_scaling_factor: Factor of all weights.
        num_voted_experts: Approximation for inference with Pangu Pro MoE, or None. In each group the tokens of the
            batch vote for their best expert, and only the experts with the most votes, this many, can be chosen. A
            token's output then depends on the other tokens of its batch. For "equal" with one choice per group.

    Raises:
        ValueError: If a name is unknown, a number is out of range, or options do not fit together.
    """

    num_experts: int
    num_experts_per_tok: int
    scoring: str = "softmax"
    grouping: str = "none"
    num_expert_groups: int | None = None
    num_limited_groups: int | None = None
    group_score: str | None = None
    group_mask: str | None = None
    selection_bias: bool = False
    renormalize: bool = False
    renormalize_eps: float = 1e-20
    routed_scaling_factor: float = 1.0
    num_voted_experts: int | None = None

    def __post_init__(self) -> None:
        positive_integer(self.num_experts, "num_experts")
        positive_integer(self.num_experts_per_tok, "num_experts_per_tok")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"`num_experts_per_tok` must be at most `num_experts`={self.num_experts}, got "
                f"{self.num_experts_per_tok}."
            )
        check_name("scoring", self.scoring, SCORINGS)
        check_name("grouping", self.grouping, GROUPINGS)
        self._check_weights()
        self._check_groups()
        if self.grouping == "equal":
            self._check_equal()
        if self.grouping == "limited":
            self._check_limited()
        if self.num_voted_experts is not None:
            self._check_votes()

    @property
    def group_size(self) -> int:
        """Number of experts of a group; E without a grouping."""
        return self.num_experts // (self.num_expert_groups or 1)

    def _check_weights(self) -> None:
        check_number("renormalize_eps", self.renormalize_eps, lowest=0.0)
        check_number("routed_scaling_factor", self.routed_scaling_factor)
        if self.scoring == "softmax_over_chosen":
            for name in ("renormalize", "selection_bias"):
                if getattr(self, name):
                    raise ValueError(f"`{name}` must be False if `scoring` is 'softmax_over_chosen', got True.")

    def _check_groups(self) -> None:
        """Check the number of groups, and that no option without effect is set."""
        if self.grouping != "limited":
            for name in ("num_limited_groups", "group_score", "group_mask"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}` must be None unless `grouping` is 'limited', got {getattr(self, name)!r} with "
                        f"{self.grouping!r}."
                    )
        if self.grouping == "none":
            if self.num_expert_groups is not None:
                raise ValueError(
                    f"`num_expert_groups` must be None if `grouping` is 'none', got {self.num_expert_groups!r}."
                )
            return
        groups = positive_integer(self.num_expert_groups, "num_expert_groups")
        if self.num_experts % groups:
            raise ValueError(f"`num_expert_groups` must divide `num_experts`={self.num_experts}, got {groups}.")

    def _check_equal(self) -> None:
        # K <= E, so K / groups never exceeds the size of a group.
        if self.num_experts_per_tok % self.num_expert_groups:  # type: ignore[operator]
            raise ValueError(
                f"`num_experts_per_tok` must be a multiple of `num_expert_groups`={self.num_expert_groups} if "
                f"`grouping` is 'equal', got {self.num_experts_per_tok}."
            )

    def _check_limited(self) -> None:
        """Check that the best groups hold enough experts, and that the score of a group is defined."""
        limit = positive_integer(self.num_limited_groups, "num_limited_groups")
        if limit > self.num_expert_groups:  # type: ignore[operator]
            raise ValueError(
                f"`num_limited_groups` must be at most `num_expert_groups`={self.num_expert_groups}, got {limit}."
            )
        if self.num_experts_per_tok > limit * self.group_size:
            raise ValueError(
                f"`num_experts_per_tok` must be at most {limit * self.group_size}, the number of experts of {limit} "
                f"groups, got {self.num_experts_per_tok}."
            )
        check_name("group_score", self.group_score, GROUP_SCORES)
        if self.group_mask is not None:
            check_name("group_mask", self.group_mask, GROUP_MASKS)
        if self.group_score == "topm_sum" and self.num_experts_per_tok % limit:
            raise ValueError(
                f"`num_experts_per_tok` must be a multiple of `num_limited_groups`={limit} if `group_score` is "
                f"'topm_sum', got {self.num_experts_per_tok}."
            )
        if self.group_score == "top2_sum" and self.group_size < 2:
            raise ValueError("`group_score` 'top2_sum' needs groups of at least 2 experts, got groups of 1.")
        if self.group_mask == "zero" and self.scoring == "softmax_over_chosen":
            raise ValueError("`group_mask` 'zero' needs non-negative scores, got `scoring` 'softmax_over_chosen'.")

    def _check_votes(self) -> None:
        voted = positive_integer(self.num_voted_experts, "num_voted_experts")
        if self.grouping != "equal" or self.num_experts_per_tok != self.num_expert_groups:
            raise ValueError(
                "`num_voted_experts` needs `grouping` 'equal' with one choice per group, got "
                f"{self.grouping!r} with {self.num_experts_per_tok} choices in {self.num_expert_groups} groups."
            )
        if voted > self.group_size:
            raise ValueError(f"`num_voted_experts` must be at most the group size {self.group_size}, got {voted}.")


def check_name(argument: str, value: Any, names: tuple[str, ...]) -> None:
    """Raise a ValueError if `value` is not one of `names`."""
    if value not in names:
        raise ValueError(f"`{argument}` must be one of {', '.join(map(repr, names))}, got {value!r}.")


def check_number(argument: str, value: Any, lowest: float = -math.inf, below: float = math.inf) -> None:
    """Raise a ValueError if `value` is not a finite number in `[lowest, below)`."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not lowest <= value < below:
        bounds = "" if lowest == -math.inf else f" of at least {lowest:g}"
        bounds += "" if below == math.inf else f" and below {below:g}"
        raise ValueError(f"`{argument}` must be a finite number{bounds}, got {value!r}.")
