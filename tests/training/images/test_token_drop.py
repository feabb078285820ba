"""Token drop: the distributions that the paper prints, and which patches stay."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from vlparts.training.images.token_drop import (
    BetaDrop,
    ConstantDrop,
    DropPolicy,
    ResolutionDrop,
    ScheduledDrop,
    draw_kept,
    kept_count,
    truncated_normal,
)

# Figure 14a of arXiv 2307.06304: maximum, mean, percentage of rates below 0.1 as printed.
PRINTED = [
    *[(0.4, 0.10, 60.3), (0.4, 0.25, 11.5), (0.4, 0.35, 1.3)],
    *[(0.7, 0.10, 66.9), (0.7, 0.25, 27.3), (0.7, 0.50, 2.3), (0.7, 0.65, 0.1)],
    *[(0.9, 0.10, 70.4), (0.9, 0.25, 33.5), (0.9, 0.50, 5.9), (0.9, 0.70, 0.9), (0.9, 0.85, 0.1)],
]
DRAWS = 4000


def rates(
    policy: DropPolicy, length: int = 100, images_seen: int = 0, draws: int = DRAWS, seed: int = 0
) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return np.array([policy.rate(length, images_seen, generator) for _ in range(draws)])


@pytest.mark.parametrize(("maximum", "mean", "printed"), PRINTED)
def test_beta_has_the_paper_s_shares_of_small_rates(maximum: float, mean: float, printed: float) -> None:
    """The paper's numbers are themselves sampled, from a number of draws that it does not tell."""
    policy = BetaDrop(mean, maximum)
    exact = stats.beta(*policy.parameters).cdf(0.1 / maximum)
    assert 100 * exact == pytest.approx(printed, abs=0.6)
    found = (rates(policy) < 0.1).mean()
    assert abs(found - exact) < 4 * np.sqrt(exact * (1 - exact) / DRAWS) + 1 / DRAWS


@pytest.mark.parametrize("factor", [0.1, 0.3, 0.8])
@pytest.mark.parametrize(("mean", "maximum"), [(0.1, 0.4), (0.5, 0.7), (0.85, 0.9)])
def test_beta_has_the_mean_and_the_variance_asked_for(mean: float, maximum: float, factor: float) -> None:
    policy = BetaDrop(mean, maximum, factor)
    exact = stats.beta(*policy.parameters)
    assert maximum * exact.mean() == pytest.approx(mean, rel=1e-12)
    assert maximum**2 * exact.var() == pytest.approx(factor * mean * (maximum - mean), rel=1e-9)
    drawn = rates(policy)
    # Not at 1 itself, where float64 gathers what lies closer to it than its spacing.
    for share in np.linspace(0.1, 0.9, 9):
        below = exact.cdf(share)
        assert abs((drawn < maximum * share).mean() - below) < 4 * np.sqrt(below * (1 - below) / DRAWS)
    assert drawn.min() >= 0
    assert drawn.max() <= maximum


@pytest.mark.parametrize("maximum", [0.0, 0.4, 0.9])
def test_beta_at_its_ends_is_constant(maximum: float) -> None:
    assert set(rates(BetaDrop(0, maximum), draws=20)) == {0.0}
    assert set(rates(BetaDrop(maximum, maximum), draws=20)) == {maximum}


@pytest.mark.parametrize("length", [16, 100, 576])
def test_longer_images_lose_more_and_nothing_lies_beyond_two_deviations(length: int) -> None:
    """Figure 9b: resolutions of 64 to 384 pixels in patches of 16, rates in 0.5 +- 0.4."""
    policy = ResolutionDrop(0.1, 0.9, 16, 576)
    mean = 0.1 + 0.8 * (length - 16) / 560
    assert policy.mean_rate(length) == pytest.approx(mean, rel=1e-12)
    drawn = rates(policy, length)
    assert np.abs(drawn - mean).max() <= 0.04 + 1e-12
    assert np.abs(drawn - mean).max() > 0.038
    assert stats.kstest(drawn, stats.truncnorm(-2, 2, mean, 0.02).cdf).pvalue > 1e-4


def test_resolution_drop_with_other_deviations() -> None:
    assert set(rates(ResolutionDrop(0.0, 0.5, 1, 201, std=0), 101, draws=20)) == {0.25}
    assert rates(ResolutionDrop(0.4, 0.5, 1, 201, std=0.2), 201).std() > 0.1


def test_lengths_outside_of_the_range_are_an_error_or_held_at_the_ends() -> None:
    for length in (15, 577):
        with pytest.raises(ValueError, match=rf"`length` must be in 16\.\.576 patches, got {length}"):
            ResolutionDrop(0.1, 0.9, 16, 576).rate(length, 0, np.random.default_rng(0))
    held = ResolutionDrop(0.1, 0.9, 16, 576, on_outside="clamp")
    assert [held.mean_rate(length) for length in (1, 16, 576, 10**6)] == [0.1, 0.1, 0.9, 0.9]


@pytest.mark.parametrize("timescale", [300.0, -300.0])
def test_schedules_follow_the_sigmoid_in_both_directions(timescale: float) -> None:
    policy = ScheduledDrop(0.2, 0.8, midpoint=1000, timescale=timescale)
    seen = np.arange(0, 3000, 250)
    found = np.array([policy.rate(64, int(n), np.random.default_rng(0)) for n in seen])
    np.testing.assert_allclose(found, 0.2 + 0.6 / (1 + np.exp(-(seen - 1000) / timescale)), rtol=1e-12)
    assert (np.diff(found) * timescale > 0).all()
    assert policy.mean_rate(1000) == pytest.approx(0.5)


def test_schedules_reach_their_limits_without_overflow() -> None:
    for timescale, last in ((1e-300, 0.8), (-1e-300, 0.2), (1e-3, 0.8), (-1e-3, 0.2)):
        policy = ScheduledDrop(0.2, 0.8, midpoint=10**9, timescale=timescale)
        assert policy.mean_rate(10**12) == last
        assert policy.mean_rate(0) == pytest.approx(1.0 - last)


def test_a_schedule_can_be_the_mean_of_a_beta() -> None:
    policy = ScheduledDrop(0.2, 0.8, midpoint=1000, timescale=-300, maximum=0.9)
    for seen in (0, 1000, 2500):
        exact = stats.beta(*BetaDrop(policy.mean_rate(seen), 0.9).parameters)
        assert stats.kstest(rates(policy, images_seen=seen) / 0.9, exact.cdf).pvalue > 1e-4


def test_a_constant_rate_draws_nothing() -> None:
    generator = np.random.default_rng(3)
    assert ConstantDrop(0.25).rate(7, 0, generator) == 0.25
    assert generator.random() == np.random.default_rng(3).random()


@pytest.mark.parametrize(
    "policy",
    [BetaDrop(0.3, 0.6), ResolutionDrop(0.1, 0.9, 16, 576), ScheduledDrop(0.2, 0.8, 50, 10, maximum=0.9)],
    ids=lambda policy: type(policy).__name__,
)
def test_draws_depend_on_the_generator_alone(policy: DropPolicy) -> None:
    first, again, other = rates(policy, seed=1), rates(policy, seed=1), rates(policy, seed=2)
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()


def test_kept_counts() -> None:
    assert [kept_count(10, rate) for rate in (0, 0.09, 0.1, 0.55, 0.9, 0.999)] == [10, 10, 9, 5, 1, 1]
    assert kept_count(1, 0.999) == 1
    assert {kept_count(length, np.nextafter(1.0, 0.0)) for length in range(1, 2000)} == {1}
    assert {kept_count(length, np.float16(0.9995)) for length in (2049, 2051)} == {2}


def test_each_patch_is_equally_likely_to_stay_and_so_is_each_pair() -> None:
    generator = np.random.default_rng(0)
    length, count, draws = 9, 4, 5000
    kept = np.zeros((draws, length))
    for row in kept:
        row[draw_kept(length, count, generator)] = 1
    share = count / length
    # Sampling without replacement: the statistic has length - 1 degrees of freedom after this scaling.
    statistic = ((kept.sum(0) - draws * share) ** 2).sum() * (length - 1) / length / (draws * share * (1 - share))
    assert stats.chi2.sf(statistic, length - 1) > 1e-4
    pairs = (kept.T @ kept)[np.triu_indices(length, 1)] / draws
    both = share * (count - 1) / (length - 1)
    assert np.abs(pairs - both).max() < 4.5 * np.sqrt(both * (1 - both) / draws)


@pytest.mark.parametrize("std", [0.5, 1.0])
@pytest.mark.parametrize("mean", [-1.0, -0.5, 0.0, 0.5])
def test_truncated_normal_has_its_distribution_function(mean: float, std: float) -> None:
    generator = np.random.default_rng(0)
    drawn = np.array([truncated_normal(mean, std, -1, 1, generator) for _ in range(DRAWS)])
    exact = stats.truncnorm((-1 - mean) / std, (1 - mean) / std, mean, std)
    assert stats.kstest(drawn, exact.cdf).pvalue > 1e-4
    assert np.abs(drawn).max() <= 1


INVALID: list[tuple[Callable[[], Any], str]] = [
    (lambda: ConstantDrop(1.0), r"`fixed_rate` must be a rate in \[0, 1\), got 1.0"),
    (lambda: ConstantDrop(-0.1), "`fixed_rate` must be a rate"),
    (lambda: ConstantDrop(float("nan")), "`fixed_rate` must be a rate .* got nan"),
    (lambda: ConstantDrop("0.5"), "`fixed_rate` must be a rate .* got '0.5'"),  # type: ignore[arg-type]
    (lambda: BetaDrop(-0.1, 0.5), "`mean` must be a rate"),
    (lambda: BetaDrop(0.5, 1.0), "`maximum` must be a rate"),
    (lambda: BetaDrop(0.6, 0.5), "`mean` must not exceed `maximum`, got 0.6 and 0.5"),
    (lambda: BetaDrop(0.5, 0.6, 0), r"`variance_factor` must be in \(0, 1\), got 0"),
    (lambda: BetaDrop(0.5, 0.6, 1), "`variance_factor` must be in"),
    (lambda: ResolutionDrop(1.5, 0.9, 16, 576), "`min_rate` must be a rate"),
    (lambda: ResolutionDrop(0.1, 1.5, 16, 576), "`max_rate` must be a rate"),
    (lambda: ResolutionDrop(0.9, 0.1, 16, 576), "`min_rate` must not exceed `max_rate`, got 0.9 and 0.1"),
    (lambda: ResolutionDrop(0.1, 0.9, 0, 576), "`min_length` must be an integer of at least 1, got 0"),
    (lambda: ResolutionDrop(0.1, 0.9, 16, 57.6), "`max_length` must be an integer"),  # type: ignore[arg-type]
    (lambda: ResolutionDrop(0.1, 0.9, 16, 16), "`min_length` must be less than `max_length`, got 16 and 16"),
    (lambda: ResolutionDrop(0.1, 0.9, 16, 576, std=-1), "`std` must be finite and at least 0, got -1"),
    (lambda: ResolutionDrop(0.1, 0.9, 16, 576, std=float("inf")), "`std` must be finite"),
    (lambda: ResolutionDrop(0.03, 0.9, 16, 576), r"`min_rate` - 2 \* `std` must be at least 0 .*min_rate=0.03"),
    (lambda: ResolutionDrop(0.1, 0.96, 16, 576), "less than 1, got .*max_rate=0.96"),
    (lambda: ResolutionDrop(0.1, 0.9, 16, 576, on_outside="hold"), "`on_outside` must be .* got 'hold'"),
    (lambda: ScheduledDrop(-0.2, 0.8, 10, 1), "`min_rate` must be a rate"),
    (lambda: ScheduledDrop(0.2, 1.8, 10, 1), "`max_rate` must be a rate"),
    (lambda: ScheduledDrop(0.8, 0.2, 10, 1), "`min_rate` must not exceed `max_rate`"),
    (lambda: ScheduledDrop(0.2, 0.8, float("inf"), 1), "`midpoint` must be a finite number of images, got inf"),
    (lambda: ScheduledDrop(0.2, 0.8, 10, 0), "`timescale` must be a finite number of images, .* got 0"),
    (lambda: ScheduledDrop(0.2, 0.8, 10, float("nan")), "`timescale` must be .* got nan"),
    (lambda: ScheduledDrop(0.2, 0.8, 10, 1, maximum=0.7), "`max_rate` must not exceed `maximum`"),
    (lambda: ScheduledDrop(0.2, 0.8, 10, 1, maximum=1.0), "`maximum` must be a rate"),
    (lambda: ScheduledDrop(0.2, 0.8, 10, 1).mean_rate(-1), "`images_seen` must be at least 0, got -1"),
    (lambda: kept_count(0, 0.5), "`length` must be an integer of at least 1, got 0"),
    (lambda: kept_count(9, 1.0), "`rate` must be a rate"),
    (lambda: draw_kept(4, 5, np.random.default_rng(0)), "`count` must be at most `length`, got count=5, length=4"),
    (lambda: draw_kept(4, 0, np.random.default_rng(0)), "`count` must be an integer of at least 1, got 0"),
    (lambda: draw_kept(4.0, 2, np.random.default_rng(0)), "`length` must be an integer"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "message"), INVALID)
def test_invalid_arguments_raise(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
