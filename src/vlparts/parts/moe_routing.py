"""The choice of experts as functions of the router's logits, without parameters.

Shapes: `T` tokens, `E` experts, `K` chosen, `G` groups. Nothing here waits for the device, and no shape depends on
data, apart from the check for NaN on CPU outside of compiled code.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .moe_options import RoutingOptions

__all__ = ["RoutingOptions", "check_token_mask", "choose_experts", "expert_counts", "route", "router_scores"]


def route(
    logits: Tensor,
    options: RoutingOptions,
    *,
    selection_bias: Tensor | None = None,
    expert_scale: Tensor | None = None,
    token_mask: Tensor | None = None,
    vote: bool = False,
) -> tuple[Tensor, Tensor]:
    """Choose K experts for each token, and weight them.

    Of experts with equal scores the one with the lower index is chosen. Choices stand by falling score; with
    grouping "equal" group by group, and by falling score in each group. The choice has no gradient, the weights have.

    Args:
        logits: `(T, E)`.
        options: What to do.
        selection_bias: `(E,)`, added to the scores for the choice; needed just where the options say so.
        expert_scale: `(1, E)` factors of the chosen experts' weights, or None for ones.
        token_mask: `(T,)` bool, false at padding: such tokens get weights of zero and do not vote. Their indices are
            valid ones, not a mark for "none": that mark, index E, is out of range for some of transformers' experts
            modules.
        vote: Whether `num_voted_experts` takes effect.

    Returns:
        Weights `(T, K)` in the type of the logits, and indices `(T, K)` int64.

    Raises:
        ValueError: If a shape or type does not fit, the bias and the options disagree, or on CPU outside of compiled
            code, if a logit is NaN.
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
    """Scores `(T, E)` of logits `(T, E)`; the logits themselves for "softmax_over_chosen"."""
    if scoring == "softmax":
        return logits.softmax(dim=-1)
    if scoring == "sigmoid":
        return logits.sigmoid()
    if scoring == "sqrtsoftplus":
        # Below the smallest number the slope of the root would be infinite.
        return F.softplus(logits).clamp_min(torch.finfo(logits.dtype).tiny).sqrt()
    return logits


def choose_experts(
    ranking: Tensor, options: RoutingOptions, token_mask: Tensor | None = None, vote: bool = False
) -> Tensor:
    """Indices `(T, K)` of the chosen experts.

    Args:
        ranking: `(T, E)` scores for the choice.
        options: What to do.
        token_mask: `(T,)` bool; the others do not vote.
        vote: Whether `num_voted_experts` takes effect.
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
    """How many tokens chose each expert.

    Args:
        indices: `(T, K)` int64.
        num_experts: E.
        token_mask: `(T,)` bool, false at tokens that do not count.

    Returns:
        `(E,)` int64.
    """
    ones = torch.ones_like(indices) if token_mask is None else token_mask[:, None].to(indices.dtype).expand_as(indices)
    return indices.new_zeros(num_experts).scatter_add_(0, indices.flatten(), ones.flatten())


def _best(scores: Tensor, count: int) -> Tensor:
    """Places of the `count` largest of the last axis, largest first; the lower place first among equals."""
    if count == 1:
        return scores.argmax(dim=-1, keepdim=True)
    # torch.topk leaves the order of equals open.
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def _keep_best_groups(grouped: Tensor, options: RoutingOptions) -> Tensor:
    """Mask scores `(T, G, E/G)` outside of each token's best groups."""
    limit = options.num_limited_groups or 1
    if options.group_score == "max":
        worth = grouped.amax(dim=-1)
    else:
        size = 2 if options.group_score == "top2_sum" else options.num_experts_per_tok // limit
        worth = grouped.topk(size, dim=-1).values.sum(dim=-1)
    kept = torch.zeros_like(worth, dtype=torch.bool).scatter(1, _best(worth, limit), True)
    return grouped.masked_fill(~kept[..., None], 0.0 if options.group_mask == "zero" else -torch.inf)


def _keep_voted(grouped: Tensor, count: int, token_mask: Tensor | None) -> Tensor:
    """Mask scores `(T, G, E/G)` of all but the `count` experts of each group that are the best of most tokens."""
    votes = grouped.argmax(dim=-1, keepdim=True) == torch.arange(grouped.shape[-1], device=grouped.device)
    if token_mask is not None:
        votes = votes & token_mask[:, None, None]
    kept = votes.new_zeros(votes.shape[1:]).scatter(1, _best(votes.sum(dim=0), count), True)
    # The published code puts scores to 0 here; a score that has underflowed would then lose to a masked one.
    return grouped.masked_fill(~kept, -torch.inf)


def check_token_mask(token_mask: Tensor | None, tokens: int) -> None:
    """Raise a ValueError if the mask is not `(tokens,)` bool."""
    if token_mask is not None and (token_mask.dtype != torch.bool or token_mask.shape != (tokens,)):
        raise ValueError(
            f"`token_mask` must be bool with shape ({tokens},), got {token_mask.dtype} with {tuple(token_mask.shape)}."
        )


def _check(logits: Tensor, options: RoutingOptions, selection_bias: Tensor | None, scale: Tensor | None) -> None:
    """Check what `route` gets."""
    experts = options.num_experts
    if logits.ndim != 2 or logits.shape[1] != experts or not logits.is_floating_point():
        raise ValueError(
            f"`logits` must be floating point with shape (tokens, {experts}), got {logits.dtype} with "
            f"{tuple(logits.shape)}."
        )
    if (selection_bias is not None) != options.selection_bias:
        raise ValueError(
            f"`selection_bias` must be given just where the options have it, got "
            f"{'a' if selection_bias is not None else 'no'} bias with selection_bias={options.selection_bias}."
        )
    if selection_bias is not None and selection_bias.shape != (experts,):
        raise ValueError(f"`selection_bias` must have shape ({experts},), got {tuple(selection_bias.shape)}.")
    if scale is not None and scale.shape != (1, experts):
        raise ValueError(f"`expert_scale` must have shape (1, {experts}), got {tuple(scale.shape)}.")
    # Elsewhere the check would wait for the device.
    if logits.device.type == "cpu" and not torch.compiler.is_compiling() and bool(logits.isnan().any()):
        raise ValueError(f"`logits` must not be NaN, got {int(logits.isnan().any(1).sum())} tokens with NaN.")
