"""Cross-entropy of a linear head and its gradients, computed in chunks of classes without holding all logits.

The first pass computes the logits of each chunk minus a shift per token, the running estimate of the log-partition
function, and sums their exponentials, which are cached while there is room. The second pass writes the gradients:
three matrix products for a cached chunk, four for one whose logits are recomputed. Each chunk of the weight's gradient
is written once. Cached exponentials are off by a factor per token, which is applied to the narrow operand of the
products.

In half precision the difference of logit and shift is rounded, not the logit. Where that is too coarse, or overflows,
everything is computed again in float32. Gradients in float16 have a factor of their own.

A chunk is `(c, N)`, classes first: the shift is then a bias of the first product, the weight's gradient needs no
transposed chunk, and little but exponentials and sums remains outside of the products. docs/benchmarks.md has the
measurements, also of the variants that were rejected.

Shapes: N tokens, H input width of the head, V classes, c classes of a chunk.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..parts import ops_linear  # noqa: F401 (defines the operation)

# Classes of a chunk. Halved, down to the minimum, while the chunk takes more than the given bytes.
MAX_CHUNK_CLASSES = 2048
MIN_CHUNK_CLASSES = 64
CHUNK_BYTES = 64 * 2**20
# Bytes of exponentials cached from the first pass for the second.
CACHE_BYTES = 128 * 2**20
# Largest entry of a float16 gradient, up to a factor of 2; the type ranges from 6e-8 to 65504.
FLOAT16_PEAK = 1024
# Log-partition functions and biases up to this, in units of 1 / eps, are computed in half precision. Rounding the
# shift moves the largest logits by up to 4, and rounding these is an error of up to 2 eps.
MAX_SHIFT = 8


class Head(NamedTuple):
    """A linear head and the options of its loss.

    Attributes:
        weight: `(V, H)`.
        bias: `(V,)` or None.
        softcap: Logits z become `softcap * tanh(z / softcap)`; None for no cap.
        label_smoothing: Share of the uniform distribution.
        z_loss: Weight of the squared log-partition function.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    label_smoothing: float
    z_loss: float


class NeedsGrad(NamedTuple):
    """Which inputs need a gradient."""

    hidden: bool
    weight: bool
    bias: bool


class Gradient(NamedTuple):
    """A gradient, which is `tensor * factor`. The factor is 1 except in float16."""

    tensor: Tensor
    factor: Tensor | float = 1.0


class HeadGradients(NamedTuple):
    """Gradients of the weighted sum of losses, `(N, H)`, `(V, H)` and `(V,)`; None where none is needed."""

    hidden: Gradient | None
    weight: Gradient | None
    bias: Gradient | None


def head_losses(
    hidden: Tensor, labels: Tensor, weights: Tensor, head: Head, needs_grad: NeedsGrad
) -> tuple[Tensor, HeadGradients | None]:
    """Compute the loss of each token and the gradients of their weighted sum.

    Args:
        hidden: `(N, H)` in the type of the head's weight.
        labels: `(N,)` int64 from 0 to V - 1.
        weights: `(N,)` float32 or float64, the weight of each token.
        head: The head.
        needs_grad: Which inputs need a gradient.

    Returns:
        Losses `(N,)` in the type of `weights`, and the gradients, or None if none is needed.
    """
    if not len(hidden):
        return weights.new_zeros(0), _no_tokens(hidden, head, needs_grad) if any(needs_grad) else None
    hidden = hidden.contiguous()
    with torch.autocast(hidden.device.type, enabled=False):  # the types have been chosen
        found = _ChunkedHead(hidden, labels, weights, head).compute(needs_grad)
        if found is None:
            found = _ChunkedHead(hidden.to(weights.dtype), labels, weights, head).compute(needs_grad)
    assert found is not None
    return found


def _no_tokens(hidden: Tensor, head: Head, needs_grad: NeedsGrad) -> HeadGradients:
    """Gradients of zero."""
    inputs = (hidden, head.weight, head.bias)
    zeros = (
        Gradient(torch.zeros_like(one)) if needed and one is not None else None
        for one, needed in zip(inputs, needs_grad, strict=True)
    )
    return HeadGradients(*zeros)


def _float16_factor(peak: Tensor) -> Tensor:
    """Factor that is taken out of a float16 gradient whose entries are up to `peak`."""
    return torch.where(peak > 0, peak / FLOAT16_PEAK, 1.0)


class _Sums(NamedTuple):
    """Sums over the classes, `(N,)` each. Differences are kept, since large logits would absorb them.

    Attributes:
        reference: A number near the log-partition function.
        offset: Log-partition function minus the reference.
        cross_entropy: Log-partition function minus the logit of the label.
        above_mean: Logit of the label minus the mean logit; 0 without label smoothing.
    """

    reference: Tensor
    offset: Tensor
    cross_entropy: Tensor
    above_mean: Tensor

    @property
    def log_partition(self) -> Tensor:
        """Logarithm of the partition function."""
        return self.reference + self.offset

    def losses(self, head: Head) -> Tensor:
        """The loss of each token, `(N,)`."""
        losses = self.cross_entropy
        if head.label_smoothing:
            losses = losses + head.label_smoothing * self.above_mean
        return losses + head.z_loss * self.log_partition.square() if head.z_loss else losses


@dataclass
class _Chunk:
    """A range of classes.

    Attributes:
        classes: The range.
        tokens: `(n,)` tokens whose label is in the range.
        rows: `(n,)` rows of those labels in the chunk.
        exponentials: Cached `(c, N)` exponentials of the logits minus `shift`, or None.
        shift: `(N,)`.
    """

    classes: slice
    tokens: Tensor
    rows: Tensor
    exponentials: Tensor | None = None
    shift: Tensor | None = None


def _make_chunks(labels: Tensor, num_classes: int, size: int) -> list[_Chunk]:
    """Cut the classes into chunks of `size`, the last one shorter; waits for the device once."""
    starts = torch.arange(0, num_classes + size, size, device=labels.device)
    order = labels.argsort()
    bounds = torch.searchsorted(labels[order], starts).tolist()
    chunks = []
    for start, first, last in zip(range(0, num_classes, size), bounds, bounds[1:], strict=False):
        tokens = order[first:last]
        chunks.append(_Chunk(slice(start, min(start + size, num_classes)), tokens, labels[tokens] - start))
    return chunks


@dataclass
class _Buffers:
    """Gradients that are being written; None where none is needed.

    Attributes:
        hidden: `(N, H)` in the type of the loss.
        weight: `(V, H)`, to be multiplied by `weight_factor`.
        bias: `(V,)`, to be multiplied by `bias_factor`.
        weight_factor: 1, or a scalar tensor.
        bias_factor: 1, or a scalar tensor.
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    weight_factor: Tensor | float = 1.0
    bias_factor: Tensor | float = 1.0


class _ChunkedHead:
    """The two passes over chunks of classes.

    Products are computed in the type of `hidden`, the rest in that of `weights`; gradients have the type of the head.
    """

    def __init__(self, hidden: Tensor, labels: Tensor, weights: Tensor, head: Head) -> None:
        self.hidden, self.weights, self.head, self.dtype = hidden, weights, head, weights.dtype
        self.is_half = hidden.dtype != weights.dtype
        size = MAX_CHUNK_CLASSES
        while size > MIN_CHUNK_CLASSES and size * weights.nbytes > CHUNK_BYTES:
            size //= 2
        self.chunks = _make_chunks(labels, len(head.weight), size)

    def compute(self, needs_grad: NeedsGrad) -> tuple[Tensor, HeadGradients | None] | None:
        """Compute losses and gradients; None if half precision is not enough for them."""
        sums = self.forward(cache=any(needs_grad))
        if sums is None:
            return None
        losses = sums.losses(self.head)
        if not any(needs_grad):
            return losses, None
        buffers = self._make_buffers(sums, needs_grad)
        self.backward(sums, buffers)
        hidden = None
        if buffers.hidden is not None:
            hidden = self._rounded(buffers.hidden)
            if hidden is None:
                return None
        weight = None if buffers.weight is None else Gradient(buffers.weight, buffers.weight_factor)
        bias = None if buffers.bias is None else Gradient(buffers.bias, buffers.bias_factor)
        return losses, HeadGradients(hidden, weight, bias)

    def _make_buffers(self, sums: _Sums, needs_grad: NeedsGrad) -> _Buffers:
        head = self.head
        buffers = _Buffers(
            self.weights.new_zeros(self.hidden.shape) if needs_grad.hidden else None,
            torch.empty_like(head.weight) if needs_grad.weight else None,
            torch.empty_like(head.bias) if needs_grad.bias and head.bias is not None else None,
        )
        if head.weight.dtype == torch.float16:  # bounds of the gradients, so that none overflows or vanishes
            bounds = self.weights * self._growth(sums.log_partition).abs().clamp_min(1)
            buffers.bias_factor = _float16_factor(bounds.sum())
            buffers.weight_factor = _float16_factor((bounds * self.hidden.abs().amax(1)).sum())
        return buffers

    def _rounded(self, gradient: Tensor) -> Gradient | None:
        """Return a gradient in the type of the head; None if a half-precision product has overflowed."""
        if self.head.weight.dtype != torch.float16:
            return Gradient(gradient.to(self.head.weight.dtype))
        peak = gradient.abs().amax()
        if self.is_half and not bool(peak.isfinite()):
            return None
        factor = _float16_factor(peak)
        return Gradient(gradient.div_(factor).half(), factor)

    def _growth(self, log_partition: Tensor) -> Tensor:
        """Gradient of a token's loss with respect to its log-partition function."""
        return 1 + 2 * self.head.z_loss * log_partition

    def _is_enough(self, sums: _Sums) -> Tensor:
        """Whether half precision is enough for these sums, a bool scalar."""
        limit = MAX_SHIFT / torch.finfo(self.hidden.dtype).eps
        enough = (sums.log_partition.abs() <= limit) & (sums.cross_entropy + sums.above_mean).isfinite()
        if self.head.bias is None:
            return enough.all()
        bias = self.head.bias.abs()
        return enough.all() & ((bias <= limit) | bias.isinf()).all()  # excluded classes have bias -inf

    def forward(self, cache: bool, exact_shift: bool = False) -> _Sums | None:
        """Sum over the classes; None if half precision is not enough.

        Args:
            cache: Whether to cache exponentials for the second pass.
            exact_shift: Shift each chunk by the maximum of its own logits, which costs two more passes over them.
        """
        # A cache needs the range of float32. Capped logits are recomputed, since the slope of the cap depends on them.
        cacheable = self.hidden.dtype != torch.float16 and self.head.softcap is None
        free_bytes = CACHE_BYTES if cache and cacheable and not exact_shift else 0
        # The logit of a label is `label_shift + label_logit`.
        label_logit, label_shift, total = (torch.zeros_like(self.weights) for _ in range(3))
        reference: Tensor | None = None
        offset: Tensor | None = None
        first_shift: Tensor | None = None
        for chunk in self.chunks:
            near = None if exact_shift or reference is None or offset is None else reference + offset
            logits, shift = self._shifted_logits(chunk.classes, near)
            first_shift = shift if first_shift is None else first_shift
            label_logit[chunk.tokens] = logits[chunk.rows, chunk.tokens].to(self.dtype)
            label_shift[chunk.tokens] = shift[chunk.tokens]
            if self.head.label_smoothing:
                total += logits.sum(0, dtype=self.dtype) + len(logits) * (shift - first_shift)
            exponentials = logits.to(self.dtype).exp_()
            log_sum = exponentials.sum(0).log_()
            if reference is None or offset is None:
                reference, offset = shift, log_sum
            else:
                before, reference = reference, torch.maximum(reference, shift)
                offset = torch.logaddexp(offset + (before - reference), log_sum + (shift - reference))
            free_bytes -= exponentials.numel() * self.hidden.element_size()
            chunk.exponentials = exponentials.to(self.hidden.dtype) if free_bytes >= 0 else None
            chunk.shift = shift
        assert reference is not None
        assert offset is not None
        assert first_shift is not None
        # The first shift is the lowest. If it is too low, exponentials have overflowed, or may have.
        limit = math.log(torch.finfo(self.dtype).max) / 2
        cross_entropy = (reference - label_shift) + (offset - label_logit)
        above_mean = total
        if self.head.label_smoothing:
            above_mean = (label_shift - first_shift) + (label_logit - total / len(self.head.weight))
        sums = _Sums(reference, offset, cross_entropy, above_mean)
        enough = (sums.log_partition - first_shift <= limit).all()
        if self.is_half:
            return sums if bool(enough & self._is_enough(sums)) else None
        return sums if exact_shift or bool(enough) else self.forward(cache, exact_shift=True)

    def backward(self, sums: _Sums, gradients: _Buffers) -> None:
        """Write all gradients."""
        head, log_partition = self.head, sums.log_partition
        growth = self._growth(log_partition)
        uniform = head.label_smoothing / len(head.weight)
        # Rounded after 1 is subtracted, or the gradient of a confident token would vanish in half precision.
        grad_label = growth * (-sums.cross_entropy).exp() - (1 - head.label_smoothing) - uniform
        for chunk in self.chunks:
            grad, shift, slope = self._exponentials(chunk, log_partition)
            scale = ((shift - sums.reference) - sums.offset).exp()
            if head.z_loss:
                grad *= growth
            if uniform:
                grad -= uniform / scale
            grad[chunk.rows, chunk.tokens] = (grad_label / scale)[chunk.tokens].to(grad.dtype)
            if slope is not None:
                grad *= slope
            self._write(grad.to(self.hidden.dtype), (self.weights * scale).unsqueeze(1), chunk.classes, gradients)

    def _shifted_logits(self, classes: slice, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute logits minus a shift, by default their maximum, and return both."""
        head, weight = self.head, self._weight(classes)
        plain = head.bias is None and head.softcap is None
        shift = None if shift is None else shift.to(self.hidden.dtype)
        fused = -shift if shift is not None and plain else None
        logits = torch.ops.vlparts.linear(weight, self.hidden, fused)
        if not plain:
            logits = logits.to(self.dtype)
        if head.bias is not None:
            logits += head.bias[classes].unsqueeze(1)
        if head.softcap is not None:
            logits = logits.div_(head.softcap).tanh_().mul_(head.softcap)
        if shift is None:
            shift = logits.amax(0).clamp_min_(torch.finfo(self.hidden.dtype).min)  # excluded classes have logit -inf
            if logits.dtype != self.dtype:  # again, so that the shifted logits are rounded, not the logits
                return self._shifted_logits(classes, shift)
        if fused is None:
            logits -= shift
        return logits, shift.to(self.dtype)

    def _weight(self, classes: slice) -> Tensor:
        """The weight of a chunk in the type of the products."""
        return self.head.weight[classes].to(self.hidden.dtype)

    def _exponentials(self, chunk: _Chunk, log_partition: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return a chunk's exponentials, their shift, and the slope of the cap."""
        if chunk.exponentials is not None and chunk.shift is not None:
            cached, chunk.exponentials = chunk.exponentials, None
            return cached, chunk.shift, None
        logits, shift = self._shifted_logits(chunk.classes, log_partition)
        cap = self.head.softcap
        slope = None if cap is None else 1 - (logits + shift).div_(cap).square_()
        return logits.exp_(), shift, slope

    def _write(self, grad: Tensor, factors: Tensor, classes: slice, gradients: _Buffers) -> None:
        """Write the gradients that follow from that of a chunk's logits, `grad` `(c, N)` times `factors` `(N, 1)`."""
        weight = self._weight(classes)
        if gradients.hidden is not None:
            gradients.hidden.addcmul_(torch.ops.vlparts.linear(grad.t(), weight.t()).to(self.dtype), factors)
        if gradients.bias is not None:
            gradients.bias[classes] = grad.to(self.dtype) @ (factors.squeeze(1) / gradients.bias_factor)
        if gradients.weight is not None:
            rows = (self.hidden * (factors / gradients.weight_factor)).to(self.hidden.dtype)
            gradients.weight[classes] = torch.ops.vlparts.linear(grad, rows.t())
