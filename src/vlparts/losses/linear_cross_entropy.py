"""Weighted cross-entropy straight from a model's last hidden states, without ever holding all logits.

The value and the gradients are those of [`weighted_cross_entropy`] of the logits. Gradients are made together with the
loss, and ignored tokens are left out before the first product.

Shapes: N tokens, H width, V classes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._linear_chunks import Gradients, Head, Wanted, head_losses
from .cross_entropy import (
    WeightedLoss,
    check_labels,
    check_loss_options,
    counted_tokens,
    weighted_cross_entropy_with_parts,
    with_parts,
)
from .weights import IGNORE_INDEX, weigh_tokens

# What the weights add up to in float16, whose numbers reach from 6e-8 to 65504.
FLOAT16_TOTAL = 1024


def linear_weighted_cross_entropy(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = IGNORE_INDEX,
    **weighting: Any,
) -> Tensor:
    """[`weighted_cross_entropy`] of the logits `hidden @ lm_head_weight.T + bias`.

    Args:
        hidden: `(S, H)` or `(B, S, H)`.
        lm_head_weight: `(V, H)`, tied to the embeddings or not, of the type of `hidden` (under autocast, of any).
        labels: `(S,)` or `(B, S)` integers from 0 to V - 1, or `ignore_index`; aligned with the hidden states.
        bias: `(V,)`.
        softcap: Logits z become `softcap * tanh(z / softcap)` (Gemma 2, arXiv 2408.00118, section 2); above 0.
        label_smoothing: As for [`weighted_cross_entropy`].
        z_loss: As for [`weighted_cross_entropy`].
        ignore_index: Label of tokens without loss.
        **weighting: As for [`weighted_cross_entropy`].

    Returns:
        A scalar, float64 for float64 hidden states, else float32.

    Raises:
        ValueError: If shapes or types do not fit, and as for [`weighted_cross_entropy`].
        RuntimeError: In the backward pass, if it is to be differentiated itself (`create_graph=True`).
    """
    return linear_weighted_cross_entropy_with_parts(
        hidden,
        lm_head_weight,
        labels,
        bias=bias,
        softcap=softcap,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        ignore_index=ignore_index,
        **weighting,
    ).loss


def linear_weighted_cross_entropy_with_parts(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = IGNORE_INDEX,
    **weighting: Any,
) -> WeightedLoss:
    """[`linear_weighted_cross_entropy`] with what it is made of, for logs and pictures."""
    check_loss_options(label_smoothing, z_loss)
    hidden, weight, bias = _checked_head(hidden, lm_head_weight, labels, bias, softcap)
    flat = check_labels(labels, len(weight), ignore_index)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    weights = weigh_tokens(labels, ignore_index=ignore_index, dtype=dtype, **weighting)
    counts = counted_tokens(weights, flat != ignore_index)
    if torch.compiler.is_compiling():  # which makes pieces of its own, and takes no shapes that depend on the data
        logits = F.linear(torch.where(counts.view(labels.shape).unsqueeze(-1), hidden, 0), weight, bias)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return weighted_cross_entropy_with_parts(
            logits, labels, label_smoothing=label_smoothing, z_loss=z_loss, ignore_index=ignore_index, **weighting
        )
    places = counts.nonzero().squeeze(1)
    rows = hidden.reshape(-1, hidden.shape[-1])
    counted = weights.weights
    if len(places) < len(rows):
        rows, counted = rows.index_select(0, places), counted.index_select(0, places)
    head = Head(weight, bias, softcap, label_smoothing, z_loss)
    loss, losses = _HeadLoss.apply(rows, weight, bias, counted, flat[places], head, torch.is_grad_enabled())
    losses = losses.new_zeros(len(flat)).index_put((places,), losses)
    return with_parts(loss, losses, weights, flat != ignore_index, labels.shape)


def _checked_head(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    if not hidden.is_floating_point() or hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"`hidden` must be floating-point of shape {(*labels.shape, 'H')}, got {hidden.dtype} "
            f"{tuple(hidden.shape)}."
        )
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or not weight.numel():
        raise ValueError(f"`lm_head_weight` must be (V, {hidden.shape[-1]}) and not empty, got {tuple(weight.shape)}.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"`bias` must be ({len(weight)},), got {tuple(bias.shape)}.")
    if softcap is not None and (isinstance(softcap, bool) or not 0 < softcap < float("inf")):
        raise ValueError(f"`softcap` must be a finite number above 0, got {softcap!r}.")
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(hidden.device.type)
        return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    for name, tensor in (("lm_head_weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(f"`{name}` must have the type of `hidden`, {hidden.dtype}, got {tensor.dtype}.")
    return hidden, weight, bias


class _HeadLoss(torch.autograd.Function):
    """The weighted sum of losses, and each loss. Gradients are made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_weights: Tensor,
        labels: Tensor,
        head: Head,
        recording: bool,
    ) -> tuple[Tensor, Tensor]:
        wanted = Wanted(*(recording and need for need in ctx.needs_input_grad[:3]))
        head = head._replace(weight=weight, bias=bias)
        ctx.unit = _unit(hidden, token_weights)
        losses, ctx.gradients = head_losses(hidden, labels, token_weights / ctx.unit, head, wanted)
        ctx.save_for_backward(hidden, weight, bias, token_weights, labels, losses)
        ctx.options, ctx.wanted = head[2:], wanted
        ctx.mark_non_differentiable(losses)
        return (losses * token_weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # Not by `once_differentiable`, which lets a second derivative pass as zero where the loss ends the graph.
        if torch.is_grad_enabled():
            raise RuntimeError("The linear form of the loss is differentiable once; got `create_graph=True`.")
        hidden, weight, bias, token_weights, labels, losses = ctx.saved_tensors
        # Handed over once, so that autograd may keep them as they are; a second pass makes them anew.
        made: Gradients | None = ctx.gradients
        ctx.gradients = None
        if made is None and any(ctx.wanted):
            head = Head(weight, bias, *ctx.options)
            _, made = head_losses(hidden, labels, token_weights / ctx.unit, head, ctx.wanted)
        grads = (None, None, None) if made is None else (made.hidden, made.weight, made.bias)
        scaled = (None if one is None else _scaled(one, grad * ctx.unit) for one in grads)
        of_weights = losses * grad if ctx.needs_input_grad[3] else None
        return *scaled, of_weights, None, None, None


def _unit(hidden: Tensor, token_weights: Tensor) -> Tensor | float:
    """What gradients are made in multiples of: in float16 those of weights that add up to 1 would vanish."""
    if hidden.dtype != torch.float16:
        return 1.0
    total = token_weights.sum() / FLOAT16_TOTAL
    return torch.where(total > 0, total, 1)


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """`gradient` times a scalar, without a pass over it where that is 1, which it nearly always is."""
    if factor.device.type == "cpu" and float(factor) == 1.0:
        return gradient
    return gradient.mul_(factor)  # in its own type: in half precision, it would be rounded
