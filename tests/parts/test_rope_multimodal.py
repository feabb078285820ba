"""Three-axis rotary positions against loops, complex numbers and transformers' Qwen2-VL, and their bad inputs."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLConfig, Qwen2VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel, Qwen2VLRotaryEmbedding, rotate_half

from tests.parts.mrope_oracle import IMAGE_ID, TEXT_ID, VIDEO_ID, Layout, batch_of, rotate
from vlparts.parts.rope_multimodal import get_multimodal_position_ids, interleave_axes, multimodal_rotary, rotary_axes

OPENPANGU_VL = [0, 1, 2, 1, 2, 1, 2] * 9 + [0]


def inv_freq(slots: int, theta: float = 10000.0) -> Tensor:
    return 1.0 / theta ** (torch.arange(slots) / slots)


def test_the_order_of_openpangu_vl() -> None:
    assert interleave_axes([10, 27, 27]) == OPENPANGU_VL


@pytest.mark.parametrize(
    ("sections", "force_last", "expected"),
    [
        ([2, 1, 1], True, [0, 1, 2, 0]),
        ([2, 1, 1], False, [0, 1, 2, 0]),
        ([1, 2, 2], True, [1, 2, 1, 2, 0]),
        ([1, 2, 2], False, [0, 1, 2, 1, 2]),
        ([4, 0, 0], True, [0, 0, 0, 0]),
        ([3, 1, 0], False, [0, 1, 0, 0]),
        ([0, 2, 1], False, [1, 2, 1]),
    ],
)
def test_orders_by_hand(sections: list[int], force_last: bool, expected: list[int]) -> None:
    assert interleave_axes(sections, force_last) == expected


@pytest.mark.parametrize("sections", [[], [1, 2], [1, 2, 3, 4], [1, -1, 2], [0, 0, 0], [1.0, 2, 3], [True, 1, 1], 3])
def test_sections_that_are_no_counts_are_refused(sections: Any) -> None:
    with pytest.raises(ValueError, match="`mrope_section` must hold three integers"):
        interleave_axes(sections)


def test_the_last_place_needs_a_frequency_of_time() -> None:
    with pytest.raises(
        ValueError, match="`mrope_section` must give time a frequency with `force_last`, got .0, 2, 2."
    ):
        interleave_axes([0, 2, 2])


def test_axes_of_rope_parameters() -> None:
    assert rotary_axes({"rope_theta": 1e4}, 4) == [0, 0, 0, 0]
    assert rotary_axes({"mrope_section": [1, 2, 1]}, 4) == [0, 1, 1, 2]
    assert (
        rotary_axes({"mrope_section": [10, 27, 27], "mrope_interleaved": False}, 64) == [0] * 10 + [1] * 27 + [2] * 27
    )
    assert rotary_axes({"mrope_section": [10, 27, 27], "mrope_interleaved": True}, 64) == OPENPANGU_VL


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"mrope_section": [1, 2, 2]}, r"must sum to half of `head_dim`, 4, got \[1, 2, 2\] \(sum 5\)"),
        ({"mrope_section": [2, 2]}, "must hold three integers"),
        ({"mrope_section": [2, 1, 1], "mrope_interleaved": 1}, "`mrope_interleaved` must be true or false"),
        ({"mrope_interleaved": True}, "only with `mrope_section`"),
        ({"mrope_section": [0, 2, 2], "mrope_interleaved": True}, "must give time a frequency"),
    ],
)
def test_rope_parameters_that_do_not_fit_are_refused(parameters: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rotary_axes(parameters, 4)


def rotated(heads: Tensor, positions: Tensor, axes: list[int]) -> Tensor:
    """`(S, H, D)` rotated by ours, positions `(3, S)`."""
    cos, sin = multimodal_rotary(positions[:, None], inv_freq(len(axes)), axes)
    return heads * cos[0, :, None] + rotate_half(heads) * sin[0, :, None]


def test_rotation_equals_complex_numbers() -> None:
    positions, heads = torch.randint(0, 60, (3, 9)), torch.randn(9, 2, 16, dtype=torch.float64)
    axes = interleave_axes([2, 3, 3])
    # The angles are float32: at 59 off by about 4e-6.
    torch.testing.assert_close(
        rotated(heads, positions, axes), rotate(heads, positions, 10000.0, axes), atol=2e-5, rtol=0
    )


@pytest.mark.parametrize("axes", [OPENPANGU_VL, [0] * 64, [0] * 10 + [1] * 27 + [2] * 27])
def test_equal_positions_are_plain_rope_to_the_bit(axes: list[int]) -> None:
    positions = torch.randint(0, 130_000, (2, 50))
    angles = positions[..., None].float() * inv_freq(64, 64e6)
    angles = torch.cat((angles, angles), dim=-1)
    cos, sin = multimodal_rotary(positions.expand(3, -1, -1), inv_freq(64, 64e6), axes)
    assert torch.equal(cos, angles.cos())
    assert torch.equal(sin, angles.sin())


def test_one_axis_after_the_other_is_qwen2_vl() -> None:
    parameters = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    config = Qwen2VLTextConfig(hidden_size=64, num_attention_heads=4, rope_parameters=dict(parameters))
    positions, theirs = torch.randint(0, 500, (3, 2, 11)), Qwen2VLRotaryEmbedding(config)
    cos, sin = theirs(torch.empty(0), positions)
    if cos.ndim == 4:  # in older versions attention picks the axes
        cos, sin = (
            torch.cat([part[index % 3] for index, part in enumerate(one.split([2, 3, 3] * 2, dim=-1))], dim=-1)
            for one in (cos, sin)
        )
    ours = multimodal_rotary(positions, theirs.inv_freq, rotary_axes(parameters, 8))
    torch.testing.assert_close(ours, (cos, sin), atol=0, rtol=0)


def test_types_of_angles_and_of_axes() -> None:
    positions = torch.randint(0, 9, (3, 2, 5), dtype=torch.int32)
    cos, sin = multimodal_rotary(positions, inv_freq(4).double(), [0, 1, 2, 0])
    assert cos.shape == sin.shape == (2, 5, 8)
    assert cos.dtype == sin.dtype == torch.float32
    same = multimodal_rotary(positions, inv_freq(4).double(), torch.tensor([0, 1, 2, 0]))
    torch.testing.assert_close(same, (cos, sin), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("shape", "axes", "message"),
    [
        ((2, 5), [0, 1], r"`position_ids` must have shape \(3, samples, tokens\), got \(2, 5\)"),
        ((4, 2, 5), [0, 1], r"`position_ids` must have shape .* got \(4, 2, 5\)"),
        ((3, 2, 5), [0, 1, 2], r"one axis per frequency of `inv_freq`, got shapes \(3,\) and \(2,\)"),
        ((3, 2, 5), [0, 3], r"`axes` must hold 0, 1 and 2, got \[0, 3\]"),
        ((3, 2, 5), [0, -1], r"`axes` must hold 0, 1 and 2, got \[0, -1\]"),
    ],
)
def test_angles_of_bad_input(shape: tuple[int, ...], axes: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        multimodal_rotary(torch.zeros(shape, dtype=torch.int64), inv_freq(2), axes)


def positions_of(**inputs: Any) -> tuple[Tensor, Tensor]:
    return get_multimodal_position_ids(**{"image_token_id": IMAGE_ID, "video_token_id": VIDEO_ID, **inputs})


def test_an_image_between_texts() -> None:
    """Text, start, an image of 2 x 3 tokens, end, text."""
    ids = torch.tensor([[1, 2, *[IMAGE_ID] * 6, 3, 1]])
    positions, deltas = positions_of(input_ids=ids, image_grid_thw=torch.tensor([[1, 4, 6]]), spatial_merge_size=2)
    expected = "000 111 222 223 224 232 233 234 555 666"
    assert ["".join(map(str, places)) for places in positions[:, 0].T.tolist()] == expected.split()
    assert deltas.tolist() == [[7 - 10]]
    assert positions.dtype == deltas.dtype == torch.int64


def test_a_video_of_two_frames() -> None:
    """Start, a frame of 2 x 2 tokens, end, start, a frame, end."""
    frame = [VIDEO_ID] * 4
    ids = torch.tensor([[1, *frame, 2, 1, *frame, 2]])
    positions, deltas = positions_of(input_ids=ids, video_grid_thw=torch.tensor([[2, 4, 4]]), spatial_merge_size=2)
    expected = "000 111 112 121 122 333 444 555 556 565 566 777"
    assert ["".join(map(str, places)) for places in positions[:, 0].T.tolist()] == expected.split()
    assert deltas.tolist() == [[8 - 12]]


LAYOUTS = [
    [("text", (3,)), ("image", (1, 2, 3)), ("image", (1, 3, 1)), ("text", (2,)), ("video", (3, 2, 2, 2))],
    [("video", (2, 1, 4, 0)), ("image", (3, 2, 2)), ("text", (1,)), ("image", (1, 1, 1))],
    [("text", (4,))],
]


@pytest.mark.parametrize("merge_size", [1, 2])
def test_a_batch_equals_token_by_token(merge_size: int) -> None:
    layouts = [Layout(items, merge_size) for items in LAYOUTS]
    inputs, expected = batch_of(layouts, [(2, 0), (0, 3), (9, 1)])
    positions, deltas = positions_of(**inputs, spatial_merge_size=merge_size)
    assert torch.equal(positions, expected)
    assert deltas.tolist() == [[one.following() - len(one.ids)] for one in layouts]


def test_placeholders_in_padding_count_nowhere() -> None:
    mask = torch.tensor([[0, 1, 1, 0]])
    positions, deltas = positions_of(input_ids=torch.full((1, 4), IMAGE_ID), attention_mask=mask, **grid(1, 1, 2))
    assert positions[:, 0].tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]]
    assert deltas.tolist() == [[0]]


def test_no_tokens_and_no_samples() -> None:
    positions, deltas = positions_of(input_ids=torch.zeros(2, 0, dtype=torch.int64))
    assert positions.shape == (3, 2, 0)
    assert deltas.tolist() == [[0], [0]]
    positions, deltas = positions_of(input_ids=torch.zeros(0, 4, dtype=torch.int64))
    assert positions.shape == (3, 0, 4)
    assert deltas.shape == (0, 1)


def qwen2_vl(merge_size: int) -> Qwen2VLModel:
    size = {"hidden_size": 8, "num_attention_heads": 2}
    text = {**size, "intermediate_size": 8, "num_hidden_layers": 0, "num_key_value_heads": 1, "vocab_size": 16}
    vision = {"depth": 0, "embed_dim": 8, "num_heads": 2, "hidden_size": 8, "spatial_merge_size": merge_size}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE_ID, video_token_id=VIDEO_ID)
    with torch.device("meta"):
        return Qwen2VLModel(config)


@pytest.mark.parametrize("merge_size", [1, 2])
def test_texts_and_images_are_as_in_qwen2_vl(merge_size: int) -> None:
    items = [[("text", (3,)), ("image", (1, 2, 3)), ("text", (2,)), ("image", (1, 4, 1)), ("text", (1,))], LAYOUTS[2]]
    inputs, _ = batch_of([Layout(one, merge_size) for one in items], [(0, 2), (7, 0)])
    kinds = (inputs["input_ids"] == IMAGE_ID).int()
    positions, deltas = qwen2_vl(merge_size).get_rope_index(mm_token_type_ids=kinds, **inputs)
    ours = positions_of(**inputs, spatial_merge_size=merge_size)
    torch.testing.assert_close(ours, (positions, deltas), atol=0, rtol=0)


def grid(*sizes: int) -> dict[str, Tensor]:
    return {"image_grid_thw": torch.tensor(sizes).view(-1, 3)}


IMAGES = torch.tensor([[TEXT_ID] * 6, [TEXT_ID, IMAGE_ID, IMAGE_ID, TEXT_ID, IMAGE_ID, TEXT_ID]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "`image_grid_thw` must be given, got None: sample 1 has 2 placeholders"),
        (grid(1, 1, 2), "Sample 1 has 1 placeholders more than `image_grid_thw` describes with 1 grids"),
        (grid(1, 2, 2), r"Sample 1 has 2 placeholders in a row where a frame of `image_grid_thw\[0\]` takes 4"),
        (grid(1, 1, 2, 1, 1, 2), r"Sample 1 has 1 placeholders in a row where .* `image_grid_thw\[1\]` takes 2"),
        (grid(1, 1, 2, 2, 1, 1), r"Sample 1 ends with 1 frames of `image_grid_thw\[1\]` without placeholders"),
        (grid(3, 1, 1, 1, 1, 1), "`image_grid_thw` holds 2 grids, but the 2 samples have placeholders for 1 of them"),
        (
            {**grid(3, 1, 1), "spatial_merge_size": 2},
            r"`image_grid_thw\[0\]` must hold .* multiples of .*=2, got .3, 1",
        ),
        (grid(3, 0, 1), r"`image_grid_thw\[0\]` must hold positive frames, rows and columns.* got \[3, 0, 1\]"),
        ({"image_grid_thw": torch.ones(3)}, r"`image_grid_thw` must be an integer tensor of shape \(n, 3\).*float32"),
        ({"image_grid_thw": torch.ones(1, 2).long()}, r"`image_grid_thw` must be an integer tensor .*\(1, 2\)"),
        ({**grid(3, 1, 1), "video_grid_thw": torch.ones(1, 3).long()}, "`video_grid_thw` holds 1 grids"),
        ({"video_token_id": None, "video_grid_thw": torch.ones(1, 3).long()}, "`video_token_id` must be given"),
        ({"video_token_id": IMAGE_ID}, f"`video_token_id` must not be `image_token_id`, got {IMAGE_ID} for both"),
        ({"spatial_merge_size": 0}, "`spatial_merge_size` must be an integer of at least 1, got 0"),
        ({"attention_mask": torch.ones(2, 5)}, r"`attention_mask` must have the shape .* \(2, 6\), got \(2, 5\)"),
        ({"input_ids": IMAGES[0]}, r"`input_ids` must be an integer tensor of shape \(samples, tokens\).*\(6,\)"),
        ({"input_ids": IMAGES.float()}, "`input_ids` must be an integer tensor .* torch.float32"),
    ],
)
def test_placeholders_and_grids_that_do_not_match_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        positions_of(**{"input_ids": IMAGES, **changes})
