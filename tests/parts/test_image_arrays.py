"""Images of any type become the pixels of the same Pillow image, in each image processor."""

import base64
import io
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import VisionTextDualEncoderProcessor

from tests.tiny import picture, save_turned, text_config, tokenizer, vision_config
from vlparts import NaViTImageProcessor, WindowFreeViTImageProcessor, compose, compose_processor
from vlparts.parts.image_arrays import fetch_images, flat_list_of_images, image_to_array

RGB = np.asarray(picture(24, 16))
GREY = RGB[..., 0]
ALPHA = np.asarray(picture(24, 16, seed=1))[..., 0]


def palette() -> Image.Image:
    image = Image.fromarray(RGB).convert("P", palette=Image.Palette.ADAPTIVE)
    image.info["transparency"] = 0
    return image


IMAGES: dict[str, Image.Image] = {
    "RGB": Image.fromarray(RGB),
    "L": Image.fromarray(GREY),
    "LA": Image.fromarray(np.stack([GREY, ALPHA], -1)),
    "RGBA": Image.fromarray(np.concatenate([RGB, ALPHA[..., None]], -1)),
    "1": Image.fromarray(GREY > 99),
    "I;16": Image.fromarray(GREY.astype(np.uint16) * 256 + ALPHA),
    "F": Image.fromarray(ALPHA.astype(np.float32) / 255),
}


def on_white(levels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return levels * share + 255 * (1 - share)


EXPECTED: dict[str, np.ndarray] = {
    "RGB": RGB,
    "L": GREY[..., None],
    "LA": on_white(GREY[..., None], ALPHA),
    "RGBA": on_white(RGB, ALPHA),
    "1": (GREY[..., None] > 99) * 255.0,
    "I;16": (GREY[..., None] * 256.0 + ALPHA[..., None]) / 257,
    "F": ALPHA[..., None],
}


@pytest.mark.parametrize("mode", IMAGES)
def test_arrays_of_each_mode_equal_the_pillow_image(mode: str) -> None:
    image, array = IMAGES[mode], np.asarray(IMAGES[mode])
    expected = image_to_array(image)
    assert (expected.shape, expected.dtype) == ((3, 16, 24), np.uint8)
    oracle = np.broadcast_to(np.moveaxis(EXPECTED[mode], -1, 0), (3, 16, 24))
    np.testing.assert_allclose(expected, oracle, atol=0.51 if "A" not in mode else 1)
    np.testing.assert_array_equal(image_to_array(array), expected)
    np.testing.assert_array_equal(image_to_array(torch.from_numpy(array.copy())), expected)
    if array.ndim == 3:
        first = np.moveaxis(array, -1, 0)
        np.testing.assert_array_equal(image_to_array(first), expected)
        np.testing.assert_array_equal(image_to_array(torch.from_numpy(first.copy())), expected)
    else:
        np.testing.assert_array_equal(image_to_array(array[None]), expected)
        np.testing.assert_array_equal(image_to_array(array[..., None]), expected)


@pytest.mark.parametrize("image", [palette(), Image.fromarray(RGB).convert("CMYK")], ids=["P", "CMYK"])
def test_modes_without_an_array_of_their_own_are_converted(image: Image.Image) -> None:
    converted = image_to_array(image)
    white = np.asarray(image) == 0 if image.mode == "P" else np.zeros((16, 24), bool)
    expected = np.where(white[..., None], 255, np.asarray(image.convert("RGB")))
    np.testing.assert_array_equal(converted, np.moveaxis(expected, -1, 0))


TYPES: dict[str, Callable[[np.ndarray], Any]] = {
    "float64": lambda levels: levels / 255,
    "float32": lambda levels: levels.astype(np.float32) / 255,
    "float16": lambda levels: (levels / 255).astype(np.float16),
    "uint16": lambda levels: levels.astype(np.uint16) * 257,
    "big-endian uint16": lambda levels: (levels.astype(np.uint16) * 257).astype(">u2"),
    "int64": lambda levels: levels.astype(np.int64),
    "float tensor": lambda levels: torch.tensor(levels / 255),
    "bfloat16 tensor": lambda levels: torch.tensor(levels // 128).bfloat16(),
    "int64 tensor": lambda levels: torch.tensor(levels).long(),
    "tensor with gradients": lambda levels: torch.tensor(levels / 255, requires_grad=True),
    "Pillow": Image.fromarray,
}


def navit(images: Any, **options: Any) -> torch.Tensor:
    processor = NaViTImageProcessor(patch_size=8, size={"shortest_edge": 64, "longest_edge": 256})
    return processor(images, return_tensors="pt", **options)["pixel_values"]


def raw(images: Any, **options: Any) -> torch.Tensor:
    pixels = WindowFreeViTImageProcessor()(images, return_tensors="pt", **options)["pixel_values"]
    assert pixels.dtype == torch.uint8
    return pixels


def normalized(images: Any, **options: Any) -> torch.Tensor:
    return WindowFreeViTImageProcessor(do_rescale=True, do_normalize=True)(images, return_tensors="pt", **options)[
        "pixel_values"
    ]


@cache
def processor_of(kind: str) -> Any:
    """The processor of the dual encoder, or of a composed model with a vision encoder of this kind."""
    words = tokenizer()
    if kind == "dual encoder":
        return VisionTextDualEncoderProcessor(NaViTImageProcessor(patch_size=8), words)
    return compose_processor(compose(vision_config(kind), text_config("qwen3", words)), words)


def dual_encoder(images: Any, **options: Any) -> torch.Tensor:
    return processor_of("dual encoder")(images=images, text=["a"], return_tensors="pt", **options)["pixel_values"]


def composed(kind: str) -> Callable[..., torch.Tensor]:
    def process(images: Any, **options: Any) -> torch.Tensor:
        text = "<image>" * len(flat_list_of_images(fetch_images(images)))
        return processor_of(kind)(images=images, text=[text], return_tensors="pt", **options)["pixel_values"]

    return process


PROCESSORS: dict[str, Callable[..., torch.Tensor]] = {
    "NaViT": navit,
    "window-free, raw": raw,
    "window-free": normalized,
    "dual encoder": dual_encoder,
    **{f"composed {kind}": composed(kind) for kind in ("navit", "clip", "siglip2")},
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_each_processor_takes_each_type_as_the_pillow_image(name: str) -> None:
    process = PROCESSORS[name]
    levels = np.where(RGB > 99, 255, 0).astype(np.uint8)  # bfloat16 has these levels
    pixels = process([Image.fromarray(levels)])
    for kind, convert in TYPES.items():
        array = convert(levels) if kind != "bfloat16 tensor" else torch.tensor(levels // 255).bfloat16()
        assert torch.equal(process([array]), pixels), kind
    for mode, image in IMAGES.items():
        assert torch.equal(process([np.asarray(image)]), process([image])), mode
    grey = np.stack([GREY, GREY])
    expected = process([Image.fromarray(GREY)] * 2)
    assert torch.equal(process([grey[0], torch.tensor(grey[1])]), expected), "grey arrays"
    assert torch.equal(process(grey[..., None]), expected), "a batch"
    assert torch.equal(process(torch.tensor(grey[:, None])), expected), "a batch of tensors"


@pytest.mark.parametrize("name", PROCESSORS)
def test_each_processor_refuses_what_it_cannot_know(name: str) -> None:
    process = PROCESSORS[name]
    ambiguous = np.ascontiguousarray(np.moveaxis(RGB, -1, 0)[:, :, :3])
    with pytest.raises(ValueError, match=r"shape \(3, 16, 3\) has two axes .*`input_data_format` must be"):
        process([ambiguous])
    expected = process([Image.fromarray(np.ascontiguousarray(np.moveaxis(ambiguous, 0, -1)))])
    assert torch.equal(process([ambiguous], input_data_format="channels_first"), expected)
    for wrong, message in (
        (np.full((16, 24, 3), np.nan), "not finite"),
        (np.full((16, 24, 3), -0.5), "values of -0.5"),
        (RGB.astype(np.float32), "in float32; expected floats from 0 to 1"),
        (RGB.astype(np.int32) * 2, "expected levels from 0 to 255"),
        (np.zeros((16, 24, 3), np.complex64), "array of complex64"),
        (np.zeros((16, 24, 5), np.uint8), "no axis with 1 to 4 channels"),
        (np.zeros((16,), np.uint8), r"got an array of shape \(16,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            process([wrong])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_processor_turns_images_upright(tmp_path: Path, orientation: int) -> None:
    path = save_turned(picture(24, 16), tmp_path / "a.png", orientation)
    encoded = base64.b64encode(path.read_bytes()).decode()
    for name, process in PROCESSORS.items():
        expected = process([picture(24, 16)])
        given = [Image.open(path), str(path), encoded, f"data:image/png;base64,{encoded}"]
        for image in given:
            assert torch.equal(process([image]), expected), name


VIDEO = np.stack([np.asarray(picture(56, 28, seed)) for seed in range(3)])


@pytest.mark.parametrize(
    "video",
    [
        [Image.fromarray(frame) for frame in VIDEO],
        VIDEO,
        list(VIDEO / 255),
        torch.tensor(VIDEO).movedim(-1, 1),
        VIDEO.astype(np.uint16) * 257,
        [torch.tensor(frame).movedim(-1, 0).float() / 255 for frame in VIDEO],
    ],
    ids=["Pillow", "array", "list of floats", "tensor", "uint16", "list of float tensors"],
)
def test_videos_of_each_type_are_equal(video: Any) -> None:
    processor = WindowFreeViTImageProcessor()
    expected = processor.preprocess_videos(VIDEO, return_tensors="pt")
    found = processor.preprocess_videos([video], return_tensors="pt")
    assert found["video_grid_thw"].tolist() == expected["video_grid_thw"].tolist()
    assert torch.equal(found["pixel_values_videos"], expected["pixel_values_videos"])
    shares = processor.preprocess_videos([list(VIDEO[..., 0])], return_tensors="pt")["pixel_values_videos"]
    grey = [Image.fromarray(frame) for frame in VIDEO[..., 0]]
    assert torch.equal(shares, processor.preprocess_videos([grey], return_tensors="pt")["pixel_values_videos"])


def test_frames_are_turned_upright(tmp_path: Path) -> None:
    turned = [Image.open(save_turned(picture(56, 28), tmp_path / f"{one}.png", one)) for one in range(1, 9)]
    processor = WindowFreeViTImageProcessor()
    found = processor.preprocess_videos(turned, return_tensors="pt")["pixel_values_videos"]
    expected = processor.preprocess_videos([picture(56, 28)] * 8, return_tensors="pt")["pixel_values_videos"]
    assert torch.equal(found, expected)


def test_levels_are_kept_without_conversion_to_rgb() -> None:
    for mode in ("L", "LA", "RGBA", "1", "I;16", "F"):
        kept = image_to_array(IMAGES[mode], convert_rgb=False)
        np.testing.assert_array_equal(kept, image_to_array(np.asarray(IMAGES[mode]), convert_rgb=False))
        assert kept.shape[0] == len(IMAGES[mode].getbands())
    np.testing.assert_array_equal(image_to_array(GREY, convert_rgb=False), GREY[None])
    bands = np.zeros((7, 16, 24), np.uint8)
    assert image_to_array(bands, False, "channels_first").shape == (7, 16, 24)
    with pytest.raises(ValueError, match="The image has 7 channels; expected 1 to 4"):
        image_to_array(bands, True, "channels_first")
    with pytest.raises(ValueError, match="mode 'P', whose levels are indices into a palette"):
        image_to_array(palette(), convert_rgb=False)
    with pytest.raises(ValueError, match="`input_data_format` must be .* got 'chw'"):
        image_to_array(RGB, True, "chw")


def test_sources_that_cannot_be_opened_are_named(tmp_path: Path) -> None:
    broken = io.BytesIO(b"no image")
    (tmp_path / "a.png").write_bytes(broken.getvalue())
    for source, message in (
        (str(tmp_path / "a.png"), r"a\.png cannot be read"),
        (tmp_path / "b.png", r"b\.png does not exist"),
        ("pictures/b.png", r"Image pictures/b\.png does not exist, and is neither a URL nor base64 text"),
        ("bm8gaW1hZ2U=", "Image from memory cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            NaViTImageProcessor()(source)
    with pytest.raises(ValueError, match="`images` must hold Pillow images, NumPy arrays or tensors, got int"):
        NaViTImageProcessor()([[[0, 1], [2, 3]]])
