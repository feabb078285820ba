"""Weights of tokens by their place in the answer: the `token_weights` of [`weigh_tokens`].

Sample averaging sees only the proportions of weights in a sample; token averaging sees their sums too.

Shapes: N tokens, n samples, g segments.

Schedules of token weights: what a token weighs by its place in the answer. See [`position_weights`].
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from .weights import IGNORE_INDEX, find_samples

__all__ = [
    "Constant",
    "Cosine",
    "Exponential",
    "Linear",
    "Places",
    "Schedule",
    "Segments",
    "labelled_places",
    "position_weights",
]


Schedule = Callable[[Tensor, Tensor], Tensor]
"""Takes places t and numbers of labelled tokens n, float32 `(N,)`, and returns weights `(N,)`."""


@dataclass(frozen=True)
class Constant:
    """The same weight at all places."""

    value: float = 1.0

    def __post_init__(self) -> None:
        _check_numbers(self, ("value",))

    def __call__(self, t: Tensor, n: Tensor) -> Tensor:  # noqa: D102
        return torch.full_like(t, self.value)


@dataclass(frozen=True)
class Linear:
    """From `start` at the first labelled token to `end` at the last, in equal steps."""

    start: float
    end: float

    def __post_init__(self) -> None:
        _check_numbers(self, ("start", "end"))

    def __call__(self, t: Tensor, n: Tensor) -> Tensor:  # noqa: D102
        return torch.lerp(torch.full_like(t, self.start), torch.full_like(t, self.end), _progress(t, n))


@dataclass(frozen=True)
class Cosine:
    """From `start` at the first labelled token to `end` at the last, along half a wave: flat at both ends."""

    start: float
    end: float

    def __post_init__(self) -> None:
        _check_numbers(self, ("start", "end"))

    def __call__(self, t: Tensor, n: Tensor) -> Tensor:  # noqa: D102
        share = (1 - torch.cos(math.pi * _progress(t, n))) / 2
        return torch.lerp(torch.full_like(t, self.start), torch.full_like(t, self.end), share)


@dataclass(frozen=True)
class Exponential:
    """1 at the first labelled token, and half as much every `half_life` tokens."""

    half_life: float

    def __post_init__(self) -> None:
        _check_numbers(self, ("half_life",))
        if self.half_life == 0:
            raise ValueError("`half_life` must be above 0, got 0.")

    def __call__(self, t: Tensor, n: Tensor) -> Tensor:  # noqa: D102
        return torch.exp2(-t / self.half_life)


@dataclass(frozen=True)
class Segments:
    """Each segment of a sample has its share of the sample's weight, however long it is (SCALe, arXiv 2603.18656).

    In a sample of n labelled tokens a token of segment i, which has n_i of them, weighs `n / n_i * w_i / sum(w)`, with
    the sum over the segments that the sample has. Its weights so add up to n, as constant ones do, or to 0 where all
    its segments have weight 0.

    Attributes:
        weights: w of the segments 0, 1, ... For [`thinking_segments`]: of the thoughts, and of the answer.
    """

    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(self.weights))
        if not self.weights or not all(_is_weight(value) for value in self.weights):
            raise ValueError(f"`weights` must be finite numbers of at least 0, got {self.weights}.")

    @classmethod
    def between(cls, start: Sequence[float], end: Sequence[float], progress: float) -> Self:
        """Segments whose weights move from `start` to `end` along a cosine, as in SCALe from thoughts to answer.

        Args:
            start: Weights at the beginning of the training.
            end: Weights at its end, as many.
            progress: Part of the training that is done, from 0 to 1.
        """
        if len(start) != len(end):
            raise ValueError(f"`start` and `end` must have as many weights, got {len(start)} and {len(end)}.")
        if not 0 <= progress <= 1:
            raise ValueError(f"`progress` must lie from 0 to 1, got {progress!r}.")
        share = (1 - math.cos(math.pi * progress)) / 2
        return cls(tuple((1 - share) * a + share * b for a, b in zip(start, end, strict=True)))


def _progress(t: Tensor, n: Tensor) -> Tensor:
    """From 0 at the first place to 1 at the last; 0 at the only one."""
    return t / (n - 1).clamp(min=1)


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _check_numbers(schedule: Any, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(schedule, name)
        if not _is_weight(value):
            raise ValueError(f"`{name}` must be a finite number of at least 0, got {value!r}.")


class Places(NamedTuple):
    """Where tokens stand among the labelled tokens of their samples.

    Attributes:
        t: `(N,)` int64, the place of a labelled token, from 0; 0 for others.
        n: `(N,)` int64, labelled tokens of the token's sample; 1 for tokens without label.
        labelled: `(N,)` bool.
        samples: `(N,)` int64, the sample of each token, from 0; `sample_count` for tokens of no sample.
        sample_count: Number of samples.
    """

    t: Tensor
    n: Tensor
    labelled: Tensor
    samples: Tensor
    sample_count: int


def labelled_places(
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    sample_ids: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Places:
    """Count the labelled tokens of each sample, which need not stand together.

    Args:
        labels: As for [`weigh_tokens`].
        cu_seqlens: As for [`weigh_tokens`].
        sample_ids: As for [`weigh_tokens`].
        ignore_index: Label of tokens without loss.

    Raises:
        ValueError: As for [`weigh_tokens`].
    """
    samples, count = find_samples(labels, cu_seqlens, sample_ids)
    labelled = (labels.reshape(-1) != ignore_index) & (samples < count)
    order = samples.argsort(stable=True)
    sorted_samples, each = samples[order], labelled[order].long()
    totals = samples.new_zeros(count + 1).index_add(0, samples, labelled.long())
    before = (each.cumsum(0) - each) - (totals.cumsum(0) - totals)[sorted_samples]
    t = torch.empty_like(samples).index_copy(0, order, before)
    return Places(torch.where(labelled, t, 0), torch.where(labelled, totals[samples], 1), labelled, samples, count)


def position_weights(
    labels: Tensor,
    schedule: Schedule | Segments,
    *,
    segment_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sample_ids: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """The weight b of each token, by its place among the labelled tokens of its sample.

    Args:
        labels: As for [`weigh_tokens`]; those of a language model as [`next_token_labels`] gives them.
        schedule: [`Constant`], [`Linear`], [`Cosine`], [`Exponential`], [`Segments`] or a function `(t, n) -> b` of
            float32 tensors `(N,)`: the place t, from 0 to n - 1, among the n labelled tokens of the sample. For other
            tokens it is asked for t = 0 and n = 1.
        segment_ids: Integers of the shape of `labels` from 0 to g - 1, or -1 for a token of no segment, which has
            weight 0. With [`Segments`], and only then.
        cu_seqlens: As for [`weigh_tokens`].
        sample_ids: As for [`weigh_tokens`].
        ignore_index: Label of tokens without loss.

    Returns:
        float32 of the shape of `labels`; 0 where they are ignored.

    Raises:
        ValueError: If the schedule returns another shape, or weights that are negative, infinite or NaN; if
            `segment_ids` do not fit the schedule or the labels; and as for [`weigh_tokens`]. Values are looked at on
            CPU only.
    """
    places = labelled_places(labels, cu_seqlens=cu_seqlens, sample_ids=sample_ids, ignore_index=ignore_index)
    if isinstance(schedule, Segments):
        ids = _checked_segments(segment_ids, labels, len(schedule.weights))
        return _share_segments(schedule.weights, ids, places).view(labels.shape)
    if not callable(schedule):
        raise ValueError(f"`schedule` must be a function of t and n or `Segments`, got {type(schedule).__name__}.")
    if segment_ids is not None:
        raise ValueError(f"`segment_ids` belong to `Segments`, got them with {type(schedule).__name__}.")
    weights = schedule(places.t.float(), places.n.float())
    if not isinstance(weights, Tensor) or weights.shape != places.t.shape or weights.dtype == torch.bool:
        got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"`schedule` must return numbers of shape {tuple(places.t.shape)}, got {got}.")
    weights = torch.where(places.labelled, weights.float(), 0)
    if weights.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = ~(torch.isfinite(weights) & (weights >= 0))
        if bool(bad.any()):
            raise ValueError(f"`schedule` must return finite weights of at least 0, got {weights[bad][0].item()}.")
    return weights.view(labels.shape)


def _share_segments(weights: tuple[float, ...], segments: Tensor, places: Places) -> Tensor:
    """The weights of [`Segments`], `(N,)`."""
    groups, none = len(weights), places.sample_count * len(weights)
    counted = places.labelled & (segments >= 0)
    key = torch.where(counted, places.samples * groups + segments, none)
    sizes = segments.new_zeros(none + 1).index_add(0, key, counted.long())
    wanted = torch.tensor(weights, dtype=torch.float32, device=segments.device)
    present = torch.where(sizes[:none].view(places.sample_count, groups) > 0, wanted, 0)
    total = present.sum(1, keepdim=True)
    shares = present / torch.where(total > 0, total, 1)
    each = torch.cat([shares.reshape(-1), shares.new_zeros(1)])[key]
    return each * places.n / sizes[key].clamp(min=1)


def _checked_segments(segment_ids: Tensor | None, labels: Tensor, groups: int) -> Tensor:
    if segment_ids is None:
        raise ValueError("`segment_ids` must say the segment of each token for `Segments`, got None.")
    if segment_ids.shape != labels.shape or segment_ids.is_floating_point() or segment_ids.dtype == torch.bool:
        raise ValueError(
            f"`segment_ids` must be integers of the shape of `labels`, {tuple(labels.shape)}, got "
            f"{segment_ids.dtype} {tuple(segment_ids.shape)}."
        )
    flat = segment_ids.reshape(-1).long()
    if flat.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = (flat < -1) | (flat >= groups)
        if bool(wrong.any()):
            raise ValueError(f"`segment_ids` must lie from -1 to {groups - 1}, got {int(flat[wrong][0])}.")
    return flat
