"""Matching against brute force."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vlparts.coordinates.metrics.matching import Match, assign, match, match_regions, similarity
from vlparts.coordinates.regions import Region

shapes = st.tuples(st.integers(0, 5), st.integers(0, 5))
costs = shapes.flatmap(lambda shape: arrays(np.float64, shape, elements=st.integers(-9, 9)))
overlaps = shapes.flatmap(lambda shape: arrays(np.float64, shape, elements=st.integers(0, 8).map(lambda v: v / 8)))


def one_to_one(rows: int, columns: int, count: int) -> Any:
    """All ways to make `count` pairs of different rows and columns."""
    for chosen in itertools.combinations(range(rows), count):
        for others in itertools.permutations(range(columns), count):
            yield list(zip(chosen, others, strict=True))


@given(costs)
def test_assignment_is_the_cheapest_of_all(cost: Any) -> None:
    rows, columns = cost.shape
    least = min(sum(cost[pair] for pair in pairs) for pairs in one_to_one(rows, columns, min(rows, columns)))
    got = assign(cost)
    assert len(got) == min(rows, columns) == len({row for row, _ in got}) == len({column for _, column in got})
    assert sum(cost[pair] for pair in got) == least
    assert got == sorted(got)


def test_a_large_assignment_finds_the_hidden_permutation() -> None:
    rng = np.random.default_rng(0)
    order = rng.permutation(60)
    cost = rng.uniform(1, 2, (60, 60))
    cost[np.arange(60), order] = -1
    assert assign(cost) == list(enumerate(order.tolist()))


@given(overlaps, st.sampled_from([0.0, 0.5, 0.75]))
def test_optimal_makes_the_most_pairs_then_the_largest_sum(matrix: Any, threshold: float) -> None:
    best = (0, 0.0)
    for count in range(min(matrix.shape) + 1):
        for pairs in one_to_one(*matrix.shape, count):
            if all(matrix[pair] >= threshold and matrix[pair] > 0 for pair in pairs):
                best = max(best, (count, sum(matrix[pair] for pair in pairs)))
    got = match(matrix, threshold, "optimal")
    assert (len(got), pytest.approx(sum(pair.similarity for pair in got))) == best


@given(overlaps, st.sampled_from([0.0, 0.5, 0.75]))
def test_greedy_takes_the_largest_that_is_left(matrix: Any, threshold: float) -> None:
    left, expected = matrix.copy(), []
    while left.size and left.max() >= threshold and left.max() > 0:
        row, column = np.unravel_index(np.argmax(left), left.shape)
        expected.append(Match(int(row), int(column), float(left[row, column])))
        left[row, :] = left[:, column] = 0
    assert match(matrix, threshold) == sorted(expected)


def test_greedy_and_optimal_differ() -> None:
    matrix = [[0.9, 0.6], [0.6, 0.0]]
    assert match(matrix) == [(0, 0, 0.9)]
    assert match(matrix, method="optimal") == [(0, 1, 0.6), (1, 0, 0.6)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: match([[1.0]], method="best"), "`method` must be one of 'greedy', 'optimal', got 'best'"),
        (lambda: match([[1.0]], math.nan), "`threshold` must be a finite number"),
        (lambda: match([[1.0]], -1), "`threshold` must be a finite number of at least 0, got -1"),
        (lambda: match([1.0]), r"`similarities` must be an \(n, m\) array of numbers, got shape \(1,\)"),
        (lambda: match([[math.nan]]), "`similarities` must be finite"),
        (lambda: match([[-0.5]]), "`similarities` must be at least 0, got -0.5"),
        (lambda: assign([["a"]]), r"`cost` must be an \(n, m\) array of numbers"),
        (lambda: assign([[math.inf]]), "`cost` must be finite"),
    ],
)
def test_bad_matrices_raise(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


CAT, DOG = Region.box(0, 0, 10, 10, "cat"), Region.box(20, 20, 30, 30, "dog")


def test_labels_and_images_must_agree() -> None:
    wrong = Region.box(0, 0, 10, 10, "dog")
    other = Region.box(0, 0, 10, 10, "cat", image=1)
    assert match_regions([wrong], [CAT, DOG]) == []
    assert match_regions([wrong], [CAT, DOG], labels=False) == [(0, 0, 1.0)]
    assert match_regions([other, DOG], [CAT, DOG]) == [(1, 1, 1.0)]
    assert match_regions([], [CAT]) == match_regions([CAT], []) == []


def test_a_point_matches_what_it_lies_in() -> None:
    points = [Region.point(5, 5, "cat"), Region.point(15, 5, "cat")]
    assert similarity(points, [CAT]).tolist() == [[1.0], [0.0]]
    assert similarity([CAT], points).tolist() == [[0.0, 0.0]]


def test_other_kinds_compare_by_their_bounds() -> None:
    quad = Region.quad([(0, 0), (10, 0), (10, 5), (0, 5)], "cat")
    assert similarity([quad], [CAT]).tolist() == [[0.5]]
