"""Pooling, projectors and the check of towers on their own."""

import pytest
import torch
from torch import nn

from tests.tiny import navit_config, order_one
from vlparts.parts.packed_pooling import MaskedAttentionPooling
from vlparts.parts.vlm_features import tower_kind
from vlparts.parts.vlm_projectors import Projector, projector_names, register_projector


def test_pooling_an_empty_image_gives_what_no_patches_give() -> None:
    pooling = order_one(MaskedAttentionPooling(navit_config())).eval()
    hidden = torch.randn(3, 32)
    pooled = pooling(hidden, torch.tensor([0, 3, 3], dtype=torch.int32), 3)
    other = pooling(hidden * 5, torch.tensor([0, 3, 3], dtype=torch.int32), 3)
    assert torch.isfinite(pooled).all()
    assert torch.equal(pooled[1], other[1])
    assert not torch.equal(pooled[0], other[0])


def test_projectors_merge_neighbours() -> None:
    projector = Projector("linear", vision_width=3, text_width=7, merge_size=2)
    features = torch.randn(8, 3)
    expected = projector.projection(torch.stack([features[:4].flatten(), features[4:].flatten()]))
    torch.testing.assert_close(projector(features), expected)


def test_registering_projectors() -> None:
    with pytest.raises(ValueError, match="`kind`.*'no such'"):
        Projector("no such", 3, 7)
    with pytest.raises(ValueError, match="'linear' is taken"):
        register_projector("linear", lambda width, out: nn.Identity())
    register_projector("linear", nn.Linear)
    assert {"linear", "mlp2_gelu"} <= set(projector_names())


def test_a_tower_without_pixels_is_refused() -> None:
    class Deaf(nn.Module):
        def forward(self, sound: torch.Tensor) -> torch.Tensor:
            return sound

    with pytest.raises(ValueError, match="Deaf takes sound"):
        tower_kind(Deaf())
