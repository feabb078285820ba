"""Token drop of NaViT: the drop rate of an image in training, and the draw of the kept patches.

The policies are those of arXiv 2307.06304, sections 2.2 and 3.3 and appendices A.4 and A.5. They are stateless: the
random generator and the number of images seen are arguments. Draw before packing, since packs hold the kept patches,
and in training only.
"""

import math
from dataclasses import dataclass
from numbers import Real
from statistics import NormalDist
from typing import Protocol

import numpy as np

from ...parts.utils import positive_integer


class DropPolicy(Protocol):
    """Chooses the drop rate of an image.

    A policy may also have an attribute `lowest_rate`, a lower bound of its rates, as the policies of this module do.
    From it a sampler computes the largest number of kept patches.
    """

    def rate(self, length: int, images_seen: int, generator: np.random.Generator) -> float:
        """Draw the drop rate of one image.

        Args:
            length: Patches of the image.
            images_seen: Images seen in training before this one, over all processes.
            generator: The random generator.

        Returns:
            A rate in [0, 1).
        """
        ...


@dataclass(frozen=True)
class ConstantDrop:
    """A constant rate.

    Args:
        fixed_rate: The rate, in [0, 1).

    Raises:
        ValueError: If the rate is not in [0, 1).
    """

    fixed_rate: float

    def __post_init__(self) -> None:
        _check_rate("fixed_rate", self.fixed_rate)

    @property
    def lowest_rate(self) -> float:
        """The fixed rate."""
        return float(self.fixed_rate)

    def rate(self, length: int, images_seen: int, generator: np.random.Generator) -> float:
        """Return the fixed rate; nothing is drawn."""
        return float(self.fixed_rate)


@dataclass(frozen=True)
class BetaDrop:
    """A rate per image, `maximum * u` with u from a Beta distribution (appendix A.4).

    With m = mean / maximum, u has the mean m and the variance `variance_factor * m * (1 - m)`: Beta(a, b) with
    a = k * m, b = k * (1 - m), k = 1 / variance_factor - 1.

    Args:
        mean: Mean rate. 0 drops nothing; equal to `maximum` it is a constant rate.
        maximum: Largest rate.
        variance_factor: Variance of u relative to the largest variance for its mean, in (0, 1). The paper uses 0.3.

    Raises:
        ValueError: If a rate is not in [0, 1), the mean exceeds the maximum, or the factor is not in (0, 1).
    """

    mean: float
    maximum: float
    variance_factor: float = 0.3

    def __post_init__(self) -> None:
        _check_rate("mean", self.mean)
        _check_rate("maximum", self.maximum)
        _check_order("mean", self.mean, "maximum", self.maximum)
        if not (isinstance(self.variance_factor, Real) and 0 < self.variance_factor < 1):
            raise ValueError(f"`variance_factor` must be in (0, 1), got {self.variance_factor!r}.")

    @property
    def parameters(self) -> tuple[float, float]:
        """The parameters (a, b) of the Beta distribution; one of them is 0 for a constant rate."""
        share = self.mean / self.maximum if self.mean else 0.0
        scale = 1 / self.variance_factor - 1
        return scale * share, scale * (1 - share)

    @property
    def lowest_rate(self) -> float:
        """0, or `maximum` if all rates equal it."""
        return float(self.maximum) if self.mean == self.maximum else 0.0

    def rate(self, length: int, images_seen: int, generator: np.random.Generator) -> float:
        """Draw a rate in [0, maximum]."""
        a, b = self.parameters
        if a == 0:
            return 0.0
        return float(self.maximum * (generator.beta(a, b) if b else 1.0))


@dataclass(frozen=True)
class ResolutionDrop:
    """A rate that increases with the length of the image (appendix A.4).

    The mean increases linearly from `min_rate` at `min_length` to `max_rate` at `max_length`. The rate is drawn from a
    normal distribution around it, truncated at two standard deviations.

    Args:
        min_rate: Mean rate of the shortest images; at least `2 * std`.
        max_rate: Mean rate of the longest images; below `1 - 2 * std`.
        min_length: Patches of the shortest images.
        max_length: Patches of the longest images.
        std: Standard deviation of the normal distribution before truncation. The paper gives 0.02 without saying
            whether it is the standard deviation or the variance.
        on_outside: Policy for an image with a length out of range: "raise", or "clamp" the length to the range.

    Raises:
        ValueError: If rates are not always in [0, 1), or a minimum is not below its maximum.
    """

    min_rate: float
    max_rate: float
    min_length: int
    max_length: int
    std: float = 0.02
    on_outside: str = "raise"

    def __post_init__(self) -> None:
        _check_rate("min_rate", self.min_rate)
        _check_rate("max_rate", self.max_rate)
        _check_order("min_rate", self.min_rate, "max_rate", self.max_rate)
        low = positive_integer(self.min_length, "min_length")
        high = positive_integer(self.max_length, "max_length")
        if low >= high:
            raise ValueError(f"`min_length` must be less than `max_length`, got {low} and {high}.")
        if not (isinstance(self.std, Real) and 0 <= self.std < math.inf):
            raise ValueError(f"`std` must be finite and at least 0, got {self.std!r}.")
        if self.min_rate - 2 * self.std < 0 or self.max_rate + 2 * self.std >= 1:
            raise ValueError(
                "`min_rate` - 2 * `std` must be at least 0 and `max_rate` + 2 * `std` less than 1, got "
                f"min_rate={self.min_rate}, max_rate={self.max_rate}, std={self.std}."
            )
        if self.on_outside not in ("raise", "clamp"):
            raise ValueError(f"`on_outside` must be 'raise' or 'clamp', got {self.on_outside!r}.")

    def mean_rate(self, length: int) -> float:
        """Return the mean rate for a length in patches.

        Raises:
            ValueError: If the length is out of range and `on_outside` is "raise".
        """
        if self.on_outside == "raise" and not self.min_length <= length <= self.max_length:
            raise ValueError(
                f"`length` must be in {self.min_length}..{self.max_length} patches, got {length}. Widen the range, or "
                "pass on_outside='clamp' to clamp lengths to it."
            )
        share = (length - self.min_length) / (self.max_length - self.min_length)
        return _interpolate(self.min_rate, self.max_rate, min(max(share, 0.0), 1.0))

    @property
    def lowest_rate(self) -> float:
        """Two standard deviations below `min_rate`."""
        return float(self.min_rate - 2 * self.std)

    def rate(self, length: int, images_seen: int, generator: np.random.Generator) -> float:
        """Draw a rate within two standard deviations of the mean rate."""
        mean = self.mean_rate(length)
        return truncated_normal(mean, self.std, mean - 2 * self.std, mean + 2 * self.std, generator)


@dataclass(frozen=True)
class ScheduledDrop:
    """A rate that changes during training (appendix A.5).

    After n images it is `min_rate + (max_rate - min_rate) * sigmoid((n - midpoint) / timescale)`. In the paper,
    decreasing schedules between 0.8 and 0.2 were better than a constant rate, and increasing ones worse.

    Args:
        min_rate: Lower limit.
        max_rate: Upper limit.
        midpoint: Images seen at the mean of both limits (the paper's mu).
        timescale: Number of images over which the rate changes (the paper's tau): positive for increasing rates,
            negative for decreasing rates.
        maximum: None gives every image the rate of the schedule. Otherwise rates are drawn as by `BetaDrop`, with the
            schedule as the mean and this maximum; this combination is not from the paper.

    Raises:
        ValueError: If a rate is not in [0, 1), the rates are not in order, or `timescale` is zero.
    """

    min_rate: float
    max_rate: float
    midpoint: float
    timescale: float
    maximum: float | None = None

    def __post_init__(self) -> None:
        _check_rate("min_rate", self.min_rate)
        _check_rate("max_rate", self.max_rate)
        _check_order("min_rate", self.min_rate, "max_rate", self.max_rate)
        if not (isinstance(self.midpoint, Real) and math.isfinite(self.midpoint)):
            raise ValueError(f"`midpoint` must be a finite number of images, got {self.midpoint!r}.")
        if not (isinstance(self.timescale, Real) and math.isfinite(self.timescale) and self.timescale):
            raise ValueError(
                "`timescale` must be a finite number of images, positive (increasing) or negative (decreasing), "
                f"got {self.timescale!r}."
            )
        if self.maximum is not None:
            _check_rate("maximum", self.maximum)
            _check_order("max_rate", self.max_rate, "maximum", self.maximum)

    def mean_rate(self, images_seen: int) -> float:
        """Return the rate of the schedule after a number of images.

        Raises:
            ValueError: If the number is negative.
        """
        if images_seen < 0:
            raise ValueError(f"`images_seen` must be at least 0, got {images_seen}.")
        # The sigmoid as tanh, which does not overflow.
        share = 0.5 + 0.5 * math.tanh((images_seen - self.midpoint) / self.timescale / 2)
        return _interpolate(self.min_rate, self.max_rate, share)

    @property
    def lowest_rate(self) -> float:
        """`min_rate`, or 0 if rates are drawn around the schedule."""
        return float(self.min_rate) if self.maximum is None else 0.0

    def rate(self, length: int, images_seen: int, generator: np.random.Generator) -> float:
        """Return the rate of the schedule, or draw one around it."""
        mean = self.mean_rate(images_seen)
        if self.maximum is None:
            return mean
        return BetaDrop(mean, self.maximum).rate(length, images_seen, generator)


def kept_count(length: int, rate: float) -> int:
    """Return the number of kept patches, `length - floor(length * rate)`, which is at least one.

    Args:
        length: Patches of the image.
        rate: Drop rate in [0, 1).

    Returns:
        A number from 1 to `length`.

    Raises:
        ValueError: If the length is not a positive integer or the rate is not in [0, 1).
    """
    _check_rate("rate", rate)
    length = positive_integer(length, "length")
    return length - math.floor(length * float(rate))


def draw_kept(length: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """Draw the kept patches, uniformly among all sets of `count` patches.

    Args:
        length: Patches of the image.
        count: Number of kept patches, from 1 to `length`; see `kept_count`.
        generator: The random generator.

    Returns:
        `(count,)` int64, ascending indices of patches.

    Raises:
        ValueError: If `length` or `count` is not a positive integer, or `count` exceeds `length`.
    """
    length, count = positive_integer(length, "length"), positive_integer(count, "count")
    if count > length:
        raise ValueError(f"`count` must be at most `length`, got count={count}, length={length}.")
    return np.sort(generator.choice(length, count, replace=False, shuffle=False)).astype(np.int64, copy=False)


def truncated_normal(mean: float, std: float, low: float, high: float, generator: np.random.Generator) -> float:
    """Draw from a normal distribution truncated to [low, high].

    It inverts the distribution function, so each draw takes one number from the generator.

    Args:
        mean: Mean before truncation.
        std: Standard deviation before truncation; 0 gives the mean.
        low: Lower end.
        high: Upper end. The interval must have a probability that float64 can represent: within about 8 standard
            deviations of the mean.
        generator: The random generator.
    """
    if std == 0:
        return float(mean)
    normal = NormalDist(mean, std)
    least, most = normal.cdf(low), normal.cdf(high)
    # Clamped against rounding errors only.
    return min(max(normal.inv_cdf(least + (most - least) * generator.random()), low), high)


def _interpolate(low: float, high: float, share: float) -> float:
    """Linear interpolation that stays in [low, high] despite rounding."""
    return float(min(max((1 - share) * low + share * high, low), high))


def _check_rate(name: str, value: float) -> None:
    if not (isinstance(value, Real) and 0 <= value < 1):
        raise ValueError(f"`{name}` must be a rate in [0, 1), got {value!r}.")


def _check_order(small_name: str, small: float, large_name: str, large: float) -> None:
    if small > large:
        raise ValueError(f"`{small_name}` must not exceed `{large_name}`, got {small} and {large}.")
