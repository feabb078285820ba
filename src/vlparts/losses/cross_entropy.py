"""Weighted cross-entropy whose value does not depend on packing, micro-batches or ranks.

The weights are those of [`weigh_tokens`]. Labels are aligned with the logits, as in torch; nothing is shifted.

Shapes: N tokens, V classes, n samples.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..parts.utils import IGNORE_INDEX
from ._checks import check_fraction, check_labels, check_logits, check_number, loss_dtype
from .weights import TokenWeights, weigh_tokens

__all__ = ["WeightedLoss", "weighted_cross_entropy", "weighted_cross_entropy_with_parts"]


class WeightedLoss(NamedTuple):
    """A loss and the values it is made of.

    Attributes:
        loss: Scalar, float32 or float64.
        per_token: Unweighted loss of each token, of the shape of the labels, detached; 0 where the weight is 0.
        per_sample: `(n,)` mean loss of each sample, by the weights of its tokens, detached; 0 for samples without
            weight.
        weights: Weight W of each token, of the shape of the labels, detached.
        valid_tokens: Scalar int64, number of tokens whose label is not ignored.
        valid_samples: Scalar int64, number of samples with a size above 0.
    """

    loss: Tensor
    per_token: Tensor
    per_sample: Tensor
    weights: Tensor
    valid_tokens: Tensor
    valid_samples: Tensor


def weighted_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = IGNORE_INDEX,
    **weighting: Any,
) -> Tensor:
    """Compute the weighted sum of the cross-entropies of all tokens.

    The loss of a token is `(1 - s) (-log p_label) + s mean(-log p) + z log(Z)^2`, with label smoothing s, partition
    function Z and z-loss weight z (PaLM, arXiv 2204.02311, section 5).

    Args:
        logits: `(S, V)` or `(B, S, V)`.
        labels: `(S,)` or `(B, S)` integers from 0 to V - 1, or `ignore_index`; aligned with the logits.
        label_smoothing: s, between 0 and 1.
        z_loss: z, at least 0.
        ignore_index: Label of tokens without loss.
        **weighting: `preset`, `mix`, `length_exponent`, `sample_weights`, `token_weights`, `cu_seqlens`, `sample_ids`
            and `normalizer` of [`weigh_tokens`].

    Returns:
        A scalar, float64 for float64 logits, otherwise float32; exactly 0, with zero gradients, if all weights are 0.

    Raises:
        ValueError: If shapes do not fit, a label is not a class (checked on CPU only), a weight is negative, infinite
            or NaN, or an option is out of range.
    """
    return weighted_cross_entropy_with_parts(
        logits, labels, label_smoothing=label_smoothing, z_loss=z_loss, ignore_index=ignore_index, **weighting
    ).loss


def weighted_cross_entropy_with_parts(
    logits: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = IGNORE_INDEX,
    **weighting: Any,
) -> WeightedLoss:
    """Compute [`weighted_cross_entropy`] and its parts, for logging; arguments and errors are the same."""
    check_logits(logits, labels)
    check_fraction(label_smoothing, "label_smoothing")
    check_number(z_loss, "z_loss")
    flat = check_labels(labels, logits.shape[-1], ignore_index)
    weights = weigh_tokens(labels, ignore_index=ignore_index, dtype=loss_dtype(logits), **weighting)
    valid = flat != ignore_index
    losses = masked_token_losses(
        logits.reshape(-1, logits.shape[-1]),
        flat.where(valid, 0),
        active_tokens(weights, valid),
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )
    return collect_parts((losses * weights.weights).sum(), losses, weights, valid, labels.shape)


def active_tokens(weights: TokenWeights, valid: Tensor) -> Tensor:
    """Return which tokens need a loss, `(N,)` bool: those whose weight is not 0, or has a gradient.

    Args:
        weights: The weights of all tokens.
        valid: `(N,)` bool, true where the label is not ignored.
    """
    if weights.weights.requires_grad and torch.is_grad_enabled():
        return valid & (weights.samples < len(weights.sizes))
    return weights.weights != 0


def masked_token_losses(
    logits: Tensor, labels: Tensor, mask: Tensor, *, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> Tensor:
    """Compute the unweighted losses of the tokens in `mask`; other losses are 0, other logits get zero gradients.

    Args:
        logits: `(N, V)`; outside of `mask` they may be anything.
        labels: `(N,)` int64 from 0 to V - 1.
        mask: `(N,)` bool.
        label_smoothing: Share of the uniform distribution.
        z_loss: Weight of the squared log-partition function.

    Returns:
        `(N,)` float64 for float64 logits, otherwise float32.
    """
    dtype = loss_dtype(logits)
    if torch.compiler.is_compiling():  # without shapes that depend on data
        rows = torch.where(mask.unsqueeze(1), logits, 0)
        return torch.where(mask, token_losses(rows.to(dtype), labels, label_smoothing, z_loss), 0)
    tokens = mask.nonzero().squeeze(1)
    rows = logits[tokens] if len(tokens) < len(logits) else logits
    losses = token_losses(rows.to(dtype), labels[tokens], label_smoothing, z_loss)
    return losses.new_zeros(len(logits)).index_put((tokens,), losses)


def token_losses(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    """Compute the unweighted losses `(N,)` of float32 or float64 logits `(N, V)` and labels `(N,)` from 0 to V - 1."""
    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    return losses + z_loss * logits.logsumexp(-1).square() if z_loss else losses


def collect_parts(
    loss: Tensor, losses: Tensor, weights: TokenWeights, valid: Tensor, shape: torch.Size
) -> WeightedLoss:
    """Return a loss with its parts.

    Args:
        loss: The scalar.
        losses: `(N,)` unweighted, 0 where the weight is 0.
        weights: The weights of all tokens.
        valid: `(N,)` bool, true where the label is not ignored.
        shape: Shape of the labels.
    """
    losses, token_weights = losses.detach(), weights.weights.detach()
    totals = token_weights.new_zeros(2, len(weights.sizes) + 1)
    totals.index_add_(1, weights.samples, torch.stack([token_weights * losses.to(token_weights), token_weights]))
    sample_losses, sample_weights = totals[:, :-1]
    used = sample_weights > 0
    return WeightedLoss(
        loss=loss,
        per_token=losses.view(shape),
        per_sample=torch.where(used, sample_losses / torch.where(used, sample_weights, 1), 0),
        weights=token_weights.view(shape),
        valid_tokens=valid.sum(),
        valid_samples=(weights.sizes > 0).sum(),
    )
