"""Weights of tokens by their position in the answer or by segment: the `token_weights` of [`weigh_tokens`].

A schedule maps the position of a labelled token to its weight; [`Segments`] gives each segment of a sample a fixed
share, for example the thoughts and the answer that [`thinking_segments`] finds. Sample averaging depends on the ratios
of the weights within a sample only; token averaging depends on their sums too.

Shapes: N tokens, n samples, g segments.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, Self

import torch
from torch import Tensor

from ..parts.thinking import THINKING_END_ID, THINKING_START_ID
from ..parts.utils import IGNORE_INDEX
from ._checks import check_fraction, check_number, is_integer, is_readable
from .weights import find_samples

__all__ = [
    "ANSWER",
    "THINKING",
    "Constant",
    "Cosine",
    "Exponential",
    "LabelledPositions",
    "Linear",
    "Schedule",
    "Segments",
    "labelled_positions",
    "position_weights",
    "thinking_segments",
]

THINKING, ANSWER = 0, 1
"""Segments of [`thinking_segments`]."""

Schedule = Callable[[Tensor, Tensor], Tensor]
"""Maps positions t and numbers n of labelled tokens, float32 `(N,)`, to weights `(N,)`."""


class _NumberFields:
    """Base class of schedules: every field is a finite number of at least 0."""

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            check_number(getattr(self, field.name), field.name)


@dataclass(frozen=True)
class Constant(_NumberFields):
    """The same weight at all positions."""

    value: float = 1.0

    def __call__(self, t: Tensor, n: Tensor) -> Tensor:  # noqa: D102
        return torch.full_like(t, self.value)


@dataclass(frozen=True)
class Linear(_NumberFields):
    """Linear from `start` at the first labelled token to `end` at the last."""

    start: float
    end: float

    def __call__(self, t: Tensor, n: Tensor) -> Tensor:  # noqa: D102
        return torch.lerp(torch.full_like(t, self.start), torch.full_like(t, self.end), _progress(t, n))


@dataclass(frozen=True)
class Cosine(_NumberFields):
    """Half a cosine wave from `start` at the first labelled token to `end` at the last."""

    start: float
    end: float

    def __call__(self, t: Tensor, n: Tensor) -> Tensor:  # noqa: D102
        share = (1 - torch.cos(math.pi * _progress(t, n))) / 2
        return torch.lerp(torch.full_like(t, self.start), torch.full_like(t, self.end), share)


@dataclass(frozen=True)
class Exponential(_NumberFields):
    """1 at the first labelled token, halved every `half_life` tokens; `half_life` is above 0."""

    half_life: float

    def __post_init__(self) -> None:
        check_number(self.half_life, "half_life", positive=True)

    def __call__(self, t: Tensor, n: Tensor) -> Tensor:  # noqa: D102
        return torch.exp2(-t / self.half_life)


def _progress(t: Tensor, n: Tensor) -> Tensor:
    """Return 0 at the first position and 1 at the last; 0 if there is only one."""
    return t / (n - 1).clamp(min=1)


@dataclass(frozen=True)
class Segments:
    """A fixed share of a sample's weight per segment, whatever its length (SCALe, arXiv 2603.18656).

    In a sample of n labelled tokens, each of the n_i tokens of segment i weighs `n / n_i * w_i / sum(w)`, where the
    sum is over the segments present in the sample. The weights of a sample add up to n, like constant ones, or to 0 if
    all its segments have weight 0.

    Attributes:
        weights: w of the segments 0, 1, ... For [`thinking_segments`]: of the thoughts, and of the answer.
    """

    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(self.weights))
        if not self.weights:
            raise ValueError("`weights` must have at least one number, got ().")
        for index, weight in enumerate(self.weights):
            check_number(weight, f"weights[{index}]")

    @classmethod
    def between(cls, start: Sequence[float], end: Sequence[float], progress: float) -> Self:
        """Interpolate from `start` to `end` along a cosine, as SCALe moves weight from the thoughts to the answer.

        Args:
            start: Weights at the beginning of training.
            end: Weights at the end of training, as many.
            progress: Fraction of the training that is done, between 0 and 1.

        Raises:
            ValueError: If the numbers of weights differ, or `progress` is out of range.
        """
        if len(start) != len(end):
            raise ValueError(f"`start` and `end` must have as many weights, got {len(start)} and {len(end)}.")
        check_fraction(progress, "progress")
        share = (1 - math.cos(math.pi * progress)) / 2
        return cls(tuple((1 - share) * a + share * b for a, b in zip(start, end, strict=True)))


def position_weights(
    labels: Tensor,
    schedule: Schedule | Segments,
    *,
    segment_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sample_ids: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Compute the weight b of each token from its position among the labelled tokens of its sample.

    Args:
        labels: `(S,)` or `(B, S)` integers, one sample per row unless `cu_seqlens` or `sample_ids` is given. Those of
            a language model as [`next_token_labels`] returns them.
        schedule: [`Constant`], [`Linear`], [`Cosine`], [`Exponential`], [`Segments`], or a function `(t, n) -> b` of
            float32 tensors `(N,)`: the position t, from 0 to n - 1, among the n labelled tokens of the sample. Tokens
            without label have t = 0 and n = 1.
        segment_ids: Integers of the shape of `labels` from 0 to g - 1, or -1 for tokens of weight 0. Required for
            [`Segments`], and refused otherwise.
        cu_seqlens: `(n + 1,)` cumulative lengths of the samples.
        sample_ids: Index of each token's sample, of the shape of `labels`; -1 for padding.
        ignore_index: Label of tokens without loss.

    Returns:
        float32 of the shape of `labels`; 0 where they are ignored.

    Raises:
        ValueError: If the schedule returns another shape, or weights that are negative, infinite or NaN; if
            `segment_ids` do not fit the schedule or the labels; and as [`weigh_tokens`]. Values are checked on CPU
            only.
    """
    positions = labelled_positions(labels, cu_seqlens=cu_seqlens, sample_ids=sample_ids, ignore_index=ignore_index)
    if isinstance(schedule, Segments):
        segments = _check_segments(segment_ids, labels, len(schedule.weights))
        return _segment_weights(schedule.weights, segments, positions).view(labels.shape)
    if not callable(schedule):
        raise ValueError(f"`schedule` must be a function of t and n or `Segments`, got {type(schedule).__name__}.")
    if segment_ids is not None:
        raise ValueError(f"`segment_ids` must be None unless `schedule` is `Segments`, got {type(schedule).__name__}.")
    weights = schedule(positions.t.float(), positions.n.float())
    if not isinstance(weights, Tensor) or weights.shape != positions.t.shape or weights.dtype == torch.bool:
        got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"`schedule` must return numbers of shape {tuple(positions.t.shape)}, got {got}.")
    weights = torch.where(positions.labelled, weights.float(), 0)
    if is_readable(weights):
        invalid = ~(torch.isfinite(weights) & (weights >= 0))
        if bool(invalid.any()):
            value = weights[invalid][0].item()
            raise ValueError(f"`schedule` must return finite weights of at least 0, got {value}.")
    return weights.view(labels.shape)


class LabelledPositions(NamedTuple):
    """Positions of tokens among the labelled tokens of their samples.

    Attributes:
        t: `(N,)` int64, position of a labelled token, from 0; 0 for other tokens.
        n: `(N,)` int64, number of labelled tokens of the token's sample; 1 for tokens without label.
        labelled: `(N,)` bool.
        samples: `(N,)` int64 index of each token's sample; `num_samples` for padding.
        num_samples: Number of samples.
    """

    t: Tensor
    n: Tensor
    labelled: Tensor
    samples: Tensor
    num_samples: int


def labelled_positions(
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    sample_ids: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> LabelledPositions:
    """Count the labelled tokens of each sample, whose tokens need not be contiguous.

    Args:
        labels: `(S,)` or `(B, S)` integers, one sample per row unless `cu_seqlens` or `sample_ids` is given.
        cu_seqlens: `(n + 1,)` cumulative lengths of the samples.
        sample_ids: Index of each token's sample, of the shape of `labels`; -1 for padding.
        ignore_index: Label of tokens without loss.

    Raises:
        ValueError: As [`weigh_tokens`].
    """
    samples, count = find_samples(labels, cu_seqlens, sample_ids)
    labelled = (labels.reshape(-1) != ignore_index) & (samples < count)
    order = samples.argsort(stable=True)
    sorted_samples, sorted_labelled = samples[order], labelled[order].long()
    totals = samples.new_zeros(count + 1).index_add(0, samples, labelled.long())
    before = (sorted_labelled.cumsum(0) - sorted_labelled) - (totals.cumsum(0) - totals)[sorted_samples]
    t = torch.empty_like(samples).index_copy(0, order, before)
    n = torch.where(labelled, totals[samples], 1)
    return LabelledPositions(torch.where(labelled, t, 0), n, labelled, samples, count)


def _segment_weights(weights: tuple[float, ...], segments: Tensor, positions: LabelledPositions) -> Tensor:
    """Compute the weights of [`Segments`], `(N,)`."""
    num_segments = len(weights)
    total = positions.num_samples * num_segments
    counted = positions.labelled & (segments >= 0)
    index = torch.where(counted, positions.samples * num_segments + segments, total)
    sizes = segments.new_zeros(total + 1).index_add(0, index, counted.long())
    values = torch.tensor(weights, dtype=torch.float32, device=segments.device)
    present = torch.where(sizes[:total].view(positions.num_samples, num_segments) > 0, values, 0)
    sums = present.sum(1, keepdim=True)
    shares = present / torch.where(sums > 0, sums, 1)
    token_shares = torch.cat([shares.reshape(-1), shares.new_zeros(1)])[index]
    return token_shares * positions.n / sizes[index].clamp(min=1)


def _check_segments(segment_ids: Tensor | None, labels: Tensor, num_segments: int) -> Tensor:
    """Return the segment of each token, `(N,)` int64."""
    if segment_ids is None:
        raise ValueError("`segment_ids` must be given for `Segments`, got None.")
    if segment_ids.shape != labels.shape or not is_integer(segment_ids):
        raise ValueError(
            f"`segment_ids` must be integers of the shape of `labels`, {tuple(labels.shape)}, got "
            f"{segment_ids.dtype} {tuple(segment_ids.shape)}."
        )
    flat = segment_ids.reshape(-1).long()
    if is_readable(flat):
        invalid = (flat < -1) | (flat >= num_segments)
        if bool(invalid.any()):
            raise ValueError(f"`segment_ids` must be between -1 and {num_segments - 1}, got {int(flat[invalid][0])}.")
    return flat


def thinking_segments(
    token_ids: Tensor,
    *,
    start_id: int = THINKING_START_ID,
    end_id: int = THINKING_END_ID,
    cu_seqlens: Tensor | None = None,
    sample_ids: Tensor | None = None,
) -> Tensor:
    """Return the segment of each token, thoughts or answer, by the rules of [`split_thinking`].

    Tokens from a start marker to the next end marker or the end of the sample are thoughts, markers included. If the
    first marker of a sample is an end marker, everything before it is thoughts. Other end markers without a start
    belong to the answer. Prompts get a segment too, which has no effect without labels.

    Args:
        token_ids: `(S,)` or `(B, S)` integers, one sample per row unless `cu_seqlens` or `sample_ids` is given.
        start_id: Id of the token that starts the thoughts. Default: openPangu's.
        end_id: Id of the token that ends them. Default: openPangu's.
        cu_seqlens: `(n + 1,)` cumulative lengths of the samples.
        sample_ids: Index of each token's sample, of the shape of `token_ids`; -1 for padding.

    Returns:
        int64 of the shape of `token_ids`: `THINKING` (0) or `ANSWER` (1).

    Raises:
        ValueError: If `token_ids` are not integers with one or two axes, the two ids are equal, and as
            [`weigh_tokens`].
    """
    if token_ids.ndim not in (1, 2) or not is_integer(token_ids):
        raise ValueError(
            f"`token_ids` must be integers (S,) or (B, S), got {token_ids.dtype} {tuple(token_ids.shape)}."
        )
    if start_id == end_id:
        raise ValueError(f"`start_id` and `end_id` must differ, got {start_id} for both.")
    samples, count = find_samples(token_ids, cu_seqlens, sample_ids)
    if not len(samples):
        return token_ids.long()
    order = samples.argsort(stable=True)
    is_thought = _is_thought(token_ids.reshape(-1)[order], samples[order], count, start_id, end_id)
    segments = torch.where(is_thought, THINKING, ANSWER)
    return torch.empty_like(samples).index_copy(0, order, segments).view(token_ids.shape)


def _is_thought(ids: Tensor, samples: Tensor, num_samples: int, start_id: int, end_id: int) -> Tensor:
    """Return which tokens are thoughts, `(N,)` bool; the tokens of a sample are contiguous."""
    index = torch.arange(len(ids), device=ids.device)
    starts, ends = ids == start_id, ids == end_id
    is_marker = starts | ends
    sizes = samples.new_zeros(num_samples + 1).index_add(0, samples, torch.ones_like(samples))
    sample_start = (sizes.cumsum(0) - sizes)[samples]
    markers = torch.where(is_marker, index, len(ids))
    first_marker = samples.new_full((num_samples + 1,), len(ids)).scatter_reduce(0, samples, markers, "amin")
    starts_open = (first_marker < len(ids)) & ends[first_marker.clamp(max=len(ids) - 1)]
    last_marker = torch.where(is_marker, index, -1).cummax(0).values
    previous_marker = torch.cat([last_marker.new_full((1,), -1), last_marker[:-1]])

    def is_open(marker: Tensor) -> Tensor:
        return torch.where(marker >= sample_start, starts[marker.clamp(min=0)], starts_open[samples])

    return is_open(last_marker) | (ends & is_open(previous_marker))
