"""Routing: the choice of experts as functions of the router's logits, without parameters.

Shapes: `T` tokens, `E` experts, `K` chosen, `G` groups. No function synchronizes with the device and no shape depends
on data; the check for NaN runs only on CPU and outside of compiled code.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .moe_options import RoutingOptions

__all__ = [
    "RoutingOptions",
    "check_token_mask",
    "choose_experts",
    "expert_counts",
    "get_token_mask",
    "route",
    "router_scores",
]


def route(
    logits: Tensor,
    options: RoutingOptions,
    *,
    selection_bias: Tensor | None = None,
    expert_scale: Tensor | None = None,
    token_mask: Tensor | None = None,
    vote: bool = False,
) -> tuple[Tensor, Tensor]:
    """Choose and weight K experts for each token.

    Among equal scores the lower index is chosen. Choices are sorted by descending score; with grouping "equal" by
    group, then by descending score. Weights are differentiable, the choice is not.

    Args:
        logits: `(T, E)`.
        options: The routing options.
        selection_bias: `(E,)`, added to the scores for the choice; given if and only if `options.selection_bias`.
        expert_scale: `(1, E)` factors of the chosen experts' weights, or None.
        token_mask: `(T,)` bool, false at padding, which gets weights of zero and does not vote. Its indices are valid
            rather than E, since E is out of range for some of transformers' experts modules.
        vote: Whether `num_voted_experts` has an effect.

    Returns:
        Weights `(T, K)` in the dtype of the logits, and indices `(T, K)` int64.

    Raises:
        ValueError: If a shape or dtype does not fit, `selection_bias` and the options disagree, or, on CPU and outside
            of compiled code, a logit is NaN.
    """
    _check(logits, options, selection_bias, expert_scale)
    check_token_mask(token_mask, len(logits))
    scores = router_scores(logits, options.scoring)
    ranking = scores.detach()
    if selection_bias is not None:
        ranking = ranking + selection_bias.detach()
    indices = choose_experts(ranking, options, token_mask, vote)
    weights = scores.gather(1, indices)
    if options.scoring == "softmax_over_chosen":
        weights = weights.softmax(dim=-1)
    if options.renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + options.renormalize_eps)
    if options.routed_scaling_factor != 1.0:
        weights = weights * options.routed_scaling_factor
    if expert_scale is not None:
        weights = weights * expert_scale.to(weights.dtype)[0][indices]
    if token_mask is not None:
        weights = weights.masked_fill(~token_mask[:, None], 0.0)
    return weights, indices


def router_scores(logits: Tensor, scoring: str) -> Tensor:
    """Return the scores `(T, E)` of logits `(T, E)`; the logits themselves for "softmax_over_chosen"."""
    if scoring == "softmax":
        return logits.softmax(dim=-1)
    if scoring == "sigmoid":
        return logits.sigmoid()
    if scoring == "sqrtsoftplus":
        # The square root has an infinite derivative at 0.
        return F.softplus(logits).clamp_min(torch.finfo(logits.dtype).tiny).sqrt()
    return logits


def choose_experts(
    ranking: Tensor, options: RoutingOptions, token_mask: Tensor | None = None, vote: bool = False
) -> Tensor:
    """Return the indices `(T, K)` of the chosen experts.

    Args:
        ranking: `(T, E)` scores for the choice.
        options: The routing options.
        token_mask: `(T,)` bool, false at padding, which does not vote.
        vote: Whether `num_voted_experts` has an effect.
    """
    if options.grouping == "none":
        return _best(ranking, options.num_experts_per_tok)
    groups = options.num_expert_groups or 1
    grouped = ranking.unflatten(1, (groups, options.group_size))
    if options.grouping == "equal":
        if vote and options.num_voted_experts is not None:
            grouped = _keep_voted(grouped, options.num_voted_experts, token_mask)
        first = torch.arange(0, options.num_experts, options.group_size, device=ranking.device)
        return (_best(grouped, options.num_experts_per_tok // groups) + first[:, None]).flatten(1)
    return _best(_keep_best_groups(grouped, options).flatten(1), options.num_experts_per_tok)


def expert_counts(indices: Tensor, num_experts: int, token_mask: Tensor | None = None) -> Tensor:
    """Count the tokens that chose each expert.

    Args:
        indices: `(T, K)` int64.
        num_experts: E.
        token_mask: `(T,)` bool, false at tokens that are not counted.

    Returns:
        `(E,)` int64.
    """
    ones = torch.ones_like(indices) if token_mask is None else token_mask[:, None].to(indices.dtype).expand_as(indices)
    return indices.new_zeros(num_experts).scatter_add_(0, indices.flatten(), ones.flatten())


def _best(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores of the last axis, in descending order; the lower index first if equal."""
    if count == 1:
        return scores.argmax(dim=-1, keepdim=True)
    # torch.topk does not define the order of equal scores.
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def _keep_best_groups(grouped: Tensor, options: RoutingOptions) -> Tensor:
    """Mask scores `(T, G, E/G)` outside of each token's best groups."""
    limit = options.num_limited_groups or 1
    if options.group_score == "max":
        group_scores = grouped.amax(dim=-1)
    else:
        size = 2 if options.group_score == "top2_sum" else options.num_experts_per_tok // limit
        group_scores = grouped.topk(size, dim=-1).values.sum(dim=-1)
    kept = torch.zeros_like(group_scores, dtype=torch.bool).scatter(1, _best(group_scores, limit), True)
    return grouped.masked_fill(~kept[..., None], 0.0 if options.group_mask == "zero" else -torch.inf)


def _keep_voted(grouped: Tensor, count: int, token_mask: Tensor | None) -> Tensor:
    """Mask scores `(T, G, E/G)` outside of the `count` experts of each group that are the best of most tokens."""
    votes = grouped.argmax(dim=-1, keepdim=True) == torch.arange(grouped.shape[-1], device=grouped.device)
    if token_mask is not None:
        votes = votes & token_mask[:, None, None]
    kept = votes.new_zeros(votes.shape[1:]).scatter(1, _best(votes.sum(dim=0), count), True)
    # The published code sets masked scores to 0, which would tie with scores that underflow to 0.
    return grouped.masked_fill(~kept, -torch.inf)


def get_token_mask(attention_mask: Any, tokens: int) -> Tensor | None:
    """Return the mask of the new tokens that are not padding.

    Args:
        attention_mask: `(B, past + S)`, 0 at padding. None and prepared masks of other shapes mark no padding.
        tokens: S.

    Returns:
        `(B * S,)` bool, or None without padding.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return None
    return attention_mask[:, -tokens:].reshape(-1).bool()


def check_token_mask(token_mask: Tensor | None, tokens: int) -> None:
    """Raise a ValueError if the mask is not `(tokens,)` bool."""
    if token_mask is not None and (token_mask.dtype != torch.bool or token_mask.shape != (tokens,)):
        raise ValueError(
            f"`token_mask` must be bool with shape ({tokens},), got {token_mask.dtype} with {tuple(token_mask.shape)}."
        )


def _check(logits: Tensor, options: RoutingOptions, selection_bias: Tensor | None, scale: Tensor | None) -> None:
    """Check the arguments of `route`."""
    experts = options.num_experts
    if logits.ndim != 2 or logits.shape[1] != experts or not logits.is_floating_point():
        raise ValueError(
            f"`logits` must be floating point with shape (tokens, {experts}), got {logits.dtype} with "
            f"{tuple(logits.shape)}."
        )
    if (selection_bias is not None) != options.selection_bias:
        raise ValueError(
            f"`selection_bias` must be given if and only if `options.selection_bias` is True, got "
            f"{'a' if selection_bias is not None else 'no'} bias with {options.selection_bias}."
        )
    if selection_bias is not None and selection_bias.shape != (experts,):
        raise ValueError(f"`selection_bias` must have shape ({experts},), got {tuple(selection_bias.shape)}.")
    if scale is not None and scale.shape != (1, experts):
        raise ValueError(f"`expert_scale` must have shape (1, {experts}), got {tuple(scale.shape)}.")
    # On other devices the check would synchronize.
    if logits.device.type == "cpu" and not torch.compiler.is_compiling() and bool(logits.isnan().any()):
        raise ValueError(f"`logits` must not hold NaN, got NaN for {int(logits.isnan().any(1).sum())} tokens.")
