"""Cross-entropy with weights of samples and tokens, the same however samples are packed, split and spread.

Which token counts how much stands in [`loss_weights`]; here the weights meet the cross-entropy. Labels stand where
their logits stand, as in torch; nothing is shifted.

Shapes: N tokens, V classes, n samples.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .weights import IGNORE_INDEX, TokenWeights, weigh_tokens


class WeightedLoss(NamedTuple):
    """A loss with its parts.

    Attributes:
        loss: Scalar, float32 or float64.
        per_token: Loss of each token, of the shape of the labels, detached; 0 where they are ignored.
        per_sample: `(n,)` mean loss of each sample over its tokens, by their weights, detached; 0 for a sample without
            weight.
        weights: Weight W of each token, of the shape of the labels, detached.
        valid_tokens: Scalar int64, tokens whose label is not ignored.
        valid_samples: Scalar int64, samples of a size above 0.
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
    """The weighted sum of the cross-entropies of all tokens.

    A token's part is `(1 - s) (-log p_label) + s mean(-log p) + z log(Z)^2`, with the label smoothing s and the weight
    z of the logarithm of the partition sum Z (z-loss of PaLM, arXiv 2204.02311, section 5).

    Args:
        logits: `(S, V)` or `(B, S, V)`.
        labels: `(S,)` or `(B, S)` integers from 0 to V - 1, or `ignore_index`; aligned with the logits.
        label_smoothing: s, from 0 to 1.
        z_loss: z, at least 0.
        ignore_index: Label of tokens without loss.
        **weighting: `preset`, `mix`, `length_exponent`, `sample_weights`, `token_weights`, `cu_seqlens`, `sample_ids`
            and `normalizer` of [`weigh_tokens`].

    Returns:
        A scalar, float64 for float64 logits, else float32; exactly 0, with zero gradients, where nothing has weight.

    Raises:
        ValueError: If shapes do not fit, a label is no class (looked at on CPU only), a weight is not finite or is
            negative, or an option is out of range.
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
    """[`weighted_cross_entropy`] with what it is made of, for logs and pictures; arguments and errors are the same."""
    if not logits.is_floating_point() or logits.shape[:-1] != labels.shape or logits.shape[-1:] == (0,):
        raise ValueError(
            f"`logits` must be floating-point of shape {(*labels.shape, 'V')}, V > 0, got {logits.dtype} "
            f"{tuple(logits.shape)}."
        )
    check_loss_options(label_smoothing, z_loss)
    flat = check_labels(labels, logits.shape[-1], ignore_index)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    weights = weigh_tokens(labels, ignore_index=ignore_index, dtype=dtype, **weighting)
    valid = flat != ignore_index
    losses = losses_where(
        counted_tokens(weights, valid),
        logits.reshape(-1, logits.shape[-1]),
        flat.where(valid, 0),
        label_smoothing,
        z_loss,
        dtype,
    )
    return with_parts((losses * weights.weights).sum(), losses, weights, valid, labels.shape)


def counted_tokens(weights: TokenWeights, valid: Tensor) -> Tensor:
    """Where losses are needed, `(N,)` bool: at weights that are not 0, or that have gradients.

    Args:
        weights: The weights of all tokens.
        valid: `(N,)` bool, where labels are not ignored.
    """
    if weights.weights.requires_grad and torch.is_grad_enabled():
        return valid & (weights.samples < len(weights.sizes))
    return weights.weights != 0


def losses_where(
    counted: Tensor, logits: Tensor, labels: Tensor, label_smoothing: float, z_loss: float, dtype: torch.dtype
) -> Tensor:
    """Unweighted losses of tokens that count, and 0 for others, whose logits may be anything and get zero gradients.

    Args:
        counted: `(N,)` bool.
        logits: `(N, V)`.
        labels: `(N,)` int64 from 0 to V - 1.
        label_smoothing: Of the loss.
        z_loss: Of the loss.
        dtype: float32 or float64, the type of the losses.

    Returns:
        `(N,)`.
    """
    if torch.compiler.is_compiling():  # without shapes that depend on the data
        rows = torch.where(counted.unsqueeze(1), logits, 0)
        return torch.where(counted, token_losses(rows.to(dtype), labels, label_smoothing, z_loss), 0)
    places = counted.nonzero().squeeze(1)
    rows = logits[places] if len(places) < len(logits) else logits
    losses = token_losses(rows.to(dtype), labels[places], label_smoothing, z_loss)
    return losses.new_zeros(len(logits)).index_put((places,), losses)


def token_losses(logits: Tensor, labels: Tensor, label_smoothing: float, z_loss: float) -> Tensor:
    """Unweighted losses `(N,)` of float32 or float64 logits `(N, V)` and labels `(N,)` from 0 to V - 1."""
    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    return losses + z_loss * logits.logsumexp(-1).square() if z_loss else losses


def with_parts(loss: Tensor, losses: Tensor, weights: TokenWeights, valid: Tensor, shape: torch.Size) -> WeightedLoss:
    """Put a loss and its parts together.

    Args:
        loss: The scalar.
        losses: `(N,)` unweighted, 0 where the weight is 0.
        weights: The weights of all tokens.
        valid: `(N,)` bool, where labels are not ignored.
        shape: Shape of the labels.
    """
    losses, each = losses.detach(), weights.weights.detach()
    totals = each.new_zeros(2, len(weights.sizes) + 1)
    totals.index_add_(1, weights.samples, torch.stack([each * losses.to(each), each]))
    shares, sums = totals[:, :-1]
    return WeightedLoss(
        loss,
        losses.view(shape),
        torch.where(sums > 0, shares / torch.where(sums > 0, sums, 1), 0),
        each.view(shape),
        valid.sum(),
        (weights.sizes > 0).sum(),
    )


def check_loss_options(label_smoothing: float, z_loss: float) -> None:
    """Check the options of a loss.

    Raises:
        ValueError: If one is out of range.
    """
    if isinstance(label_smoothing, bool) or not 0 <= label_smoothing <= 1:
        raise ValueError(f"`label_smoothing` must lie from 0 to 1, got {label_smoothing!r}.")
    if isinstance(z_loss, bool) or not 0 <= z_loss < float("inf"):
        raise ValueError(f"`z_loss` must be a finite number of at least 0, got {z_loss!r}.")


def check_labels(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """The labels as `(N,)` int64, after a look (on CPU only) whether they are classes.

    Raises:
        ValueError: If a label is neither a class nor `ignore_index`.
    """
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"`labels` must be integers, got {labels.dtype}.")
    flat = labels.reshape(-1).long()
    if flat.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = (flat != ignore_index) & ((flat < 0) | (flat >= num_classes))
        if bool(wrong.any()):
            raise ValueError(
                f"`labels` must lie from 0 to {num_classes - 1}, or be {ignore_index}, got {int(flat[wrong][0])}."
            )
    return flat
