"""Layouts of packed sequences against plain loops, with dropped patches, padding rows and padding examples."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from vlparts.parts.packed_index import (
    get_cu_seqlens,
    get_kept_cu_seqlens,
    get_patch_layout,
    get_position_ids,
    validate_grid,
)

GRIDS = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=5)


@st.composite
def packed(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, ...]]]:
    """A grid with padding examples, a `keep_index` with padding rows, and the layout of each row by a loop."""
    grids, examples, rows = draw(GRIDS), draw(st.integers(0, 2)), draw(st.integers(0, 4))
    places, start = [], 0
    for image, (frames, height, width) in enumerate(grids):
        total = frames * height * width
        kept = draw(st.sets(st.integers(0, total - 1), min_size=1))
        for place in sorted(kept):
            frame, inside = divmod(place, height * width)
            places.append((start + place, image, frame, inside // width, inside % width, height, width))
        start += total
    keep_index = torch.tensor([place[0] for place in places] + [-1] * rows)
    return torch.tensor(grids + [(0, 0, 0)] * examples), keep_index, places


@given(packed())
def test_every_row_is_where_a_loop_says(sample: tuple) -> None:
    grid, keep_index, places = sample
    validate_grid(grid, len(keep_index), keep_index=keep_index)
    layout = get_patch_layout(grid, len(keep_index), keep_index=keep_index)
    for row, (_, image, frame, y, x, height, width) in enumerate(places):
        assert layout.image_ids[row] == image
        assert layout.frame_ids[row] == frame
        assert layout.position_ids[row].tolist() == [y, x]
        assert layout.grid_sizes[row].tolist() == [height, width]
    assert (layout.image_ids[len(places) :] == len(grid)).all()
    assert not layout.position_ids[len(places) :].any()


@given(packed())
def test_segments_count_what_a_loop_counts(sample: tuple) -> None:
    grid, keep_index, places = sample
    layout = get_patch_layout(grid, len(keep_index), keep_index=keep_index)
    padding = len(keep_index) - len(places)
    images = [sum(place[1] == image for place in places) for image in range(len(grid))]
    frames = [
        sum(place[1:3] == (image, frame) for place in places)
        for image, (count, _, _) in enumerate(grid.tolist())
        for frame in range(max(1, count))
    ]
    assert layout.cu_images.diff().tolist() == [*images, padding]
    assert get_kept_cu_seqlens(grid, layout, len(keep_index), merge_temporal=True).diff().tolist() == [
        *images,
        padding,
    ]
    assert get_kept_cu_seqlens(grid, layout, len(keep_index)).diff().tolist() == [*frames, padding]


@given(GRIDS)
def test_all_patches_kept_is_as_if_nothing_was_said(grids: list[tuple[int, int, int]]) -> None:
    grid = torch.tensor(grids)
    total = int(grid.prod(-1).sum())
    plain = get_patch_layout(grid, total)
    kept = get_patch_layout(grid, total, keep_index=torch.arange(total))
    assert torch.equal(plain.position_ids, get_position_ids(grid))
    for name in ("image_ids", "frame_ids", "position_ids", "grid_sizes"):
        assert torch.equal(getattr(plain, name), getattr(kept, name)), name
    assert torch.equal(kept.cu_images[:-1], plain.cu_images)
    assert torch.equal(get_kept_cu_seqlens(grid, kept, total)[:-1], get_cu_seqlens(grid))


@given(
    st.lists(st.tuples(st.just(1), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=4), st.integers(2, 3)
)
def test_merge_order_is_kept(blocks: list[tuple[int, int, int]], merge_size: int) -> None:
    grid = torch.tensor([(t, h * merge_size, w * merge_size) for t, h, w in blocks])
    layout = get_patch_layout(grid, int(grid.prod(-1).sum()), merge_size)
    assert torch.equal(layout.position_ids, get_position_ids(grid, merge_size))
    padded = torch.cat([grid, torch.zeros(1, 3, dtype=torch.int64)])
    keep_index = torch.cat([torch.arange(len(layout.position_ids)), torch.tensor([-1, -1])])
    with_padding = get_patch_layout(padded, len(keep_index), merge_size, keep_index)
    assert torch.equal(with_padding.position_ids[:-2], layout.position_ids)
    assert not with_padding.position_ids[-2:].any()
