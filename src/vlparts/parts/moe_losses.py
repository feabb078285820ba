"""Losses that keep a router's choice balanced and its logits small.

Shapes: `T` tokens, `E` experts, `K` chosen, `n` sequences. All sums are taken in float32, or float64 for such logits.
"""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from .distributed import resolve_group
from .moe_options import SCORINGS, check_name
from .moe_routing import check_token_mask, expert_counts, router_scores
from .packed_index import segment_ids

__all__ = ["BALANCE_FORMS", "balance_loss", "normalized_scores", "router_z_loss"]

BALANCE_FORMS = ("batch", "sequence", "global")


def balance_loss(
    router_logits: Tensor,
    indices: Tensor,
    *,
    scoring: str | None = "softmax",
    form: str = "batch",
    token_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    counts: Tensor | None = None,
    group: Any = None,
) -> Tensor:
    """How unevenly experts are used: `sum_i f_i p_i`, 1 for perfect balance (arXiv 2505.21411, eq. 8).

    `f_i = E / (K N) * tokens that chose i`, which has no gradient, and `p_i` is the mean score of expert i over N
    tokens. Scores are those over all experts, before any choice of groups, with the sum 1 for each token.
    transformers' `load_balancing_loss_func` is K times this value for a softmax. The factor alpha is the caller's.

    Forms:
        "batch": N are the real tokens of this call, in this process.
        "sequence": The mean of the loss of every sequence that has a real token (DeepSeek-V3, arXiv 2412.19437,
            eq. 17 to 20).
        "global": N are the real tokens of the global batch, over all processes of `group` and, with `counts`, over
            all its micro-batches (arXiv 2501.11873).

    The global form under gradient accumulation: give every micro-batch the `counts` of the whole batch, and sum the
    losses, do not average them: sum and gradient then are exactly those of the whole batch in one call. That needs the
    choices before the first backward pass, for example from a pass without gradients. Counts of the micro-batches so
    far, as the paper proposes, are its approximation.

    The global form over processes: every process returns the same value, that of the tokens of all of them. Gradients
    are those of the sum of the returned values over the processes, so that the mean of them, as
    DistributedDataParallel takes it, is the gradient of the loss of the whole batch. All processes must call the
    function, and backward, equally often.

    Args:
        router_logits: `(T, E)`, the router's logits; with `scoring` None scores that are not negative.
        indices: `(T, K)` int64, the chosen experts.
        scoring: How logits become scores, as in `RoutingOptions`; "softmax_over_chosen" is taken as "softmax".
        form: "batch", "sequence" or "global".
        token_mask: `(T,)` bool, false at padding: such a token stands in no sum and no count, and gets gradients of
            exactly zero, whatever it holds.
        cu_seqlens: `(n + 1,)` cumulative lengths of the sequences with a leading zero, for "sequence" only. Tokens
            beyond the last one are padding.
        counts: `(E,)` choices of each expert in the whole global batch, for "global" only, as `expert_counts` and
            `RouterStatistics` give them. None counts this call, over the processes.
        group: For "global" the process group that shares the batch; None for the default group if there is one,
            "local" for this process alone.

    Returns:
        The loss, of shape `()`; zero, with gradients of zero, if there is no real token.

    Raises:
        ValueError: If shapes or types do not fit, a name is unknown, or an argument has no effect in this form.
    """
    _check(router_logits, indices, form, token_mask, cu_seqlens, counts)
    scores = normalized_scores(router_logits, scoring, token_mask)
    if form == "sequence":
        assert cu_seqlens is not None
        return _by_sequence(scores, indices, token_mask, cu_seqlens)
    shared = resolve_group(group) if form == "global" else None
    if counts is None:
        counts = expert_counts(indices, scores.shape[1], token_mask)
        if shared is not None:
            dist.all_reduce(counts, group=shared)
    elif counts.shape != scores.shape[1:]:
        raise ValueError(f"`counts` must have shape ({scores.shape[1]},), got {tuple(counts.shape)}.")
    sums = scores.sum(dim=0)
    if shared is not None:
        sums = _SumOverProcesses.apply(sums, shared)
    # The tokens are the choices divided by K, so f_i = E * count_i / choices.
    choices = counts.to(scores.dtype).sum().clamp_min(1)
    frequencies = counts.to(scores.dtype) * (scores.shape[1] / choices)
    return (frequencies * sums).sum() * (indices.shape[1] / choices)


def router_z_loss(
    router_logits: Tensor, *, token_mask: Tensor | None = None, num_tokens: Tensor | float | None = None
) -> Tensor:
    """Mean square of the log-sum-exp of a token's logits, which keeps logits small (ST-MoE, arXiv 2202.08906, eq. 5).

    Args:
        router_logits: `(T, E)`.
        token_mask: `(T,)` bool, false at padding: such a token gets gradients of exactly zero, whatever it holds.
        num_tokens: What the sum is divided by, such as the real tokens of the global batch; None for those of this
            call.

    Returns:
        The loss, of shape `()`; zero if there is no real token. The coefficient is the caller's; 1e-3 is usual.

    Raises:
        ValueError: If shapes or types do not fit, or `num_tokens` is a number that is not positive.
    """
    _check_logits(router_logits)
    check_token_mask(token_mask, len(router_logits))
    if isinstance(num_tokens, int | float) and not num_tokens > 0:
        raise ValueError(f"`num_tokens` must be positive, got {num_tokens!r}.")
    squares = _real(router_logits, token_mask).logsumexp(dim=-1).square()
    if token_mask is not None:
        squares = squares.masked_fill(~token_mask, 0.0)
    if num_tokens is None:
        num_tokens = max(len(squares), 1) if token_mask is None else token_mask.sum().clamp_min(1)
    return squares.sum() / num_tokens


def normalized_scores(router_logits: Tensor, scoring: str | None, token_mask: Tensor | None = None) -> Tensor:
    """Scores `(T, E)` over all experts with the sum 1 for each real token and 0 for the others.

    Args:
        router_logits: `(T, E)`, or scores with `scoring` None.
        scoring: How logits become scores; "softmax_over_chosen" is taken as "softmax".
        token_mask: `(T,)` bool, false at padding.
    """
    logits = _real(router_logits, token_mask)
    scores = logits
    if scoring is not None:
        check_name("scoring", scoring, SCORINGS)
        scores = router_scores(logits, "softmax" if scoring == "softmax_over_chosen" else scoring)
    if scoring is None or not scoring.startswith("softmax"):
        scores = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
    return scores if token_mask is None else scores.masked_fill(~token_mask[:, None], 0.0)


def _real(logits: Tensor, token_mask: Tensor | None) -> Tensor:
    """Logits in the type of the sums, with zeros in place of what padding holds."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if token_mask is None else torch.where(token_mask[:, None], logits, 0.0)


def _by_sequence(scores: Tensor, indices: Tensor, token_mask: Tensor | None, cu_seqlens: Tensor) -> Tensor:
    """Mean of the losses of the sequences."""
    sequences, (tokens, experts) = len(cu_seqlens) - 1, scores.shape
    # One row more than sequences, for tokens beyond the last.
    numbers = segment_ids(cu_seqlens, tokens)
    real = scores.new_ones(tokens) if token_mask is None else token_mask.to(scores.dtype)
    lengths = scores.new_zeros(sequences + 1).index_add_(0, numbers, real)[:-1]
    places = (numbers[:, None] * experts + indices).flatten()
    counts = scores.new_zeros((sequences + 1) * experts)
    counts = counts.index_add_(0, places, real[:, None].expand_as(indices).flatten()).view(-1, experts)[:-1]
    sums = scores.new_zeros(sequences + 1, experts).index_add(0, numbers, scores)[:-1]
    losses = (counts * sums).sum(dim=1) * (experts / indices.shape[1]) / lengths.clamp_min(1).square()
    return losses.sum() / (lengths > 0).sum().clamp_min(1)


class _SumOverProcesses(torch.autograd.Function):
    """Sum of a tensor over the processes; backward sums the gradients of what every process made of it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


def _check_logits(router_logits: Tensor) -> None:
    """Check shape and type of logits."""
    if router_logits.ndim != 2 or not router_logits.is_floating_point():
        raise ValueError(
            f"`router_logits` must be floating point with shape (tokens, experts), got {router_logits.dtype} with "
            f"{tuple(router_logits.shape)}."
        )


def _check(
    router_logits: Tensor,
    indices: Tensor,
    form: str,
    token_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    counts: Tensor | None,
) -> None:
    """Check what `balance_loss` gets."""
    _check_logits(router_logits)
    check_name("form", form, BALANCE_FORMS)
    if indices.ndim != 2 or len(indices) != len(router_logits) or indices.dtype != torch.int64:
        raise ValueError(
            f"`indices` must be int64 with shape ({len(router_logits)}, chosen), got {indices.dtype} with "
            f"{tuple(indices.shape)}."
        )
    check_token_mask(token_mask, len(router_logits))
    if (cu_seqlens is not None) != (form == "sequence"):
        raise ValueError(f"`cu_seqlens` must be given with form='sequence' and no other, got form={form!r}.")
    if counts is not None and form != "global":
        raise ValueError(f"`counts` is for form='global', got form={form!r}.")
    if cu_seqlens is not None and (cu_seqlens.ndim != 1 or not len(cu_seqlens) or cu_seqlens.is_floating_point()):
        raise ValueError(
            f"`cu_seqlens` must be integers with shape (sequences + 1,), got {cu_seqlens.dtype} with "
            f"{tuple(cu_seqlens.shape)}."
        )
