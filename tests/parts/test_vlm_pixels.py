"""Raw pixels in floating point, as a collator of another library makes them, are refused on every way into a model."""

import pytest
import torch
from torch import Tensor

from tests.parts.test_vlm_distributed import OURS, composition
from tests.tiny import navit, packed_images
from vlparts import NaViTConfig, NaViTForImageClassification
from vlparts.parts.vlm_distributed import blank_image

NATIVE = ("clip_vision_model", "siglip2_vision_model", "pixtral", "gemma4_vision", "qwen2_5_vl_vision", "swin")


def blank(vision: str, value: float, dtype: torch.dtype) -> tuple:
    """A composed model, and an image of one value."""
    model = composition(vision)
    inputs = blank_image(model.model.vision_tower, model.config.merge_size, torch.device("cpu"))
    return model, {**inputs, "pixel_values": torch.full_like(inputs["pixel_values"], value, dtype=dtype)}


@pytest.mark.parametrize("vision", [*OURS, *NATIVE])
def test_composed_models_refuse_raw_pixels(vision: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        model, inputs = blank(vision, 255, dtype)
        with pytest.raises(ValueError, match=f"`pixel_values` holds values up to 255 in {dtype}; expected normalized"):
            model.get_image_features(**inputs)
    model, inputs = blank(vision, 200, torch.int64)
    with pytest.raises(ValueError, match="`pixel_values` is torch.int64; expected"):
        model.get_image_features(**inputs)
    model, inputs = blank(vision, 2.5, torch.float32)
    assert len(model.get_image_features(**inputs).pooler_output) == 1


def test_videos_are_checked() -> None:
    model, inputs = blank("navit", 255, torch.float32)
    with pytest.raises(ValueError, match="values up to 255"):
        model.get_video_features(inputs["pixel_values"], inputs["image_grid_thw"])


@pytest.mark.parametrize("vision", [name for name in OURS if name != "windowfree"])
def test_raw_bytes_are_only_for_models_that_normalise(vision: str) -> None:
    model, inputs = blank(vision, 200, torch.uint8)
    with pytest.raises(ValueError, match="is torch.uint8; expected normalized pixels in floating point"):
        model.get_image_features(**inputs)
    model, inputs = blank("windowfree", 200, torch.uint8)
    assert len(model.get_image_features(**inputs).pooler_output) == 1


def images(value: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    pixels, grids = packed_images([(2, 3), (4, 1)])
    return torch.full_like(pixels, value, dtype=dtype), grids


def test_navit_alone_refuses_raw_pixels() -> None:
    classifier = NaViTForImageClassification(NaViTConfig.from_preset("tiny", patch_size=4, num_labels=3))
    for model in (navit(), classifier):
        with pytest.raises(ValueError, match="values up to 255 in torch.bfloat16.*normalize them by"):
            model(*images(255, torch.bfloat16))
        with pytest.raises(ValueError, match="is torch.uint8; expected normalized pixels"):
            model(*images(255, torch.uint8))
        model(*images(-2.5))


def test_precomputed_inputs_are_not_read() -> None:
    """So that they need no answer from an accelerator."""
    model = navit()
    pixels, grids = images(255)
    assert model(pixels, grids, **model.precompute(grids)).last_hidden_state.isfinite().all()
