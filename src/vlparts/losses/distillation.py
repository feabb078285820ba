"""The divergence of a model from its teacher, with the weights of [`weighted_cross_entropy`].

Shapes: N tokens, V classes.
"""

from typing import Any

import torch
from torch import Tensor

from .chunked import chunked_losses
from .weights import IGNORE_INDEX, weigh_tokens

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
    """The weighted sum of all tokens' divergences from a teacher.

    A token's part is `T^2 KL(p || q)` forward and `T^2 KL(q || p)` in reverse, with p = softmax(teacher / T) and
    q = softmax(logits / T); the square keeps the size of gradients (Hinton et al., arXiv 1503.02531, section 2).
    Forward covers all that the teacher may say, reverse keeps to what it is likely to say (MiniLLM, arXiv 2306.08543,
    section 2.1). Classes that the teacher excludes by a logit of minus infinity are left out of the forward sum.

    It is computed some tokens at a time, and again in backward; it is differentiable once, in `logits` and in weights.

    Args:
        logits: `(S, V)` or `(B, S, V)`.
        teacher_logits: Of the same shape and any floating-point type; they get no gradient.
        labels: `(S,)` or `(B, S)` integers, which only say which tokens count: those that are not `ignore_index`.
            Aligned with the logits.
        divergence: "forward" or "reverse".
        temperature: T, above 0.
        ignore_index: Label of tokens without loss.
        **weighting: `preset`, `mix`, `length_exponent`, `sample_weights`, `token_weights`, `cu_seqlens`, `sample_ids`
            and `normalizer` of [`weigh_tokens`].

    Returns:
        A scalar, float64 for float64 logits, else float32; exactly 0, with zero gradients, where nothing has weight.

    Raises:
        ValueError: If shapes do not fit, an option is out of range, and as for [`weigh_tokens`].
    """
    if not logits.is_floating_point() or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"`logits` must be floating-point of shape {(*labels.shape, 'V')}, got {logits.dtype} "
            f"{tuple(logits.shape)}."
        )
    if not teacher_logits.is_floating_point() or teacher_logits.shape != logits.shape:
        raise ValueError(
            f"`teacher_logits` must be floating-point of the shape of `logits`, {tuple(logits.shape)}, got "
            f"{teacher_logits.dtype} {tuple(teacher_logits.shape)}."
        )
    if divergence not in DIVERGENCES:
        raise ValueError(f"`divergence` must be one of {', '.join(DIVERGENCES)}, got {divergence!r}.")
    if isinstance(temperature, bool) or not 0 < temperature < float("inf"):
        raise ValueError(f"`temperature` must be a finite number above 0, got {temperature!r}.")
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    weights = weigh_tokens(labels, ignore_index=ignore_index, dtype=dtype, **weighting).weights
    teacher = teacher_logits.detach().reshape(-1, logits.shape[-1])

    def row_losses(rows: Tensor, places: Tensor) -> Tensor:
        return _divergences(rows / temperature, teacher[places].to(rows.dtype) / temperature, divergence)

    losses = chunked_losses(logits.reshape(-1, logits.shape[-1]), weights != 0, row_losses)
    return temperature**2 * (losses * weights).sum()


def _divergences(logits: Tensor, teacher: Tensor, divergence: str) -> Tensor:
    """`(N,)`; a class that the first of the two distributions excludes has no part, whatever the second says."""
    log_q, log_p = logits.log_softmax(-1), teacher.log_softmax(-1)
    log_first, log_second = (log_p, log_q) if divergence == "forward" else (log_q, log_p)
    first = log_first.exp()
    return (first * torch.where(first > 0, log_first - log_second, 0)).sum(-1)
