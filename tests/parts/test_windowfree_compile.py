"""The window-free encoder as one graph: `torch.compile(fullgraph=True)` and `torch.export`."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parts.test_navit_compile import Counter
from tests.tiny import WINDOWED, packed_images, windowfree
from vlparts import WindowFreeViTModel
from vlparts.parts.packed_index import get_cu_seqlens, get_max_seqlen, get_position_ids
from vlparts.parts.packed_windows import get_windows

PATTERNS: dict[str, dict[str, Any]] = {
    "full": {},
    "hybrid": {"attention_pattern": WINDOWED, "feature_layers": [-1, -3]},
    "positions": {"position_grid_size": 5, "norm_type": "layer_norm", "final_norm": False},
}
BATCHES = [[(4, 6), (2, 2), (8, 6)], [(2, 4), (6, 4)], [(6, 6), (2, 2), (2, 8)]]
every_pattern = pytest.mark.parametrize("pattern", PATTERNS)


def inputs(grids: list[tuple[int, int]], pattern: str, seed: int = 0) -> dict[str, Any]:
    pixels, grid_thw = packed_images(grids, seed=seed)
    precomputed = windowfree(**PATTERNS[pattern]).precompute(grid_thw)
    return {"pixel_values": pixels, "image_grid_thw": grid_thw, **precomputed}


@every_pattern
def test_precomputed_inputs(pattern: str) -> None:
    pixels, grid_thw = packed_images([*BATCHES[0], (3, 4, 4)])
    model, cu_seqlens = windowfree(**PATTERNS[pattern]), get_cu_seqlens(grid_thw)
    found = model.precompute(grid_thw)
    expected = {
        "cu_seqlens": cu_seqlens,
        "max_seqlen": get_max_seqlen(cu_seqlens),
        "position_ids": get_position_ids(grid_thw, 2),
    }
    if pattern == "hybrid":
        windows = get_windows(grid_thw, 2, 2)
        expected |= {"window_index": windows.order, "cu_window_seqlens": windows.cu_seqlens}
    torch.testing.assert_close(found, expected)
    outputs = model(pixels, grid_thw, **found)
    torch.testing.assert_close(outputs.last_hidden_state, model(pixels, grid_thw).last_hidden_state)
    with pytest.raises(ValueError, match="spatial_merge_size=2 does not divide"):
        model.precompute(torch.tensor([[1, 3, 4]]))


@every_pattern
def test_one_graph_serves_changing_batches(pattern: str) -> None:
    torch.compiler.reset()
    model, counter = windowfree(**PATTERNS[pattern]), Counter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for grids in BATCHES:
        given = inputs(grids, pattern)
        for mine, expected in zip(compiled(**given).feature_maps, model(**given).feature_maps, strict=True):
            torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)
    assert counter.graphs <= 2  # the first for the sizes of the first batch, the second for any


@every_pattern
def test_gradients_of_the_compiled_encoder(pattern: str) -> None:
    torch.compiler.reset()
    model = windowfree(**PATTERNS[pattern]).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (model, compiled):
        model.zero_grad()
        run(**inputs(BATCHES[0], pattern)).last_hidden_state.pow(2).mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_default_compiler_takes_it() -> None:
    torch.compiler.reset()
    model = windowfree(**PATTERNS["hybrid"])
    compiled = torch.compile(model, fullgraph=True)
    for grids in BATCHES:
        given = inputs(grids, "hybrid")
        with torch.no_grad():
            expected = model(**given).last_hidden_state
            torch.testing.assert_close(compiled(**given).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


class Bare(torch.nn.Module):
    """Wrapper with tensors as arguments and results, for export; the bound on segments is a constant."""

    def __init__(self, model: WindowFreeViTModel, max_seqlen: int) -> None:
        super().__init__()
        self.model, self.max_seqlen = model, max_seqlen

    def forward(self, *tensors: Tensor) -> Tensor:
        pixel_values, grid, cu_seqlens, position_ids, *windows = tensors
        outputs = self.model(pixel_values, grid, cu_seqlens, self.max_seqlen, position_ids, *windows)
        return outputs.last_hidden_state


@every_pattern
def test_export(pattern: str) -> None:
    model, given = windowfree(**PATTERNS[pattern]), inputs(BATCHES[0], pattern)
    expected = model(**given).last_hidden_state
    tensors = tuple(value for value in given.values() if isinstance(value, Tensor))
    program = torch.export.export(Bare(model, 4096), tensors)
    torch.testing.assert_close(program.module()(*tensors), expected, atol=1e-5, rtol=1e-5)
