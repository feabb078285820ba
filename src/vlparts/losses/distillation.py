"""Divergence of a model from its teacher, with the weights of [`weighted_cross_entropy`].

Shapes: N tokens, V classes.
"""

from typing import Any

import torch
from torch import Tensor

from ..parts.utils import IGNORE_INDEX
from ._checks import check_logits, check_number, loss_dtype
from ._token_chunks import chunked_losses
from .weights import weigh_tokens

__all__ = ["DIVERGENCES", "weighted_distillation_loss"]

DIVERGENCES = ("forward", "reverse")


def weighted_distillation_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    divergence: str = "forward",
    temperature: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    **weighting: Any,
) -> Tensor:
    """Compute the weighted sum of the KL divergences of all tokens from a teacher.

    The loss of a token is `T^2 KL(p || q)` (forward) or `T^2 KL(q || p)` (reverse), with p = softmax(teacher / T) and
    q = softmax(logits / T); the factor keeps the scale of the gradients (Hinton et al., arXiv 1503.02531, section 2).
    Forward KL is mode-covering, reverse KL is mode-seeking (MiniLLM, arXiv 2306.08543, section 2.1). Classes that the
    teacher excludes by a logit of minus infinity are left out of the forward sum.

    It is computed in chunks of tokens, which backward recomputes, and is differentiable once, in the logits and the
    weights.

    Args:
        logits: `(S, V)` or `(B, S, V)`.
        teacher_logits: Of the same shape and any floating-point type; they get no gradient.
        labels: `(S,)` or `(B, S)` integers aligned with the logits. Only whether they equal `ignore_index` is used.
        divergence: "forward" or "reverse".
        temperature: T, above 0.
        ignore_index: Label of tokens without loss.
        **weighting: `preset`, `mix`, `length_exponent`, `sample_weights`, `token_weights`, `cu_seqlens`, `sample_ids`
            and `normalizer` of [`weigh_tokens`].

    Returns:
        A scalar, float64 for float64 logits, otherwise float32; exactly 0, with zero gradients, if all weights are 0.

    Raises:
        ValueError: If shapes do not fit, an option is out of range, and as [`weigh_tokens`].
    """
    check_logits(logits, labels)
    if not teacher_logits.is_floating_point() or teacher_logits.shape != logits.shape:
        raise ValueError(
            f"`teacher_logits` must be floating-point of the shape of `logits`, {tuple(logits.shape)}, got "
            f"{teacher_logits.dtype} {tuple(teacher_logits.shape)}."
        )
    if divergence not in DIVERGENCES:
        raise ValueError(f"`divergence` must be one of {', '.join(DIVERGENCES)}, got {divergence!r}.")
    check_number(temperature, "temperature", positive=True)
    weights = weigh_tokens(labels, ignore_index=ignore_index, dtype=loss_dtype(logits), **weighting).weights
    teacher = teacher_logits.detach().reshape(-1, logits.shape[-1])

    def row_losses(rows: Tensor, tokens: Tensor) -> Tensor:
        return _divergences(rows / temperature, teacher[tokens].to(rows.dtype) / temperature, divergence)

    losses = chunked_losses(logits.reshape(-1, logits.shape[-1]), weights != 0, row_losses)
    return temperature**2 * (losses * weights).sum()


def _divergences(logits: Tensor, teacher: Tensor, divergence: str) -> Tensor:
    """Compute KL divergences `(N,)`. Classes to which the first distribution gives no probability are left out."""
    log_q, log_p = logits.log_softmax(-1), teacher.log_softmax(-1)
    log_first, log_second = (log_p, log_q) if divergence == "forward" else (log_q, log_p)
    first = log_first.exp()
    return (first * torch.where(first > 0, log_first - log_second, 0)).sum(-1)
