"""Work of packs, and packs shared out evenly."""

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlparts.training.images.balance import balanced_steps, encoder_work, split_packs


def test_work_counts_multiplications_and_additions_of_a_layer() -> None:
    """Two operations for each entry of each matrix product of a layer whose MLP is four times as wide."""
    width, lengths = 6, [3, 5]
    expected = 0
    for length in lengths:
        linear = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
        expected += sum(2 * length * inner * outer for inner, outer in linear)
        expected += 2 * (2 * length * length * width)  # scores, and the weighted sum of values
    assert encoder_work(lengths, width) == expected
    assert encoder_work([], width) == 0


@given(st.lists(st.integers(0, 9), min_size=6, max_size=6), st.sampled_from([1, 2, 3, 6]))
def test_the_grouping_is_optimal(works: list[int], world_size: int) -> None:
    def cost(order: tuple[int, ...]) -> int:
        return sum(max(works[i] for i in order[at : at + world_size]) for at in range(0, 6, world_size))

    steps = balanced_steps(works, world_size)
    assert all(len(step) == world_size for step in steps)
    assert sorted(place for step in steps for place in step) == list(range(6))
    found = cost(tuple(place for step in steps for place in step))
    assert found == min(cost(order) for order in permutations(range(6)))


def test_steps_and_their_packs_keep_their_order() -> None:
    assert balanced_steps([5, 1, 5, 1, 9, 2, 8, 2], 2) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert balanced_steps([3, 1, 2], 1) == [[0], [1], [2]]
    assert balanced_steps([], 4) == []


def test_packs_that_cannot_be_shared_evenly_are_refused() -> None:
    with pytest.raises(ValueError, match="`works` must have a multiple of world_size=2 entries, got 3"):
        balanced_steps([1, 2, 3], 2)


@given(st.lists(st.integers(1, 6), max_size=12), st.integers(1, 6))
def test_splitting_keeps_the_items_and_their_order(sizes: list[int], multiple: int) -> None:
    items = iter(range(100))
    packs = [[next(items) for _ in range(size)] for size in sizes]
    parts = split_packs([list(pack) for pack in packs], multiple)
    assert [item for pack in parts for item in pack] == [item for pack in packs for item in pack]
    assert all(parts)
    assert len(parts) % multiple == 0 or len(parts) == sum(sizes)
    assert len(parts) < len(packs) + multiple


def test_the_longest_pack_is_halved_first() -> None:
    assert split_packs([[1], [2, 3, 4, 5], [6, 7]], 4) == [[1], [2, 3], [4, 5], [6, 7]]
