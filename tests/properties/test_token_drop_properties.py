"""Whatever the policy and its parameters: rates stay in range, and a set of patches stays."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vlparts.training.images.token_drop import (
    BetaDrop,
    ConstantDrop,
    DropPolicy,
    ResolutionDrop,
    ScheduledDrop,
    draw_kept,
    kept_count,
)

RATES = st.floats(0, 1, exclude_max=True)
SEEDS = st.integers(0, 2**32)
NUMBERS = st.floats(-1e30, 1e30)


@st.composite
def policies(draw: st.DrawFn) -> tuple[DropPolicy, float, float]:
    """A policy, and the limits of its rates."""
    low, middle, high = sorted(draw(st.tuples(RATES, RATES, RATES)))
    kind = draw(st.sampled_from([ConstantDrop, BetaDrop, ResolutionDrop, ScheduledDrop]))
    if kind is ConstantDrop:
        return ConstantDrop(low), low, low
    if kind is BetaDrop:
        return BetaDrop(low, high, draw(st.floats(1e-6, 0.999999))), 0, high
    if kind is ScheduledDrop:
        timescale = draw(NUMBERS.filter(bool))
        maximum = draw(st.sampled_from([None, high]))
        scheduled = ScheduledDrop(low, middle, draw(NUMBERS), timescale, maximum=maximum)
        return scheduled, (low if maximum is None else 0), (middle if maximum is None else high)
    std = draw(st.floats(0, 0.5)) * min(low, max(0.0, 0.99 - high))
    ends = draw(st.tuples(st.integers(1, 50), st.integers(51, 200)))
    policy = ResolutionDrop(low, high, *ends, std=std, on_outside="clamp")
    return policy, low - 2 * std, high + 2 * std


@given(policies(), st.integers(1, 300), st.integers(0, 10**15), SEEDS)
def test_rates_stay_within_the_limits(
    case: tuple[DropPolicy, float, float], length: int, images_seen: int, seed: int
) -> None:
    policy, low, high = case
    chance = np.random.default_rng(seed)
    drawn = [policy.rate(length, images_seen, chance) for _ in range(5)]
    least = policy.lowest_rate  # type: ignore[attr-defined]
    assert all(type(rate) is float and 0 <= low <= least <= rate <= high < 1 for rate in drawn)


@given(st.integers(1, 500), RATES, SEEDS)
def test_a_sorted_set_of_patches_stays(length: int, rate: float, seed: int) -> None:
    count = kept_count(length, rate)
    assert 1 <= count <= length
    assert count == 1 or abs(count - length * (1 - rate)) < 1 + 1e-9
    kept = draw_kept(length, count, np.random.default_rng(seed))
    assert kept.dtype == np.int64
    assert kept.shape == (count,)
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert kept[0] >= 0
    assert kept[-1] < length
    np.testing.assert_array_equal(kept, draw_kept(length, count, np.random.default_rng(seed)))


@given(st.integers(1, 500), SEEDS)
def test_without_drop_all_stay_in_order(length: int, seed: int) -> None:
    kept = draw_kept(length, kept_count(length, 0.0), np.random.default_rng(seed))
    assert kept.tolist() == list(range(length))


@given(st.integers(1, 500), RATES, RATES)
def test_a_higher_rate_never_keeps_more(length: int, first: float, second: float) -> None:
    low, high = sorted((first, second))
    assert kept_count(length, high) <= kept_count(length, low)
