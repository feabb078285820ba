"""Host lengths (`cu_seqlens_cpu`): they replace reads from the device and change no result."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.parts.attention_oracle import boundaries, inputs
from tests.tiny import navit, packed_images, windowfree
from vlparts.parts.ops_attention import packed_attention
from vlparts.parts.ops_attention_reference import packed_attention_reference
from vlparts.parts.packed_index import get_cu_seqlens, get_max_seqlen, get_position_ids, resolve_seqlens

META = torch.device("meta")
MODELS: dict[str, Any] = {
    "attention pooling": lambda: navit(pooling="map"),
    "class token and rotary": lambda: navit(pooling="class_token", num_register_tokens=2, rotary_theta=100.0),
    "window-free": lambda: windowfree(),
}
each_model = pytest.mark.parametrize("name", MODELS)


# --- attention


def test_host_lengths_replace_values_of_the_device() -> None:
    """Boundaries on the meta device have no values."""
    tensors, bounds = inputs(([2, 5], [2, 5])), boundaries([2, 5])
    expected = packed_attention_reference(*tensors, bounds, bounds, 5, 5)
    lengths = {"cu_seqlens_q_cpu": [0, 2, 7], "cu_seqlens_k_cpu": [0, 2, 7]}
    found = packed_attention_reference(*tensors, bounds.to(META), bounds.to(META), 5, 5, **lengths)
    assert torch.equal(found, expected)
    with pytest.raises(NotImplementedError, match="meta"):
        packed_attention_reference(*tensors, bounds.to(META), bounds.to(META), 5, 5)


@pytest.mark.parametrize("attend", [packed_attention, packed_attention_reference])
def test_host_lengths_of_queries_and_keys_change_no_result(attend: Any) -> None:
    tensors = inputs(([2, 5, 3], [4, 1, 3]))
    cu_q, cu_k = boundaries([2, 5, 3]), boundaries([4, 1, 3])
    options = {"max_seqlen_q": 5, "max_seqlen_k": 4}
    expected = attend(*tensors, cu_q, cu_k, **options)
    options |= {"cu_seqlens_q_cpu": cu_q.tolist(), "cu_seqlens_k_cpu": cu_k.tolist()}
    assert torch.equal(attend(*tensors, cu_q, cu_k, **options), expected)


def test_host_lengths_of_the_queries_are_those_of_the_keys_of_the_same_segments() -> None:
    tensors, bounds = inputs(([2, 5], [2, 5])), boundaries([2, 5])
    found = packed_attention(*tensors, bounds, cu_seqlens_q_cpu=[0, 2, 7])
    assert torch.equal(found, packed_attention(*tensors, bounds))


@pytest.mark.parametrize("side", ["q", "k"])
def test_host_lengths_must_cover_the_tokens(side: str) -> None:
    tensors, bounds = inputs(([2, 5], [2, 5])), boundaries([2, 5])
    lengths = {"cu_seqlens_q_cpu": [0, 2, 7], "cu_seqlens_k_cpu": [0, 2, 7]}
    wrong = lengths | {f"cu_seqlens_{side}_cpu": [0, 2, 6]}
    with pytest.raises(ValueError, match=rf"`cu_seqlens_{side}` must rise from 0 to .* 7, got \[0, 2, 6\]"):
        packed_attention(*tensors, bounds, bounds.clone(), **wrong)
    wrong = lengths | {f"cu_seqlens_{side}_cpu": [0, 7]}
    with pytest.raises(ValueError, match=rf"`cu_seqlens_{side}_cpu` must hold one integer .* \(3,\), got 2"):
        packed_attention(*tensors, bounds, bounds.clone(), **wrong)


# --- resolve_seqlens


def test_the_longest_segment_follows_from_host_lengths() -> None:
    bounds = boundaries([2, 5, 3])
    assert resolve_seqlens(bounds.to(META), None, [0, 2, 7, 10], 10) == (5, [0, 2, 7, 10])
    assert resolve_seqlens(bounds, None, None, 10) == (5, [0, 2, 7, 10])


def test_a_bound_on_the_longest_segment_is_kept_and_nothing_is_read() -> None:
    bounds = boundaries([2, 5, 3]).to(META)
    assert resolve_seqlens(bounds, 9, None, 10) == (9, None)
    assert resolve_seqlens(bounds, 9, [0, 2, 7, 10], 10) == (9, [0, 2, 7, 10])


def test_no_segments() -> None:
    assert resolve_seqlens(boundaries([]), None, None, 0) == (0, [0])


@pytest.mark.parametrize("lengths", [[0, 3], [0, 1, 2, 3]])
def test_another_number_of_boundaries_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"`cu_seqlens_cpu` must hold one integer .* \(3,\), got {len(lengths)}"):
        resolve_seqlens(boundaries([1, 2]), 2, lengths, 3)


# --- models


def precomputed(model: nn.Module, device: str) -> tuple[dict[str, Any], list[int]]:
    """Inputs with everything that a forward pass would compute from values of the device, and the host lengths."""
    merge_size = model.config.spatial_merge_size
    patches, grid_thw = packed_images([(2, 4), (6, 2), (4, 4)])
    cu_seqlens = get_cu_seqlens(grid_thw)
    tensors = {
        "pixel_values": patches,
        "image_grid_thw": grid_thw,
        "cu_seqlens": cu_seqlens,
        "position_ids": get_position_ids(grid_thw, merge_size),
    }
    inputs = {name: tensor.to(device) for name, tensor in tensors.items()}
    return {**inputs, "max_seqlen": get_max_seqlen(cu_seqlens)}, cu_seqlens.tolist()


@each_model
def test_a_model_with_host_lengths_reads_nothing_from_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device there is nothing to read, and no autocast to ask for."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)
    model: nn.Module = MODELS[name]().to("meta")
    inputs, lengths = precomputed(model, "meta")
    output = model(**inputs, cu_seqlens_cpu=lengths)
    assert output.last_hidden_state.shape[0] == lengths[-1]
    with pytest.raises(NotImplementedError, match="meta"):
        model(**inputs)


@each_model
def test_host_lengths_change_no_result_of_a_model(name: str) -> None:
    model = MODELS[name]()
    inputs, lengths = precomputed(model, "cpu")
    expected = model(**inputs)
    found = model(**inputs, cu_seqlens_cpu=lengths)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    if expected.pooler_output is not None:
        assert torch.equal(found.pooler_output, expected.pooler_output)


@each_model
def test_a_model_refuses_another_number_of_boundaries(name: str) -> None:
    model = MODELS[name]()
    inputs, lengths = precomputed(model, "cpu")
    with pytest.raises(
        ValueError, match=r"`cu_seqlens_cpu` must hold one integer per boundary of `cu_seqlens` \(4,\)"
    ):
        model(**inputs, cu_seqlens_cpu=lengths[1:])


def test_other_host_lengths_do_not_recompile() -> None:
    graphs = []

    def compiler(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model = navit(pooling="map")
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    for last in (30, 34):
        inputs, _ = precomputed(model, "cpu")
        inputs["cu_seqlens"] = torch.tensor([0, 8, last, 36], dtype=torch.int32)
        expected = model(**inputs).last_hidden_state
        found = compiled(**inputs, cu_seqlens_cpu=[0, 8, last, 36]).last_hidden_state
        torch.testing.assert_close(found, expected)
    assert len(graphs) == 1
