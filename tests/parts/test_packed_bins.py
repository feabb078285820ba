"""The online packer: what it closes and when, and how it goes on from a state."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlparts.parts.packed_bins import FirstFitPacker, plan_packing

LENGTHS = st.lists(st.integers(1, 20), max_size=60)
LIMITS = st.fixed_dictionaries(
    {"capacity": st.integers(20, 40), "max_items": st.none() | st.integers(1, 5), "open_bins": st.integers(1, 6)}
)


def naive(lengths: list[int], capacity: int, max_items: int | None, open_bins: int) -> list[list[list[int]]]:
    """The bins that each item closes, and those left at the end."""
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
def test_a_packer_goes_on_from_its_state(lengths: list[int], limits: dict[str, Any], at: int) -> None:
    at = min(at, len(lengths))
    first: FirstFitPacker[int] = FirstFitPacker(**limits)
    before = run(first, lengths[:at])
    state = json.loads(json.dumps(first.state_dict()))
    run(first, lengths, at)  # what the first packer does from now on is nothing to the state
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
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1"):
        FirstFitPacker(**{"capacity": 10, name: value})


@pytest.mark.parametrize("length", [0, -1, 2.0, None, True])
def test_a_length_must_be_a_positive_integer(length: Any) -> None:
    with pytest.raises(ValueError, match="length must be an integer of at least 1"):
        FirstFitPacker(10).add("a", length)


def test_a_length_beyond_the_capacity_changes_nothing() -> None:
    packer: FirstFitPacker[str] = FirstFitPacker(10)
    with pytest.raises(ValueError, match="length is 11, which exceeds capacity=10"):
        packer.add("a", 11)
    assert packer.flush() == []


@pytest.mark.parametrize(
    ("bins", "message"),
    [
        ([{"items": ["a"], "length": 10}], r"bins\[0\] of state has length 10; .* of capacity=10 has 1\.\.9"),
        ([{"items": ["a"], "length": 3}, {"items": ["b"], "length": 0}], r"bins\[1\] of state has length 0"),
        ([{"items": [], "length": 3}], r"bins\[0\] of state has 0 items"),
        ([{"items": ["a", "b"], "length": 3}], r"bins\[0\] of state has 2 items; .* less than max_items=2"),
        ([{"items": ["a"], "length": 3}] * 3, "state has 3 open bins, more than open_bins=2"),
    ],
)
def test_a_state_must_fit_the_packer(bins: list[dict[str, Any]], message: str) -> None:
    packer: FirstFitPacker[str] = FirstFitPacker(10, max_items=2, open_bins=2)
    with pytest.raises(ValueError, match=message):
        packer.load_state_dict({"bins": bins})
