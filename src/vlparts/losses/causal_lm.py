"""The weighted cross-entropy as a loss of transformers' models, native ones too: registered as `vlparts_weighted`.

transformers' models call `self.loss_function(logits, labels, vocab_size, **kwargs)` with the unknown arguments of
their `forward`, so that weights reach it as an input of the model, `loss_weights`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.loss.loss_utils import LOSS_MAPPING

from .cross_entropy import check_labels, losses_where
from .weights import IGNORE_INDEX, check_weights

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
    """The sum of the next tokens' cross-entropies times their weights.

    Args:
        logits: `(B, S, V)`.
        labels: `(B, S)`, shifted here: the logits of a token are compared with the label of the next.
        vocab_size: V.
        num_items_in_batch: Divides the sum where there are no weights, as in transformers; with weights, which hold
            all denominators, it is not used.
        ignore_index: Label of tokens without loss.
        shift_labels: `(B, S)` labels that are shifted already, in place of `labels`.
        loss_weights: `(B, S)` final weight of each token, standing where its label stands (shifted where
            `shift_labels` is given), as [`weigh_tokens`] makes them of [`next_token_labels`]. Without them the loss is
            transformers' own.
        **kwargs: Not used; models pass what they do not know.

    Returns:
        A scalar, float64 for float64 logits, else float32.

    Raises:
        ValueError: If the shape of `loss_weights` is not that of the labels, a weight is negative, infinite or NaN
            (seen on CPU only), the logits do not fit the labels, or a label is no class.
    """
    shifted = shift_labels is not None
    targets = shift_labels if shift_labels is not None else labels
    if targets is None:
        raise ValueError("`labels` or `shift_labels` must be given.")
    if logits.numel() != targets.numel() * vocab_size:
        raise ValueError(
            f"`logits` must be of shape {(*targets.shape, vocab_size)} for these labels, got {tuple(logits.shape)}."
        )
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    loss_weights = check_weights(loss_weights, "loss_weights", targets.shape, dtype)
    if not shifted:
        targets = F.pad(targets, (0, 1), value=ignore_index)[..., 1:]
        loss_weights = None if loss_weights is None else F.pad(loss_weights, (0, 1))[..., 1:]
    flat = check_labels(targets, vocab_size, ignore_index).to(logits.device)
    valid = flat != ignore_index
    weights = valid.to(dtype)
    if loss_weights is not None:
        weights = torch.where(valid, loss_weights.reshape(-1).to(weights), 0)
    losses = losses_where(weights != 0, logits.reshape(-1, vocab_size), flat.where(valid, 0), 0.0, 0.0, dtype)
    total = (losses * weights).sum()
    if loss_weights is not None:
        return total
    count = valid.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=total.device)
    return total / count.clamp(min=1)


LOSS_MAPPING.setdefault(WEIGHTED_LOSS_NAME, weighted_causal_lm_loss)
