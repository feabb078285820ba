"""Schedules of token weights: what a token weighs by its place in the answer. See [`position_weights`]."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

__all__ = ["Constant", "Cosine", "Exponential", "Linear", "Schedule", "Segments"]

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
