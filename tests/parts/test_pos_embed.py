"""Position embeddings: every set of options against loops, larger grids, types, initial values, compiled code."""

from typing import Any

import pytest
import torch
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings

from tests.parts.position_oracle import all_options, draw_order_one, embed_grid, name_of, place_patches
from vlparts.parts.pos_embed import PositionEmbedding
from vlparts.parts.pos_embed_tables import resample_grid, resample_whole_grid

FITTING = [(3, 4), (5, 5), (1, 1), (5, 2)]
GRIDS = [*FITTING, (9, 13), (2, 17), (6, 3), (5, 6)]
every_set_of_options = pytest.mark.parametrize("options", list(all_options()), ids=name_of)


def is_limited(options: dict[str, Any]) -> bool:
    return (options["kind"], options["coordinates"], options["overflow"]) == ("learned", "absolute", "error")


@every_set_of_options
def test_equals_loops_over_images(options: dict[str, Any]) -> None:
    module = draw_order_one(PositionEmbedding(8, 5, **options))
    grids = FITTING if is_limited(options) else GRIDS
    ours = module(*place_patches(grids), torch.float64)
    expected = torch.cat([embed_grid(module, grid) for grid in grids])
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)
    parameters = list(module.parameters())
    if parameters:
        grad = torch.randn_like(expected)
        ours_grad = torch.autograd.grad(ours, parameters, grad)
        torch.testing.assert_close(ours_grad, torch.autograd.grad(expected, parameters, grad), atol=1e-12, rtol=1e-12)


@every_set_of_options
def test_padding_is_finite(options: dict[str, Any]) -> None:
    module = draw_order_one(PositionEmbedding(8, 5, **options))
    position_ids, grid_sizes = place_patches([(3, 4)])
    padding = torch.zeros(2, 2, dtype=torch.int64)
    padded = module(torch.cat([position_ids, padding]), torch.cat([grid_sizes, padding]))
    assert torch.isfinite(padded).all()
    torch.testing.assert_close(padded[:-2], module(position_ids, grid_sizes))
    if padded.requires_grad:
        padded.sum().backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in module.parameters())


@every_set_of_options
def test_no_patches(options: dict[str, Any]) -> None:
    assert PositionEmbedding(8, 5, **options)(*place_patches([])).shape == (0, 8)


@every_set_of_options
def test_bfloat16_is_float32_rounded(options: dict[str, Any]) -> None:
    """Interpolation weights are rounded too, so that values of order one differ by a few roundings."""
    module = draw_order_one(PositionEmbedding(8, 5, **options)).bfloat16()
    patches = place_patches(FITTING)
    half = module(*patches, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), module.float()(*patches), atol=0.06, rtol=0.02)


@pytest.mark.parametrize("combination", ["add", "joint"])
def test_a_larger_grid_is_resampled_alone(combination: str) -> None:
    """Axes that fit into the table use its rows unchanged."""
    options = {"coordinates": "absolute", "combination": combination}
    module = draw_order_one(PositionEmbedding(8, 5, **options, overflow="interpolate"))
    strict = PositionEmbedding(8, 5, **options).double()
    strict.load_state_dict(module.state_dict())
    inside, beyond = place_patches(FITTING), place_patches([(2, 9)])
    mixed = module(*(torch.cat(pair) for pair in zip(inside, beyond, strict=True)))
    torch.testing.assert_close(mixed[: len(inside[0])], strict(*inside), atol=0, rtol=0)
    middle = (beyond[0][:, 1] == 4).nonzero().flatten()  # the fifth of nine columns lies on the third of five
    kept = strict(torch.tensor([[0, 2], [1, 2]]), torch.full((2, 2), 5))
    torch.testing.assert_close(mixed[len(inside[0]) + middle], kept)


@pytest.mark.parametrize("combination", ["add", "stack", "product", "joint", "flat"])
def test_a_grid_beyond_the_table_is_refused(combination: str) -> None:
    module = PositionEmbedding(8, 5, coordinates="absolute", combination=combination)
    position_ids, grid_sizes = place_patches([(2, 3), (6, 5)])
    reach = 30 if combination == "flat" else 6
    message = (
        f"need {reach} positions, but the table of absolute positions has {25 if reach == 30 else 5}.*interpolate"
    )
    with pytest.raises(ValueError, match=message):
        module(position_ids, grid_sizes)
    with pytest.raises(ValueError, match=message):  # whichever patches were kept
        module(position_ids[:7], grid_sizes[:7])


def test_a_position_beyond_the_table_is_refused() -> None:
    module = PositionEmbedding(8, 5, coordinates="absolute")
    with pytest.raises(ValueError, match="`position_ids` and `grid_sizes` need 8 positions"):
        module(torch.tensor([[0, 7]]), torch.tensor([[1, 5]]))


def test_options_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="`combination` must be one of add, stack, product"):
        PositionEmbedding(8, 5, kind="sinusoidal", combination="joint")


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({}, {"row": (5, 8), "column": (5, 8)}),
        ({"combination": "stack"}, {"row": (5, 4), "column": (5, 4)}),
        ({"combination": "joint"}, {"table": (5, 5, 8)}),
        ({"combination": "flat", "coordinates": "absolute"}, {"table": (25, 8)}),
        ({"kind": "sinusoidal"}, {}),
        ({"kind": "fourier"}, {"row_frequencies": (4,), "column_frequencies": (4,)}),
        ({"kind": "fourier", "combination": "stack"}, {"row_frequencies": (2,), "column_frequencies": (2,)}),
        ({"kind": "fourier", "combination": "joint"}, {"frequencies": (4, 2)}),
    ],
)
def test_parameters(options: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    module = PositionEmbedding(8, 5, **options)
    assert {name: tuple(parameter.shape) for name, parameter in module.named_parameters()} == shapes
    assert list(module.buffers()) == []


@pytest.mark.parametrize(
    ("options", "std"),
    [
        ({}, 0.3),
        ({"combination": "joint"}, 0.3),
        ({"combination": "product"}, 0.3**0.5),
        ({"kind": "fourier"}, 7.0),
        ({"kind": "fourier", "combination": "joint"}, 7.0),
        ({"kind": "fourier", "coordinates": "absolute"}, 7.0 / 16),
    ],
)
def test_initial_values(options: dict[str, Any], std: float) -> None:
    module = PositionEmbedding(2048, 16, **options)
    module.reset_parameters(0.3, 7.0)
    for parameter in module.parameters():
        assert abs(parameter.std().item() / std - 1) < 0.1
        assert abs(parameter.mean().item() / std) < 0.1


def test_loaded_weights_are_not_redrawn() -> None:
    """transformers marks parameters that were loaded from a checkpoint."""
    module = PositionEmbedding(8, 5)
    module.row._is_hf_initialized = True
    row, column = module.row.clone(), module.column.clone()
    module.reset_parameters()
    assert torch.equal(module.row, row)
    assert not torch.equal(module.column, column)


def test_types() -> None:
    patches = place_patches([(3, 4)])
    sinusoidal = PositionEmbedding(8, 5, kind="sinusoidal").bfloat16()
    assert sinusoidal(*patches).dtype == torch.float32
    assert sinusoidal(*patches, torch.bfloat16).dtype == torch.bfloat16
    learned = PositionEmbedding(8, 5).bfloat16()
    assert learned(*patches).dtype == torch.bfloat16
    assert learned(*patches, torch.float32).dtype == torch.float32


def test_fourier_features_of_far_patches_survive_autocast() -> None:
    module = PositionEmbedding(8, 5, kind="fourier", coordinates="absolute", combination="joint")
    patches = place_patches([(2, 900)])
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(module(*patches), module(*patches, torch.float32), atol=0, rtol=0)
    torch.testing.assert_close(module(*patches).double(), module.double()(*patches), atol=1e-3, rtol=0)


def test_equals_siglip2() -> None:
    """Its table is a joint one, resampled with antialiasing to each image's grid."""
    module = PositionEmbedding(8, 5, combination="joint", interpolation="bilinear_antialias")
    torch.nn.init.normal_(module.table)
    theirs = Siglip2VisionEmbeddings.resize_positional_embeddings(module.table, torch.tensor(GRIDS), 117)
    expected = torch.cat([rows[: height * width] for rows, (height, width) in zip(theirs, GRIDS, strict=True)])
    torch.testing.assert_close(module(*place_patches(GRIDS)), expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"combination": "joint", "interpolation": "bicubic", "coordinates": "fractional_aspect"},
        {"combination": "joint", "coordinates": "absolute"},
        {"coordinates": "absolute", "overflow": "interpolate", "interpolation": "bilinear_antialias"},
        {"kind": "sinusoidal", "combination": "stack"},
        {"kind": "fourier", "combination": "joint"},
    ],
    ids=name_of,
)
def test_compiles_in_one_graph_for_all_sizes(options: dict[str, Any]) -> None:
    torch.compiler.reset()
    module = PositionEmbedding(8, 5, **options)
    compiled = torch.compile(module, backend="eager", fullgraph=True, dynamic=True)
    for grids in (FITTING, [(4, 4)], [(2, 3), (1, 5), (4, 1)]):
        with torch.compiler.set_stance("default" if grids is FITTING else "fail_on_recompile"):
            torch.testing.assert_close(compiled(*place_patches(grids)), module(*place_patches(grids)))


@pytest.mark.parametrize("size", [(4, 1), (1, 4), (1, 1), (5, 3), (9, 1)])
def test_a_whole_grid_of_any_size_is_that_of_its_patches(size: tuple[int, int]) -> None:
    """One column, which PyTorch's antialiased interpolation gets wrong on CPU, like any other number of columns."""
    table = torch.randn(6, 7, 3, generator=torch.Generator().manual_seed(0))
    height, width = size
    positions = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    expected = resample_grid(table, positions, torch.tensor([size]).expand(len(positions), 2), "bicubic_antialias")
    found = resample_whole_grid(table, height, width)
    torch.testing.assert_close(found.flatten(0, 1), expected, atol=1e-5, rtol=1e-5)
