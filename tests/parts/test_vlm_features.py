"""The layouts in which vision encoders take images."""

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig

from tests.tiny import vision_config
from vlparts.parts.part_models import model_from_config
from vlparts.parts.vlm_features import pixel_layout


@pytest.mark.parametrize(("kind", "layout"), [("navit", "packed"), ("siglip2", "naflex"), ("clip", "square")])
def test_the_layout_follows_from_the_arguments_of_forward(kind: str, layout: str) -> None:
    with torch.device("meta"):
        assert pixel_layout(model_from_config(vision_config(kind))) == layout


def test_an_encoder_without_pixels_is_refused() -> None:
    class Deaf(nn.Module):
        config = PreTrainedConfig()

        def forward(self, sound: torch.Tensor) -> torch.Tensor:
            return sound

    with pytest.raises(
        ValueError, match="`vision` Deaf of type '' takes sound; expected .* a forward with `pixel_values`"
    ):
        pixel_layout(Deaf())
