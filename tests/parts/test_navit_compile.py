"""NaViT as one graph: `torch.compile(fullgraph=True)` and `torch.export` with precomputed index tensors."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import navit, packed_images
from vlparts import NaViTModel
from vlparts.parts.packed_index import get_cu_seqlens, get_max_seqlen, get_position_ids

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "registers and rotary": {"pooling": "class_token", "num_register_tokens": 1, "rotary_theta": 100.0},
    "mean of sinusoidal": {"pooling": "mean", "position_kind": "sinusoidal"},
}
BATCHES = [[(3, 5), (1, 1), (2, 7), (4, 4)], [(2, 3), (5, 4)], [(6, 6), (2, 2), (1, 8)]]


def inputs(grids: list[tuple[int, int]], seed: int = 0) -> dict[str, Any]:
    patches, grid_thw = packed_images(grids, seed=seed)
    return {"pixel_values": patches, "image_grid_thw": grid_thw, **navit().precompute(grid_thw)}


@pytest.mark.parametrize("video_attention", ["frame", "clip"])
def test_precomputed_inputs(video_attention: str) -> None:
    patches, grid_thw = packed_images([*BATCHES[0], (3, 2, 5)])
    model = navit(video_attention=video_attention)
    cu_seqlens = get_cu_seqlens(grid_thw, video_attention == "clip")
    expected = {
        "cu_seqlens": cu_seqlens,
        "max_seqlen": get_max_seqlen(cu_seqlens),
        "position_ids": get_position_ids(grid_thw),
    }
    torch.testing.assert_close(model.precompute(grid_thw), expected)
    pooled = model(patches, grid_thw, **expected).pooler_output
    torch.testing.assert_close(pooled, model(patches, grid_thw).pooler_output)
    kept = torch.tensor([0, 14, 15, 16, 29, 30, 50, 75, -1])
    outputs = model(patches[kept], grid_thw, keep_index=kept, **model.precompute(grid_thw, kept))
    torch.testing.assert_close(outputs.pooler_output, model(patches[kept], grid_thw, keep_index=kept).pooler_output)
    with pytest.raises(ValueError, match="must hold positive frames"):
        model.precompute(torch.tensor([[1, 0, 4]]))


def fixed(grids: list[tuple[int, int]], capacity: int = 48, items: int = 5, seed: int = 0) -> dict[str, Any]:
    """Some patches dropped, padded to a fixed size, so that shapes do not depend on the images."""
    patches, grid_thw = packed_images(grids, seed=seed)
    kept = torch.arange(0, len(patches), 2)
    firsts = grid_thw.prod(-1).cumsum(0)[:-1]
    kept = torch.unique(torch.cat([kept, firsts]))
    rows = capacity - len(kept)
    owners = torch.searchsorted(grid_thw.prod(-1).cumsum(0), kept, right=True)
    lengths = torch.bincount(owners, minlength=items).tolist()
    return {
        "pixel_values": torch.cat([patches[kept], torch.zeros(rows, patches.shape[1])]),
        "image_grid_thw": torch.cat([grid_thw, torch.zeros(items - len(grids), 3, dtype=torch.int64)]),
        "cu_seqlens": torch.tensor([0, *lengths, rows]).cumsum(0).to(torch.int32),
        "max_seqlen": capacity,
        "position_ids": torch.cat([get_position_ids(grid_thw)[kept], torch.zeros(rows, 2, dtype=torch.int64)]),
        "keep_index": torch.cat([kept, torch.full((rows,), -1)]),
    }


class Counter:
    """A compiler that counts its graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        self.graphs += 1
        return graph.forward


def agree(outputs: Any, expected: Any) -> None:
    torch.testing.assert_close(outputs.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs.pooler_output, expected.pooler_output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", OPTIONS)
def test_one_graph_serves_changing_batches(options: str) -> None:
    torch.compiler.reset()
    model, counter = navit(**OPTIONS[options]), Counter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for grids in BATCHES:
        agree(compiled(**inputs(grids)), model(**inputs(grids)))
    assert counter.graphs <= 2  # the first for the sizes of the first batch, the second for any


@pytest.mark.parametrize("options", OPTIONS)
def test_one_graph_serves_packs_of_fixed_size(options: str) -> None:
    torch.compiler.reset()
    model, counter = navit(**OPTIONS[options]), Counter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for seed, grids in enumerate(BATCHES):
        agree(compiled(**fixed(grids, seed=seed)), model(**fixed(grids, seed=seed)))
    assert counter.graphs == 1


def test_dense_attention_compiles() -> None:
    torch.compiler.reset()
    model, counter = navit(pooling="class_token", rotary_theta=100.0), Counter()
    model.set_attn_implementation("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for grids in BATCHES:
        agree(compiled(**inputs(grids)), model(**inputs(grids)))
    assert counter.graphs <= 2


def test_gradients_of_the_compiled_encoder() -> None:
    torch.compiler.reset()
    model = navit().train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for grids in BATCHES[:2]:
        model.zero_grad()
        model(**inputs(grids)).pooler_output.pow(2).sum().backward()
        expected = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        compiled(**inputs(grids)).pooler_output.pow(2).sum().backward()
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_default_compiler_takes_it() -> None:
    torch.compiler.reset()
    model = navit()
    compiled = torch.compile(model, fullgraph=True)
    for grids in BATCHES:
        with torch.no_grad():
            agree(compiled(**inputs(grids)), model(**inputs(grids)))


class Bare(torch.nn.Module):
    """Wrapper with tensors as arguments and results, for export; the bound on segments is a constant."""

    def __init__(self, model: NaViTModel, max_seqlen: int) -> None:
        super().__init__()
        self.model, self.max_seqlen = model, max_seqlen

    def forward(
        self, pixel_values: Tensor, image_grid_thw: Tensor, cu_seqlens: Tensor, position_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        outputs = self.model(pixel_values, image_grid_thw, cu_seqlens, self.max_seqlen, position_ids)
        return outputs.last_hidden_state, outputs.pooler_output


@pytest.mark.parametrize("options", OPTIONS)
def test_export_with_sizes_that_vary(options: str) -> None:
    model = navit(**OPTIONS[options])
    names = ("pixel_values", "image_grid_thw", "cu_seqlens", "position_ids")
    patches, images = torch.export.Dim("patches", min=2, max=4096), torch.export.Dim("images", min=2, max=64)
    shapes = {
        "pixel_values": {0: patches},
        "image_grid_thw": {0: images},
        "cu_seqlens": {0: images + 1},
        "position_ids": {0: patches},
    }
    example = inputs(BATCHES[0])
    program = torch.export.export(Bare(model, 4096), tuple(example[name] for name in names), dynamic_shapes=shapes)
    for grids in BATCHES:
        found = inputs(grids)
        hidden, pooled = program.module()(*(found[name] for name in names))
        expected = model(**found)
        torch.testing.assert_close(hidden, expected.last_hidden_state, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(pooled, expected.pooler_output, atol=1e-5, rtol=1e-5)
