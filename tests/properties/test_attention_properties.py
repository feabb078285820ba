"""Properties of attention over any packing."""

from itertools import pairwise
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.kernels.cpu.forms import prefer_forms
from torch import Tensor

from vlparts.kernels.cpu import attention as attention_cpu
from vlparts.kernels.cpu import attention_blocks
from vlparts.parts.ops_attention import packed_attention
from vlparts.parts.ops_attention_reference import block_mask, packed_attention_reference
from vlparts.training.bins import plan_packing

lengths = st.integers(0, 6) | st.sampled_from([1, 13, 64, 129])
segments = st.lists(st.tuples(lengths, lengths), max_size=7)
head_counts = st.sampled_from([(1, 1), (4, 4), (4, 2), (3, 1)])
types = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])


def boundaries(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts], dtype=torch.int64).cumsum(0).to(torch.int32)


def draw_tensors(
    pairs: list[tuple[int, int]], heads: tuple[int, int] = (2, 2), dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    queries, keys = (sum(pair[i] for pair in pairs) for i in (0, 1))
    shapes = [(queries, heads[0], 8), (keys, heads[1], 8), (keys, heads[1], 8)]
    return tuple(torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)


def attend(tensors: tuple[Tensor, ...], pairs: list[tuple[int, int]], causal: bool = False) -> Tensor:
    cu_q, cu_k = (boundaries([pair[i] for pair in pairs]) for i in (0, 1))
    return packed_attention(*tensors, cu_q, cu_k, causal=causal)


def gradients(output: Tensor, tensors: tuple[Tensor, ...], direction: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((output.double() * direction).sum(), tensors, allow_unused=True, materialize_grads=True)


@given(segments, head_counts, st.booleans())
def test_the_fast_path_is_the_dense_mask(pairs: list[tuple[int, int]], heads: tuple[int, int], causal: bool) -> None:
    tensors = draw_tensors(pairs, heads)
    output = attend(tensors, pairs, causal)
    query, key, value = tensors
    cu_q, cu_k = (boundaries([pair[i] for pair in pairs]) for i in (0, 1))
    seen = block_mask(cu_q, cu_k, len(query), len(key), causal)
    keys, values = (x.repeat_interleave(heads[0] // heads[1], 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, keys) / 8**0.5
    exponents = scores.exp() * seen
    weights = exponents / exponents.sum(-1, keepdim=True).clamp(min=1e-300)
    expected = torch.einsum("hqk,khd->qhd", weights, values)
    direction = torch.randn_like(expected)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        gradients(output, tensors, direction), gradients(expected, tensors, direction), rtol=1e-8, atol=1e-8
    )


@given(segments, st.booleans(), types)
def test_a_segment_in_a_pack_is_the_segment_alone(
    pairs: list[tuple[int, int]], causal: bool, dtype: torch.dtype
) -> None:
    tensors = draw_tensors(pairs, dtype=dtype)
    packed = attend(tensors, pairs, causal)
    direction = torch.randn(packed.shape, dtype=torch.float64)
    together = gradients(packed, tensors, direction)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    bounds = [pairwise(boundaries([pair[i] for pair in pairs]).tolist()) for i in (0, 1)]
    for pair, queries, keys in zip(pairs, *bounds, strict=True):
        rows = (slice(*queries), slice(*keys), slice(*keys))
        alone = tuple(x[r].detach().requires_grad_() for x, r in zip(tensors, rows, strict=True))
        output = attend(alone, [pair], causal)
        torch.testing.assert_close(packed[rows[0]], output, rtol=tolerance, atol=tolerance)
        separate = gradients(output, alone, direction[rows[0]])
        for a, b, r in zip(together, separate, rows, strict=True):
            torch.testing.assert_close(a[r], b, rtol=tolerance, atol=4 * tolerance)


@given(segments, st.randoms(use_true_random=False), st.booleans())
def test_the_order_of_segments_is_free(pairs: list[tuple[int, int]], random: Random, causal: bool) -> None:
    tensors = draw_tensors(pairs)
    order = list(range(len(pairs)))
    random.shuffle(order)
    parts = [x.split([pair[i] for pair in pairs]) for x, i in zip(tensors, (0, 1, 1), strict=True)]
    shuffled = tuple(torch.cat([x[:0], *(p[i] for i in order)]) for x, p in zip(tensors, parts, strict=True))
    output = attend(shuffled, [pairs[i] for i in order], causal)
    outputs = attend(tensors, pairs, causal).split([pair[0] for pair in pairs])
    torch.testing.assert_close(output, torch.cat([output[:0], *(outputs[i] for i in order)]), rtol=1e-12, atol=1e-12)


@given(segments.filter(len), st.data(), types)
def test_gradients_stay_in_their_segment(
    pairs: list[tuple[int, int]], data: st.DataObject, dtype: torch.dtype
) -> None:
    tensors = draw_tensors(pairs, dtype=dtype)
    chosen = data.draw(st.integers(0, len(pairs) - 1))
    bounds = [boundaries([pair[i] for pair in pairs]).tolist()[chosen : chosen + 2] for i in (0, 1)]
    output = attend(tensors, pairs)[slice(*bounds[0])]
    grads = gradients(output, tensors, torch.randn(output.shape, dtype=torch.float64))
    for gradient, (start, end) in zip(grads, (bounds[0], bounds[1], bounds[1]), strict=True):
        assert gradient[:start].count_nonzero() == 0
        assert gradient[end:].count_nonzero() == 0


@given(segments, head_counts, st.booleans(), types)
def test_the_fast_path_is_the_reference(
    pairs: list[tuple[int, int]], heads: tuple[int, int], causal: bool, dtype: torch.dtype
) -> None:
    tensors = draw_tensors(pairs, heads, dtype)
    cu_q, cu_k = (boundaries([pair[i] for pair in pairs]) for i in (0, 1))
    output = attend(tensors, pairs, causal)
    expected = packed_attention_reference(*tensors, cu_q, cu_k, 0, 0, causal=causal)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)


@given(
    segments,
    head_counts,
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(1, 400),
    st.sampled_from([1, 8, 32]),
)
def test_blocks_of_any_size_are_the_reference(
    pairs: list[tuple[int, int]], heads: tuple[int, int], dtype: torch.dtype, scores: int, steps: int
) -> None:
    tensors = draw_tensors(pairs, heads, dtype)
    with pytest.MonkeyPatch.context() as patch:
        # Also for single keys: PyTorch's fused attention sums their gradients in bfloat16.
        prefer_forms(patch, "blocks", "onednn")
        patch.setattr(attention_cpu, "BFLOAT16_TRAINING_UP_TO", 0)
        patch.setattr(attention_blocks, "MIN_LENGTH", 1)
        patch.setattr(attention_blocks, "MAX_THREADS", 64)
        patch.setattr(attention_blocks, "SCORES_PER_BLOCK", scores)
        patch.setattr(attention_blocks, "LENGTH_MULTIPLE", steps)
        output = attend(tensors, pairs)
        # Rounded first: sums over many queries would hold the rounding of the kernels' input, which is none of theirs.
        direction = torch.randn(output.shape).to(dtype).double()
        found = gradients(output, tensors, direction)
    precise = tuple(x.detach().double().requires_grad_() for x in tensors)
    cu_q, cu_k = (boundaries([pair[i] for pair in pairs]) for i in (0, 1))
    expected = packed_attention_reference(*precise, cu_q, cu_k, 0, 0)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)
    for mine, exact in zip(found, gradients(expected, precise, direction), strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=2 * tolerance, atol=4 * tolerance)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.integers(20, 40))
def test_every_packing_plan_gives_the_same_images(sizes: list[int], capacity: int) -> None:
    images = [torch.randn(size, 2, 8, dtype=torch.float64) for size in sizes]
    alone = [attend((x, x, x), [(len(x), len(x))]) for x in images]
    for strategy in ("first_fit", "best_fit_decreasing", "next_fit"):
        for members in plan_packing(sizes, capacity, strategy=strategy):
            pack = torch.cat([images[i] for i in members])
            output = attend((pack, pack, pack), [(sizes[i], sizes[i]) for i in members])
            torch.testing.assert_close(output, torch.cat([alone[i] for i in members]), rtol=1e-12, atol=1e-12)
