"""Packed attention: division into calls, lengths on the host, the choice of the operation."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.npu import fake_ops
from vlparts.parts.ops_attention_reference import packed_attention_reference
from vlparts.parts.packed_index import remember_bounds
from vlparts_npu import attention, attention_calls
from vlparts_npu.attention import packed_attention_npu, supports_packed_attention
from vlparts_npu.attention_calls import split_calls


@pytest.fixture(autouse=True)
def _empty_log() -> None:
    fake_ops.CALLS.clear()


def on_device(ends: list[int]) -> Tensor:
    """Boundaries whose values cannot be read from the tensor, only from what was handed over."""
    bounds = [0, *ends]
    return remember_bounds(torch.empty(len(bounds), dtype=torch.int32, device="meta"), bounds)


def compare(ends_q: list[int], ends_k: list[int], causal: bool, heads: tuple[int, int] = (4, 2)) -> None:
    """Outputs and gradients in float64 are those of the reference."""
    shapes = [(ends_q[-1], heads[0], 6), (ends_k[-1], heads[1], 6), (ends_k[-1], heads[1], 4)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    arguments = (*inputs, on_device(ends_q), on_device(ends_k), max(ends_q), max(ends_k), 0.7, causal)
    weights = torch.randn(ends_q[-1], heads[0], 4, dtype=torch.float64)
    found, expected = (run(*arguments) for run in (packed_attention_npu, packed_attention_reference))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    gradients = [torch.autograd.grad(output, inputs, weights) for output in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_self_attention(causal: bool) -> None:
    compare([3, 4, 11], [3, 4, 11], causal)


@pytest.mark.parametrize("causal", [False, True])
def test_cross_attention(causal: bool) -> None:
    compare([1, 3, 6], [4, 6, 13], causal)


@pytest.mark.parametrize("causal", [False, True])
def test_empty_segments(causal: bool) -> None:
    compare([0, 3, 3, 7, 7], [0, 3, 3, 7, 7], causal)


def test_keys_of_segments_without_queries_are_left_out() -> None:
    compare([2, 2, 5], [3, 7, 11], causal=False)
    assert fake_ops.CALLS == ["npu_fusion_attention"] * 2


@pytest.mark.parametrize("causal", [False, True])
def test_more_segments_than_one_call_takes(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_calls, "MOST_SEGMENTS", 3)
    ends = [2, 3, 6, 7, 9, 12, 13, 14]
    compare(ends, ends, causal)
    assert fake_ops.CALLS == ["npu_fusion_attention"] * 3


def test_the_limit_is_1024_segments() -> None:
    bounds = range(2050)
    assert [len(call.ends_q) for call in split_calls(bounds, bounds)] == [1024, 1024, 1]


def test_a_call_takes_no_more_tokens_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_calls, "MOST_TOKENS", 10)
    calls = split_calls([0, 4, 8, 12, 16], [0, 9, 10, 11, 20])
    assert [(call.ends_q, call.ends_k) for call in calls] == [([4, 8], [9, 10]), ([4, 8], [1, 10])]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), min_size=1, max_size=12), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_calls_cover_all_queries_with_their_own_keys(lengths: list[tuple[int, int]], most: int) -> None:
    sums = [torch.tensor([0, *column]).cumsum(0).tolist() for column in zip(*lengths, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_calls, "MOST_SEGMENTS", most)
        calls = split_calls(*sums)
    found = []
    for call in calls:
        assert 1 <= len(call.ends_q) == len(call.ends_k) <= most
        assert call.ends_q[-1] == call.queries.stop - call.queries.start
        assert call.ends_k[-1] == call.keys.stop - call.keys.start
        pairs = zip(pairwise([0, *call.ends_q]), pairwise([0, *call.ends_k]), strict=True)
        found += [[call.queries.start + x for x in q] + [call.keys.start + x for x in k] for q, k in pairs]
    segments = zip(pairwise(sums[0]), pairwise(sums[1]), strict=True)
    assert found == [[*q, *k] for q, k in segments if q[0] < q[1]]


def random_heads(channels: int, dtype: torch.dtype, trains: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = torch.randn(3, 9, 2, channels).to(dtype).requires_grad_(trains).unbind()
    return query, key, value


@pytest.mark.parametrize(
    ("channels", "dtype", "trains", "operation"),
    [
        (128, torch.bfloat16, False, "npu_fused_infer_attention_score"),
        (128, torch.bfloat16, True, "npu_fusion_attention"),
        (128, torch.float32, False, "npu_fusion_attention"),
        (80, torch.bfloat16, False, "npu_fusion_attention"),
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_the_inference_operation_runs_where_it_is_documented(
    channels: int, dtype: torch.dtype, trains: bool, operation: str, causal: bool
) -> None:
    bounds = on_device([4, 9])
    arguments = (*random_heads(channels, dtype, trains), bounds, bounds, 5, 5, None, causal)
    assert supports_packed_attention(*arguments) is None
    output = packed_attention_npu(*arguments)
    assert [operation] == fake_ops.CALLS
    torch.testing.assert_close(output, packed_attention_reference(*arguments), atol=2e-2, rtol=2e-2)


def test_a_mask_made_in_inference_mode_serves_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_masks", {})
    bounds = on_device([4, 9])
    with torch.inference_mode():
        packed_attention_npu(*random_heads(8, torch.float32), bounds, bounds, 5, 5, None, True)
    (mask,) = attention._masks.values()
    assert not mask.is_inference()


def test_queries_that_see_no_key_are_for_the_reference() -> None:
    query, key, value = random_heads(8, torch.float32)
    arguments = (query, key, value, on_device([5, 9]), on_device([4, 9]), 5, 5, None)
    assert supports_packed_attention(*arguments, False) is None
    assert supports_packed_attention(*arguments, True) == (
        "a segment of 5 queries and 4 keys has queries that see no key"
    )
