"""Weight of each token in a loss, from the importance of samples, the weights of tokens, and global denominators.

One formula covers the averages that vision-language models are trained with. A token weighs

    W = a b ( m / (A B)  +  (1 - m) B^-p / C )

where a is the importance of its sample, b its own weight (0 where its label is ignored), B the sum of b over the
sample, m the mix, p the length exponent, A the sum of a over samples with B > 0, and C the sum of `a b B^-p` over all
tokens. All W add up to 1. Token averaging is `m = 0, p = 0`; sample averaging is `m = 1`, or `m = 0, p = 1`; square
averaging (InternVL2.5, arXiv 2412.05271, section 3) is `m = 0, p = 1/2`. openPangu-VL mixes the first two; its formula
is not published, so the mix is a parameter.

Shapes: N tokens, n samples.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..parts.utils import IGNORE_INDEX
from ._checks import check_fraction, check_number, check_weights, is_integer, is_readable

__all__ = [
    "DEFAULT_MIX",
    "PRESETS",
    "Denominators",
    "TokenWeights",
    "find_samples",
    "next_token_labels",
    "resolve_mix",
    "weigh_next_tokens",
    "weigh_tokens",
]

DEFAULT_MIX = 0.5

PRESETS: dict[str, tuple[float, float]] = {
    "token": (0.0, 0.0),
    "sample": (1.0, 0.0),
    "square": (0.0, 0.5),
    "openpangu_mix": (DEFAULT_MIX, 0.0),
}
"""The mix and the length exponent of each preset."""


class Denominators(Protocol):
    """Denominators of the weights of a step; see [`LossNormalizer`]."""

    @property
    def samples(self) -> Tensor:
        """A, a float64 scalar."""

    @property
    def tokens(self) -> Tensor:
        """C, a float64 scalar."""


class TokenWeights(NamedTuple):
    """The weights of all tokens of a call.

    Attributes:
        weights: `(N,)` W; 0 where a label is ignored.
        samples: `(N,)` int64 index of each token's sample; n for padding.
        sizes: `(n,)` B of each sample.
        importance: `(n,)` a of each sample.
        total_samples: A of this call alone.
        total_tokens: C of this call alone.
    """

    weights: Tensor
    samples: Tensor
    sizes: Tensor
    importance: Tensor
    total_samples: Tensor
    total_tokens: Tensor


def weigh_tokens(
    labels: Tensor,
    *,
    preset: str | None = None,
    mix: float | None = None,
    length_exponent: float | None = None,
    sample_weights: Tensor | None = None,
    token_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sample_ids: Tensor | None = None,
    normalizer: Denominators | None = None,
    ignore_index: int = IGNORE_INDEX,
    dtype: torch.dtype = torch.float32,
) -> TokenWeights:
    """Compute the weight W of each token in the loss.

    Args:
        labels: `(S,)` or `(B, S)` integers; `ignore_index` for tokens without loss. Each row is a sample, unless
            `cu_seqlens` or `sample_ids` is given.
        preset: "token", "sample", "square" or "openpangu_mix", instead of `mix` and `length_exponent`.
        mix: m, the share of sample averaging, between 0 and 1. Default: 0.5.
        length_exponent: p, at least 0. Default: 0.
        sample_weights: `(n,)` a, at least 0. Default: 1 for every sample.
        token_weights: b, of the shape of `labels`, at least 0. Default: 1 for every token.
        cu_seqlens: `(n + 1,)` integers from 0 to N, cumulative lengths of the samples in the flattened labels.
        sample_ids: Integers of the shape of `labels`, the index of each token's sample; -1 for padding.
        normalizer: Denominators of the whole step. Default: those of this call.
        ignore_index: Label of tokens without loss.
        dtype: Type of the weights, float32 or float64.

    Raises:
        ValueError: If a shape does not fit, a weight is negative, infinite or NaN (checked on CPU only), `cu_seqlens`
            does not rise from 0 to N, both it and `sample_ids` are given, or the normalizer is empty (checked on CPU
            only) or has another length exponent.
    """
    mix, exponent = resolve_mix(preset, mix, length_exponent)
    samples, count = find_samples(labels, cu_seqlens, sample_ids, sample_weights)
    flat = labels.reshape(-1)
    given = check_weights(token_weights, "token_weights", labels.shape, dtype)
    b = torch.ones(flat.shape, dtype=dtype, device=flat.device) if given is None else given.reshape(-1)
    b = torch.where((flat == ignore_index) | (samples == count), 0, b)
    a = check_weights(sample_weights, "sample_weights", (count,), dtype)
    a = torch.ones(count, dtype=dtype, device=flat.device) if a is None else a
    sizes = torch.zeros(count + 1, dtype=dtype, device=flat.device).index_add(0, samples, b)[:count]
    used = sizes > 0
    safe_sizes = torch.where(used, sizes, 1)
    total_samples = torch.where(used, a, 0).sum()
    scaled = torch.where(used, a * safe_sizes**-exponent, 0)
    total_tokens = (scaled * sizes).sum()
    by_sample, by_token = total_samples, total_tokens
    if normalizer is not None:
        _check_normalizer(normalizer, exponent, total_samples)
        by_sample, by_token = normalizer.samples.to(a), normalizer.tokens.to(a)
    factor = torch.zeros_like(a)
    if mix > 0:
        factor = factor + mix * torch.where(used, a / safe_sizes, 0) / _nonzero(by_sample)
    if mix < 1:
        factor = factor + (1 - mix) * scaled / _nonzero(by_token)
    weights = b * torch.cat([factor, factor.new_zeros(1)])[samples]
    return TokenWeights(weights, samples, sizes, a, total_samples, total_tokens)


def weigh_next_tokens(
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    sample_ids: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    **weighting: Any,
) -> TokenWeights:
    """Compute the weights for a language model's loss, which shifts labels: [`weigh_tokens`] of [`next_token_labels`].

    Args:
        labels: `(S,)` or `(B, S)` integers, not shifted. The weights are aligned with them.
        cu_seqlens: `(n + 1,)` cumulative lengths of the samples.
        sample_ids: Index of each token's sample, of the shape of `labels`; -1 for padding.
        ignore_index: Label of tokens without loss.
        **weighting: Other arguments of [`weigh_tokens`].

    Raises:
        ValueError: As [`weigh_tokens`].
    """
    options: dict[str, Any] = {"cu_seqlens": cu_seqlens, "sample_ids": sample_ids, "ignore_index": ignore_index}
    return weigh_tokens(next_token_labels(labels, **options), **options, **weighting)


def next_token_labels(
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    sample_ids: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Ignore the first label of each sample and of each row, which no earlier token of the sample can predict.

    Args:
        labels: `(S,)` or `(B, S)` integers. Each row is a sample, unless `cu_seqlens` or `sample_ids` is given.
        cu_seqlens: `(n + 1,)` cumulative lengths of the samples.
        sample_ids: Index of each token's sample, of the shape of `labels`; -1 for padding.
        ignore_index: Label of tokens without loss.

    Returns:
        Labels of the same shape, not shifted.

    Raises:
        ValueError: As [`weigh_tokens`].
    """
    samples, _ = find_samples(labels, cu_seqlens, sample_ids)
    first = torch.ones_like(samples, dtype=torch.bool)
    first[1:] = samples[1:] != samples[:-1]
    first = first.view(labels.shape)
    if labels.ndim == 2 and labels.shape[1]:
        first[:, 0] = True
    return labels.masked_fill(first, ignore_index)


def resolve_mix(preset: str | None, mix: float | None, length_exponent: float | None) -> tuple[float, float]:
    """Return the mix and the length exponent that a preset or the two numbers ask for.

    Args:
        preset: A name in `PRESETS`, or None.
        mix: Share of sample averaging, between 0 and 1. Default: the preset's, or `DEFAULT_MIX`.
        length_exponent: p, at least 0. Default: the preset's, or 0.

    Raises:
        ValueError: If the preset is unknown, a number is out of range, or a number is given that the preset fixes.
            Only "openpangu_mix" leaves its mix open.
    """
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"`preset` must be one of {', '.join(PRESETS)}, got {preset!r}.")
    default_mix, default_exponent = PRESETS[preset or "openpangu_mix"]
    for name, value in (("mix", mix), ("length_exponent", length_exponent)):
        fixed = preset is not None and (preset, name) != ("openpangu_mix", "mix")
        if value is not None and fixed:
            raise ValueError(f"`{name}` is fixed by `preset={preset!r}`, got {value}; pass only one of the two.")
    mix = default_mix if mix is None else mix
    exponent = default_exponent if length_exponent is None else length_exponent
    check_fraction(mix, "mix")
    check_number(exponent, "length_exponent")
    return float(mix), float(exponent)


def find_samples(
    labels: Tensor, cu_seqlens: Tensor | None, sample_ids: Tensor | None, sample_weights: Tensor | None = None
) -> tuple[Tensor, int]:
    """Return the index of each token's sample, `(N,)` int64, n for padding; and the number of samples n.

    Raises:
        ValueError: As [`weigh_tokens`].
    """
    if labels.ndim not in (1, 2) or not is_integer(labels):
        raise ValueError(f"`labels` must be integers (S,) or (B, S), got {labels.dtype} {tuple(labels.shape)}.")
    total, device = labels.numel(), labels.device
    if cu_seqlens is not None and sample_ids is not None:
        raise ValueError("`cu_seqlens` and `sample_ids` both define the samples; pass only one of the two.")
    if cu_seqlens is not None:
        return _samples_of_lengths(cu_seqlens, total, device)
    if sample_ids is None:
        rows = 1 if labels.ndim == 1 else labels.shape[0]
        return torch.arange(rows, device=device).repeat_interleave(labels.shape[-1]), rows
    if sample_ids.shape != labels.shape or not is_integer(sample_ids):
        raise ValueError(
            f"`sample_ids` must be integers of the shape of `labels`, {tuple(labels.shape)}, got {sample_ids.dtype} "
            f"{tuple(sample_ids.shape)}."
        )
    ids = sample_ids.reshape(-1).long()
    highest = int(ids.max()) if total else -1
    count = max(highest + 1, 0) if sample_weights is None or sample_weights.ndim == 0 else len(sample_weights)
    if highest >= count or (total and int(ids.min()) < -1):
        weights = "" if sample_weights is None else " `sample_weights` must have one weight per sample."
        raise ValueError(
            f"`sample_ids` must be between -1 and {count - 1}, got {int(ids.min())} to {highest}.{weights}"
        )
    return torch.where(ids < 0, count, ids), count


def _samples_of_lengths(cu_seqlens: Tensor, total: int, device: torch.device) -> tuple[Tensor, int]:
    if cu_seqlens.ndim != 1 or len(cu_seqlens) == 0 or not is_integer(cu_seqlens):
        raise ValueError(
            f"`cu_seqlens` must be integers (samples + 1,), got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}."
        )
    lengths = cu_seqlens.long().diff().to(device)
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != total or bool((lengths < 0).any()):
        raise ValueError(
            f"`cu_seqlens` must rise from 0 to the number of tokens, {total}, got {cu_seqlens[:4].tolist()} ... "
            f"{int(cu_seqlens[-1])}."
        )
    count = len(lengths)
    return torch.arange(count, device=device).repeat_interleave(lengths, output_size=total), count


def _check_normalizer(normalizer: Denominators, exponent: float, total_samples: Tensor) -> None:
    expected = getattr(normalizer, "length_exponent", exponent)
    if expected != exponent:
        raise ValueError(f"`normalizer` has a `length_exponent` of {expected}, got {exponent}.")
    if is_readable(total_samples) and float(normalizer.samples) == 0 < float(total_samples):
        raise ValueError("`normalizer` has no samples; add the labels of the whole step to it first.")


def _nonzero(total: Tensor) -> Tensor:
    """Replace a denominator of 0 by 1."""
    return torch.where(total > 0, total, 1)
