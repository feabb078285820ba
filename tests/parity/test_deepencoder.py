"""`DeepEncoderModel` against transformers' `UnlimitedOcrVisionModel`, with copied weights in float64."""

import pytest
import torch
from torch import Tensor

from vlparts.parts.configuration_deepencoder import DeepEncoderConfig
from vlparts.parts.image_pixels import patchify
from vlparts.parts.modeling_deepencoder import DeepEncoderModel

from .unlimited_ocr import native_of, ours_of

# The published sides of windows and tables, so that views of 512 to 1280 pixels are resampled and padded alike.
PUBLISHED_SIDES = {"sam_position_size": 64, "sam_window_size": 14, "clip_position_size": 16}


def pack(views: list[Tensor]) -> dict[str, Tensor]:
    """Patches and grids of views `(3, H, W)`."""
    packed, grids = zip(*(patchify(view[None].numpy(), 16) for view in views), strict=True)
    return {
        "pixel_values": torch.cat([torch.from_numpy(patches) for patches in packed]),
        "image_grid_thw": torch.tensor(grids),
    }


@pytest.mark.parametrize("side", [512, 640, 1024, 1280])
def test_views_of_every_published_size(side: int) -> None:
    config = DeepEncoderConfig.from_preset("deepencoder_tiny", **PUBLISHED_SIDES)
    native = native_of(config).double()
    ours = ours_of(native, config)
    view = torch.randn(3, side, side, dtype=torch.float64)
    with torch.no_grad():
        expected = native(view[None]).last_hidden_state[0]
        result = ours(**pack([view]))
    assert result.tokens_per_image.tolist() == [side // 64 * (side // 64 + 1) + 1]
    assert expected.abs().max() > 1
    torch.testing.assert_close(result.last_hidden_state, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "vlparts_packed"])
def test_gradients(attention: str) -> None:
    config = DeepEncoderConfig.from_preset("deepencoder_tiny")
    native = native_of(config).double()
    ours = ours_of(native, config)
    ours.set_attn_implementation(attention)
    view = torch.randn(3, 192, 192, dtype=torch.float64)
    weights = torch.randn(9, config.hidden_size, dtype=torch.float64)
    (native(view[None]).last_hidden_state[0] * weights).sum().backward()
    (ours(**pack([view])).last_hidden_state * weights).sum().backward()
    expected = DeepEncoderModel(config).double()
    gradients = {name: parameter.grad for name, parameter in native.named_parameters()}
    with torch.no_grad():
        for name, parameter in native.named_parameters():
            parameter.copy_(gradients[name])
    expected = ours_of(native, config)
    for (name, parameter), (_, gradient) in zip(ours.named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(
            parameter.grad, gradient.data, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )
