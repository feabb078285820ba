"""Bin packing: `FirstFitPacker` against a naive packer, its state, and the strategies of `plan_packing`."""

import json
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlparts.training.bins import FirstFitPacker, plan_packing

STRATEGIES = ["first_fit", "best_fit_decreasing", "next_fit"]
LENGTHS = st.lists(st.integers(1, 20), max_size=60)
LIMITS = st.fixed_dictionaries(
    {"capacity": st.integers(20, 40), "max_items": st.none() | st.integers(1, 5), "open_bins": st.integers(1, 6)}
)


def naive(lengths: list[int], capacity: int, max_items: int | None, open_bins: int) -> list[list[list[int]]]:
    """The bins that each item closes, and those open at the end."""
    bins: list[list[int]] = []
    closed = []

    def room(items: list[int]) -> int:
        return capacity - sum(lengths[item] for item in items)

    for index, length in enumerate(lengths):
        now = []
        fitting = [items for items in bins if room(items) >= length]
        if not fitting and len(bins) == open_bins:
            fullest = min(bins, key=room)
            now.append(fullest)
            bins.remove(fullest)
        if not fitting:
            bins.append([])
            fitting = bins[-1:]
        fitting[0].append(index)
        if room(fitting[0]) == 0 or len(fitting[0]) == max_items:
            now.append(fitting[0])
            bins.remove(fitting[0])
        closed.append(now)
    return [*closed, bins]


def run(packer: FirstFitPacker[int], lengths: list[int], start: int = 0) -> list[list[list[int]]]:
    return [packer.add(index, lengths[index]) for index in range(start, len(lengths))]


@given(LENGTHS, LIMITS)
def test_bins_are_those_of_the_naive_packer(lengths: list[int], limits: dict[str, Any]) -> None:
    packer: FirstFitPacker[int] = FirstFitPacker(**limits)
    found = [*run(packer, lengths), packer.flush()]
    assert found == naive(lengths, **limits)
    assert packer.flush() == []
    planned = plan_packing(lengths, **limits)
    assert planned == sorted(items for now in found for items in now)


@given(LENGTHS, LIMITS, st.integers(0, 60))
def test_a_packer_continues_from_its_state(lengths: list[int], limits: dict[str, Any], at: int) -> None:
    at = min(at, len(lengths))
    first: FirstFitPacker[int] = FirstFitPacker(**limits)
    before = run(first, lengths[:at])
    state = json.loads(json.dumps(first.state_dict()))
    run(first, lengths, at)  # must not change the state
    second: FirstFitPacker[int] = FirstFitPacker(**limits)
    second.add(99, 1)
    second.load_state_dict(state)
    assert [*before, *run(second, lengths, at), second.flush()] == naive(lengths, **limits)


def test_one_item_can_close_two_bins() -> None:
    packer: FirstFitPacker[str] = FirstFitPacker(10, open_bins=1)
    assert packer.add("a", 4) == []
    assert packer.add("b", 10) == [["a"], ["b"]]


def test_a_state_does_not_change_with_the_packer() -> None:
    packer: FirstFitPacker[str] = FirstFitPacker(10)
    packer.add("a", 4)
    state = packer.state_dict()
    other: FirstFitPacker[str] = FirstFitPacker(10)
    other.load_state_dict(state)
    packer.add("b", 4)
    other.add("c", 4)
    assert state == {"bins": [{"items": ["a"], "length": 4}]}


@pytest.mark.parametrize("name", ["capacity", "max_items", "open_bins"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_limits_must_be_positive_integers(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be an integer of at least 1"):
        FirstFitPacker(**{"capacity": 10, name: value})


@pytest.mark.parametrize("length", [0, -1, 2.0, None, True])
def test_a_length_must_be_a_positive_integer(length: Any) -> None:
    with pytest.raises(ValueError, match="`length` must be an integer of at least 1"):
        FirstFitPacker(10).add("a", length)


def test_a_length_beyond_the_capacity_changes_nothing() -> None:
    packer: FirstFitPacker[str] = FirstFitPacker(10)
    with pytest.raises(ValueError, match="`length` is 11, which exceeds capacity=10"):
        packer.add("a", 11)
    assert packer.flush() == []


@pytest.mark.parametrize(
    ("bins", "message"),
    [
        ([{"items": ["a"], "length": 10}], r"`state\['bins'\]\[0\]` has length 10, expected 1 to 9 .* of capacity=10"),
        ([{"items": ["a"], "length": 3}, {"items": ["b"], "length": 0}], r"`state\['bins'\]\[1\]` has length 0"),
        ([{"items": [], "length": 3}], r"`state\['bins'\]\[0\]` has 0 items"),
        ([{"items": ["a", "b"], "length": 3}], r"`state\['bins'\]\[0\]` has 2 items, .* fewer than max_items=2"),
        ([{"items": ["a"], "length": 3}] * 3, "`state` has 3 open bins, expected at most open_bins=2"),
    ],
)
def test_a_state_must_fit_the_packer(bins: list[dict[str, Any]], message: str) -> None:
    packer: FirstFitPacker[str] = FirstFitPacker(10, max_items=2, open_bins=2)
    with pytest.raises(ValueError, match=message):
        packer.load_state_dict({"bins": bins})


# --- plan_packing


def paper_lengths(count: int, capacity: int, seed: int) -> list[int]:
    """Patches of images with a side drawn from U(64, 256), log-normal aspects and patches of 16 pixels."""
    draw = random.Random(seed)
    lengths = []
    for _ in range(count):
        side, stretch = draw.uniform(64, 256), math.exp(draw.gauss(0, 0.35) / 2)
        rows, columns = max(1, round(side * stretch / 16)), max(1, round(side / stretch / 16))
        lengths.append(min(capacity, rows * columns))
    return lengths


def padding(lengths: list[int], capacity: int, **options: Any) -> float:
    return 1 - sum(lengths) / (capacity * len(plan_packing(lengths, capacity, **options)))


def test_first_fit_returns_to_an_older_bin() -> None:
    assert plan_packing([6, 5, 4, 5], 10) == [[0, 2], [1, 3]]


def test_next_fit_keeps_the_order() -> None:
    assert plan_packing([6, 5, 4, 5], 10, strategy="next_fit") == [[0], [1, 2], [3]]


def test_best_fit_decreasing_takes_the_fullest_bin_that_fits() -> None:
    assert plan_packing([2, 6, 5, 4, 3], 10, strategy="best_fit_decreasing") == [[1, 3], [2, 4, 0]]


def test_first_fit_closes_the_fullest_bin() -> None:
    # Item 2 opens a third bin, and of the two others the fuller one closes, be it the younger or the older.
    assert plan_packing([6, 7, 8, 4], 10, open_bins=2) == [[0, 3], [1], [2]]
    assert plan_packing([7, 6, 8, 3], 10, open_bins=2) == [[0], [1, 3], [2]]
    assert plan_packing([7, 6, 8, 3], 10, open_bins=3) == [[0, 3], [1], [2]]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_max_items_bounds_the_items_of_a_bin(strategy: str) -> None:
    assert plan_packing([1, 1, 1, 1, 1], 10, max_items=2, strategy=strategy) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_oversize_item_gets_its_own_bin_on_request(strategy: str) -> None:
    bins = plan_packing([3, 11, 3, 20, 4], 10, strategy=strategy, oversize="own_bin")
    assert [1] in bins
    assert [3] in bins
    assert sorted(i for items in bins for i in items) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("lengths", [[], np.array([], dtype=np.int64), torch.tensor([], dtype=torch.int64)])
def test_no_items_need_no_bins(strategy: str, lengths: Any) -> None:
    assert plan_packing(lengths, 10, strategy=strategy) == []


@pytest.mark.parametrize("make", [list, tuple, iter, np.array, torch.tensor])
def test_lengths_come_in_any_container(make: Any) -> None:
    assert plan_packing(make([6, 5, 4, 5]), 10) == [[0, 2], [1, 3]]


def test_first_fit_wastes_little_on_the_lengths_of_the_paper() -> None:
    lengths = paper_lengths(5000, capacity=512, seed=0)
    assert padding(lengths, 512) < 0.02
    assert padding(lengths, 512, strategy="best_fit_decreasing") < padding(lengths, 512)
    assert padding(lengths, 512) < padding(lengths, 512, strategy="next_fit") / 5


@pytest.mark.parametrize("length", [0, -3, True, 2.0, 2.5, float("nan"), None, "4"])
def test_lengths_of_a_plan_must_be_positive_integers(length: Any) -> None:
    with pytest.raises(ValueError, match=r"`lengths\[1\]` must be an integer of at least 1, got "):
        plan_packing([5, length], 10)


@pytest.mark.parametrize("lengths", [torch.tensor([1.0]), torch.tensor([True]), np.array([1.5]), np.array([True])])
def test_a_container_must_hold_integers(lengths: Any) -> None:
    with pytest.raises(ValueError, match=r"`lengths\[0\]` must be an integer of at least 1"):
        plan_packing(lengths, 10)


def test_an_oversize_item_is_named() -> None:
    with pytest.raises(ValueError, match=r"`lengths\[2\]` is 11, which exceeds capacity=10"):
        plan_packing([3, 10, 11], 10)


@pytest.mark.parametrize("option", ["capacity", "max_items", "open_bins"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, float("nan")])
def test_limits_of_a_plan_must_be_positive_integers(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{option}` must be an integer of at least 1, got "):
        plan_packing([1], **{"capacity": 10, option: value})


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="`strategy` must be one of .*'first_fit'.*, got 'greedy'"):
        plan_packing([1], 10, strategy="greedy")
    with pytest.raises(ValueError, match="`oversize` must be 'raise' or 'own_bin', got 'drop'"):
        plan_packing([1], 10, oversize="drop")
