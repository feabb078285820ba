"""Packed attention against a dense block mask: values, gradients, isolation, types, bad input."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.parts.attention_oracle import assert_like_oracle, boundaries, cases, flags, inputs, oracle
from vlparts.parts.ops_attention import packed_attention
from vlparts.parts.ops_attention_reference import packed_attention_reference


@cases
@flags
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_output_and_gradients_are_those_of_dense_attention(
    segments: tuple[list[int], list[int]], causal: bool, key_heads: int
) -> None:
    tensors = inputs(segments, key_heads=key_heads)
    output = packed_attention(*tensors, *map(boundaries, segments), causal=causal)
    assert output.is_contiguous()
    assert_like_oracle(output, tensors, segments, causal, 1e-10)


@cases
@flags
def test_the_reference_agrees(segments: tuple[list[int], list[int]], causal: bool) -> None:
    tensors = inputs(segments, key_heads=2)
    output = packed_attention_reference(*tensors, *map(boundaries, segments), 0, 0, causal=causal)
    assert_like_oracle(output, tensors, segments, causal, 1e-10)


@cases
@flags
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)], ids=str
)
def test_every_type(segments: tuple[list[int], list[int]], causal: bool, dtype: torch.dtype, tolerance: float) -> None:
    tensors = inputs(segments, dtype=dtype)
    output = packed_attention(*tensors, *map(boundaries, segments), causal=causal)
    assert output.dtype == dtype
    assert_like_oracle(output, tensors, segments, causal, tolerance)


@pytest.mark.usefixtures("poisoned_empty")
@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_unwritten_memory_is_read(segments: tuple[list[int], list[int]], dtype: torch.dtype) -> None:
    tensors = inputs(segments, dtype=dtype)
    output = packed_attention(*tensors, *map(boundaries, segments))
    output.sum().backward()
    assert output.isfinite().all()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in tensors)


def test_values_may_have_another_width_and_scale_is_used() -> None:
    query, key, value = torch.randn(5, 2, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 3)
    cu_seqlens = boundaries([2, 3])
    output = packed_attention(query, key, value, cu_seqlens, scale=0.3)
    expected = oracle(query * 0.3 * 8**0.5, key, value, [2, 3], [2, 3])
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scale_is_used_in_training(dtype: torch.dtype) -> None:
    tensors = inputs(([4, 3], [4, 3]), dtype=dtype)
    output = packed_attention(*tensors, boundaries([4, 3]), scale=0.1)
    scaled = (tensors[0].double() * 0.1 * 8**0.5, *tensors[1:])
    expected = oracle(*scaled, [4, 3], [4, 3])
    got, wanted = (torch.autograd.grad(x.double().square().sum(), tensors) for x in (output, expected))
    torch.testing.assert_close(got, wanted, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize(("queries", "keys"), [([], []), ([0], [0]), ([0, 0], [0, 3]), ([2], [0])])
def test_nothing_to_attend_to(queries: list[int], keys: list[int]) -> None:
    tensors = inputs((queries, keys))
    output = packed_attention(*tensors, boundaries(queries), boundaries(keys))
    assert output.shape == (sum(queries), 4, 8)
    assert output.tolist() == torch.zeros_like(output).tolist()
    (gradient,) = torch.autograd.grad(output.sum(), tensors[:1])
    assert gradient.count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_no_gradient_crosses_segments(dtype: torch.dtype) -> None:
    lengths = [4, 3, 4, 200]
    tensors = inputs((lengths, lengths), dtype=dtype)
    cu_seqlens = boundaries(lengths)
    output = packed_attention(*tensors, cu_seqlens)
    for start, end in pairwise(cu_seqlens.tolist()):
        for gradient in torch.autograd.grad(output[start:end].sum(), tensors, retain_graph=True):
            assert gradient[:start].count_nonzero() == 0
            assert gradient[end:].count_nonzero() == 0
        (gradient,) = torch.autograd.grad(output[start:end].square().sum(), tensors[2:], retain_graph=True)
        assert gradient[start:end].count_nonzero() > 0


def test_poison_stays_in_its_segment() -> None:
    tensors = [x.detach() for x in inputs(([3, 4, 3], [3, 4, 3]))]
    clean = packed_attention(*tensors, boundaries([3, 4, 3]))
    for tensor in tensors:
        tensor[3:7] = float("nan")
    poisoned = packed_attention(*tensors, boundaries([3, 4, 3]))
    assert torch.equal(poisoned[:3], clean[:3])
    assert torch.equal(poisoned[7:], clean[7:])
    assert poisoned[3:7].isnan().all()


@flags
def test_gradcheck(causal: bool) -> None:
    segments = ([2, 0, 3, 1], [2, 1, 3, 2])
    tensors = tuple(torch.randn(n, 1, 2, dtype=torch.float64, requires_grad=True) for n in (6, 8, 8))
    assert torch.autograd.gradcheck(
        lambda *x: packed_attention(*x, *map(boundaries, segments), causal=causal), tensors
    )


def test_inference_mode_and_no_grad() -> None:
    tensors = inputs(([3, 5], [3, 5]))
    expected = packed_attention(*tensors, boundaries([3, 5]))
    with torch.no_grad():
        assert torch.equal(packed_attention(*tensors, boundaries([3, 5])), expected)
    with torch.inference_mode():
        assert torch.equal(packed_attention(*tensors, boundaries([3, 5])), expected)


def test_autocast_brings_mixed_types_together() -> None:
    query, key, value = inputs(([3, 5], [3, 5]), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = packed_attention(query, key, value.bfloat16(), boundaries([3, 5]))
    assert output.dtype == torch.bfloat16
    rounded = packed_attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), boundaries([3, 5]))
    assert torch.equal(output, rounded)


# --- bad input


def test_tensors_that_do_not_fit_are_refused() -> None:
    q, k, v = torch.randn(4, 2, 8), torch.randn(4, 2, 8), torch.randn(4, 2, 8)
    cu = boundaries([4])
    with pytest.raises(ValueError, match=r"`key` must have shape \(tokens, heads, channels\), got \(1, 4, 2, 8\)"):
        packed_attention(q, k[None], v, cu)
    with pytest.raises(ValueError, match="the same floating-point dtype and device, .*for `value`, torch.float64"):
        packed_attention(q, k, v.double(), cu)
    with pytest.raises(ValueError, match="the same floating-point dtype and device, .*torch.int64"):
        packed_attention(q.long(), k.long(), v.long(), cu)
    with pytest.raises(
        ValueError, match="the same .* device, got torch.float32 on cpu and, for `key`, torch.float32 on meta"
    ):
        packed_attention(q, k.to("meta"), v, cu)
    with pytest.raises(
        ValueError, match=r"`key` and `value` must have the same number of tokens .*\(4, 2, 8\) and \(3, 2, 8\)"
    ):
        packed_attention(q, k, v[:3], cu)
    with pytest.raises(
        ValueError, match="`query` and `key` must have the same number of channels per head, got 8 and 7"
    ):
        packed_attention(q, k[..., :7], v, cu)
    with pytest.raises(ValueError, match="The heads of `key` must divide the heads of `query`, got 2 and 3"):
        packed_attention(torch.randn(4, 3, 8), k, v, cu)
    with pytest.raises(ValueError, match="The heads of `key` must divide the heads of `query`, got 0 and 2"):
        packed_attention(q, k[:, :0], v[:, :0], cu)


@pytest.mark.parametrize(
    "bad",
    [
        torch.tensor([0, 4]),
        torch.tensor([0.0, 4.0]),
        torch.tensor([[0, 4]], dtype=torch.int32),
        boundaries([4])[:0],
    ],
    ids=["int64", "float", "two dimensions", "nothing"],
)
def test_boundaries_are_a_row_of_int32(bad: Tensor) -> None:
    tensors = inputs(([4], [4]))
    with pytest.raises(ValueError, match=r"`cu_seqlens_q` must be an int32 tensor of shape \(segments \+ 1,\), got "):
        packed_attention(*tensors, bad)
    with pytest.raises(ValueError, match="`cu_seqlens_k` must be an int32 tensor"):
        packed_attention(*tensors, boundaries([4]), bad)


@pytest.mark.parametrize("bounds", [[0, 2], [1, 4], [0, 5], [0, 3, 2, 4]])
def test_boundaries_must_cover_the_tokens(bounds: list[int]) -> None:
    tensors = inputs(([4], [4]))
    bad = torch.tensor(bounds, dtype=torch.int32)
    good = boundaries([0] * (len(bounds) - 2) + [4])
    with pytest.raises(ValueError, match="`cu_seqlens_q` must rise from 0 to the number of tokens, 4, got "):
        packed_attention(*tensors, bad, good)
    with pytest.raises(ValueError, match="`cu_seqlens_k` must rise from 0 to the number of tokens, 4, got "):
        packed_attention(*tensors, good, bad)


def test_boundaries_must_agree() -> None:
    tensors = inputs(([4], [4]))
    with pytest.raises(ValueError, match="the same number of segments, got 1 and 2"):
        packed_attention(*tensors, boundaries([4]), boundaries([2, 2]))
    with pytest.raises(ValueError, match="`cu_seqlens_q` must be on cpu like `query`, got meta"):
        packed_attention(*tensors, boundaries([4]).to("meta"))
