"""What packing must never change, for images of any size."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import navit, packed_images

MODEL = navit()
GRIDS = st.lists(st.tuples(st.integers(1, 13), st.integers(1, 13)), min_size=1, max_size=6)


@given(GRIDS, st.integers(0, 2**16))
def test_an_image_comes_out_as_it_does_alone(grids: list[tuple[int, int]], seed: int) -> None:
    patches, grid_thw = packed_images(grids, seed=seed)
    packed = MODEL(patches, grid_thw)
    lengths = grid_thw.prod(-1).tolist()
    for index, (part, hidden) in enumerate(
        zip(patches.split(lengths), packed.last_hidden_state.split(lengths), strict=True)
    ):
        alone = MODEL(part, grid_thw[index : index + 1])
        torch.testing.assert_close(hidden, alone.last_hidden_state, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(packed.pooler_output[index], alone.pooler_output[0], atol=1e-5, rtol=1e-5)


@given(GRIDS, st.randoms(use_true_random=False))
def test_the_order_of_images_does_not_matter(grids: list[tuple[int, int]], chance: object) -> None:
    patches, grid_thw = packed_images(grids)
    order = list(range(len(grids)))
    chance.shuffle(order)
    parts = patches.split(grid_thw.prod(-1).tolist())
    expected = MODEL(patches, grid_thw).pooler_output[order]
    shuffled = MODEL(torch.cat([parts[index] for index in order]), grid_thw[order]).pooler_output
    torch.testing.assert_close(shuffled, expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=15)
@given(GRIDS, st.data())
def test_no_gradient_crosses_between_images(grids: list[tuple[int, int]], data: st.DataObject) -> None:
    patches, grid_thw = packed_images(grids)
    patches.requires_grad_()
    chosen = data.draw(st.integers(0, len(grids) - 1))
    outputs = MODEL(patches, grid_thw)
    lengths = grid_thw.prod(-1).tolist()
    hidden = outputs.last_hidden_state.split(lengths)[chosen]
    (hidden.pow(2).sum() + outputs.pooler_output[chosen].pow(2).sum()).backward()
    for index, gradient in enumerate(patches.grad.split(lengths)):
        if index == chosen:
            assert torch.count_nonzero(gradient) > 0
        else:
            assert torch.count_nonzero(gradient) == 0
