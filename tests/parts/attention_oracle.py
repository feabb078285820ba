"""Dense attention in float64, and the segments of the tests of packed attention."""

import pytest
import torch
from torch import Tensor

# Lengths of queries and keys of each segment.
SEGMENTS: dict[str, tuple[list[int], list[int]]] = {
    "self": ([5, 3, 8], [5, 3, 8]),
    "one token": ([1, 4, 1], [1, 4, 1]),
    "equal neighbours": ([4, 4, 4], [4, 4, 4]),
    "equal apart": ([4, 2, 4, 2, 3], [4, 2, 4, 2, 3]),
    "empty": ([0, 3, 0, 2, 0], [0, 3, 0, 2, 0]),
    "pooling": ([1, 1, 1], [7, 2, 5]),
    "cross": ([2, 5, 3], [4, 1, 3]),
    "no keys": ([2, 3, 1], [4, 0, 2]),
    "no queries": ([2, 0, 1], [4, 3, 2]),
    "long": ([131, 7, 131], [131, 7, 131]),
}
cases = pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS.keys())
flags = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


def boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def inputs(
    segments: tuple[list[int], list[int]],
    heads: int = 4,
    key_heads: int = 4,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = [
        (sum(segments[0]), heads, 8),
        (sum(segments[1]), key_heads, 8),
        (sum(segments[1]), key_heads, 8),
    ]
    query, key, value = (torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes)
    return query, key, value


def oracle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths_q: list[int],
    lengths_k: list[int],
    causal: bool = False,
) -> Tensor:
    """Dense attention in float64 with a mask filled in by loops."""
    seen = torch.zeros(sum(lengths_q), sum(lengths_k), dtype=torch.bool)
    start_q = start_k = 0
    for length_q, length_k in zip(lengths_q, lengths_k, strict=True):
        for i in range(length_q):
            for j in range(length_k):
                seen[start_q + i, start_k + j] = not causal or length_q - i <= length_k - j
        start_q, start_k = start_q + length_q, start_k + length_k
    query, key, value = query.double(), key.double(), value.double()
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
    blind = ~seen.any(1)
    weights = scores.masked_fill(~(seen | blind[:, None]), float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights.masked_fill(blind[:, None], 0.0), value)


def assert_like_oracle(
    output: Tensor,
    tensors: tuple[Tensor, ...],
    segments: tuple[list[int], list[int]],
    causal: bool,
    tolerance: float,
) -> None:
    """Compare the output and the gradients of a random projection."""
    expected = oracle(*tensors, *segments, causal)
    direction = torch.randn_like(expected)
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)
    gradients = torch.autograd.grad((output.double() * direction).sum(), tensors)
    references = torch.autograd.grad((expected * direction).sum(), tensors)
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=tolerance, atol=4 * tolerance)
