"""The choice of experts with loops over tokens, groups and experts."""

import math

import torch
from torch import Tensor

from vlparts.parts.moe_options import RoutingOptions


def best(scores: list[float], count: int) -> list[int]:
    """Places of the largest, the lower place first among equals."""
    return sorted(range(len(scores)), key=lambda place: (-scores[place], place))[:count]


def score(logits: Tensor, expert: int, scoring: str) -> Tensor:
    """Score of one expert from one token's logits."""
    if scoring == "softmax":
        return logits[expert].exp() / logits.exp().sum()
    if scoring == "sigmoid":
        return 1 / (1 + (-logits[expert]).exp())
    if scoring == "sqrtsoftplus":
        return (1 + logits[expert].exp()).log().sqrt()
    return logits[expert]


def blocks(options: RoutingOptions) -> list[list[int]]:
    """The experts of each group."""
    size = options.num_experts // (options.num_expert_groups or 1)
    return [list(range(first, first + size)) for first in range(0, options.num_experts, size)]


def choice(ranking: list[float], options: RoutingOptions) -> list[int]:
    """Experts that one token chooses."""
    count = options.num_experts_per_tok
    if options.grouping == "none":
        return best(ranking, count)
    groups = blocks(options)
    if options.grouping == "equal":
        share = count // len(groups)
        return [group[place] for group in groups for place in best([ranking[expert] for expert in group], share)]
    worth = []
    for group in groups:
        ordered = sorted((ranking[expert] for expert in group), reverse=True)
        taken = {"max": 1, "top2_sum": 2, "topm_sum": count // (options.num_limited_groups or 1)}
        worth.append(sum(ordered[: taken[options.group_score or ""]]))
    kept = best(worth, options.num_limited_groups or 1)
    masked = 0.0 if options.group_mask == "zero" else -math.inf
    inside = {expert for group in kept for expert in groups[group]}
    return best([value if expert in inside else masked for expert, value in enumerate(ranking)], count)


def voted_out(rankings: list[list[float]], options: RoutingOptions) -> set[int]:
    """Experts that too few tokens like best."""
    out = set()
    for group in blocks(options):
        votes = [0.0] * len(group)
        for ranking in rankings:
            votes[best([ranking[expert] for expert in group], 1)[0]] += 1
        kept = best(votes, options.num_voted_experts or len(group))
        out |= {expert for place, expert in enumerate(group) if place not in kept}
    return out


def weigh(chosen: list[Tensor], options: RoutingOptions) -> list[Tensor]:
    """Weights of one token's chosen scores."""
    if options.scoring == "softmax_over_chosen":
        total = sum(value.exp() for value in chosen)
        chosen = [value.exp() / total for value in chosen]
    if options.renormalize:
        total = sum(chosen) + options.renormalize_eps
        chosen = [value / total for value in chosen]
    return [value * options.routed_scaling_factor for value in chosen]


def looped(
    logits: Tensor,
    options: RoutingOptions,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    mask: Tensor | None = None,
    vote: bool = False,
) -> tuple[Tensor, Tensor]:
    """Weights `(T, K)` and indices `(T, K)`."""
    experts = range(options.num_experts)
    real = [True] * len(logits) if mask is None else mask.tolist()
    scores = [[score(row, expert, options.scoring) for expert in experts] for row in logits]
    rankings = [
        [row[expert].item() + (float(bias[expert]) if bias is not None else 0) for expert in experts] for row in scores
    ]
    if vote:
        out = voted_out([ranking for ranking, use in zip(rankings, real, strict=True) if use], options)
        rankings = [[-math.inf if expert in out else row[expert] for expert in experts] for row in rankings]
    weights, indices = [], []
    for row, ranking, use in zip(scores, rankings, real, strict=True):
        chosen = choice(ranking, options)
        values = weigh([row[expert] for expert in chosen], options)
        if scale is not None:
            values = [value * scale[0, expert] for value, expert in zip(values, chosen, strict=True)]
        weights.append(torch.stack([value if use else value * 0 for value in values]))
        indices.append(chosen)
    return torch.stack(weights), torch.tensor(indices)
