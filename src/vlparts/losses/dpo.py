"""Direct preference optimisation (DPO, arXiv 2305.18290) with weights of pairs and tokens.

Shapes: N tokens, V classes, n samples or pairs.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..parts.utils import IGNORE_INDEX
from ._checks import check_labels, check_logits, check_number, loss_dtype
from ._token_chunks import chunked_losses
from .cross_entropy import token_losses
from .weights import Denominators, weigh_tokens

__all__ = ["SequenceLogProbs", "sequence_log_probs", "weighted_dpo_loss"]


class _UnitDenominators:
    """Denominators of 1, with which a token weighs b."""

    samples = tokens = torch.ones((), dtype=torch.float64)


class SequenceLogProbs(NamedTuple):
    """Log-probabilities of samples.

    Attributes:
        log_probs: `(n,)` weighted sum (or mean) of the log-probabilities of each sample's labels; 0 without labels.
        sizes: `(n,)` sum of the weights of each sample's tokens.
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
    """Compute the log-probability of each sample's labels, in chunks of tokens that backward recomputes.

    Args:
        logits: `(S, V)` or `(B, S, V)`.
        labels: `(S,)` or `(B, S)` integers from 0 to V - 1, or `ignore_index`; aligned with the logits.
        average: Divide by the size of the sample, so that length does not affect the result.
        token_weights: Weights of the shape of `labels`, at least 0. Default: 1 for every token.
        cu_seqlens: `(n + 1,)` cumulative lengths of the samples. By default each row is a sample.
        sample_ids: Index of each token's sample, of the shape of `labels`; -1 for padding. For pairs, chosen and
            rejected answers need the same number of samples.
        ignore_index: Label of tokens without loss.

    Returns:
        Log-probabilities and sizes, float64 for float64 logits, otherwise float32.

    Raises:
        ValueError: If shapes do not fit, a label is not a class, and as [`weigh_tokens`].
    """
    check_logits(logits, labels)
    flat = check_labels(labels, logits.shape[-1], ignore_index)
    weights = weigh_tokens(
        labels,
        mix=0.0,
        length_exponent=0.0,
        token_weights=token_weights,
        cu_seqlens=cu_seqlens,
        sample_ids=sample_ids,
        normalizer=_UnitDenominators(),
        ignore_index=ignore_index,
        dtype=loss_dtype(logits),
    )

    def row_losses(rows: Tensor, tokens: Tensor) -> Tensor:
        return token_losses(rows, flat[tokens].clamp(min=0))

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
    """Compute the weighted mean of the sigmoid losses of all pairs.

    The loss of a pair is `-(1 - s) log sigmoid(beta d) - s log sigmoid(-beta d)`, where d is the difference between
    the model's and the reference's log-ratio of chosen to rejected, and s the share of pairs with flipped labels
    (cDPO). Without a reference, d is the model's log-ratio. With averaged log-probabilities the loss is
    length-normalised.

    Args:
        chosen: Log-probabilities of the chosen answers: `(n,)` per answer, or `(n, S)` per token, 0 for padding, which
            are summed.
        rejected: Log-probabilities of the rejected answers; S may differ.
        reference_chosen: Log-probabilities of the chosen answers by the reference model; no gradient. None, with
            `reference_rejected`, for no reference.
        reference_rejected: Log-probabilities of the rejected answers by the reference model; no gradient.
        beta: Strength of the penalty for deviating from the reference, above 0.
        label_smoothing: s, at least 0 and below 0.5.
        sample_weights: `(n,)` weight of each pair, at least 0. Default: 1 for every pair.
        pair_mask: `(n,)` bool, false for pairs to ignore, for example with an answer without tokens; their
            log-probabilities may be anything.
        normalizer: Denominators of the whole step. Default: those of this call. A pair is a sample of one token:
            `normalizer.add(torch.zeros(pairs, 1, dtype=torch.int64), sample_weights=...)`.

    Returns:
        A scalar, float64 for float64 log-probabilities, otherwise float32; exactly 0, with zero gradients, if all
        weights are 0.

    Raises:
        ValueError: If shapes do not fit, only one side has a reference, an option is out of range, or a weight is
            negative, infinite or NaN (checked on CPU only).
    """
    check_number(beta, "beta", positive=True)
    if isinstance(label_smoothing, bool) or not 0 <= label_smoothing < 0.5:
        raise ValueError(f"`label_smoothing` must be at least 0 and below 0.5, got {label_smoothing!r}.")
    if (reference_chosen is None) != (reference_rejected is None):
        raise ValueError("`reference_chosen` and `reference_rejected` must be given together, got only one.")
    log_ratio = _answer_log_probs(chosen, "chosen") - _answer_log_probs(rejected, "rejected", len(chosen))
    if reference_chosen is not None and reference_rejected is not None:
        log_ratio = log_ratio - (
            _answer_log_probs(reference_chosen.detach(), "reference_chosen", len(chosen))
            - _answer_log_probs(reference_rejected.detach(), "reference_rejected", len(chosen))
        )
    labels = torch.zeros(len(log_ratio), 1, dtype=torch.int64, device=log_ratio.device)
    if pair_mask is not None:
        if pair_mask.shape != log_ratio.shape or pair_mask.dtype != torch.bool:
            raise ValueError(
                f"`pair_mask` must be bool of shape {tuple(log_ratio.shape)}, got {pair_mask.dtype} "
                f"{tuple(pair_mask.shape)}."
            )
        labels = labels.masked_fill(~pair_mask.unsqueeze(1), IGNORE_INDEX)
    weights = weigh_tokens(
        labels, preset="sample", sample_weights=sample_weights, normalizer=normalizer, dtype=log_ratio.dtype
    ).weights
    scores = beta * torch.where(weights != 0, log_ratio, 0)
    losses = (label_smoothing - 1) * F.logsigmoid(scores) - label_smoothing * F.logsigmoid(-scores)
    return (losses * weights).sum()


def _answer_log_probs(log_probs: Tensor, name: str, pairs: int | None = None) -> Tensor:
    """Return the log-probability of each answer, `(n,)` float32 or float64."""
    fits = log_probs.ndim in (1, 2) and pairs in (None, len(log_probs))
    if not fits or not log_probs.is_floating_point():
        count = "n" if pairs is None else pairs
        raise ValueError(
            f"`{name}` must be floating-point ({count},) or ({count}, S), got {log_probs.dtype} "
            f"{tuple(log_probs.shape)}."
        )
    wide = log_probs.to(loss_dtype(log_probs))
    return wide.sum(1) if wide.ndim == 2 else wide
