"""Packed attention: division into calls, host lengths, and the choice of the operation."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.npu import fake_ops
from vlparts.parts.ops_attention_reference import packed_attention_reference
from vlparts_npu import attention
from vlparts_npu.attention import (
    KERNEL,
    add_host_lengths,
    group_segments,
    packed_attention_npu,
    supports_packed_attention,
)
from vlparts_npu.self_check import reset_checks, with_fallback


@pytest.fixture(autouse=True)
def _empty_log() -> None:
    fake_ops.CALLS.clear()


def arguments_of(
    tensors: tuple[Tensor, Tensor, Tensor],
    ends_q: list[int],
    ends_k: list[int],
    scale: float | None = None,
    causal: bool = False,
) -> tuple[Any, ...]:
    """Arguments of the operation whose boundaries have values on the host only."""
    host = [[0, *ends] for ends in (ends_q, ends_k)]
    device = [torch.empty(len(bounds), dtype=torch.int32, device="meta") for bounds in host]
    longest = [max(end - start for start, end in pairwise(bounds)) for bounds in host]
    return *tensors, *device, *longest, scale, causal, *host


def compare(ends_q: list[int], ends_k: list[int], causal: bool, heads: tuple[int, int] = (4, 2)) -> None:
    """Compare outputs and gradients with the reference in float64."""
    shapes = [(ends_q[-1], heads[0], 6), (ends_k[-1], heads[1], 6), (ends_k[-1], heads[1], 4)]
    inputs = tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    arguments = arguments_of(inputs, ends_q, ends_k, 0.7, causal)
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
    monkeypatch.setattr(attention, "MAX_SEGMENTS", 3)
    ends = [2, 3, 6, 7, 9, 12, 13, 14]
    compare(ends, ends, causal)
    assert fake_ops.CALLS == ["npu_fusion_attention"] * 3


def test_a_call_takes_at_most_1024_segments() -> None:
    bounds = range(2050)
    assert [len(group.ends_q) for group in group_segments(bounds, bounds)] == [1024, 1024, 1]


def test_a_call_takes_a_limited_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MAX_TOKENS", 10)
    groups = group_segments([0, 4, 8, 12, 16], [0, 9, 10, 11, 20])
    assert [(group.ends_q, group.ends_k) for group in groups] == [([4, 8], [9, 10]), ([4, 8], [1, 10])]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), min_size=1, max_size=12), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_groups_cover_all_queries_with_the_keys_of_their_segments(lengths: list[tuple[int, int]], most: int) -> None:
    sums = [torch.tensor([0, *column]).cumsum(0).tolist() for column in zip(*lengths, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "MAX_SEGMENTS", most)
        groups = group_segments(*sums)
    found = []
    for group in groups:
        assert 1 <= len(group.ends_q) == len(group.ends_k) <= most
        assert group.ends_q[-1] == group.queries.stop - group.queries.start
        assert group.ends_k[-1] == group.keys.stop - group.keys.start
        pairs = zip(pairwise([0, *group.ends_q]), pairwise([0, *group.ends_k]), strict=True)
        found += [[group.queries.start + x for x in q] + [group.keys.start + x for x in k] for q, k in pairs]
    segments = zip(pairwise(sums[0]), pairwise(sums[1]), strict=True)
    assert found == [[*q, *k] for q, k in segments if q[0] < q[1]]


def random_heads(
    channels: int, dtype: torch.dtype, requires_grad: bool = False, keys: int = 9
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (
        torch.randn(tokens, 2, channels).to(dtype).requires_grad_(requires_grad) for tokens in (9, keys, keys)
    )
    return query, key, value


@pytest.mark.parametrize(
    ("channels", "dtype", "requires_grad", "operation"),
    [
        (128, torch.bfloat16, False, "npu_fused_infer_attention_score"),
        (128, torch.bfloat16, True, "npu_fusion_attention"),
        (128, torch.float32, False, "npu_fusion_attention"),
        (80, torch.bfloat16, False, "npu_fusion_attention"),
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_the_inference_operation_runs_for_the_arguments_it_is_documented_for(
    channels: int, dtype: torch.dtype, requires_grad: bool, operation: str, causal: bool
) -> None:
    arguments = arguments_of(random_heads(channels, dtype, requires_grad), [4, 9], [4, 9], None, causal)
    assert supports_packed_attention(*arguments) is None
    output = packed_attention_npu(*arguments)
    assert [operation] == fake_ops.CALLS
    torch.testing.assert_close(output, packed_attention_reference(*arguments), atol=2e-2, rtol=2e-2)


def test_a_mask_created_in_inference_mode_can_be_used_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_causal_masks", {})
    with torch.inference_mode():
        packed_attention_npu(*arguments_of(random_heads(8, torch.float32), [4, 9], [4, 9], None, True))
    (mask,) = attention._causal_masks.values()
    assert not mask.is_inference()


def test_queries_without_keys_are_not_supported() -> None:
    tensors = random_heads(8, torch.float32)
    assert supports_packed_attention(*arguments_of(tensors, [5, 9], [4, 9])) is None
    assert supports_packed_attention(*arguments_of(tensors, [5, 9], [4, 9], None, True)) == (
        "a segment of 5 queries and 4 keys has queries without keys"
    )


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Tensors that `tolist` copied to the host."""
    copied: list[Tensor] = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: copied.append(tensor) or tolist(tensor))
    return copied


@pytest.mark.parametrize("given_q", [False, True])
@pytest.mark.parametrize("given_k", [False, True])
@pytest.mark.parametrize("same_segments", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # which the kernel supports, and does not
def test_missing_host_lengths_are_copied_once_per_call(
    given_q: bool,
    given_k: bool,
    same_segments: bool,
    dtype: torch.dtype,
    copies: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vlparts_npu.self_check.DEVICE_TYPE", "cpu")
    monkeypatch.setattr("vlparts_npu.self_check.check_kernel", lambda kernel, device: "")
    reset_checks()
    implementation = with_fallback(KERNEL)
    tensors = random_heads(8, dtype, keys=9 if same_segments else 12)
    cu_seqlens_q = torch.tensor([0, 4, 9], dtype=torch.int32)
    cu_seqlens_k = cu_seqlens_q if same_segments else torch.tensor([0, 5, 12], dtype=torch.int32)
    arguments = (*tensors, cu_seqlens_q, cu_seqlens_k, 5, 7)
    expected = packed_attention_reference(*arguments)
    copies.clear()
    fake_ops.CALLS.clear()
    found = implementation(
        *arguments,
        cu_seqlens_q_cpu=[0, 4, 9] if given_q else None,
        cu_seqlens_k_cpu=([0, 4, 9] if same_segments else [0, 5, 12]) if given_k else None,
    )
    operations = ["npu_fusion_attention"] if dtype == torch.float32 else []
    assert operations == fake_ops.CALLS
    if same_segments:
        expected_copies = [] if given_q or given_k else [cu_seqlens_q]
    else:
        pairs = ((cu_seqlens_q, given_q), (cu_seqlens_k, given_k))
        expected_copies = [cu_seqlens for cu_seqlens, given in pairs if not given]
    assert [id(x) for x in copies] == [id(x) for x in expected_copies]
    torch.testing.assert_close(found, expected)
    reset_checks()


def test_arguments_with_defaults_may_be_omitted() -> None:
    """PyTorch's dispatcher does not pass trailing arguments that have their default value to a Python kernel."""
    tensors = random_heads(8, torch.float32)
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    assert add_host_lengths(*tensors, cu_seqlens, cu_seqlens, 5, 5)[-4:] == (None, False, [0, 4, 9], [0, 4, 9])
