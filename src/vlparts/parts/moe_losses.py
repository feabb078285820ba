"""Auxiliary losses of routers: load balancing and small logits.

Shapes: `B` samples, `S` tokens per sample, `T` tokens, `E` experts, `K` chosen, `n` sequences. All sums are taken in
float32, or float64 for float64 logits.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from transformers.modeling_utils import PreTrainedModel

from .distributed import resolve_group
from .moe_options import BALANCE_FORMS, SCORINGS, check_name
from .moe_routing import check_token_mask, expert_counts, router_scores
from .packed_index import segment_ids

__all__ = ["BALANCE_FORMS", "balance_loss", "find_balance_loss", "normalized_scores", "router_z_loss"]


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
    """Load-balancing loss of a router: `sum_i f_i p_i`, 1 for perfect balance (arXiv 2505.21411, eq. 8).

    `f_i = E / (K N) * tokens that chose i`, without gradient, and `p_i` is the mean score of expert i over N tokens.
    Scores are those over all experts, before groups are chosen, normalised to sum 1 per token. transformers'
    `load_balancing_loss_func` is K times this value for a softmax. The coefficient alpha is not applied here.

    Forms:
        "batch": N are the real tokens of this call, in this process.
        "sequence": The mean of the losses of all sequences that have a real token (DeepSeek-V3, arXiv 2412.19437,
            eq. 17 to 20).
        "global": N are the real tokens of the global batch, over all processes of `group` and, with `counts`, over
            all its micro-batches (arXiv 2501.11873).

    "global" with gradient accumulation: pass the `counts` of the whole batch to every micro-batch and sum the losses,
    do not average them; sum and gradient are then exactly those of the whole batch in one call. This needs the choices
    before the first backward pass, for example from a pass without gradients. Counts of the micro-batches so far, as
    the paper proposes, are an approximation.

    "global" over processes: every process returns the loss of the tokens of all processes. Gradients are those of the
    sum of the returned values over the processes, so that their mean, as DistributedDataParallel computes it, is the
    gradient of the loss of the whole batch. All processes must call the function, and backward, equally often.

    Args:
        router_logits: `(T, E)` logits of the router; non-negative scores if `scoring` is None.
        indices: `(T, K)` int64, the chosen experts.
        scoring: How logits become scores, as in `RoutingOptions`; "softmax_over_chosen" is taken as "softmax".
        form: "batch", "sequence" or "global".
        token_mask: `(T,)` bool, false at padding. Padding is in no sum and no count, and its gradients are exactly
            zero, also if it holds NaN.
        cu_seqlens: `(n + 1,)` cumulative lengths of the sequences with a leading zero, for "sequence" only. Tokens
            after the last sequence are padding.
        counts: `(E,)` choices of each expert in the whole global batch, for "global" only, as `expert_counts` and
            `RouterStatistics` return them. None counts the choices of this call, over the processes.
        group: For "global", the process group that shares the batch; None for the default group if there is one,
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
        return _sequence_loss(scores, indices, token_mask, cu_seqlens)
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
    # N is the number of choices divided by K, so f_i = E * count_i / choices.
    choices = counts.to(scores.dtype).sum().clamp_min(1)
    frequencies = counts.to(scores.dtype) * (scores.shape[1] / choices)
    return (frequencies * sums).sum() * (indices.shape[1] / choices)


def router_z_loss(
    router_logits: Tensor, *, token_mask: Tensor | None = None, num_tokens: Tensor | float | None = None
) -> Tensor:
    """Mean square of the log-sum-exp of each token's logits (ST-MoE, arXiv 2202.08906, eq. 5).

    Args:
        router_logits: `(T, E)`.
        token_mask: `(T,)` bool, false at padding, whose gradients are exactly zero, also if it holds NaN.
        num_tokens: Divisor of the sum, such as the number of real tokens of the global batch; None for the real tokens
            of this call.

    Returns:
        The loss, of shape `()`; zero if there is no real token. The coefficient is not applied here; 1e-3 is usual.

    Raises:
        ValueError: If shapes or types do not fit, or `num_tokens` is a number that is not positive.
    """
    _check_logits(router_logits)
    check_token_mask(token_mask, len(router_logits))
    if isinstance(num_tokens, int | float) and not num_tokens > 0:
        raise ValueError(f"`num_tokens` must be positive, got {num_tokens!r}.")
    squares = _zero_padding(router_logits, token_mask).logsumexp(dim=-1).square()
    if token_mask is not None:
        squares = squares.masked_fill(~token_mask, 0.0)
    if num_tokens is None:
        num_tokens = max(len(squares), 1) if token_mask is None else token_mask.sum().clamp_min(1)
    return squares.sum() / num_tokens


def normalized_scores(router_logits: Tensor, scoring: str | None, token_mask: Tensor | None = None) -> Tensor:
    """Return scores `(T, E)` over all experts, with sum 1 for real tokens and 0 for padding.

    Args:
        router_logits: `(T, E)` logits, or scores if `scoring` is None.
        scoring: How logits become scores; "softmax_over_chosen" is taken as "softmax".
        token_mask: `(T,)` bool, false at padding.
    """
    logits = _zero_padding(router_logits, token_mask)
    scores = logits
    if scoring is not None:
        check_name("scoring", scoring, SCORINGS)
        scores = router_scores(logits, "softmax" if scoring == "softmax_over_chosen" else scoring)
    if scoring is None or not scoring.startswith("softmax"):
        scores = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
    return scores if token_mask is None else scores.masked_fill(~token_mask[:, None], 0.0)


def _zero_padding(logits: Tensor, token_mask: Tensor | None) -> Tensor:
    """Return logits in the dtype of the sums, with zeros at padding."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if token_mask is None else torch.where(token_mask[:, None], logits, 0.0)


def _sequence_loss(scores: Tensor, indices: Tensor, token_mask: Tensor | None, cu_seqlens: Tensor) -> Tensor:
    """Mean of the losses of the sequences."""
    sequences, (tokens, experts) = len(cu_seqlens) - 1, scores.shape
    # One row more than sequences, for tokens after the last.
    sequence_ids = segment_ids(cu_seqlens, tokens)
    real = scores.new_ones(tokens) if token_mask is None else token_mask.to(scores.dtype)
    lengths = scores.new_zeros(sequences + 1).index_add_(0, sequence_ids, real)[:-1]
    flat_index = (sequence_ids[:, None] * experts + indices).flatten()
    counts = scores.new_zeros((sequences + 1) * experts)
    counts = counts.index_add_(0, flat_index, real[:, None].expand_as(indices).flatten()).view(-1, experts)[:-1]
    sums = scores.new_zeros(sequences + 1, experts).index_add(0, sequence_ids, scores)[:-1]
    losses = (counts * sums).sum(dim=1) * (experts / indices.shape[1]) / lengths.clamp_min(1).square()
    return losses.sum() / (lengths > 0).sum().clamp_min(1)


class _SumOverProcesses(torch.autograd.Function):
    """Sum a tensor over the processes; backward sums the gradients of all processes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _SumOverProcesses.apply(gradient, ctx.group), None


def find_balance_loss(model: PreTrainedModel) -> Callable[..., Tensor]:
    """Return the function that computes the balance loss of a model with experts, as its own head computes it.

    Args:
        model: A model without its head: ours, with a method `get_balance_loss`, or a native one with a
            `load_balancing_loss_func` in its modeling file.

    Returns:
        A function of the `router_logits` of the outputs, `(T, E)` per layer with experts, the batch size B, and
        `attention_mask` `(B, past + S)`, `position_ids` and `cu_seq_lens_q` of the inputs; native losses ignore the
        last two. It returns the loss, of shape `()`, without its coefficient, and raises a ValueError if the router
        logits were not recorded.

    Raises:
        ValueError: If the model has no known balance loss.
    """
    if hasattr(model, "get_balance_loss"):
        return model.get_balance_loss
    config = model.config
    # Each modeling file of transformers has its own function. The class may be a subclass that a user or FSDP derived.
    modules = [sys.modules.get(base.__module__) for base in type(model).__mro__]
    functions = (getattr(module, "load_balancing_loss_func", None) for module in modules)
    function = next((one for one in functions if one is not None), None)
    fields = ("router_aux_loss_coef", "num_experts", "num_experts_per_tok")
    if function is None or any(getattr(config, name, None) is None for name in fields):
        raise ValueError(
            f"`output_router_logits` must not be True for a text model without a balance loss, got "
            f"{type(model).__name__}."
        )

    def native_balance_loss(
        router_logits: tuple[Tensor, ...] | None, batch_size: int, attention_mask: Any, *_: Any
    ) -> Tensor:
        if router_logits is None:
            raise ValueError(f"`router_logits` must be a tuple, got None: {type(model).__name__} records none.")
        mask = None
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            mask = attention_mask[:, -(len(router_logits[0]) // batch_size) :]
        return function(
            router_logits, num_experts=config.num_experts, top_k=config.num_experts_per_tok, attention_mask=mask
        )

    return native_balance_loss


def _check_logits(router_logits: Tensor) -> None:
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
    """Check the arguments of `balance_loss`."""
    _check_logits(router_logits)
    check_name("form", form, BALANCE_FORMS)
    if indices.ndim != 2 or len(indices) != len(router_logits) or indices.dtype != torch.int64:
        raise ValueError(
            f"`indices` must be int64 with shape ({len(router_logits)}, chosen), got {indices.dtype} with "
            f"{tuple(indices.shape)}."
        )
    check_token_mask(token_mask, len(router_logits))
    if (cu_seqlens is not None) != (form == "sequence"):
        raise ValueError(f"`cu_seqlens` must be given if and only if `form` is 'sequence', got `form` {form!r}.")
    if counts is not None and form != "global":
        raise ValueError(f"`counts` must be None unless `form` is 'global', got `form` {form!r}.")
    if cu_seqlens is not None and (cu_seqlens.ndim != 1 or not len(cu_seqlens) or cu_seqlens.is_floating_point()):
        raise ValueError(
            f"`cu_seqlens` must be integers with shape (sequences + 1,), got {cu_seqlens.dtype} with "
            f"{tuple(cu_seqlens.shape)}."
        )
