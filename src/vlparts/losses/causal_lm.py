"""Weighted cross-entropy in the interface of transformers' model losses, registered as `vlparts_weighted`.

transformers' models call `self.loss_function(logits, labels, vocab_size, **kwargs)` with the unknown keyword arguments
of their `forward`, so the weights are an input of the model, `loss_weights`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.loss.loss_utils import LOSS_MAPPING

from ..parts.utils import IGNORE_INDEX
from ._checks import check_labels, check_weights, loss_dtype
from ._token_chunks import chunked_losses
from .cross_entropy import masked_token_losses, token_losses

__all__ = ["WEIGHTED_LOSS_NAME", "next_token_losses", "weighted_causal_lm_loss"]

WEIGHTED_LOSS_NAME = "vlparts_weighted"


def weighted_causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift_labels: Tensor | None = None,
    loss_weights: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Compute the weighted sum of next-token cross-entropies, or transformers' own loss without `loss_weights`.

    Args:
        logits: `(B, S, V)`.
        labels: `(B, S)`, shifted here: the logits of a token are compared with the label of the next one.
        vocab_size: V.
        num_items_in_batch: Denominator of the sum, as in transformers. Ignored with `loss_weights`, which contain all
            denominators.
        ignore_index: Label of tokens without loss.
        shift_labels: `(B, S)` labels that are already shifted, instead of `labels`.
        loss_weights: `(B, S)` weights aligned with the labels (shifted if `shift_labels` is given), as
            [`weigh_next_tokens`] computes them.
        **kwargs: Ignored: what models pass to any loss.

    Returns:
        A scalar, float64 for float64 logits, otherwise float32.

    Raises:
        ValueError: If the shape of `loss_weights` is not that of the labels, a weight is negative, infinite or NaN
            (checked on CPU only), the logits do not fit the labels, or a label is not a class.
    """
    targets = labels if shift_labels is None else shift_labels
    if targets is None:
        raise ValueError("`labels` or `shift_labels` must be given, got None for both.")
    if logits.numel() != targets.numel() * vocab_size:
        raise ValueError(
            f"`logits` must be of shape {(*targets.shape, vocab_size)} for these labels, got {tuple(logits.shape)}."
        )
    dtype = loss_dtype(logits)
    loss_weights = check_weights(loss_weights, "loss_weights", targets.shape, dtype)
    if shift_labels is None:
        targets = F.pad(targets, (0, 1), value=ignore_index)[..., 1:]
        loss_weights = None if loss_weights is None else F.pad(loss_weights, (0, 1))[..., 1:]
    flat = check_labels(targets, vocab_size, ignore_index).to(logits.device)
    valid = flat != ignore_index
    weights = valid.to(dtype)
    if loss_weights is not None:
        weights = torch.where(valid, loss_weights.reshape(-1).to(weights), 0)
    losses = masked_token_losses(logits.reshape(-1, vocab_size), flat.where(valid, 0), weights != 0)
    total = (losses * weights).sum()
    if loss_weights is not None:
        return total
    count = valid.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=total.device)
    return total / count.clamp(min=1)


def next_token_losses(logits: Tensor, labels: Tensor, loss_weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute the unweighted cross-entropy of every next token with loss, in chunks of tokens.

    Args:
        logits: `(B, S, V)`.
        labels: `(B, S)`, shifted here.
        loss_weights: `(B, S)` weights aligned with the labels; tokens of weight 0 have no loss.

    Returns:
        Losses `(B, S)` of the tokens that follow each token, float64 for float64 logits, otherwise float32; and a mask
        `(B, S)` of those with loss, the others are 0.
    """
    targets = F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:].to(logits.device)
    mask = targets != IGNORE_INDEX
    if loss_weights is not None:
        mask &= F.pad(loss_weights, (0, 1))[:, 1:].to(logits.device) != 0
    flat = targets.flatten()
    losses = chunked_losses(
        logits.reshape(-1, logits.shape[-1]), mask.flatten(), lambda rows, tokens: token_losses(rows, flat[tokens])
    )
    return losses.view(mask.shape), mask


LOSS_MAPPING.setdefault(WEIGHTED_LOSS_NAME, weighted_causal_lm_loss)
