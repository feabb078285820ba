"""Arguments that the kernels do not support, with the reason, on meta tensors."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from vlparts_npu.support import (
    is_joint_projection,
    supports_attention_tensors,
    supports_experts,
    supports_gelu,
    supports_inference_attention,
    supports_rms_norm,
    supports_rotary,
    supports_rotary_pair,
    supports_segments,
    supports_swiglu,
)

HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64


def empty(*shape: int, dtype: torch.dtype = HALF, **options: Any) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", **options)


def check(reason: str | None, part: str | None) -> None:
    """Compare a reason with a part of the expected one; None if the arguments are supported."""
    assert reason is None if part is None else reason is not None and part in reason, reason


@pytest.mark.parametrize(
    ("shape", "dtype", "weight", "weight_dtype", "reason"),
    [
        ((7, 1280), HALF, 1280, HALF, None),
        ((0, 8), torch.float16, 8, torch.float16, None),
        ((2, 3, 4, 8), SINGLE, 8, SINGLE, None),
        ((7, 8), HALF, 8, SINGLE, None),
        ((7, 8), SINGLE, 8, HALF, "the weight is torch.bfloat16 and the input torch.float32"),
        ((7, 8), HALF, 8, torch.float16, "the weight is torch.float16 and the input torch.bfloat16"),
        ((8,), SINGLE, 8, SINGLE, "1 axes"),
        ((1,) * 9, SINGLE, 1, SINGLE, "9 axes"),
        ((7, 8), SINGLE, 4, SINGLE, "the weight (4,) does not match the last axis of (7, 8)"),
        ((7, 0), SINGLE, 0, SINGLE, "the weight (0,) does not match the last axis of (7, 0)"),
        ((7, 8), DOUBLE, 8, DOUBLE, "torch.float64"),
    ],
)
def test_rms_norm(
    shape: tuple[int, ...], dtype: torch.dtype, weight: int, weight_dtype: torch.dtype, reason: str | None
) -> None:
    check(supports_rms_norm(empty(*shape, dtype=dtype), empty(weight, dtype=weight_dtype), 1e-6), reason)


@pytest.mark.parametrize(
    ("input", "reason"),
    [
        (empty(3, 8), None),
        (empty(3, 8).t(), None),
        (empty(0, 8), "empty"),
        (empty(3, 8, dtype=DOUBLE), "torch.float64"),
        (empty(3, 8, dtype=torch.int32), "torch.int32"),
    ],
)
def test_gelu(input: Tensor, reason: str | None) -> None:
    check(supports_gelu(input), reason)


@pytest.mark.parametrize(
    ("gate_up", "reason"),
    [
        (empty(3, 8), None),
        (empty(2, 3, 8, dtype=SINGLE), None),
        (empty(3, 7), "no even last axis"),
        (empty(), "no even last axis"),
        (empty(0, 8), "empty"),
        (empty(8, 6).t(), "not contiguous"),
        (empty(3, 8, dtype=DOUBLE), "torch.float64"),
    ],
)
def test_swiglu(gate_up: Tensor, reason: str | None) -> None:
    check(supports_swiglu(gate_up), reason)


@pytest.mark.parametrize(
    ("shape", "dtype", "trained", "reason"),
    [
        ((7, 16, 80), HALF, False, None),
        ((7, 999, 894), SINGLE, False, None),
        ((7, 2, 9), HALF, False, "9 channels"),
        ((7, 2, 896), HALF, False, "896 channels"),
        ((7, 1000, 8), HALF, False, "1000 heads"),
        ((0, 2, 8), HALF, False, "empty"),
        ((7, 2, 8), DOUBLE, False, "torch.float64"),
        ((7, 2, 8), HALF, True, "cosines or sines require gradients"),
    ],
)
def test_rotary(shape: tuple[int, int, int], dtype: torch.dtype, trained: bool, reason: str | None) -> None:
    angles = empty(shape[0], shape[2], dtype=SINGLE, requires_grad=trained)
    check(supports_rotary(empty(*shape, dtype=dtype), angles, angles), reason)
    for pair in itertools.permutations((empty(*shape, dtype=dtype), empty(shape[0], 1, shape[2]))):
        check(supports_rotary_pair(*pair, angles, angles), reason)


def projected(*shape: int, dtype: torch.dtype = HALF) -> list[Tensor]:
    """Queries, keys and values that are views of one projection."""
    return list(empty(shape[0], 3, *shape[1:], dtype=dtype).unbind(1))


@pytest.mark.parametrize(
    ("query", "key", "joint"),
    [
        (*projected(7, 4, 8)[:2], True),
        (*projected(7, 4, 8, dtype=torch.float16)[:2], True),
        (*projected(7, 4, 8, dtype=SINGLE)[:2], False),
        (*projected(7, 4, 8)[::2], True),
        (*projected(7, 4, 8)[1::-1], False),
        (projected(7, 4, 8)[0], projected(7, 4, 8)[1], False),
        (empty(7, 4, 8), empty(7, 4, 8), False),
        (*[x.transpose(1, 2) for x in projected(7, 8, 8)[:2]], True),
        (projected(7, 8, 8)[0], projected(7, 8, 8)[1].transpose(1, 2), False),
        (projected(7, 4, 8)[0], empty(7, 2, 8), False),
    ],
)
def test_which_queries_and_keys_are_rotated_together(query: Tensor, key: Tensor, joint: bool) -> None:
    assert is_joint_projection(query, key) == joint


@pytest.mark.parametrize(
    ("query", "key", "value", "reason"),
    [
        (empty(9, 16, 72), empty(9, 16, 72), empty(9, 16, 72), None),
        (empty(9, 8, 768, dtype=SINGLE), empty(4, 2, 768, dtype=SINGLE), empty(4, 2, 64, dtype=SINGLE), None),
        (empty(9, 256, 8), empty(9, 1, 8), empty(9, 1, 8), None),
        (empty(9, 257, 8), empty(9, 257, 8), empty(9, 257, 8), "257 query heads"),
        (empty(9, 3, 8), empty(9, 2, 8), empty(9, 2, 8), "3 query heads on 2 key heads"),
        (empty(9, 3, 8), empty(9, 0, 8), empty(9, 0, 8), "on 0 key heads"),
        (empty(9, 2, 776), empty(9, 2, 776), empty(9, 2, 8), "776 channels"),
        (empty(9, 2, 8), empty(9, 2, 8), empty(9, 2, 16), "16 of values"),
        (empty(9, 2, 8), empty(9, 2, 8), empty(9, 2, 8, dtype=SINGLE), "dtypes differ"),
        (empty(9, 2, 8, dtype=DOUBLE), empty(9, 2, 8, dtype=DOUBLE), empty(9, 2, 8, dtype=DOUBLE), "torch.float64"),
    ],
)
def test_attention_tensors(query: Tensor, key: Tensor, value: Tensor, reason: str | None) -> None:
    check(supports_attention_tensors(query, key, value), reason)


@pytest.mark.parametrize(
    ("bounds_q", "bounds_k", "causal", "reason"),
    [
        ([0, 3, 7], [0, 3, 7], True, None),
        ([0, 3, 3, 7], [0, 3, 3, 7], True, None),
        ([0, 1, 2], [0, 5, 9], True, None),
        ([0, 5, 9], [0, 1, 2], False, None),
        ([0, 5, 9], [0, 5, 8], True, "4 queries and 3 keys"),
        ([0, 0, 4], [0, 3, 9], False, None),
        ([0, 2, 4], [0, 0, 9], False, "2 queries and 0 keys"),
        ([0, 0], [0, 3], False, "no queries or no keys"),
        ([0, 3], [0, 0], False, "no queries or no keys"),
        ([0], [0], False, "no queries or no keys"),
        ([1, 4], [0, 4], False, "do not rise from 0 to 4"),
        ([0, 5, 4], [0, 2, 4], False, "do not rise from 0 to 4"),
        ([0, 2**20], [0, 4], False, None),
        ([0, 4], [0, 2**20 + 1], False, "1048577 tokens"),
    ],
)
def test_segments(bounds_q: list[int], bounds_k: list[int], causal: bool, reason: str | None) -> None:
    check(supports_segments(bounds_q, bounds_k, bounds_q[-1], bounds_k[-1], causal), reason)


def test_segments_must_cover_all_tokens() -> None:
    check(supports_segments([0, 4], [0, 4], 4, 5, False), "do not rise from 0 to 5")


@pytest.mark.parametrize(
    ("query", "key", "reason"),
    [
        (empty(9, 8, 128), empty(9, 2, 128), None),
        (empty(9, 8, 64), empty(9, 2, 64), "heads have 64 and 64 channels"),
        (empty(9, 8, 128, dtype=SINGLE), empty(9, 2, 128, dtype=SINGLE), "not half precision"),
        (empty(9, 130, 128), empty(9, 2, 128), "more than 64 query heads"),
        (empty(9, 8, 128, requires_grad=True), empty(9, 2, 128), "gradients"),
    ],
)
def test_attention_without_gradients(query: Tensor, key: Tensor, reason: str | None) -> None:
    check(supports_inference_attention(query, key, key), reason)
    with torch.no_grad():
        check(supports_inference_attention(query, key, key), None if reason == "gradients" else reason)


def arranged(experts: int, outer: int, inner: int, dtype: torch.dtype = HALF) -> Tensor:
    return empty(experts, inner, outer, dtype=dtype).transpose(1, 2)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"hidden_states": empty(7, 16, dtype=SINGLE)}, None),
        ({"has_biases": True}, "biases"),
        ({"down": arranged(4, 16, 8, SINGLE)}, "dtypes of the weights differ"),
        ({"up": empty(4, 16, 16)}, "call `arrange_expert_weights`"),
        ({"down": empty(4, 16, 8)}, "call `arrange_expert_weights`"),
        ({"up": arranged(1025, 16, 16), "down": arranged(1025, 16, 8)}, "1025 experts"),
        ({"up": arranged(4, 65_536, 16)}, "are not below 65536"),
        ({"hidden_states": empty(0, 16), "top_k_index": empty(0, 2)}, "(0, 2) are not 1 to 512 of one or more tokens"),
        ({"top_k_index": empty(7, 513)}, "(7, 513) are not 1 to 512"),
        ({"top_k_index": empty(7, 0)}, "(7, 0) are not 1 to 512"),
        ({"top_k_index": empty(2**22, 4)}, "16777216 pairs"),
        ({"up": arranged(4, 16, 16, DOUBLE), "down": arranged(4, 16, 8, DOUBLE)}, "torch.float64"),
    ],
)
def test_experts(changes: dict[str, Any], reason: str | None) -> None:
    arguments: dict[str, Any] = {
        "hidden_states": empty(7, 16),
        "top_k_index": empty(7, 2),
        "up": arranged(4, 16, 16),
        "down": arranged(4, 16, 8),
        "has_biases": False,
    }
    check(supports_experts(**{**arguments, **changes}), reason)
