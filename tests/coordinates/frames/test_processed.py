"""Frames of image processors, against where the processors put the pixels of a ramp."""

from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from vlparts import CattyImageProcessor, DeepEncoderImageProcessor, NaViTImageProcessor, WindowFreeViTImageProcessor
from vlparts.coordinates import (
    CoordinateError,
    Frame,
    Original,
    Processed,
    Region,
    as_seen,
    decode,
    encode,
    get_format,
)

PLAIN = {"do_rescale": False, "do_normalize": False}
SIZES = [(120, 90), (90, 121), (61, 60)]
PROCESSORS: dict[str, Any] = {
    "CLIP": CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}, **PLAIN),
    "a larger image than its crop": BitImageProcessorPil(
        size={"shortest_edge": 64}, crop_size={"height": 41, "width": 56}, **PLAIN
    ),
    "a smaller image than its crop": CLIPImageProcessorPil(
        do_resize=False, crop_size={"height": 101, "width": 97}, **PLAIN
    ),
    "ViT": ViTImageProcessorPil(size={"height": 40, "width": 56}, **PLAIN),
    "nothing": ViTImageProcessorPil(do_resize=False, **PLAIN),
    "padding": ViTImageProcessorPil(do_resize=False, do_pad=True, pad_size={"height": 130, "width": 140}, **PLAIN),
    "NaViT": NaViTImageProcessor(patch_size=8, size={"shortest_edge": 64, "longest_edge": 6400}, **PLAIN),
    "window-free": WindowFreeViTImageProcessor(size={"shortest_edge": 28**2, "longest_edge": 84**2}),
    "Siglip2": Siglip2ImageProcessorPil(patch_size=8, max_num_patches=64, **PLAIN),
}


def ramps(width: int, height: int) -> Image.Image:
    """x in red, y in green, from 0 to 250 at the far edges, and blue that is not padding."""
    x, y = ((np.arange(side) + 0.5) * 250 / side for side in (width, height))
    red, green = np.meshgrid(x, y)
    return Image.fromarray(np.stack([red, green, np.full_like(red, 255)], -1).round().astype(np.uint8))


def output(processor: Any, image: Image.Image) -> np.ndarray:
    """The picture that the model receives, `(H, W, 3)`."""
    inputs = processor(image, return_tensors="np")
    pixels = inputs["pixel_values"][0] if "image_grid_thw" not in inputs else inputs["pixel_values"]
    if pixels.ndim == 3:
        return np.moveaxis(pixels, 0, -1)
    patch, merge = processor.patch_size, getattr(processor, "merge_size", 1)
    if "spatial_shapes" in inputs:
        rows, columns = inputs["spatial_shapes"][0]
        patches = pixels[: rows * columns].reshape(rows, columns, patch, patch, 3)
        return patches.transpose(0, 2, 1, 3, 4).reshape(rows * patch, columns * patch, 3)
    _, rows, columns = inputs["image_grid_thw"][0]
    patches = pixels.reshape(rows // merge, columns // merge, merge, merge, 3, patch, patch)
    return patches.transpose(0, 2, 5, 1, 3, 6, 4).reshape(rows * patch, columns * patch, 3)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PROCESSORS)
def test_frames_say_where_pixels_go(name: str, size: tuple[int, int]) -> None:
    seen = output(PROCESSORS[name], ramps(*size)).astype(float)
    frame = Processed(PROCESSORS[name])(size)
    assert frame.size == seen.shape[1::-1]
    columns, rows = np.meshgrid(np.arange(frame.size[0]) + 0.5, np.arange(frame.size[1]) + 0.5)
    points = frame.to_image(np.stack([columns.ravel(), rows.ravel()], 1)).reshape(*seen.shape[:2], 2)
    inside = ((points > 0) & (points < size)).all(-1)
    np.testing.assert_array_equal(inside, seen[..., 2] > 0)  # padding is black
    # Away from the edges, where resampling has no pixels on one side.
    inner = ((points > 0.06 * np.array(size)) & (points < 0.94 * np.array(size))).all(-1)
    assert inner.sum() > 500
    np.testing.assert_allclose(seen[inner][:, :2], points[inner] * 250 / size, atol=1.6)


@pytest.mark.parametrize("name", PROCESSORS)
def test_relative_numbers_change_only_with_a_crop_or_padding(name: str) -> None:
    frame = Processed(PROCESSORS[name], relative=True)((120, 90))
    assert frame.is_original is (name not in ("CLIP", "padding", *(one for one in PROCESSORS if "crop" in one)))


def test_a_processor_with_an_image_processor_is_taken() -> None:
    class Processor:
        image_processor = PROCESSORS["ViT"]

    assert Processed(Processor())((120, 90)) == Frame.resized((120, 90), (56, 40))


def test_regions_are_written_and_read_relative_to_what_is_seen() -> None:
    seen, size = as_seen(None, PROCESSORS["CLIP"]), (120, 60)
    # The crop shows x from 30 to 90.
    region = Region.box(30, 6, 60, 54, "cat")
    text = encode([region], size, seen)
    assert text == encode([Region.box(0, 6, 30, 54, "cat")], (60, 60))
    (found,) = decode(text, size, seen).regions
    np.testing.assert_allclose(found.xyxy, region.xyxy, atol=0.06)
    outside = Region.box(10, 6, 60, 54, "cat")
    with pytest.raises(CoordinateError, match=r"outside the frame of format 'openpangu'; on_outside='clamp'"):
        encode([outside], size, seen)
    assert encode([outside], size, seen, on_outside="clamp") == text
    assert encode([outside, region], size, seen, on_outside="skip") == text


def test_formats_with_a_frame_of_their_own_and_resizing_processors_change_nothing() -> None:
    assert as_seen("qwen2_5_vl", PROCESSORS["CLIP"]) is get_format("qwen2_5_vl")
    regions = [Region.box(11, 7, 63, 54, "cat"), Region.point(119, 3)]
    for name in ("ViT", "NaViT", "Siglip2"):
        assert encode(regions, (120, 60), as_seen("openpangu", PROCESSORS[name])) == encode(regions, (120, 60))
    assert get_format(None).frame == Original()


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (ConvNextImageProcessorPil(size={"shortest_edge": 48}), "ConvNext.* handles `shortest_edge` in its own way"),
        (CLIPImageProcessorPil(size={"longest_edge": 48}), "has `size` .*; expected height and width, or"),
    ],
)
def test_unknown_steps_are_errors(processor: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Processed(processor)((120, 90))


@pytest.mark.parametrize(
    "processor", [CattyImageProcessor(), DeepEncoderImageProcessor(mode="tiny")], ids=["CATTY", "tiny"]
)
def test_an_image_cut_into_views_has_relative_numbers_only(processor: Any) -> None:
    assert Processed(processor, relative=True)((120, 90)) == Frame.original((120, 90))
    with pytest.raises(ValueError, match="cuts an image into views; its frame is unknown"):
        Processed(processor)((120, 90))
