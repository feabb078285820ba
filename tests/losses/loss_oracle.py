"""Reference of the weighted loss: its formula in loops over Python floats.

With the importance a of a sample, the weight b of a token (0 without label) and its loss l, the mix m, the length
exponent p, and B, the sum of b over a sample,

    L = m sum_s a (sum_t b l / B) / sum_s a  +  (1 - m) sum_st a b B^-p l / sum_st a b B^-p

over the samples with B > 0.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORED = -100
VOCABULARY = 11


class Case(NamedTuple):
    """Packed samples; `logits` requires gradients."""

    logits: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    sample_weights: Tensor
    token_weights: Tensor

    @property
    def weighting(self) -> dict[str, Tensor]:
        """Keyword arguments of the losses."""
        return dict(cu_seqlens=self.cu_seqlens, sample_weights=self.sample_weights, token_weights=self.token_weights)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_case(lengths: list[int], seed: int = 0, ignored: float = 0.3, vocabulary: int = VOCABULARY) -> Case:
    """Samples of these lengths with random weights; a share of the labels is ignored."""
    tokens = sum(lengths)
    uniform = torch.rand(2, tokens + len(lengths), generator=torch.Generator().manual_seed(seed)).double()
    labels = (uniform[0, :tokens] * vocabulary).long().masked_fill(uniform[1, :tokens] < ignored, IGNORED)
    return Case(
        (2 * drawn(tokens, vocabulary, seed=seed)).requires_grad_(),
        labels,
        torch.tensor([0, *lengths]).cumsum(0),
        0.2 + uniform[0, tokens:],
        0.2 + uniform.flip(1)[1, :tokens],
    )


def rows_of(cu_seqlens: Tensor) -> list[slice]:
    """The rows of each sample."""
    bounds = cu_seqlens.tolist()
    return [slice(start, end) for start, end in zip(bounds, bounds[1:], strict=False)]


def token_loss(row: list[float], label: int, smoothing: float = 0.0, z: float = 0.0) -> float:
    """The loss of one token."""
    top = max(row)
    partition = top + math.log(sum(math.exp(x - top) for x in row))
    of_classes = [partition - x for x in row]
    return (1 - smoothing) * of_classes[label] + smoothing * sum(of_classes) / len(row) + z * partition**2


def formula(samples: list[tuple[float, list[tuple[float, float]]]], mix: float, exponent: float) -> float:
    """L from a of each sample and b and l of its tokens."""
    used = [(a, tokens, sum(b for b, _ in tokens)) for a, tokens in samples if sum(b for b, _ in tokens) > 0]
    importance = sum(a for a, _, _ in used)
    by_token = sum(a * b * size**-exponent for a, tokens, size in used for b, _ in tokens)
    if importance == 0:
        return 0.0
    means = sum(a * sum(b * loss for b, loss in tokens) / size for a, tokens, size in used)
    summed = sum(a * b * size**-exponent * loss for a, tokens, size in used for b, loss in tokens)
    return mix * means / importance + (1 - mix) * summed / by_token


def looped_loss(case: Case, mix: float, exponent: float, smoothing: float = 0.0, z: float = 0.0) -> float:
    """The formula on a case."""
    samples = []
    for a, rows in zip(case.sample_weights.tolist(), rows_of(case.cu_seqlens), strict=True):
        tokens = [
            (b, token_loss(row, label, smoothing, z))
            for row, label, b in zip(
                case.logits[rows].tolist(), case.labels[rows].tolist(), case.token_weights[rows].tolist(), strict=True
            )
            if label != IGNORED
        ]
        samples.append((a, tokens))
    return formula(samples, mix, exponent)


def numeric_gradient(function: Callable[[], float], tensor: Tensor, step: float = 1e-6) -> Tensor:
    """Gradient by central differences."""
    gradient, flat = torch.zeros_like(tensor), tensor.data.view(-1)
    for index in range(tensor.numel()):
        value = flat[index].item()
        sides = []
        for side in (step, -step):
            flat[index] = value + side
            sides.append(function())
        flat[index] = value
        gradient.view(-1)[index] = (sides[0] - sides[1]) / (2 * step)
    return gradient


def gradients(loss: Tensor, *inputs: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """Gradients of a scalar; zeros for inputs it does not depend on."""
    return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True, **options)


def assert_equal(got: Any, wanted: Any, tolerance: float = 1e-10) -> None:
    """Equal up to an absolute and relative tolerance."""
    torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)
