"""Packing invariance of the window-free encoder, and window order of any grid."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import WINDOWED, packed_images, windowfree
from transformers.vision_utils import get_vision_window_index

from vlparts import WindowFreeViTModel
from vlparts.parts.packed_windows import get_windows, permute_blocks

VARIANTS = {
    "full": {"pooling": "mean"},
    "hybrid": {"pooling": "mean", "attention_pattern": WINDOWED, "feature_layers": [-1, -3]},
    "positions": {
        "pooling": "mean",
        "position_grid_size": 5,
        "norm_type": "layer_norm",
        "final_norm": False,
        "hidden_act": "quick_gelu",
        "feature_layers": [-1, 1],
    },
}
GRIDS = st.lists(
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)).map(lambda g: (g[0], 2 * g[1], 2 * g[2])),
    min_size=1,
    max_size=4,
)
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@cache
def model_of(variant: str) -> WindowFreeViTModel:
    return windowfree(**VARIANTS[variant])


@every_variant
@settings(max_examples=25)
@given(grids=GRIDS, seed=st.integers(0, 2**16))
def test_an_image_comes_out_as_it_does_alone(variant: str, grids: list[tuple[int, ...]], seed: int) -> None:
    model = model_of(variant)
    pixels, grid_thw = packed_images(grids, seed=seed)
    packed = model(pixels, grid_thw)
    lengths = grid_thw.prod(-1).tolist()
    maps = zip(*(one.split(lengths) for one in packed.feature_maps), strict=True)
    for index, (part, features) in enumerate(zip(pixels.split(lengths), maps, strict=True)):
        alone = model(part, grid_thw[index : index + 1])
        torch.testing.assert_close(features, alone.feature_maps, **CLOSE)
        torch.testing.assert_close(packed.pooler_output[index], alone.pooler_output[0], **CLOSE)


@every_variant
@settings(max_examples=15)
@given(frames=st.integers(1, 4), rows=st.integers(1, 5), columns=st.integers(1, 5), seed=st.integers(0, 2**16))
def test_frames_of_a_video_are_images(variant: str, frames: int, rows: int, columns: int, seed: int) -> None:
    model = model_of(variant)
    pixels, grid_thw = packed_images([(frames, 2 * rows, 2 * columns)], seed=seed)
    images = torch.tensor([[1, 2 * rows, 2 * columns]] * frames)
    assert torch.equal(model(pixels, grid_thw).last_hidden_state, model(pixels, images).last_hidden_state)


@every_variant
@settings(max_examples=15)
@given(grids=GRIDS, seed=st.integers(0, 2**16), data=st.data())
def test_no_gradient_crosses_between_images(
    variant: str, grids: list[tuple[int, ...]], seed: int, data: st.DataObject
) -> None:
    pixels, grid_thw = packed_images(grids, seed=seed)
    pixels.requires_grad_()
    lengths = grid_thw.prod(-1).tolist()
    chosen = data.draw(st.integers(0, len(grids) - 1))
    hidden = model_of(variant)(pixels, grid_thw).last_hidden_state.split(lengths)[chosen]
    (gradient,) = torch.autograd.grad(hidden.pow(2).sum(), pixels)
    for index, part in enumerate(gradient.split(lengths)):
        assert bool((part != 0).any()) == (index == chosen)


LARGE = st.lists(
    st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 40)).map(lambda g: (g[0], 2 * g[1], 2 * g[2])),
    min_size=1,
    max_size=5,
)


@settings(max_examples=100)
@given(grids=LARGE, window=st.integers(1, 9))
def test_windows_are_those_of_qwen2_5_vl(grids: list[tuple[int, int, int]], window: int) -> None:
    grid_thw = torch.tensor(grids)
    index, cu_seqlens = get_vision_window_index(grid_thw, spatial_merge_size=2, window_size=window * 28, patch_size=14)
    windows = get_windows(grid_thw, window, 2)
    assert torch.equal(windows.order, index)
    assert torch.equal(windows.cu_seqlens, cu_seqlens)
    assert windows.cu_seqlens.dtype == torch.int32


@settings(max_examples=50)
@given(grids=LARGE, window=st.integers(1, 9))
def test_the_inverse_brings_cells_back(grids: list[tuple[int, int, int]], window: int) -> None:
    grid_thw = torch.tensor(grids)
    windows = get_windows(grid_thw, window, 2)
    patches = torch.arange(int(grid_thw.prod(-1).sum())).unsqueeze(1)
    assert torch.equal(permute_blocks(permute_blocks(patches, windows.order), windows.inverse), patches)
    assert int(windows.cu_seqlens[-1]) == len(patches)
