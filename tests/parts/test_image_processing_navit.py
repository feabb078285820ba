"""Image processor of NaViT: patches against loops, kinds of images, bad input."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.tiny import picture
from vlparts import NaViTImageProcessor

PLAIN = {"do_resize": False, "do_rescale": False, "do_normalize": False}


def test_patches_are_cut_row_by_row_channels_first() -> None:
    image = np.arange(8 * 12 * 3).reshape(8, 12, 3).astype(np.uint8)
    inputs = NaViTImageProcessor(patch_size=4, **PLAIN)(Image.fromarray(image), return_tensors="np")
    assert inputs["image_grid_thw"].tolist() == [[1, 2, 3]]
    expected = [
        image[4 * row : 4 * row + 4, 4 * column : 4 * column + 4].transpose(2, 0, 1).ravel()
        for row in range(2)
        for column in range(3)
    ]
    np.testing.assert_array_equal(inputs["pixel_values"], np.stack(expected))


def test_merge_order_equals_the_native_processor_of_qwen2_vl() -> None:
    image = picture(56, 84)
    ours = NaViTImageProcessor(patch_size=14, merge_size=2, do_resize=False)(image, return_tensors="pt")
    native = Qwen2VLImageProcessorPil(
        do_resize=False, temporal_patch_size=1, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )(image, return_tensors="pt")
    assert ours["image_grid_thw"].tolist() == native["image_grid_thw"].tolist()
    torch.testing.assert_close(ours["pixel_values"], native["pixel_values"])


def test_images_of_many_sizes_follow_each_other() -> None:
    images = [picture(40, 20), picture(8, 8), picture(9, 31)]
    processor = NaViTImageProcessor(patch_size=8)
    inputs = processor(images, return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 2, 5], [1, 2, 2], [1, 4, 1]]
    alone = torch.cat([processor(image, return_tensors="pt")["pixel_values"] for image in images])
    assert torch.equal(inputs["pixel_values"], alone)
    for image, (_, rows, columns) in zip(images, inputs["image_grid_thw"].tolist(), strict=True):
        assert processor.get_number_of_image_patches(image.height, image.width) == rows * columns


def test_values_are_rescaled_and_normalised() -> None:
    inputs = NaViTImageProcessor(patch_size=4)(Image.new("RGB", (4, 4), (255, 0, 51)), return_tensors="pt")
    expected = torch.tensor([1.0, -1.0, 51 / 127.5 - 1]).repeat_interleave(16)[None].repeat(16, 1)
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 4]]
    torch.testing.assert_close(inputs["pixel_values"], expected)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "1"])
def test_every_mode_is_taken(mode: str) -> None:
    inputs = NaViTImageProcessor(patch_size=4)(Image.new(mode, (16, 16)), return_tensors="pt")
    assert inputs["pixel_values"].shape == (16, 48)
    assert torch.isfinite(inputs["pixel_values"]).all()


def test_arrays_and_tensors_are_taken_like_pictures() -> None:
    image = picture(16, 24)
    processor = NaViTImageProcessor(patch_size=8)
    expected = processor(image, return_tensors="pt")["pixel_values"]
    array = np.asarray(image)
    assert torch.equal(processor(array, return_tensors="pt")["pixel_values"], expected)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    assert torch.equal(processor(tensor, return_tensors="pt")["pixel_values"], expected)


def test_one_pixel_is_enlarged() -> None:
    inputs = NaViTImageProcessor()(Image.new("RGB", (1, 1)), return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 1, 1]]


def test_options_of_a_call_come_before_those_of_the_processor() -> None:
    processor = NaViTImageProcessor(patch_size=8)
    size = {"shortest_edge": 64, "longest_edge": 256}
    inputs = processor(picture(64, 64), size=size, return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 2, 2]]
    assert processor.size["longest_edge"] == 1024 * 1024


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (np.zeros((0, 5, 3), dtype=np.uint8), {}, "size of 5 x 0 pixels"),
        (Image.new("RGB", (0, 5)), {}, "size of 0 x 5 pixels"),
        (np.full((8, 8, 3), np.nan), {}, "not finite"),
        (Image.new("RGB", (2000, 4)), {}, "aspect ratio of 500"),
        (Image.new("F", (4, 4), 255.0), {}, "values of 255..255 in float32; expected floats from 0 to 1"),
        (picture(16, 16), {"do_rescale": False}, "`do_rescale` is False, so the levels are from 0 to 255, but"),
        (picture(17, 16), {"do_resize": False}, "17 x 16 pixels.*multiples of 16"),
        (picture(16, 16), {"size": {"shortest_edge": 64}}, "longest_edge"),
    ],
)
def test_bad_images_are_refused(image: object, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NaViTImageProcessor()(image, return_tensors="pt", **options)


def test_a_truncated_file_is_refused() -> None:
    data = io.BytesIO()
    picture(64, 64).save(data, "PNG")
    with pytest.raises(ValueError, match="cannot be read.*(truncated|broken)"):
        NaViTImageProcessor()(Image.open(io.BytesIO(data.getvalue()[:2000])), return_tensors="pt")


def test_no_image_is_refused() -> None:
    with pytest.raises(ValueError, match="(expected|at least) one image"):
        NaViTImageProcessor()([], return_tensors="pt")


def test_an_extreme_image_can_be_stretched() -> None:
    processor = NaViTImageProcessor(patch_size=4, on_extreme_aspect="clamp", max_aspect_ratio=50.0)
    inputs = processor(Image.new("RGB", (2000, 4)), return_tensors="pt")
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    assert columns / rows == pytest.approx(50, rel=0.15)


def test_it_is_saved_and_found_again(tmp_path: object) -> None:
    from transformers import AutoImageProcessor

    processor = NaViTImageProcessor(patch_size=8, max_aspect_ratio=20.0)
    processor.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(again, NaViTImageProcessor)
    assert (again.patch_size, again.max_aspect_ratio) == (8, 20.0)
