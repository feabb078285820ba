"""Image processor of the window-free encoder: published sizes and patches, raw and normalized pixels, videos."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.tiny import picture
from vlparts.parts.image_pixels import check_normalized, normalize_raw_pixels
from vlparts.parts.image_processing_windowfree import WindowFreeViTImageProcessor, enlarge_tiny
from vlparts.parts.image_transforms import smart_resize

NORMALIZED = {"do_rescale": True, "do_normalize": True}
LIMITS = {"shortest_edge": 50176, "longest_edge": 3312400}


def native(image: Image.Image, **options: object) -> Tensor:
    """Rows of Qwen2-VL's own processor, which repeats every frame, without the repetitions."""
    inputs = Qwen2VLImageProcessorPil(size=LIMITS)(image, return_tensors="pt", **options)
    rows = inputs["pixel_values"].unflatten(1, (3, 2, 196))
    assert torch.equal(rows[:, :, 0], rows[:, :, 1])
    return rows[:, :, 0].flatten(1)


@pytest.mark.parametrize("size", [(224, 224), (150, 400), (613, 291), (29, 29), (57, 3000)])
def test_patches_equal_the_native_ones_of_qwen2_vl(size: tuple[int, int]) -> None:
    image = picture(*size)
    ours = WindowFreeViTImageProcessor(**NORMALIZED)(image, return_tensors="pt")
    torch.testing.assert_close(ours["pixel_values"], native(image), atol=1e-6, rtol=1e-6)
    raw = WindowFreeViTImageProcessor()(image, return_tensors="pt")
    assert raw["pixel_values"].dtype == torch.uint8
    unnormalized = native(image, do_rescale=False, do_normalize=False)
    torch.testing.assert_close(raw["pixel_values"].float(), unnormalized, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((720, 1280), (52, 92)),  # 728 x 1288 pixels
        ((1080, 1920), (78, 138)),  # 1092 x 1932
        ((2160, 3840), (96, 172)),  # 1344 x 2408
        ((448, 448), (32, 32)),
    ],
)
def test_published_sizes(size: tuple[int, int], grid: tuple[int, int]) -> None:
    processor = WindowFreeViTImageProcessor()
    assert processor.get_grid_thw(*size) == (1, *grid)
    assert processor.get_number_of_image_patches(*size) == grid[0] * grid[1]


@given(st.integers(1, 8000), st.integers(1, 8000))
def test_images_have_64_to_4225_tokens(height: int, width: int) -> None:
    assume(max(height, width) <= 200 * min(height, width))
    _, rows, columns = WindowFreeViTImageProcessor().get_grid_thw(height, width)
    assert rows % 2 == columns % 2 == 0
    assert 64 <= rows * columns / 4 <= 4225


def test_raw_pixels_become_the_normalised_ones_in_the_model() -> None:
    images = [picture(60, 90), picture(300, 200)]
    processor = WindowFreeViTImageProcessor()
    raw = processor(images, return_tensors="pt")
    normalized = processor(images, return_tensors="pt", **NORMALIZED)
    assert normalized["pixel_values"].dtype == torch.float32
    assert torch.equal(raw["image_grid_thw"], normalized["image_grid_thw"])
    in_model = normalize_raw_pixels(raw["pixel_values"], processor.image_mean, processor.image_std, torch.float32)
    torch.testing.assert_close(in_model, normalized["pixel_values"])
    check_normalized(normalized["pixel_values"])


def test_images_follow_each_other() -> None:
    images = [picture(60, 90), picture(300, 200), picture(28, 28)]
    processor = WindowFreeViTImageProcessor()
    together = processor(images, return_tensors="pt")
    alone = [processor(image, return_tensors="pt") for image in images]
    assert torch.equal(together["pixel_values"], torch.cat([inputs["pixel_values"] for inputs in alone]))
    assert torch.equal(together["image_grid_thw"], torch.cat([inputs["image_grid_thw"] for inputs in alone]))
    for image, (_, rows, columns) in zip(images, together["image_grid_thw"].tolist(), strict=True):
        assert processor.get_grid_thw(image.height, image.width) == (1, rows, columns)


@given(st.integers(1, 28), st.integers(1, 400), st.booleans())
def test_tiny_images_are_enlarged_to_a_short_side_of_56(short: int, long: int, upright: bool) -> None:
    short, long = min(short, long), max(short, long)
    size = (long, short) if upright else (short, long)
    enlarged = enlarge_tiny(*size)
    assert min(enlarged) == 56
    assert max(enlarged) == enlarged[0 if upright else 1] or short == long
    assert 56 * long / short - 1 - 1e-9 <= max(enlarged) <= 56 * long / short


def test_larger_images_are_not_enlarged_first() -> None:
    assert enlarge_tiny(29, 4000) == (29, 4000)


def test_a_tiny_image_is_resized_twice() -> None:
    image = picture(31, 20)
    first = image.resize((86, 56), Image.Resampling.BICUBIC)  # 56 / 20 * 31 = 86.8
    processor = WindowFreeViTImageProcessor()
    inputs = processor(image, return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], processor(first, return_tensors="pt")["pixel_values"])
    _, rows, columns = processor.get_grid_thw(20, 31)
    assert inputs["image_grid_thw"].tolist() == [[1, rows, columns]]
    once = processor(image.resize((14 * columns, 14 * rows), Image.Resampling.BICUBIC), return_tensors="pt")
    assert once["image_grid_thw"].tolist() == [[1, rows, columns]]
    assert not torch.equal(inputs["pixel_values"], once["pixel_values"])


@pytest.mark.parametrize("size", [(20, 31), (3, 5), (28, 28), (29, 29)], ids=str)
def test_tiny_images_as_qwen2_vl_resizes_them(size: tuple[int, int]) -> None:
    image = picture(*size)
    processor = WindowFreeViTImageProcessor(size=LIMITS, enlarge_tiny=False)
    inputs = processor(image, return_tensors="pt")
    assert processor.get_grid_thw(*size[::-1]) == tuple(inputs["image_grid_thw"][0].tolist())
    expected = native(image, do_rescale=False, do_normalize=False)
    torch.testing.assert_close(inputs["pixel_values"].float(), expected, atol=0, rtol=0)
    usual = WindowFreeViTImageProcessor(size=LIMITS)
    assert usual.get_grid_thw(*size[::-1], enlarge_tiny=False) == processor.get_grid_thw(*size[::-1])
    once = usual(image, enlarge_tiny=False, return_tensors="pt")
    assert torch.equal(once["pixel_values"], inputs["pixel_values"])
    assert WindowFreeViTImageProcessor.from_dict(processor.to_dict()).enlarge_tiny is False


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "1"])
def test_every_mode_is_taken(mode: str) -> None:
    inputs = WindowFreeViTImageProcessor()(Image.new(mode, (224, 224)), return_tensors="pt")
    assert inputs["pixel_values"].shape == (256, 588)


def test_arrays_and_tensors_are_taken_like_pictures() -> None:
    image = picture(60, 90)
    processor = WindowFreeViTImageProcessor()
    expected = processor(image, return_tensors="pt")["pixel_values"]
    array = np.array(image)
    assert torch.equal(processor(array, return_tensors="pt")["pixel_values"], expected)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    assert torch.equal(processor(tensor, return_tensors="pt")["pixel_values"], expected)


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (np.full((8, 8, 3), 255.0), NORMALIZED, "values of 255..255 in float64; expected floats from 0 to 1"),
        (torch.full((3, 8, 8), -0.1), {}, "values of -0.1..-0.1 in float32"),
        (np.full((8, 8, 3), 256), {}, "values of 256..256 in int64; expected levels from 0 to 255"),
        (np.zeros((0, 5, 3), dtype=np.uint8), {}, "5 x 0 pixels"),
        (Image.new("RGB", (2000, 4)), {}, "2000 x 4 pixels has an aspect ratio of 500.0; expected at most 200"),
        (Image.new("I;16", (28, 28)), {"do_convert_rgb": False}, "1 channels; expected 3"),
        (picture(57, 56), {"do_resize": False}, "57 x 56 pixels.*multiples of 28"),
        (picture(56, 56), {"do_rescale": True}, "`do_rescale` and `do_normalize` must be equal, got True and False"),
        (picture(56, 56), {"do_normalize": True}, "`do_rescale` and `do_normalize` must be equal, got False and True"),
        (picture(56, 56), {"rescale_factor": 1.0}, "`rescale_factor` must be 1/255, got 1.0"),
        (picture(56, 56), {"temporal_patch_size": 2}, "`temporal_patch_size` must be 1, got 2"),
        (picture(56, 56), {"image_mean": [0.5, 0.5]}, r"`image_mean` must have 3 values"),
        (picture(56, 56), {"image_std": 0.5}, "`image_std` must have 3 values, got 0.5"),
        (picture(56, 56), {"size": {"shortest_edge": 64}}, "longest_edge"),
        ([], {}, "(expected|at least) one image"),
    ],
)
def test_bad_images_and_options_are_refused(image: object, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WindowFreeViTImageProcessor()(image, return_tensors="pt", **options)


@pytest.mark.parametrize("options", [{"do_normalize": True}, {"do_rescale": True}, {"temporal_patch_size": 2}])
def test_a_processor_that_could_not_work_is_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        WindowFreeViTImageProcessor(**options)


def test_a_video_is_its_frames_normalised() -> None:
    frames = [picture(448, 448, seed=seed) for seed in range(3)]
    processor = WindowFreeViTImageProcessor()
    inputs = processor.preprocess_videos(frames, return_tensors="pt")
    assert inputs["video_grid_thw"].tolist() == [[3, 32, 32]]
    assert inputs["pixel_values_videos"].dtype == torch.float32
    images = processor(frames, return_tensors="pt", **NORMALIZED)["pixel_values"]
    torch.testing.assert_close(inputs["pixel_values_videos"], images)


def test_videos_are_taken_in_every_form() -> None:
    frames = [picture(70, 90, seed=seed) for seed in range(2)]
    processor = WindowFreeViTImageProcessor()
    expected = processor.preprocess_videos(frames, return_tensors="pt")["pixel_values_videos"]
    array = np.stack([np.array(frame) for frame in frames])
    for video in (array, array.transpose(0, 3, 1, 2), torch.from_numpy(array), [array], [frames], [list(array)]):
        assert torch.equal(processor.preprocess_videos(video, return_tensors="pt")["pixel_values_videos"], expected)


def test_the_frames_of_all_videos_of_a_call_share_the_budget() -> None:
    long, short = [picture(448, 448)] * 3, [picture(300, 900)]
    processor = WindowFreeViTImageProcessor(video_max_total_pixels=4 * 150000)
    alone = processor.preprocess_videos(long, return_tensors="pt")["video_grid_thw"]
    assert alone.tolist() == [[3, 30, 30]]  # 600000 / 3 pixels a frame are just under 448 * 448
    grids = processor.preprocess_videos([long, short], return_tensors="pt")["video_grid_thw"]
    expected = [smart_resize(height, width, 28, 100352, 150000) for height, width in ((448, 448), (900, 300))]
    assert grids[:, 0].tolist() == [3, 1]
    assert (14 * grids[:, 1:]).tolist() == [list(size) for size in expected]


def test_video_options_of_a_call_come_before_those_of_the_processor() -> None:
    options = {"video_dynamic_pixels": False, "video_max_frame_pixels": 56**2, "video_min_frame_pixels": 28**2}
    inputs = WindowFreeViTImageProcessor().preprocess_videos([picture(448, 448)], return_tensors="np", **options)
    assert inputs["video_grid_thw"].tolist() == [[1, 4, 4]]
    inputs = WindowFreeViTImageProcessor().preprocess_videos([picture(28, 56)], do_resize=False)
    assert inputs["video_grid_thw"].tolist() == [[1, *(side // 14 for side in picture(28, 56).size[::-1])]]


@pytest.mark.parametrize(
    ("videos", "options", "message"),
    [
        ([], {}, "`videos` is empty"),
        (
            [[picture(56, 56)], [picture(56, 56), picture(56, 84)]],
            {},
            "frames of one size",
        ),
        (np.full((2, 56, 56, 3), 2.0), {}, "values of 2..2 in float64"),
        ([Image.new("RGB", (2000, 4))], {}, "aspect ratio of 500"),
        (np.zeros((0, 56, 56, 3), dtype=np.uint8), {}, r"`videos\[0\]` has no frames"),
        (
            [np.zeros((2, 56, 56, 3), dtype=np.uint8), np.zeros((0, 56, 56, 3), dtype=np.uint8)],
            {},
            r"`videos\[1\]` has no frames",
        ),
        (picture(56, 56), {}, "`videos` must hold videos as lists of frames .* got 'Image'"),
        ([picture(56, 56)], {"do_normalize": False}, "`do_normalize` must be True for videos, got False"),
        ([picture(56, 56)], {"do_rescale": False}, "`do_rescale` must be True for videos, got False"),
        ([picture(56, 56)], {"size": LIMITS}, "`size` must not be given for videos"),
        ([picture(56, 56)], {"video_max_frame_pixels": 1}, "Pixel limits must be positive"),
        ([picture(30, 30)], {"do_resize": False}, "30 x 30 pixels.*multiples of 28"),
    ],
)
def test_bad_videos_and_options_are_refused(videos: object, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WindowFreeViTImageProcessor().preprocess_videos(videos, return_tensors="pt", **options)


def test_it_is_saved_with_all_its_fields(tmp_path: Path) -> None:
    changes = {"max_aspect_ratio": 20.0, "video_max_total_pixels": 10**7, "video_dynamic_pixels": False, **NORMALIZED}
    processor = WindowFreeViTImageProcessor(**changes)
    processor.save_pretrained(tmp_path)
    again = WindowFreeViTImageProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == processor.to_dict()
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert {name: saved[name] for name in changes} == changes


@pytest.mark.parametrize("options", [{"do_sample_frames": True}, {"num_frames": 2}, {"fps": 1.0}])
def test_frames_of_videos_are_sampled_beforehand(options: dict) -> None:
    processor, video = WindowFreeViTImageProcessor(), np.zeros((2, 56, 56, 3), dtype=np.uint8)
    expected = processor.preprocess_videos(video)
    found = processor.preprocess_videos(video, do_sample_frames=False)
    np.testing.assert_array_equal(found["pixel_values_videos"], expected["pixel_values_videos"])
    with pytest.raises(ValueError, match="`do_sample_frames`, `num_frames` and `fps` must not be set"):
        processor.preprocess_videos(video, **options)
