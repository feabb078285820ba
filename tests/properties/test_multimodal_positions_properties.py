"""Positions of batches and of packed rows, token by token, for texts of any layout."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.parts.mrope_oracle import IMAGE_ID, VIDEO_ID, Layout, batch_of
from torch import Tensor

from vlparts.parts.vlm_positions import multimodal_positions

sides = st.integers(1, 3)
items = st.one_of(
    st.tuples(st.just("text"), st.tuples(st.integers(1, 4))),
    st.tuples(st.just("image"), st.tuples(st.just(1), sides, sides)),
    st.tuples(st.just("video"), st.tuples(sides, sides, sides, st.integers(0, 2))),
)
texts = st.lists(items, min_size=1, max_size=4)
batches = st.lists(texts, min_size=1, max_size=4)


def found(inputs: dict[str, Tensor | None], merge_size: int, position_ids: Tensor | None = None) -> Tensor:
    ids = inputs["input_ids"]
    assert ids is not None
    return multimodal_positions(
        ids == IMAGE_ID,
        ids == VIDEO_ID,
        image_grid_thw=inputs["image_grid_thw"],
        video_grid_thw=inputs["video_grid_thw"],
        merge_size=merge_size,
        attention_mask=inputs.get("attention_mask"),
        position_ids=position_ids,
    )


@given(batch=batches, merge_size=sides, data=st.data())
def test_a_padded_batch(batch: list, merge_size: int, data: st.DataObject) -> None:
    layouts = [Layout(text, merge_size) for text in batch]
    padding = [data.draw(st.tuples(st.integers(0, 2), st.integers(0, 2))) for _ in layouts]
    inputs, expected = batch_of(layouts, padding)
    mask = inputs["attention_mask"]
    assert mask is not None
    places = (mask.cumsum(-1) - 1).clamp(min=0) * mask.cummax(-1).values
    for given_places in (None, places):
        positions = found(inputs, merge_size, given_places)
        assert torch.equal(positions[1:], expected)
        assert torch.equal(positions[0] * mask, places * mask)


@given(rows=st.lists(batches, min_size=1, max_size=2), merge_size=sides)
def test_packed_rows(rows: list, merge_size: int) -> None:
    """Each text has the positions that it has alone, wherever it stands in its row."""
    packed = [[Layout(text, merge_size) for text in row] for row in rows]
    longest = max(sum(len(one.ids) for one in row) for row in packed)
    ids, mask, places = (torch.zeros(len(rows), longest, dtype=torch.int64) for _ in range(3))
    expected = torch.zeros(4, len(rows), longest, dtype=torch.int64)
    grids: dict[str, list] = {"image": [], "video": []}
    for number, row in enumerate(packed):
        start = 0
        for layout in row:
            for place, (token, positions) in enumerate(zip(layout.ids, layout.positions, strict=True)):
                ids[number, start + place], mask[number, start + place] = token, 1
                places[number, start + place] = place
                expected[:, number, start + place] = torch.tensor((place, *positions))
            start += len(layout.ids)
            for kind in grids:
                grids[kind] += layout.grids[kind]
    inputs = {f"{kind}_grid_thw": torch.tensor(given) if given else None for kind, given in grids.items()}
    assert torch.equal(found({"input_ids": ids, "attention_mask": mask, **inputs}, merge_size, places), expected)
