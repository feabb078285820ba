"""Merging between the layers of encoders, against an encoder that repeats each token as often as it holds patches."""

from itertools import pairwise

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from tests.tiny import WINDOWED, navit, packed_images, windowfree
from vlparts import NaViTConfig, NaViTModel, WindowFreeViTConfig
from vlparts.parts.token_merging import merge_tokens
from vlparts.parts.token_reduction_types import count_share

GRIDS = [(4, 6), (2, 2), (6, 4)]
ENCODERS = {
    "navit": lambda **changes: navit(**{"max_grid_size": 8, "num_hidden_layers": 4, **changes}),
    "prefix": lambda **changes: navit(
        num_register_tokens=2, pooling="class_token", rotary_theta=100.0, num_hidden_layers=4, **changes
    ),
    "windowfree": windowfree,
    "windows": lambda **changes: windowfree(attention_pattern=WINDOWED, feature_layers=[-1, 1], **changes),
}


def inputs_of(encoder: nn.Module, grids: list[tuple[int, ...]] = GRIDS) -> tuple[Tensor, Tensor]:
    return packed_images(grids, encoder.config.num_channels * encoder.config.patch_size**2, dtype=torch.float64)


def made(kind: str, **changes: object) -> nn.Module:
    return ENCODERS[kind](**changes).double()


@pytest.mark.parametrize("kind", ENCODERS)
def test_off_is_exact_and_a_ratio_of_one_changes_nothing(kind: str) -> None:
    plain, merging = made(kind), made(kind, merge_layers=[0, 2], merge_ratio=1.0)
    pixels, grids = inputs_of(plain)
    expected, found = plain(pixels, grids), merging(pixels, grids)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state)
    off = made(kind, merge_layers=[], merge_ratio=0.3)
    assert torch.equal(off(pixels, grids).last_hidden_state, expected.last_hidden_state)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "vlparts_packed"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_an_image_is_encoded_as_if_it_were_alone(kind: str, attention: str) -> None:
    encoder = made(kind, merge_layers=[0, 2], merge_ratio=0.6)
    encoder.set_attn_implementation(attention)
    pixels, grids = inputs_of(encoder)
    together = encoder(pixels, grids).last_hidden_state
    lengths = grids.prod(-1).tolist()
    alone = [
        encoder(part, grid[None]).last_hidden_state for part, grid in zip(pixels.split(lengths), grids, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "vlparts_packed"])
def test_a_merged_token_counts_as_often_as_it_holds_patches(attention: str) -> None:
    """Attention with the logarithm of sizes equals attention over tokens that are repeated."""
    encoder = made("navit", merge_layers=[0], merge_ratio=0.5, num_hidden_layers=2)
    encoder.set_attn_implementation(attention)
    plain = made("navit", num_hidden_layers=2)
    pixels, grids = inputs_of(encoder)
    states = plain(pixels, grids, output_hidden_states=True).hidden_states[1]
    parts = []
    for start, end in pairwise([0, *grids.prod(-1).cumsum(0).tolist()]):
        merged = merge_tokens(states[start:end], count_share(end - start, 0.5))
        repeated = merged.tokens[merged.assignment]
        layer = plain.layers[1]
        projected = layer.self_attn.qkv(layer.norm1(repeated)).unflatten(-1, (3, 2, 16)).permute(1, 2, 0, 3)
        query, key = layer.self_attn.normalize(projected[0].transpose(0, 1), projected[1].transpose(0, 1))
        attended = nn.functional.scaled_dot_product_attention(query.transpose(0, 1), key.transpose(0, 1), projected[2])
        repeated = repeated + layer.self_attn.o_proj(attended.transpose(0, 1).flatten(1))
        parts.append(plain.norm(repeated + layer.mlp(layer.norm2(repeated))))
    torch.testing.assert_close(encoder(pixels, grids).last_hidden_state, torch.cat(parts), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ENCODERS)
def test_following_layers_get_fewer_tokens(kind: str) -> None:
    encoder = made(kind, merge_layers=[0, 1], merge_ratio=0.5)
    lengths = []
    for layer in encoder.layers:
        layer.mlp.register_forward_hook(lambda _, inputs, __: lengths.append(len(inputs[0])))
    pixels, grids = inputs_of(encoder, [(4, 4)])
    found = encoder(pixels, grids)
    prefix = 3 if kind == "prefix" else 0
    assert [length - prefix for length in lengths] == [16, 8, 4, 4]
    assert found.last_hidden_state.shape == (16, 32)
    assert len(found.last_hidden_state.unique(dim=0)) == 4
    for feature_map in getattr(found, "feature_maps", None) or ():
        assert feature_map.shape == (16, 32)


@pytest.mark.parametrize("kind", ENCODERS)
def test_the_output_says_which_patches_share_a_token(kind: str) -> None:
    encoder = made(kind, merge_layers=[0, 2], merge_ratio=0.6)
    pixels, grids = inputs_of(encoder)
    found = encoder(pixels, grids)
    first, last = found.merge_assignments
    _, equal = found.last_hidden_state.unique(dim=0, return_inverse=True)
    assert torch.equal(last[:, None] == last, equal[:, None] == equal)
    assert ((first[:, None] == first) <= (last[:, None] == last)).all()
    image = torch.arange(len(grids)).repeat_interleave(grids.prod(-1))
    assert ((last[:, None] == last) <= (image[:, None] == image)).all()
    assert made(kind)(pixels, grids).merge_assignments is None


@pytest.mark.parametrize("kind", ENCODERS)
def test_gradients(kind: str) -> None:
    encoder = made(kind, merge_layers=[1], merge_ratio=0.5)
    pixels, grids = inputs_of(encoder)
    pixels.requires_grad_()
    encoder(pixels, grids).last_hidden_state[:24].square().sum().backward()
    assert (pixels.grad[:24].abs().sum(-1) > 0).all()
    assert pixels.grad[24:].abs().sum() == 0
    encoder.gradient_checkpointing_enable()
    encoder.train()
    stored, pixels.grad = pixels.grad, None
    encoder(pixels, grids).last_hidden_state[:24].square().sum().backward()
    torch.testing.assert_close(pixels.grad, stored)


def test_dropped_patches_and_padding() -> None:
    encoder = made("navit", merge_layers=[0], merge_ratio=0.5)
    pixels, grids = inputs_of(encoder, [(4, 4), (2, 4)])
    keep = torch.tensor([0, 3, 5, 8, 9, 15, 17, 18, 23, -1, -1])
    rows = torch.cat((pixels[keep[:9]], torch.zeros(2, pixels.shape[1], dtype=pixels.dtype)))
    found = encoder(rows, grids, keep_index=keep).last_hidden_state
    first = encoder(rows[:6], grids[:1], keep_index=keep[:6]).last_hidden_state
    torch.testing.assert_close(found[:6], first)


def test_videos_are_merged_frame_by_frame() -> None:
    encoder = made("navit", merge_layers=[0], merge_ratio=0.5)
    pixels, _ = inputs_of(encoder, [(4, 4), (4, 4)])
    video = encoder(pixels, torch.tensor([[2, 4, 4]])).last_hidden_state
    images = encoder(pixels, torch.tensor([[1, 4, 4]] * 2)).last_hidden_state
    torch.testing.assert_close(video, images)


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_layers_of_several_lengths_are_not_returned(kind: str, name: str) -> None:
    encoder = made(kind, merge_layers=[0])
    encoder.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=f"`{name}` must not be set with `merge_layers`"):
        encoder(*inputs_of(encoder), **{name: True})


@pytest.mark.parametrize("config", [NaViTConfig, WindowFreeViTConfig])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge_layers": [12, 40]}, "`merge_layers` must name layers from 0 to"),
        ({"merge_layers": [-1]}, "`merge_layers` must name layers from 0 to"),
        ({"merge_layers": [1, 1]}, "each once, got"),
        ({"merge_layers": [1], "merge_ratio": 0.0}, "`merge_ratio` must be above 0 and at most 1, got 0.0"),
        ({"merge_layers": [1], "merge_ratio": 1.5}, "`merge_ratio` must be above 0 and at most 1, got 1.5"),
    ],
)
def test_options_that_do_not_fit(config: type, changes: dict, message: str) -> None:
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        config(**changes)


def test_a_saved_encoder_merges_as_before(tmp_path) -> None:  # noqa: ANN001
    encoder = made("navit", merge_layers=[0], merge_ratio=0.5)
    encoder.save_pretrained(tmp_path)
    pixels, grids = inputs_of(encoder)
    again = NaViTModel.from_pretrained(tmp_path)
    assert torch.equal(again(pixels, grids).last_hidden_state, encoder(pixels, grids).last_hidden_state)
