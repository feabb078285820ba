"""Direct preference optimisation (DPO, arXiv 2305.18290) with weights of pairs and of tokens.

Shapes: N tokens, V classes, n samples or pairs.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunked import chunked_losses
from .cross_entropy import check_labels, token_losses
from .weights import IGNORE_INDEX, Denominators, weigh_tokens

__all__ = ["SequenceLogProbs", "sequence_log_probs", "weighted_dpo_loss"]


class _Undivided:
    """Denominators of 1: tokens then weigh b."""

    samples = tokens = torch.ones((), dtype=torch.float64)


class SequenceLogProbs(NamedTuple):
    """Log-probabilities of answers.

    Attributes:
        log_probs: `(n,)`, sum of the weighted log-probabilities of each sample's labels; 0 for one without tokens.
        sizes: `(n,)`, sum of its tokens' weights; log_probs / sizes is the mean.
    """

    log_probs: Tensor
    sizes: Tensor


def sequence_log_probs(
    logits: Tensor,
    labels: Tensor,
    *,
    average: bool = False,
    token_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sample_ids: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> SequenceLogProbs:
    """The log-probability of each sample's labels, computed some tokens at a time, and again in backward.

    Args:
        logits: `(S, V)` or `(B, S, V)`.
        labels: `(S,)` or `(B, S)` integers from 0 to V - 1, or `ignore_index`; aligned with the logits.
        average: Divide by the size of the sample, so that long answers gain nothing by their length.
        token_weights: As for [`weigh_tokens`].
        cu_seqlens: As for [`weigh_tokens`].
        sample_ids: As for [`weigh_tokens`]; pairs must have as many samples on both sides.
        ignore_index: Label of tokens without loss.

    Returns:
        Log-probabilities and sizes, float64 for float64 logits, else float32.

    Raises:
        ValueError: If shapes do not fit, a label is no class, and as for [`weigh_tokens`].
    """
    if not logits.is_floating_point() or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"`logits` must be floating-point of shape {(*labels.shape, 'V')}, got {logits.dtype} "
            f"{tuple(logits.shape)}."
        )
    flat = check_labels(labels, logits.shape[-1], ignore_index)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    weights = weigh_tokens(
        labels,
        mix=0.0,
        length_exponent=0.0,
        token_weights=token_weights,
        cu_seqlens=cu_seqlens,
        sample_ids=sample_ids,
        normalizer=_Undivided(),
        ignore_index=ignore_index,
        dtype=dtype,
    )

    def row_losses(rows: Tensor, places: Tensor) -> Tensor:
        return token_losses(rows, flat[places].clamp(min=0), 0.0, 0.0)

    losses = chunked_losses(logits.reshape(-1, logits.shape[-1]), weights.weights != 0, row_losses)
    sizes = weights.sizes
    sums = losses.new_zeros(len(sizes) + 1).index_add(0, weights.samples, -losses * weights.weights)[:-1]
    return SequenceLogProbs(sums / torch.where(sizes > 0, sizes, 1) if average else sums, sizes)


def weighted_dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor | None = None,
    reference_rejected: Tensor | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    sample_weights: Tensor | None = None,
    pair_mask: Tensor | None = None,
    normalizer: Denominators | None = None,
) -> Tensor:
    """The weighted mean of the pairs' sigmoid losses.

    A pair's part is `-(1 - s) log sigmoid(beta d) - s log sigmoid(-beta d)`, where d is by how much more the model
    prefers the chosen answer to the rejected one than the reference does, and s the share of pairs that are labelled
    the wrong way round (cDPO). Without a reference d is the model's preference alone. Log-probabilities that are
    means make it length-normalised.

    Args:
        chosen: Log-probabilities of the chosen answers: `(n,)` of whole answers, or `(n, S)` of tokens, 0 where there
            is none, which are summed.
        rejected: Of the rejected answers; S may differ.
        reference_chosen: Of the chosen answers by the reference model; no gradient. None, with `reference_rejected`,
            for no reference.
        reference_rejected: Of the rejected answers by the reference model.
        beta: How strongly the model is held to the reference, above 0.
        label_smoothing: s, at least 0 and below 0.5.
        sample_weights: `(n,)` a of each pair, at least 0; all 1 where None.
        pair_mask: `(n,)` bool, false for pairs that do not count, such as one with an answer without tokens; their
            log-probabilities may be anything.
        normalizer: Of a whole step, in place of the weights of this call. A pair is a sample of one token:
            `normalizer.add(torch.zeros(pairs, 1, dtype=torch.int64), sample_weights=...)`.

    Returns:
        A scalar, float64 where log-probabilities are, else float32; exactly 0, with zero gradients,
        where nothing has weight.

    Raises:
        ValueError: If shapes do not fit, only one side has a reference, an option is out of range, or a weight is
            negative, infinite or NaN (looked at on CPU only).
    """
    if isinstance(beta, bool) or not 0 < beta < float("inf"):
        raise ValueError(f"`beta` must be a finite number above 0, got {beta!r}.")
    if isinstance(label_smoothing, bool) or not 0 <= label_smoothing < 0.5:
        raise ValueError(f"`label_smoothing` must be at least 0 and below 0.5, got {label_smoothing!r}.")
    if (reference_chosen is None) != (reference_rejected is None):
        raise ValueError("`reference_chosen` and `reference_rejected` must both be given, or neither, got one.")
    preference = _summed(chosen, "chosen") - _summed(rejected, "rejected", len(chosen))
    if reference_chosen is not None and reference_rejected is not None:
        of_chosen = _summed(reference_chosen.detach(), "reference_chosen", len(chosen))
        preference = preference - (of_chosen - _summed(reference_rejected.detach(), "reference_rejected", len(chosen)))
    labels = torch.zeros(len(preference), 1, dtype=torch.int64, device=preference.device)
    if pair_mask is not None:
        if pair_mask.shape != preference.shape or pair_mask.dtype != torch.bool:
            raise ValueError(
                f"`pair_mask` must be bool of shape {tuple(preference.shape)}, got {pair_mask.dtype} "
                f"{tuple(pair_mask.shape)}."
            )
        labels = labels.masked_fill(~pair_mask.unsqueeze(1), IGNORE_INDEX)
    weights = weigh_tokens(
        labels, preset="sample", sample_weights=sample_weights, normalizer=normalizer, dtype=preference.dtype
    ).weights
    scores = beta * torch.where(weights != 0, preference, 0)
    losses = (label_smoothing - 1) * F.logsigmoid(scores) - label_smoothing * F.logsigmoid(-scores)
    return (losses * weights).sum()


def _summed(log_probs: Tensor, name: str, pairs: int | None = None) -> Tensor:
    """Log-probabilities of whole answers, `(n,)` float32 or float64."""
    fits = log_probs.ndim in (1, 2) and pairs in (None, len(log_probs))
    if not fits or not log_probs.is_floating_point():
        count = "n" if pairs is None else pairs
        raise ValueError(
            f"`{name}` must be floating-point ({count},) or ({count}, S), got {log_probs.dtype} "
            f"{tuple(log_probs.shape)}."
        )
    wide = log_probs if log_probs.dtype == torch.float64 else log_probs.float()
    return wide.sum(1) if wide.ndim == 2 else wide
