"""How much each token counts in a loss: weights of samples and tokens, and what they are divided by.

One form covers the averages that vision-language models are trained with. With the importance `a` of a sample, the
weight `b` of a token (0 where its label is ignored), the size `B` of a sample, which is the sum of its `b`, a mix `m`
and a length exponent `p`, a token weighs

    W = a b ( m / (A B)  +  (1 - m) B^-p / C )

with A the sum of `a` over samples with B > 0 and C the sum of `a b B^-p` over tokens, and all weights add up to 1.
Token averaging is `m = 0, p = 0`; sample averaging is `m = 1`, and also `m = 0, p = 1`; the square averaging of
InternVL2.5 (arXiv 2412.05271, section 3) is `m = 0, p = 1/2`. openPangu-VL mixes the first two; its formula is not
published, so the mix is a parameter.

Shapes: N tokens, n samples.

Which sample each token of a loss belongs to: by rows, by cumulative lengths, or by ids.

Shapes: N tokens, n samples.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..parts.utils import IGNORE_INDEX

__all__ = ["find_samples"]


def find_samples(
    labels: Tensor, cu_seqlens: Tensor | None, sample_ids: Tensor | None, sample_weights: Tensor | None = None
) -> tuple[Tensor, int]:
    """The sample of each token, `(N,)` int64, and the number of samples n; tokens of no sample have n.

    Raises:
        ValueError: As for [`weigh_tokens`].
    """
    if labels.ndim not in (1, 2) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"`labels` must be integers (S,) or (B, S), got {labels.dtype} {tuple(labels.shape)}.")
    total, device = labels.numel(), labels.device
    if cu_seqlens is not None and sample_ids is not None:
        raise ValueError("`cu_seqlens` and `sample_ids` both say where samples are; pass one of the two.")
    if cu_seqlens is not None:
        return _from_lengths(cu_seqlens, total, device)
    if sample_ids is None:
        rows = 1 if labels.ndim == 1 else labels.shape[0]
        return torch.arange(rows, device=device).repeat_interleave(labels.shape[-1]), rows
    if sample_ids.shape != labels.shape or sample_ids.is_floating_point() or sample_ids.dtype == torch.bool:
        raise ValueError(
            f"`sample_ids` must be integers of the shape of `labels`, {tuple(labels.shape)}, got {sample_ids.dtype} "
            f"{tuple(sample_ids.shape)}."
        )
    ids = sample_ids.reshape(-1).long()
    highest = int(ids.max()) if total else -1
    count = max(highest + 1, 0) if sample_weights is None or sample_weights.ndim == 0 else len(sample_weights)
    if highest >= count or (total and int(ids.min()) < -1):
        raise ValueError(
            f"`sample_ids` must lie from -1 to {count - 1}, got {int(ids.min())} to {highest}; `sample_weights` has a "
            "weight for each sample."
        )
    return torch.where(ids < 0, count, ids), count


def _from_lengths(cu_seqlens: Tensor, total: int, device: torch.device) -> tuple[Tensor, int]:
    integers = not cu_seqlens.is_floating_point() and cu_seqlens.dtype != torch.bool
    if cu_seqlens.ndim != 1 or len(cu_seqlens) == 0 or not integers:
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


DEFAULT_MIX = 0.5

PRESETS: dict[str, tuple[float, float]] = {
    "token": (0.0, 0.0),
    "sample": (1.0, 0.0),
    "square": (0.0, 0.5),
    "openpangu_mix": (DEFAULT_MIX, 0.0),
}
"""The mix and the length exponent of each preset."""


class Denominators(Protocol):
    """What the weights of a step are divided by; see [`LossNormalizer`]."""

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
        samples: `(N,)` int64, the sample of each token, from 0; n for tokens of no sample.
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


def resolve_mix(preset: str | None, mix: float | None, length_exponent: float | None) -> tuple[float, float]:
    """The mix and the length exponent that a call asks for.

    Args:
        preset: A name in `PRESETS`, or None.
        mix: Share of sample averaging, from 0 to 1; `DEFAULT_MIX` where neither it nor a preset is given.
        length_exponent: p, at least 0; 0 where neither it nor a preset is given.

    Raises:
        ValueError: For an unknown preset, a value out of range, or a preset that has another value already. Only
            "openpangu_mix" leaves its mix open.
    """
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"`preset` must be one of {', '.join(PRESETS)}, got {preset!r}.")
    fixed = PRESETS[preset or "openpangu_mix"]
    for name, given in (("mix", mix), ("length_exponent", length_exponent)):
        closed = preset is not None and (preset, name) != ("openpangu_mix", "mix")
        if given is not None and closed:
            raise ValueError(f"`{name}` belongs to `preset={preset!r}` already, got {given}; pass one of the two.")
    mix = fixed[0] if mix is None else mix
    exponent = fixed[1] if length_exponent is None else length_exponent
    if isinstance(mix, bool) or not 0 <= mix <= 1:
        raise ValueError(f"`mix` must lie from 0 to 1, got {mix!r}.")
    if isinstance(exponent, bool) or not 0 <= exponent < float("inf"):
        raise ValueError(f"`length_exponent` must be a finite number of at least 0, got {exponent!r}.")
    return float(mix), float(exponent)


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
    """The weight W of each token in the loss.

    Args:
        labels: `(S,)` or `(B, S)` integers; `ignore_index` where no loss is wanted. Each row is a sample, unless
            `cu_seqlens` or `sample_ids` say otherwise.
        preset: "token", "sample", "square" or "openpangu_mix", in place of `mix` and `length_exponent`.
        mix: m, the share of sample averaging, from 0 to 1. 0.5 where nothing is given.
        length_exponent: p, at least 0. 0 where nothing is given.
        sample_weights: `(n,)` a, at least 0; all 1 where None.
        token_weights: b, of the shape of `labels`, at least 0; all 1 where None.
        cu_seqlens: `(n + 1,)` integers from 0 to N, cumulative lengths of the samples in the flattened labels.
        sample_ids: Integers of the shape of `labels`, the sample of each token, from 0; -1 for padding.
        normalizer: Denominators of a whole step; those of this call where None.
        ignore_index: Label of tokens without loss.
        dtype: float32 or float64, the type of the weights.

    Raises:
        ValueError: If a shape does not fit, a weight is negative, infinite or NaN (seen on CPU only), `cu_seqlens` is
            no division of the tokens, both it and `sample_ids` are given, or the normalizer holds nothing (seen on CPU
            only) or adds up for another length exponent.
    """
    mix, exponent = resolve_mix(preset, mix, length_exponent)
    samples, count = find_samples(labels, cu_seqlens, sample_ids, sample_weights)
    flat = labels.reshape(-1)
    own = check_weights(token_weights, "token_weights", labels.shape, dtype)
    b = torch.ones(flat.shape, dtype=dtype, device=flat.device) if own is None else own.reshape(-1)
    b = torch.where((flat == ignore_index) | (samples == count), 0, b)
    a = check_weights(sample_weights, "sample_weights", (count,), dtype)
    a = torch.ones(count, dtype=dtype, device=flat.device) if a is None else a
    sizes = torch.zeros(count + 1, dtype=dtype, device=flat.device).index_add(0, samples, b)[:count]
    used = sizes > 0
    safe = torch.where(used, sizes, 1)
    total_samples = torch.where(used, a, 0).sum()
    scaled = torch.where(used, a * safe**-exponent, 0)
    total_tokens = (scaled * sizes).sum()
    by_sample, by_token = total_samples, total_tokens
    if normalizer is not None:
        _check_normalizer(normalizer, exponent, total_samples)
        by_sample, by_token = normalizer.samples.to(a), normalizer.tokens.to(a)
    factor = torch.zeros_like(a)
    if mix > 0:
        factor = factor + mix * torch.where(used, a / safe, 0) / _nonzero(by_sample)
    if mix < 1:
        factor = factor + (1 - mix) * scaled / _nonzero(by_token)
    weights = b * torch.cat([factor, factor.new_zeros(1)])[samples]
    return TokenWeights(weights, samples, sizes, a, total_samples, total_tokens)


def next_token_labels(
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    sample_ids: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Labels of a language model's loss, which shifts them: without the first token of each sample and row.

    Nothing before it in its sample can predict it, so it has no loss, whatever its label says.

    Args:
        labels: As for [`weigh_tokens`].
        cu_seqlens: As for [`weigh_tokens`].
        sample_ids: As for [`weigh_tokens`].
        ignore_index: Label of tokens without loss.

    Returns:
        Labels of the same shape, unshifted.
    """
    samples, _ = find_samples(labels, cu_seqlens, sample_ids)
    first = torch.ones_like(samples, dtype=torch.bool)
    first[1:] = samples[1:] != samples[:-1]
    first = first.view(labels.shape)
    if labels.ndim == 2 and labels.shape[1]:
        first[:, 0] = True
    return labels.masked_fill(first, ignore_index)


def weigh_next_tokens(
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    sample_ids: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    **weighting: Any,
) -> TokenWeights:
    """[`weigh_tokens`] of [`next_token_labels`]: the weights of a language model's loss, which shifts labels.

    Args:
        labels: As for [`weigh_tokens`], not shifted; nor are the weights, which stand where the labels stand.
        cu_seqlens: As for [`weigh_tokens`].
        sample_ids: As for [`weigh_tokens`].
        ignore_index: Label of tokens without loss.
        **weighting: The other arguments of [`weigh_tokens`].

    Raises:
        ValueError: As for [`weigh_tokens`].
    """
    places: dict[str, Any] = {"cu_seqlens": cu_seqlens, "sample_ids": sample_ids, "ignore_index": ignore_index}
    return weigh_tokens(next_token_labels(labels, **places), **places, **weighting)


def check_weights(weights: Tensor | None, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """Given weights in `dtype`, after a look at their values (on CPU only).

    Raises:
        ValueError: If their shape does not fit, or one is negative, infinite or NaN.
    """
    if weights is None:
        return None
    if tuple(weights.shape) != tuple(shape) or weights.dtype == torch.bool:
        raise ValueError(
            f"`{name}` must be numbers of shape {tuple(shape)}, got {weights.dtype} {tuple(weights.shape)}."
        )
    if weights.device.type == "cpu" and not torch.compiler.is_compiling():
        good = torch.isfinite(weights) & (weights >= 0)
        if not bool(good.all()):
            bad = weights.detach()[~good].flatten()[0].item()
            raise ValueError(f"`{name}` must be finite and at least 0, got {bad}.")
    return weights.to(dtype)


def _check_normalizer(normalizer: Denominators, exponent: float, total_samples: Tensor) -> None:
    made_for = getattr(normalizer, "length_exponent", exponent)
    if made_for != exponent:
        raise ValueError(f"`normalizer` adds up for a `length_exponent` of {made_for}, got {exponent}.")
    readable = total_samples.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and float(normalizer.samples) == 0 < float(total_samples):
        raise ValueError("`normalizer` has no samples; add the labels of the whole step to it first.")


def _nonzero(total: Tensor) -> Tensor:
    """A denominator; without anything to divide, 1."""
    return torch.where(total > 0, total, 1)
