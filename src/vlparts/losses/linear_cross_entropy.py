"""Weighted cross-entropy from a model's last hidden states, without holding all logits.

Value and gradients are those of [`weighted_cross_entropy`] of the logits. Gradients are computed together with the
loss, and tokens without weight are dropped before the first matrix product.

Shapes: N tokens, H width, V classes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..parts.utils import IGNORE_INDEX, refuse_second_derivative
from ._checks import check_fraction, check_labels, check_number, loss_dtype
from ._head_gradients import Head, HeadGradients, NeedsGrad
from ._vocab_chunks import head_losses
from .cross_entropy import WeightedLoss, active_tokens, collect_parts, weighted_cross_entropy_with_parts
from .weights import weigh_tokens

__all__ = ["linear_weighted_cross_entropy", "linear_weighted_cross_entropy_with_parts"]


def linear_weighted_cross_entropy(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    **options: Any,
) -> Tensor:
    """Compute [`weighted_cross_entropy`] of the logits `hidden @ lm_head_weight.T + bias`.

    Args:
        hidden: `(S, H)` or `(B, S, H)`.
        lm_head_weight: `(V, H)`, tied to the embeddings or not, of the type of `hidden` (any type under autocast).
        labels: `(S,)` or `(B, S)` integers from 0 to V - 1, or `ignore_index`; aligned with the hidden states.
        bias: `(V,)`.
        softcap: Logits z become `softcap * tanh(z / softcap)` (Gemma 2, arXiv 2408.00118, section 2); above 0.
        **options: `label_smoothing`, `z_loss`, `ignore_index` and the weighting of [`weighted_cross_entropy`].

    Returns:
        A scalar, float64 for float64 hidden states, otherwise float32.

    Raises:
        ValueError: If shapes or types do not fit, and as [`weighted_cross_entropy`].
        RuntimeError: In a backward pass with `create_graph=True`; the loss is differentiable once.
    """
    return linear_weighted_cross_entropy_with_parts(
        hidden, lm_head_weight, labels, bias=bias, softcap=softcap, **options
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
    """Compute [`linear_weighted_cross_entropy`] and its parts, for logging; arguments and errors are the same."""
    check_fraction(label_smoothing, "label_smoothing")
    check_number(z_loss, "z_loss")
    hidden, weight, bias = _check_head(hidden, lm_head_weight, labels, bias, softcap)
    flat = check_labels(labels, len(weight), ignore_index)
    weights = weigh_tokens(labels, ignore_index=ignore_index, dtype=loss_dtype(hidden), **weighting)
    valid = flat != ignore_index
    active = active_tokens(weights, valid)
    if torch.compiler.is_compiling():  # the compiler tiles on its own, and needs shapes that do not depend on data
        logits = F.linear(torch.where(active.view(labels.shape).unsqueeze(-1), hidden, 0), weight, bias)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return weighted_cross_entropy_with_parts(
            logits, labels, label_smoothing=label_smoothing, z_loss=z_loss, ignore_index=ignore_index, **weighting
        )
    tokens = active.nonzero().squeeze(1)
    rows, row_weights = hidden.reshape(-1, hidden.shape[-1]), weights.weights
    if len(tokens) < len(rows):
        rows, row_weights = rows.index_select(0, tokens), row_weights.index_select(0, tokens)
    head = Head(weight, bias, softcap, label_smoothing, z_loss)
    loss, losses = _HeadLoss.apply(rows, weight, bias, row_weights, flat[tokens], head, torch.is_grad_enabled())
    losses = losses.new_zeros(len(flat)).index_put((tokens,), losses)
    return collect_parts(loss, losses, weights, valid, labels.shape)


def _check_head(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return hidden states, weight and bias in one type."""
    if not hidden.is_floating_point() or hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"`hidden` must be floating-point of shape {(*labels.shape, 'H')}, got {hidden.dtype} "
            f"{tuple(hidden.shape)}."
        )
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or not weight.numel():
        raise ValueError(f"`lm_head_weight` must be (V, {hidden.shape[-1]}) and not empty, got {tuple(weight.shape)}.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"`bias` must be ({len(weight)},), got {tuple(bias.shape)}.")
    if softcap is not None:
        check_number(softcap, "softcap", positive=True)
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:  # as autocast does
        dtype = torch.get_autocast_dtype(hidden.device.type)
        return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    for name, tensor in (("lm_head_weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(f"`{name}` must have the type of `hidden`, {hidden.dtype}, got {tensor.dtype}.")
    return hidden, weight, bias


class _HeadLoss(torch.autograd.Function):
    """The weighted sum of losses and the loss of each token. Gradients are computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_weights: Tensor,
        labels: Tensor,
        head: Head,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        needs_grad = NeedsGrad(*(grad_enabled and needed for needed in ctx.needs_input_grad[:3]))
        head = head._replace(weight=weight, bias=bias)
        losses, ctx.gradients = head_losses(hidden, labels, token_weights, head, needs_grad)
        ctx.save_for_backward(hidden, weight, bias, token_weights, labels, losses)
        ctx.options, ctx.needs_grad = head[2:], needs_grad
        ctx.mark_non_differentiable(losses)
        return (losses * token_weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("The linear form of the loss is")
        hidden, weight, bias, token_weights, labels, losses = ctx.saved_tensors
        # Returned once, so that autograd may keep the tensors without a copy; a second pass recomputes them.
        gradients: HeadGradients | None = ctx.gradients
        ctx.gradients = None
        if gradients is None and any(ctx.needs_grad):
            head = Head(weight, bias, *ctx.options)
            _, gradients = head_losses(hidden, labels, token_weights, head, ctx.needs_grad)
        found = HeadGradients(None, None, None) if gradients is None else gradients
        scaled = (None if one is None else _scaled(one.tensor, grad * one.factor) for one in found)
        grad_weights = losses * grad if ctx.needs_input_grad[3] else None
        return *scaled, grad_weights, None, None, None


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiply a gradient by a scalar in place. The usual factor of 1 costs no pass over the tensor."""
    if factor.device.type == "cpu" and float(factor) == 1.0:
        return gradient
    return gradient.mul_(factor)  # the factor keeps its type; in half precision it would be rounded
