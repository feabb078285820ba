"""Packing invariance, for images and videos of any size and every option of the encoder."""

from functools import cache
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import navit, packed_images
from torch import Tensor

from vlparts import NaViTModel

VARIANTS = {
    "default": {},
    "mean pooling, sinusoidal, rotary": {"pooling": "mean", "position_kind": "sinusoidal", "rotary_theta": 100.0},
    "max pooling, fourier": {"pooling": "max", "position_kind": "fourier", "position_combination": "joint"},
    "class token, registers, rotary only": {
        "pooling": "class_token",
        "num_register_tokens": 2,
        "position_kind": "none",
        "rotary_theta": 100.0,
    },
    "clips": {"video_attention": "clip", "max_frames": 4, "position_coordinates": "fractional_aspect"},
    "clips with class token": {"video_attention": "clip", "pooling": "class_token", "position_combination": "joint"},
}
GRIDS = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=5)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@cache
def model_of(variant: str) -> NaViTModel:
    return navit(**VARIANTS[variant])


def drop(grid_thw: Tensor, seed: int) -> Tensor:
    """Indices of some patches of each image, at least one."""
    chance, places, start = Random(seed), [], 0
    for patches in grid_thw.prod(-1).tolist():
        places += sorted(start + place for place in chance.sample(range(patches), chance.randint(1, patches)))
        start += patches
    return torch.tensor(places)


@every_variant
@settings(max_examples=25)
@given(grids=GRIDS, seed=st.integers(0, 2**16))
def test_an_image_comes_out_as_it_does_alone(variant: str, grids: list[tuple[int, ...]], seed: int) -> None:
    model = model_of(variant)
    patches, grid_thw = packed_images(grids, seed=seed)
    packed = model(patches, grid_thw)
    lengths = grid_thw.prod(-1).tolist()
    for index, (part, hidden) in enumerate(
        zip(patches.split(lengths), packed.last_hidden_state.split(lengths), strict=True)
    ):
        alone = model(part, grid_thw[index : index + 1])
        torch.testing.assert_close(hidden, alone.last_hidden_state, **CLOSE)
        torch.testing.assert_close(packed.pooler_output[index], alone.pooler_output[0], **CLOSE)


@every_variant
@settings(max_examples=15)
@given(grids=GRIDS, seed=st.integers(0, 2**16))
def test_kept_patches_come_out_as_they_do_alone(variant: str, grids: list[tuple[int, ...]], seed: int) -> None:
    model = model_of(variant)
    patches, grid_thw = packed_images(grids, seed=seed)
    keep_index = drop(grid_thw, seed)
    packed = model(patches[keep_index], grid_thw, keep_index=keep_index)
    assert torch.equal(packed.keep_index, keep_index)
    start = 0
    for index, total in enumerate(grid_thw.prod(-1).tolist()):
        own = (keep_index >= start) & (keep_index < start + total)
        alone = model(patches[keep_index[own]], grid_thw[index : index + 1], keep_index=keep_index[own] - start)
        torch.testing.assert_close(packed.last_hidden_state[own], alone.last_hidden_state, **CLOSE)
        torch.testing.assert_close(packed.pooler_output[index], alone.pooler_output[0], **CLOSE)
        start += total


@every_variant
@settings(max_examples=10)
@given(grids=GRIDS)
def test_keeping_all_patches_changes_nothing(variant: str, grids: list[tuple[int, ...]]) -> None:
    model = model_of(variant)
    patches, grid_thw = packed_images(grids)
    expected, kept = model(patches, grid_thw), model(patches, grid_thw, keep_index=torch.arange(len(patches)))
    torch.testing.assert_close(kept.last_hidden_state, expected.last_hidden_state, **CLOSE)
    torch.testing.assert_close(kept.pooler_output, expected.pooler_output, **CLOSE)


@every_variant
@settings(max_examples=10)
@given(grids=GRIDS, seed=st.integers(0, 2**16), rows=st.integers(1, 9), examples=st.integers(0, 3))
def test_padding_is_inert(variant: str, grids: list[tuple[int, ...]], seed: int, rows: int, examples: int) -> None:
    model = model_of(variant)
    patches, grid_thw = packed_images(grids, seed=seed)
    keep_index = drop(grid_thw, seed)
    kept = patches[keep_index]
    expected = model(kept, grid_thw, keep_index=keep_index)
    junk = torch.full((rows, kept.shape[1]), 1e3)
    padded = torch.cat([kept, junk]).requires_grad_()
    outputs = model(
        padded,
        torch.cat([grid_thw, torch.zeros(examples, 3, dtype=torch.int64)]),
        keep_index=torch.cat([keep_index, torch.full((rows,), -1)]),
    )
    assert torch.isfinite(outputs.last_hidden_state).all()
    assert torch.isfinite(outputs.pooler_output).all()
    assert outputs.pooler_output.shape[0] == len(grids) + examples
    torch.testing.assert_close(outputs.last_hidden_state[: len(kept)], expected.last_hidden_state, **CLOSE)
    torch.testing.assert_close(outputs.pooler_output[: len(grids)], expected.pooler_output, **CLOSE)
    (outputs.last_hidden_state[: len(kept)].sum() + outputs.pooler_output[: len(grids)].pow(2).sum()).backward()
    assert torch.count_nonzero(padded.grad[len(kept) :]) == 0


@every_variant
@settings(max_examples=10)
@given(grids=GRIDS, chance=st.randoms(use_true_random=False))
def test_the_order_of_images_does_not_matter(variant: str, grids: list[tuple[int, ...]], chance: Random) -> None:
    model = model_of(variant)
    patches, grid_thw = packed_images(grids)
    order = list(range(len(grids)))
    chance.shuffle(order)
    parts = patches.split(grid_thw.prod(-1).tolist())
    expected = model(patches, grid_thw).pooler_output[order]
    shuffled = model(torch.cat([parts[index] for index in order]), grid_thw[order]).pooler_output
    torch.testing.assert_close(shuffled, expected, **CLOSE)


@every_variant
@settings(max_examples=10)
@given(grids=GRIDS, data=st.data())
def test_no_gradient_crosses_between_images(variant: str, grids: list[tuple[int, ...]], data: st.DataObject) -> None:
    model = model_of(variant)
    patches, grid_thw = packed_images(grids)
    patches.requires_grad_()
    chosen = data.draw(st.integers(0, len(grids) - 1))
    outputs = model(patches, grid_thw)
    lengths = grid_thw.prod(-1).tolist()
    hidden = outputs.last_hidden_state.split(lengths)[chosen]
    (hidden.pow(3).sum() + outputs.pooler_output[chosen].pow(2).sum()).backward()
    for index, gradient in enumerate(patches.grad.split(lengths)):
        if index == chosen:
            assert torch.count_nonzero(gradient) > 0
        else:
            assert torch.count_nonzero(gradient) == 0


@every_variant
@settings(max_examples=8)
@given(grids=GRIDS, seed=st.integers(0, 2**16))
def test_all_ways_of_attention_agree(variant: str, grids: list[tuple[int, ...]], seed: int) -> None:
    dense = navit(**VARIANTS[variant])
    dense.set_attn_implementation("eager")
    patches, grid_thw = packed_images(grids, seed=seed)
    keep_index = drop(grid_thw, seed)
    expected = dense(patches[keep_index], grid_thw, keep_index=keep_index)
    outputs = model_of(variant)(patches[keep_index], grid_thw, keep_index=keep_index)
    torch.testing.assert_close(outputs.last_hidden_state, expected.last_hidden_state, **CLOSE)
    torch.testing.assert_close(outputs.pooler_output, expected.pooler_output, **CLOSE)
