"""Boundaries remembered on the host."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.tiny import navit, packed_images, windowfree
from vlparts.parts.ops_attention_reference import packed_attention_reference
from vlparts.parts.packed_index import (
    get_cu_seqlens,
    get_max_seqlen,
    get_position_ids,
    known_bounds,
    read_bounds,
    remember_bounds,
)


def test_boundaries_that_are_handed_over_are_not_read() -> None:
    """A tensor on the meta device has no values to read."""
    bounds = remember_bounds(torch.empty(3, dtype=torch.int32, device="meta"), [0, 2, 7])
    query, key, value = torch.randn(3, 7, 2, 4, dtype=torch.float64).unbind()
    known = torch.tensor([0, 2, 7], dtype=torch.int32)
    expected = packed_attention_reference(query, key, value, known, known, 5, 5)
    assert torch.equal(packed_attention_reference(query, key, value, bounds, bounds, 5, 5), expected)


def test_what_is_read_is_remembered_until_the_tensor_is_written() -> None:
    cu_seqlens = torch.tensor([0, 3, 5], dtype=torch.int32)
    first = read_bounds(cu_seqlens)
    assert tuple(first) == (0, 3, 5)
    assert read_bounds(cu_seqlens) is first
    cu_seqlens[1] = 4
    assert tuple(read_bounds(cu_seqlens)) == (0, 4, 5)


def test_what_is_handed_over_is_void_once_the_tensor_is_written() -> None:
    cu_seqlens = remember_bounds(torch.tensor([0, 3, 5], dtype=torch.int32), (0, 3, 5))
    cu_seqlens += 1
    assert tuple(read_bounds(cu_seqlens)) == (1, 4, 6)


def test_tensors_without_a_count_of_writes_are_read_again() -> None:
    with torch.inference_mode():
        cu_seqlens = torch.tensor([0, 3], dtype=torch.int32)
        assert tuple(read_bounds(cu_seqlens)) == (0, 3)
        cu_seqlens[1] = 4
        assert tuple(read_bounds(cu_seqlens)) == (0, 4)
        assert tuple(read_bounds(remember_bounds(cu_seqlens, (0, 7)))) == (0, 7)


def test_a_copy_is_read() -> None:
    copy = remember_bounds(torch.tensor([0, 3], dtype=torch.int32), (0, 9)).clone()
    assert tuple(read_bounds(copy)) == (0, 3)


def test_the_dispatcher_passes_the_same_tensor_on() -> None:
    """So a kernel behind it finds what the packer has remembered."""
    seen = []
    library = torch.library.Library("vlparts_tests", "FRAGMENT")
    library.define("boundaries(Tensor tokens, Tensor cu_seqlens) -> Tensor")

    def kernel(tokens: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        seen.append(read_bounds(cu_seqlens))
        return tokens.clone()

    library.impl("boundaries", kernel, "CompositeImplicitAutograd")
    cu_seqlens = remember_bounds(torch.zeros(2, dtype=torch.int32), (0, 4))
    torch.ops.vlparts_tests.boundaries(torch.randn(4, requires_grad=True), cu_seqlens)
    assert seen == [(0, 4)]


@pytest.mark.parametrize("bounds", [[0, 3], [0, 1, 2, 3]])
def test_another_number_of_boundaries_is_refused(bounds: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"`bounds` must hold one number .* \(3,\), got {len(bounds)}"):
        remember_bounds(torch.zeros(3, dtype=torch.int32), bounds)


def test_known_are_only_those_that_are_remembered() -> None:
    cu_seqlens = torch.tensor([0, 3], dtype=torch.int32)
    assert known_bounds(cu_seqlens) is None
    remember_bounds(cu_seqlens, (0, 3))
    assert known_bounds(cu_seqlens) == (0, 3)
    cu_seqlens += 1
    assert known_bounds(cu_seqlens) is None


def precomputed(device: str, merge_size: int = 1) -> tuple[dict[str, Any], list[int]]:
    """Inputs with everything that a forward pass would compute on the host, and the boundaries."""
    patches, grid_thw = packed_images([(2, 4), (6, 2), (4, 4)])
    cu_seqlens = get_cu_seqlens(grid_thw)
    positions = get_position_ids(grid_thw, merge_size)
    tensors = {
        "pixel_values": patches,
        "image_grid_thw": grid_thw,
        "cu_seqlens": cu_seqlens,
        "position_ids": positions,
    }
    inputs = {name: tensor.to(device) for name, tensor in tensors.items()}
    return {**inputs, "max_seqlen": get_max_seqlen(cu_seqlens)}, cu_seqlens.tolist()


MODELS: dict[str, Any] = {
    "attention pooling": lambda: navit(pooling="map"),
    "class token and rotary": lambda: navit(pooling="class_token", num_register_tokens=2, rotary_theta=100.0),
    "window-free": lambda: windowfree(),
}
each_model = pytest.mark.parametrize("name", MODELS)


@each_model
def test_a_model_with_bounds_reads_nothing_from_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device there is nothing to read, and no autocast to ask for."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)
    model: nn.Module = MODELS[name]().to("meta")
    inputs, bounds = precomputed("meta", getattr(model.config, "spatial_merge_size", 1))
    output = model(**inputs, segment_bounds=bounds)
    assert output.last_hidden_state.shape[0] == bounds[-1]
    inputs, _ = precomputed("meta", getattr(model.config, "spatial_merge_size", 1))
    with pytest.raises(NotImplementedError, match="meta"):
        model(**inputs)


@each_model
def test_bounds_change_no_result(name: str) -> None:
    model = MODELS[name]()
    inputs, bounds = precomputed("cpu", getattr(model.config, "spatial_merge_size", 1))
    expected = model(**inputs).last_hidden_state
    inputs, _ = precomputed("cpu", getattr(model.config, "spatial_merge_size", 1))
    assert torch.equal(model(**inputs, segment_bounds=bounds).last_hidden_state, expected)
    with pytest.raises(ValueError, match=r"`bounds` must hold one number for each boundary of `cu_seqlens` \(4,\)"):
        model(**inputs, segment_bounds=bounds[1:])


def test_other_bounds_compile_nothing_anew() -> None:
    graphs = []

    def compiler(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model = navit(pooling="map")
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    for last in (30, 34):
        inputs, _ = precomputed("cpu")
        inputs["cu_seqlens"] = torch.tensor([0, 8, last, 36], dtype=torch.int32)
        expected = model(**inputs).last_hidden_state
        found = compiled(**inputs, segment_bounds=[0, 8, last, 36]).last_hidden_state
        torch.testing.assert_close(found, expected)
    assert len(graphs) == 1
