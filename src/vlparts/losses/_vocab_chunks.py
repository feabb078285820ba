"""Cross-entropy of a linear head and its gradients, computed in chunks of classes without holding all logits.

The first pass computes the logits of each chunk minus a shift per token, the running estimate of the log-partition
function, and sums their exponentials, which are cached while there is room. The second pass writes the gradients:
three matrix products for a cached chunk, four for one whose logits are recomputed. Each chunk of the weight's gradient
is written once. Cached exponentials are off by a factor per token, which is applied to the narrow operand of the
products.

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


@dataclass
class HeadGradients:
    """Gradients of the weighted sum of losses, `(N, H)`, `(V, H)` and `(V,)`; None where none is needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


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
    gradients = None
    empty_like = torch.empty_like if len(hidden) else torch.zeros_like  # without tokens no chunk is written
    if any(needs_grad):
        gradients = HeadGradients(
            weights.new_zeros(hidden.shape) if needs_grad.hidden else None,
            empty_like(head.weight) if needs_grad.weight else None,
            empty_like(head.bias) if needs_grad.bias and head.bias is not None else None,
        )
    losses = torch.zeros_like(weights)
    if len(hidden):
        with torch.autocast(hidden.device.type, enabled=False):  # the types have been chosen
            chunked = _ChunkedHead(hidden.contiguous(), labels, weights, head)
            sums = chunked.forward(cache=gradients is not None)
            if gradients is not None:
                chunked.backward(sums, gradients)
            losses = sums.losses(head)
    if gradients is not None and gradients.hidden is not None:
        gradients.hidden = gradients.hidden.to(hidden.dtype)
    return losses, gradients


class _Sums(NamedTuple):
    """Sums over the classes, `(N,)` each.

    Attributes:
        label_logit: Logit of each token's label.
        log_partition: Logarithm of the partition function.
        mean_logit: Mean logit; 0 without label smoothing.
    """

    label_logit: Tensor
    log_partition: Tensor
    mean_logit: Tensor

    def losses(self, head: Head) -> Tensor:
        """The loss of each token, `(N,)`."""
        losses = self.log_partition - self.label_logit
        if head.label_smoothing:
            losses = losses + head.label_smoothing * (self.label_logit - self.mean_logit)
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


class _ChunkedHead:
    """The two passes over chunks of classes."""

    def __init__(self, hidden: Tensor, labels: Tensor, weights: Tensor, head: Head) -> None:
        self.hidden, self.weights, self.head, self.dtype = hidden, weights, head, weights.dtype
        size = MAX_CHUNK_CLASSES
        while size > MIN_CHUNK_CLASSES and size * weights.nbytes > CHUNK_BYTES:
            size //= 2
        self.chunks = _make_chunks(labels, len(head.weight), size)

    def forward(self, cache: bool, exact_shift: bool = False) -> _Sums:
        """Sum over the classes.

        Args:
            cache: Whether to cache exponentials for the second pass.
            exact_shift: Shift each chunk by the maximum of its own logits, which costs two more passes over them and,
                in half precision, a second product.
        """
        # A cache needs the range of float32. Capped logits are recomputed, since the slope of the cap depends on them.
        cacheable = self.hidden.dtype != torch.float16 and self.head.softcap is None
        free_bytes = CACHE_BYTES if cache and cacheable and not exact_shift else 0
        label_logit, total = torch.zeros_like(self.weights), torch.zeros_like(self.weights)
        log_partition = first_shift = None
        for chunk in self.chunks:
            logits, shift = self._shifted_logits(chunk.classes, None if exact_shift else log_partition)
            first_shift = shift if first_shift is None else first_shift
            label_logit[chunk.tokens] = logits[chunk.rows, chunk.tokens].to(self.dtype) + shift[chunk.tokens]
            if self.head.label_smoothing:
                total += logits.sum(0, dtype=self.dtype) + len(logits) * shift
            exponentials = logits.to(self.dtype).exp_()
            log_sum = exponentials.sum(0).log_().add_(shift)
            log_partition = log_sum if log_partition is None else torch.logaddexp(log_partition, log_sum)
            free_bytes -= exponentials.numel() * self.hidden.element_size()
            chunk.exponentials = exponentials.to(self.hidden.dtype) if free_bytes >= 0 else None
            chunk.shift = shift
        assert log_partition is not None
        assert first_shift is not None
        # The first shift is the lowest. If it is too low, exponentials have overflowed, or may have.
        limit = math.log(torch.finfo(self.dtype).max) / 2
        if not exact_shift and not bool((log_partition - first_shift <= limit).all()):
            return self.forward(cache, exact_shift=True)
        return _Sums(label_logit, log_partition, total / len(self.head.weight))

    def backward(self, sums: _Sums, gradients: HeadGradients) -> None:
        """Write all gradients."""
        head, log_partition = self.head, sums.log_partition
        growth = 1 + 2 * head.z_loss * log_partition
        uniform = head.label_smoothing / len(head.weight)
        # Rounded after 1 is subtracted, or the gradient of a confident token would vanish in half precision.
        grad_label = growth * (sums.label_logit - log_partition).exp() - (1 - head.label_smoothing) - uniform
        for chunk in self.chunks:
            grad, shift, slope = self._exponentials(chunk, log_partition)
            scale = (shift - log_partition).exp()
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
        head = self.head
        plain = head.bias is None and head.softcap is None
        shift = None if shift is None else shift.to(self.hidden.dtype)
        fused = -shift if shift is not None and plain else None
        logits = torch.ops.vlparts.linear(head.weight[classes], self.hidden, fused)
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

    def _exponentials(self, chunk: _Chunk, log_partition: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return a chunk's exponentials, their shift, and the slope of the cap."""
        if chunk.exponentials is not None and chunk.shift is not None:
            cached, chunk.exponentials = chunk.exponentials, None
            return cached, chunk.shift, None
        logits, shift = self._shifted_logits(chunk.classes, log_partition)
        cap = self.head.softcap
        slope = None if cap is None else 1 - (logits + shift).div_(cap).square_()
        return logits.exp_(), shift, slope

    def _write(self, grad: Tensor, factors: Tensor, classes: slice, gradients: HeadGradients) -> None:
        """Write the gradients that follow from that of a chunk's logits, `grad` `(c, N)` times `factors` `(N, 1)`."""
        weight = self.head.weight[classes]
        if gradients.hidden is not None:
            gradients.hidden.addcmul_(torch.ops.vlparts.linear(grad.t(), weight.t()).to(self.dtype), factors)
        if gradients.bias is not None:
            gradients.bias[classes] = grad.to(self.dtype) @ factors.squeeze(1)
        if gradients.weight is not None:
            rows = (self.hidden * factors).to(self.hidden.dtype)
            gradients.weight[classes] = torch.ops.vlparts.linear(grad, rows.t())
