"""Properties of every packing plan and every grid."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from vlparts.parts.packed_index import (
    get_cu_seqlens,
    get_max_seqlen,
    get_position_ids,
    merge_order,
    segment_ids,
    validate_grid,
)
from vlparts.training.bins import plan_packing

strategies = st.sampled_from(["first_fit", "best_fit_decreasing", "next_fit"])
limits = st.none() | st.integers(1, 5)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], int, dict[str, Any]]:
    capacity = draw(st.integers(1, 40))
    lengths = draw(st.lists(st.integers(1, capacity), max_size=60))
    options = {"strategy": draw(strategies), "max_items": draw(limits), "open_bins": draw(st.integers(1, 6))}
    return lengths, capacity, options


@given(problems())
def test_nothing_is_lost_and_nothing_overflows(problem: tuple[list[int], int, dict[str, Any]]) -> None:
    lengths, capacity, options = problem
    bins = plan_packing(lengths, capacity, **options)
    assert sorted(i for items in bins for i in items) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in items) <= capacity for items in bins)
    assert all(len(items) <= (options["max_items"] or len(lengths)) for items in bins)
    assert bins == plan_packing(lengths, capacity, **options)


@given(problems())
def test_bins_come_in_the_order_of_opening(problem: tuple[list[int], int, dict[str, Any]]) -> None:
    lengths, capacity, options = problem
    bins = plan_packing(lengths, capacity, **options)
    placed = list(range(len(lengths)))
    if options["strategy"] == "best_fit_decreasing":
        placed.sort(key=lambda i: -lengths[i])
    rank = {index: place for place, index in enumerate(placed)}
    assert [rank[items[0]] for items in bins] == sorted(rank[items[0]] for items in bins)
    assert all([rank[i] for i in items] == sorted(rank[i] for i in items) for items in bins)


@given(problems())
def test_no_two_bins_are_wasted(problem: tuple[list[int], int, dict[str, Any]]) -> None:
    """Two neighbouring bins of next-fit, and any two bins of the others, exceed the capacity together."""
    lengths, capacity, options = problem
    options.update(max_items=None, open_bins=len(lengths) + 1)
    loads = [sum(lengths[i] for i in items) for items in plan_packing(lengths, capacity, **options)]
    if options["strategy"] == "next_fit":
        assert all(a + b > capacity for a, b in zip(loads, loads[1:], strict=False))
    else:
        assert sum(sorted(loads)[:2]) > capacity or len(loads) < 2


@given(problems())
def test_first_fit_is_the_naive_one(problem: tuple[list[int], int, dict[str, Any]]) -> None:
    lengths, capacity, _ = problem
    expected: list[list[int]] = []
    for index, length in enumerate(lengths):
        fitting = [b for b in expected if sum(lengths[i] for i in b) + length <= capacity]
        if not fitting:
            expected.append([])
        (fitting[0] if fitting else expected[-1]).append(index)
    assert plan_packing(lengths, capacity, open_bins=len(lengths) + 1) == expected


@given(problems())
def test_best_fit_decreasing_is_the_naive_one(problem: tuple[list[int], int, dict[str, Any]]) -> None:
    lengths, capacity, _ = problem
    expected: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        loads = [sum(lengths[i] for i in items) for items in expected]
        fitting = [(load, -b) for b, load in enumerate(loads) if load + lengths[index] <= capacity]
        if fitting:
            expected[-max(fitting)[1]].append(index)
        else:
            expected.append([index])
    assert plan_packing(lengths, capacity, strategy="best_fit_decreasing") == expected


@given(st.lists(st.integers(1, 30), max_size=30), st.integers(1, 10), strategies)
def test_only_oversize_bins_exceed_the_capacity(lengths: list[int], capacity: int, strategy: str) -> None:
    bins = plan_packing(lengths, capacity, strategy=strategy, oversize="own_bin")
    assert sorted(i for items in bins for i in items) == list(range(len(lengths)))
    assert all(len(items) == 1 or sum(lengths[i] for i in items) <= capacity for items in bins)
    if strategy == "next_fit":
        assert [i for items in bins for i in items] == list(range(len(lengths)))


grids = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 11), st.integers(1, 11)), max_size=6)


@given(grids, st.integers(1, 3))
def test_index_tensors_agree_with_loops(rows: list[tuple[int, int, int]], merge_size: int) -> None:
    rows = [(t, h * merge_size, w * merge_size) for t, h, w in rows]
    grid = torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)
    total = sum(t * h * w for t, h, w in rows)
    validate_grid(grid, total, merge_size)
    frames = [h * w for t, h, w in rows for _ in range(t)]
    cu_seqlens = get_cu_seqlens(grid)
    assert cu_seqlens.diff().tolist() == frames
    assert cu_seqlens[-1] == total
    assert get_max_seqlen(cu_seqlens) == max(frames, default=0)
    assert segment_ids(cu_seqlens, total).tolist() == [i for i, size in enumerate(frames) for _ in range(size)]
    positions = [
        divmod(place, w) for t, h, w in rows for _ in range(t) for place in merge_order(h, w, merge_size).tolist()
    ]
    assert get_position_ids(grid, merge_size).tolist() == [list(p) for p in positions]


@given(grids)
def test_images_keep_their_positions_in_any_pack(rows: list[tuple[int, int, int]]) -> None:
    packed = get_position_ids(torch.tensor(rows, dtype=torch.int64).reshape(-1, 3))
    alone = [get_position_ids(torch.tensor([row])) for row in rows]
    assert torch.equal(packed, torch.cat([*alone, packed[:0]]))


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 4))
def test_merge_order_makes_blocks(rows: int, columns: int, merge_size: int) -> None:
    height, width = rows * merge_size, columns * merge_size
    order = merge_order(height, width, merge_size)
    assert sorted(order.tolist()) == list(range(height * width))
    blocks = order.view(-1, merge_size**2)
    for block in blocks:
        row, column = block // width, block % width
        assert len(set((row // merge_size).tolist())) == len(set((column // merge_size).tolist())) == 1
        assert block.tolist() == sorted(block.tolist())
