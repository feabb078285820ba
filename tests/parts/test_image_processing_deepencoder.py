"""DeepSeek-OCR's image processor: modes, tiles against transformers' helper, padding against Pillow's, bad options."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from tests.tiny import picture
from vlparts import DeepEncoderImageProcessor
from vlparts.parts.image_processing_deepencoder import choose_tiles

# arXiv 2510.18234, table 1, and the tokens of tiles.
TOKENS = {"tiny": 64, "small": 100, "base": 256, "large": 400, "gundam": 4 * 100 + 256, "gundam_m": 4 * 256 + 400}


def unpack(patches: Tensor, height: int, width: int) -> Tensor:
    """Pixels `(3, H, W)` from 0 to 255 of one view."""
    pixels = rearrange(patches, "(h w) (c p q) -> c (h p) (w q)", h=height, w=width, c=3, p=16)
    return pixels * 127.5 + 127.5


@pytest.mark.parametrize("mode", TOKENS)
def test_tokens_of_each_mode(mode: str) -> None:
    processor = DeepEncoderImageProcessor(mode=mode)
    output = processor(picture(1100, 1100), return_tensors="pt")
    assert output["image_grid_thw"].prod(-1).sum() // 16 == TOKENS[mode]
    assert len(output["pixel_values"]) == output["image_grid_thw"].prod(-1).sum()
    assert processor.get_number_of_image_patches(1100, 1100) == len(output["pixel_values"])
    assert processor.get_number_of_valid_tokens(1100, 1100) == TOKENS[mode]
    assert output["image_tile_grid"].tolist() == ([[2, 2]] if mode.startswith("gundam") else [[0, 0]])


def test_views_are_tiles_row_after_row_and_then_the_whole_image() -> None:
    image = picture(909, 615)
    output = DeepEncoderImageProcessor(mode="gundam")([image, picture(100, 80)], return_tensors="pt")
    assert output["image_tile_grid"].tolist() == [[2, 3], [0, 0]]
    assert output["image_grid_thw"].tolist() == [[1, 40, 40]] * 6 + [[1, 64, 64]] * 2
    views = output["pixel_values"].split(output["image_grid_thw"].prod(-1).tolist())
    resized = torch.from_numpy(np.array(image.resize((3 * 640, 2 * 640), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    rows = [torch.cat([unpack(view, 40, 40) for view in views[start : start + 3]], dim=2) for start in (0, 3)]
    torch.testing.assert_close(torch.cat(rows, dim=1), resized.float(), rtol=0, atol=1e-4)
    padded = torch.from_numpy(np.array(ImageOps.pad(image, (1024, 1024), color=(127, 127, 127)))).permute(2, 0, 1)
    torch.testing.assert_close(unpack(views[6], 64, 64), padded.float(), rtol=0, atol=1e-4)


def test_modes_without_padding_resize_to_a_square() -> None:
    image = picture(300, 200)
    output = DeepEncoderImageProcessor()(image, mode="tiny", return_tensors="pt")
    square = torch.from_numpy(np.array(image.resize((512, 512), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    torch.testing.assert_close(unpack(output["pixel_values"], 32, 32), square.float(), rtol=0, atol=1e-4)


def test_100_000_grids_of_tiles_equal_those_of_transformers() -> None:
    sizes = random.Random(0)
    for _ in range(100_000):
        height, width = sizes.randint(1, 5000), sizes.randint(1, 5000)
        tile_size, most = sizes.choice([640, 1024]), sizes.choice([6, 9, 32])
        columns, rows = get_optimal_tiled_canvas((height, width), (tile_size, tile_size), 2, most)
        assert choose_tiles(height, width, tile_size, 2, most) == (rows, columns)


def test_sizes_from_which_images_are_tiled() -> None:
    processor = DeepEncoderImageProcessor(mode="gundam_m")
    assert processor.get_tile_grid(640, 640) == (0, 0)
    assert processor.get_tile_grid(641, 641) == (2, 2)
    assert processor.get_tile_grid(641, 641, untiled_size=1024) == (0, 0)
    assert processor.get_tile_grid(3000, 3000, max_tiles=6) == (2, 2)
    assert processor.get_tile_grid(3000, 3000) == (3, 3)
    assert processor.get_tile_grid(500, 2000) == (1, 4)


def test_valid_tokens_of_a_padded_page() -> None:
    # A4 at 200 dpi: ceil(256 * 1654 / 2339) = 182, as "Base" in table 2 of the paper.
    assert DeepEncoderImageProcessor(mode="base").get_number_of_valid_tokens(2339, 1654) == 182
    assert DeepEncoderImageProcessor(mode="tiny").get_number_of_valid_tokens(2339, 1654) == 64
    assert DeepEncoderImageProcessor(mode="gundam").get_number_of_valid_tokens(2339, 1654) == 6 * 100 + 182


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1)])
def test_extreme_sizes(size: tuple[int, int]) -> None:
    output = DeepEncoderImageProcessor(mode="gundam")(Image.new("RGB", size), return_tensors="pt")
    assert len(output["pixel_values"]) == output["image_grid_thw"].prod(-1).sum()


def test_options_replace_those_of_a_mode_and_are_saved(tmp_path: Any) -> None:
    processor = DeepEncoderImageProcessor(mode="large", base_size=768, padding_color=[255, 255, 255])
    processor.save_pretrained(tmp_path)
    again = DeepEncoderImageProcessor.from_pretrained(tmp_path)
    for one in (processor, again):
        output = one(Image.new("RGB", (10, 20)), return_tensors="pt")
        assert output["image_grid_thw"].tolist() == [[1, 48, 48]]
        assert output["pixel_values"].max() == 1.0
    assert again.to_dict() == processor.to_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "huge"}, "`mode` must be one of tiny, small, base, large, gundam, gundam_m, or None, got 'huge'"),
        ({"base_size": 1000}, r"`base_size` must be a multiple of 4 \* patch_size = 64, got 1000"),
        ({"tile_size": 650}, "`tile_size` must be a multiple of"),
        ({"min_tiles": 10}, "`min_tiles` must be at most `max_tiles`, got 10 and 9"),
        ({"max_tiles": 0}, "`max_tiles` must be an integer of at least 1, got 0"),
        ({"padding_color": [127, 127]}, "`padding_color` must be three integers from 0 to 255"),
        ({"do_resize": False}, "`do_resize` must be True"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepEncoderImageProcessor(**options)
    with pytest.raises(ValueError, match=message):
        DeepEncoderImageProcessor()(picture(10, 10), **options)
