"""Positions, pooling and projectors on their own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.tiny import navit_config, order_one
from vlparts.parts.pooling import MaskedAttentionPooling
from vlparts.parts.positions import FactorizedPositionEmbedding
from vlparts.parts.projectors import Projector, projector_names, register_projector
from vlparts.parts.vision_features import tower_kind


@given(st.integers(1, 12), st.integers(1, 40))
def test_fractional_positions_are_linear_resampling(rows: int, size: int) -> None:
    """The half-pixel map is that of `interpolate(..., align_corners=False)`."""
    positions = FactorizedPositionEmbedding(rows, 5).double()
    index = torch.arange(size)
    place = torch.stack([index, torch.zeros_like(index)], -1)
    sizes = torch.stack([torch.full_like(index, size), torch.ones_like(index)], -1)
    ours = positions(place, sizes)
    column = positions(torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.long))
    expected = nn.functional.interpolate(positions.row.T[None], size=size, mode="linear", align_corners=False)
    middle = nn.functional.interpolate(positions.row.T[None], size=1, mode="linear", align_corners=False)
    torch.testing.assert_close(ours, expected[0].T + (column - middle[0].T))


def test_a_grid_of_the_tables_size_takes_the_tables_rows() -> None:
    fractional = FactorizedPositionEmbedding(6, 4)
    absolute = FactorizedPositionEmbedding(6, 4, "absolute")
    absolute.load_state_dict(fractional.state_dict())
    place = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    torch.testing.assert_close(
        fractional(place, torch.full_like(place, 6)), absolute(place, torch.full_like(place, 6))
    )


def test_unknown_coordinates_are_refused() -> None:
    with pytest.raises(ValueError, match="`coordinates`.*'polar'"):
        FactorizedPositionEmbedding(4, 4, "polar")


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
