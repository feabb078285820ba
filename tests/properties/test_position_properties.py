"""Properties of position embeddings of all grids."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.parts.position_oracle import COORDINATES, INTERPOLATIONS, all_options, draw_order_one, place_patches

from vlparts.parts.ops_rotary import apply_rotary, axial_rotary
from vlparts.parts.pos_embed import PositionEmbedding
from vlparts.parts.pos_embed_tables import axis_taps, axis_weights

EVERYTHING = [options for options in all_options() if options["overflow"] == "error"]
CLOSE = {"atol": 1e-10, "rtol": 1e-10}
table_rows = st.integers(1, 12)
sides = st.integers(1, 40)
grids_of_any_size = st.lists(st.tuples(st.integers(1, 11), st.integers(1, 11)), min_size=1, max_size=4)


@given(st.sampled_from(EVERYTHING), grids_of_any_size, st.data())
def test_a_patch_depends_on_its_place_and_grid_alone(
    options: dict[str, Any], grids: list[tuple[int, int]], data: st.DataObject
) -> None:
    """Any patches in any order, as after token dropping, have the embeddings of the whole image."""
    module = draw_order_one(PositionEmbedding(8, 11, **options))
    position_ids, grid_sizes = place_patches(grids)
    whole = torch.cat([module(*place_patches([grid])) for grid in grids])
    kept = torch.tensor(data.draw(st.lists(st.integers(0, len(position_ids) - 1), min_size=1, max_size=12)))
    torch.testing.assert_close(module(position_ids[kept], grid_sizes[kept]), whole[kept], **CLOSE)


@given(table_rows, sides, st.sampled_from(INTERPOLATIONS), st.sampled_from(["add", "joint"]))
def test_a_mirrored_table_gives_mirrored_positions(rows: int, side: int, interpolation: str, combination: str) -> None:
    module = draw_order_one(PositionEmbedding(2, rows, combination=combination, interpolation=interpolation))
    position_ids, grid_sizes = place_patches([(side, 1)])
    plain = module(position_ids, grid_sizes)
    with torch.no_grad():
        table = module.table if combination == "joint" else module.row
        table.copy_(table.flip(0).clone())
    torch.testing.assert_close(module(position_ids, grid_sizes), plain.flip(0), **CLOSE)


@given(table_rows, sides, st.sampled_from(INTERPOLATIONS))
def test_weights_sum_to_one(rows: int, side: int, interpolation: str) -> None:
    index = torch.arange(side)
    if interpolation.endswith("_antialias"):
        dense = axis_weights(index, torch.full_like(index, side), rows, interpolation, torch.float64)
        torch.testing.assert_close(dense.sum(-1), torch.ones(side, dtype=torch.float64))
    if side >= rows or not interpolation.endswith("_antialias"):
        taps, weights = axis_taps(index, torch.full_like(index, side), rows, interpolation, torch.float64)
        torch.testing.assert_close(weights.sum(-1), torch.ones(side, dtype=torch.float64))
        assert taps.min() >= 0
        assert taps.max() < rows


@given(table_rows, sides, sides, st.sampled_from(["bilinear", "bilinear_antialias"]))
def test_linear_mixtures_stay_between_the_rows(rows: int, height: int, width: int, interpolation: str) -> None:
    module = draw_order_one(PositionEmbedding(3, rows, combination="joint", interpolation=interpolation))
    embedded = module(*place_patches([(height, width)]))
    table = module.table.flatten(0, 1)
    assert (embedded <= table.amax(0) + 1e-12).all()
    assert (embedded >= table.amin(0) - 1e-12).all()


@given(st.sampled_from([o for o in EVERYTHING if o["coordinates"] == "fractional"]), st.integers(1, 12))
def test_square_images_have_one_kind_of_fraction(options: dict[str, Any], side: int) -> None:
    fractional = draw_order_one(PositionEmbedding(8, 5, **options))
    aspect = PositionEmbedding(8, 5, **{**options, "coordinates": "fractional_aspect"}).double()
    aspect.load_state_dict(fractional.state_dict())
    patches = place_patches([(side, side)])
    torch.testing.assert_close(fractional(*patches), aspect(*patches), **CLOSE)


@given(st.sampled_from(COORDINATES), st.integers(0, 30), st.integers(0, 30))
def test_sinusoids_and_fourier_features_take_any_grid(coordinates: str, y: int, x: int) -> None:
    """The embeddings have a known norm, that of sine and cosine of each angle."""
    place, size = torch.tensor([[y, x]]), torch.tensor([[y + 1, x + 1]])
    joint = PositionEmbedding(16, 4, kind="fourier", coordinates=coordinates, combination="joint").double()
    torch.testing.assert_close(joint(place, size).square().sum(), torch.tensor(8.0, dtype=torch.float64))
    if coordinates == "absolute":
        stacked = PositionEmbedding(16, 4, kind="sinusoidal", coordinates=coordinates, combination="stack")
        length = stacked(place, size, torch.float64).square().sum()
        torch.testing.assert_close(length, torch.tensor(8.0, dtype=torch.float64))


places = st.tuples(st.integers(0, 60), st.integers(0, 60))


@given(places, places, st.tuples(st.integers(0, 40), st.integers(0, 40)), st.sampled_from([4, 8, 20]))
def test_rotary_scores_depend_on_relative_positions(
    first: tuple[int, int], second: tuple[int, int], shift: tuple[int, int], head_dim: int
) -> None:
    query, key = torch.randn(2, 1, 3, head_dim, dtype=torch.float64).unbind()

    def score(offset: tuple[int, int]) -> torch.Tensor:
        moved = torch.tensor([first, second]) + torch.tensor(offset)
        cos, sin = axial_rotary(moved, head_dim)
        return (apply_rotary(query, cos[:1], sin[:1]) * apply_rotary(key, cos[1:], sin[1:])).sum(-1)

    # The angles are float32: at 100 patches off by about 1e-5.
    torch.testing.assert_close(score(shift), score((0, 0)), atol=2e-4, rtol=0)


@given(st.lists(places, min_size=1, max_size=6), st.sampled_from([4, 8, 20]))
def test_rotation_keeps_lengths_and_turns_back(positions: list[tuple[int, int]], head_dim: int) -> None:
    tensor = torch.randn(len(positions), 2, head_dim, dtype=torch.float64)
    cos, sin = axial_rotary(torch.tensor(positions), head_dim)
    rotated = apply_rotary(tensor, cos, sin)
    torch.testing.assert_close(rotated.norm(dim=-1), tensor.norm(dim=-1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(apply_rotary(rotated, cos, -sin), tensor, atol=1e-5, rtol=1e-5)
