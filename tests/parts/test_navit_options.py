"""Options of the encoder: pooling, prefix tokens, video, dropped patches; each against a slow version in float64."""

import pytest
import torch

from tests.parts.navit_oracle import fractional_positions, oracle, rotation, run_layers
from tests.tiny import navit, packed_images
from vlparts.parts import packed_segments
from vlparts.parts.packed_index import get_position_ids


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_mean_and_max_pooling(pooling: str) -> None:
    model = navit(pooling=pooling).double()
    patches, grids = packed_images([(3, 5), (1, 1)], dtype=torch.float64)
    patches.requires_grad_()
    outputs = model(patches, grids)
    hidden = [
        run_layers(model, model.embeddings.patch_embedding(part) + fractional_positions(model, *grid))
        for part, grid in zip(patches.split([15, 1]), [(3, 5), (1, 1)], strict=True)
    ]
    expected = torch.stack([one.mean(0) if pooling == "mean" else one.max(0).values for one in hidden])
    torch.testing.assert_close(outputs.pooler_output, expected)
    weights = torch.randn_like(expected)
    mine = torch.autograd.grad((outputs.pooler_output * weights).sum(), patches)
    theirs = torch.autograd.grad((expected * weights).sum(), patches)
    torch.testing.assert_close(mine, theirs)


def test_mean_pooling_sums_bfloat16_in_float32() -> None:
    from vlparts.parts.packed_pooling import mean_pooling

    ones = torch.ones(4096, 1, dtype=torch.bfloat16)
    assert mean_pooling(ones, torch.zeros(4096, dtype=torch.int64), 1).item() == 1.0


def test_class_token_and_registers_with_rotary_positions() -> None:
    model = navit(pooling="class_token", num_register_tokens=2, rotary_theta=50.0).double()
    patches, grids = packed_images([(2, 3), (4, 1)], dtype=torch.float64)
    outputs = model(patches, grids)
    for index, (part, (rows, columns)) in enumerate(zip(patches.split([6, 4]), [(2, 3), (4, 1)], strict=True)):
        embedded = model.embeddings.patch_embedding(part) + fractional_positions(model, rows, columns)
        hidden = torch.cat([model.prefix.tokens, embedded])
        # A prefix token has no place, which is the same as place (0, 0): no rotation.
        places = torch.cat(
            [torch.zeros(3, 2, dtype=torch.int64), get_position_ids(torch.tensor([[1, rows, columns]]))]
        )
        hidden = run_layers(model, hidden, rotation(places, 16, 50.0))
        torch.testing.assert_close(outputs.last_hidden_state.split([6, 4])[index], hidden[3:])
        torch.testing.assert_close(outputs.prefix_hidden_state[index], hidden[:3])
        torch.testing.assert_close(outputs.pooler_output[index], hidden[0])


def test_kept_patches_have_the_positions_of_the_whole_image() -> None:
    model = navit().double()
    patches, grids = packed_images([(3, 5), (2, 2)], dtype=torch.float64)
    keep_index = torch.tensor([0, 4, 7, 13, 15, 18])
    outputs = model(patches[keep_index], grids, keep_index=keep_index)
    for places, rows, columns, part in (([0, 4, 7, 13], 3, 5, slice(0, 4)), ([0, 3], 2, 2, slice(4, 6))):
        positions = fractional_positions(model, rows, columns)[places]
        embedded = model.embeddings.patch_embedding(patches[keep_index][part]) + positions
        torch.testing.assert_close(outputs.last_hidden_state[part], run_layers(model, embedded))


def test_kept_patches_can_be_scattered_onto_the_grid() -> None:
    model = navit()
    patches, grids = packed_images([(3, 5), (2, 2)])
    keep_index = torch.tensor([0, 4, 7, 13, 15, 18])
    outputs = model(patches[keep_index], grids, keep_index=keep_index)
    dense = torch.zeros(19, 32).index_copy(0, outputs.keep_index, outputs.last_hidden_state)
    assert torch.equal(dense[keep_index], outputs.last_hidden_state)
    assert torch.count_nonzero(dense.abs().sum(-1)) == 6


def test_frames_of_a_video_are_encoded_one_by_one_and_pooled_together() -> None:
    model = navit()
    patches, grids = packed_images([(3, 2, 2), (1, 5)])
    outputs = model(patches, grids)
    alone = model(patches[:12], torch.tensor([[1, 2, 2]] * 3))
    torch.testing.assert_close(outputs.last_hidden_state[:12], alone.last_hidden_state)
    whole = model.pooling(outputs.last_hidden_state[:12], torch.tensor([0, 12], dtype=torch.int32), 12)
    torch.testing.assert_close(outputs.pooler_output[:1], whole)
    assert (whole - alone.pooler_output).abs().max() > 1e-3


def test_a_clip_is_attended_as_one() -> None:
    model = navit(video_attention="clip", max_frames=3).double()
    patches, grids = packed_images([(3, 2, 2), (1, 5)], dtype=torch.float64)
    outputs = model(patches, grids)
    table = model.embeddings.frame_embedding.weight
    embedded = model.embeddings.patch_embedding(patches[:12]) + fractional_positions(model, 2, 2).repeat(3, 1)
    hidden = run_layers(model, embedded + table.repeat_interleave(4, dim=0))
    torch.testing.assert_close(outputs.last_hidden_state[:12], hidden)
    still = oracle(model, patches[12:], 1, 5)[0]
    assert (outputs.last_hidden_state[12:] - still).abs().max() > 1e-3  # an image is a clip of one frame, with its row


def test_class_tokens_of_frames_are_averaged() -> None:
    model = navit(pooling="class_token")
    patches, grids = packed_images([(3, 2, 2), (1, 5)])
    frames = model(patches, torch.tensor([[1, 2, 2]] * 3 + [[1, 1, 5]])).pooler_output
    expected = torch.stack([frames[:3].mean(0), frames[3]])
    torch.testing.assert_close(model(patches, grids).pooler_output, expected)
    # A frame of which nothing is kept has no say.
    keep_index = torch.tensor([0, 1, 8, 11, 12])
    kept = model(patches[keep_index], grids, keep_index=keep_index).pooler_output
    parts = [torch.tensor([0, 1]), torch.tensor([8, 11])]
    grid = torch.tensor([[1, 2, 2]])
    alone = [model(patches[part], grid, keep_index=part % 4).pooler_output[0] for part in parts]
    torch.testing.assert_close(kept[0], torch.stack(alone).mean(0))


def test_more_frames_than_the_table_are_refused() -> None:
    with pytest.raises(
        ValueError, match="`image_grid_thw` must not hold videos of more than `max_frames`=2 frames, got .* 3 frames"
    ):
        navit(max_frames=2)(*packed_images([(3, 2, 2)]))


def test_pooling_can_be_left_out() -> None:
    model = navit(pooling="none")
    assert model.pooling is None
    assert model(*packed_images([(2, 2)])).pooler_output is None


def test_registers_are_no_patches() -> None:
    outputs = navit(num_register_tokens=3)(*packed_images([(2, 2), (3, 1)]))
    assert outputs.last_hidden_state.shape == (7, 32)
    assert outputs.prefix_hidden_state.shape == (2, 3, 32)


def test_large_sequences_are_encoded_in_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = navit(pooling="class_token", rotary_theta=100.0)
    patches, grids = packed_images([(4, 4), (2, 3), (5, 5), (1, 1), (3, 3)])
    patches.requires_grad_()
    whole = model(patches, grids, output_hidden_states=True)
    expected = torch.autograd.grad(whole.pooler_output.pow(2).sum(), patches)[0]
    monkeypatch.setattr(packed_segments, "tokens_per_pass", lambda hidden_states, width: 20)
    outputs = model(patches, grids, output_hidden_states=True)
    assert len(outputs.hidden_states) == len(whole.hidden_states)
    for mine, theirs in zip(outputs.hidden_states, whole.hidden_states, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(outputs.pooler_output.pow(2).sum(), patches)[0], expected, atol=1e-4, rtol=1e-4
    )


def test_absolute_positions_refuse_larger_grids_and_fractional_ones_do_not() -> None:
    patches, grids = packed_images([(2, 9)])
    with pytest.raises(ValueError, match="`position_ids` and `grid_sizes` need 9 positions, but the table .* has 8"):
        navit(position_coordinates="absolute")(patches, grids)
    for changes in (
        {"position_coordinates": "fractional"},
        {"position_coordinates": "absolute", "position_overflow": "interpolate"},
    ):
        assert navit(**changes)(patches, grids).last_hidden_state.shape == (18, 32)


def test_hidden_states_of_patches_can_be_told_from_prefix_tokens() -> None:
    from vlparts.parts.vlm_features import encode_images

    model = navit(num_register_tokens=3)
    patches, grids = packed_images([(2, 2), (3, 1)])
    outputs = model(patches, grids, output_hidden_states=True)
    torch.testing.assert_close(model.norm(outputs.hidden_states[-1][outputs.patch_index]), outputs.last_hidden_state)
    _, (features,), counts = encode_images(model, patches, grids, None, None, layer=-2, merge_size=1)
    assert torch.equal(features, outputs.hidden_states[-2][outputs.patch_index])
    assert counts.tolist() == [4, 3]
