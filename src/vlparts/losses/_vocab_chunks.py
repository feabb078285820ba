"""Cross-entropy of a linear head and its gradients, computed in chunks of classes without holding all logits.

The first pass computes the logits of each chunk minus a shift per token, the running estimate of the log-partition
function, and sums their exponentials, which are cached while there is room. The second pass writes the gradients:
three matrix products for a cached chunk, four for one whose logits are recomputed. Cached exponentials are off by a
factor per token, which is applied to the narrow operand of the products.

In full precision the tokens are taken in groups whose exponentials fit in the cache, so that no product is repeated;
each group adds to the gradient of the weight. In half precision such sums would be rounded once per group. There all
tokens are one group, and each chunk of the weight's gradient is written once.

In half precision the difference of logit and shift is rounded, not the logit. Where that is too coarse, or overflows,
everything is computed again in float32. Gradients in float16 have a factor of their own.

A chunk is `(c, n)`, classes first: the shift is then a bias of the first product, the weight's gradient needs no
transposed chunk, and little but exponentials and sums remains outside of the products. Chunks are written to memory
that is used again, since fresh memory costs as much as some of the products. docs/benchmarks.md has the measurements,
also of the variants that were rejected.

Shapes: N tokens, n tokens of a group, H input width of the head, V classes, c classes of a chunk.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..parts.ops_linear import linear, linear_out
from ._head_gradients import Buffers, Head, HeadGradients, NeedsGrad, make_buffers, no_tokens

# Classes of a chunk. Halved, down to the minimum, while the chunk takes more than the given bytes.
MAX_CHUNK_CLASSES = 4096
MIN_CHUNK_CLASSES = 64
CHUNK_BYTES = 64 * 2**20
# Bytes of exponentials cached from the first pass for the second.
CACHE_BYTES = 128 * 2**20
# Fewest tokens of a group: with fewer, adding to the gradient of the weight would cost more than a repeated product.
MIN_GROUP_TOKENS = 128
# Groups have a multiple of this many tokens: MKL multiplies by 208 columns 1.25 times as fast as by 205.
GROUP_MULTIPLE = 16
# Log-partition functions and biases up to this, in units of 1 / eps, are computed in half precision. Rounding the
# shift moves the largest logits by up to 4, and rounding these is an error of up to 2 eps.
MAX_SHIFT = 8


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
        return weights.new_zeros(0), no_tokens(hidden, head, needs_grad) if any(needs_grad) else None
    hidden = hidden.contiguous()
    with torch.autocast(hidden.device.type, enabled=False):  # the types have been chosen
        found = _compute(hidden, labels, weights, head, needs_grad)
        if found is None:
            found = _compute(hidden.to(weights.dtype), labels, weights, head, needs_grad)
    assert found is not None
    return found


def _compute(
    hidden: Tensor, labels: Tensor, weights: Tensor, head: Head, needs_grad: NeedsGrad
) -> tuple[Tensor, HeadGradients | None] | None:
    """As [`head_losses`], with products in the type of `hidden`; None if half precision is not enough."""
    losses, buffers = torch.empty_like(weights), None
    cache = _make_cache(hidden, weights, head) if any(needs_grad) else None
    size = len(hidden) if cache is None else cache.shape[1]
    for start in range(0, len(hidden), size):
        tokens = slice(start, start + size)
        group = _ChunkedHead(hidden[tokens], labels[tokens], weights[tokens], head, cache)
        sums = group.forward()
        if sums is None:
            return None
        losses[tokens] = sums.losses(head)
        if any(needs_grad):
            if buffers is None:
                buffers = make_buffers(hidden, weights, head, needs_grad, sums.log_partition)
            group.backward(sums, buffers, tokens)
    if buffers is None:
        return losses, None
    gradients = buffers.finish(head.weight.dtype, check=hidden.dtype != weights.dtype)
    return None if gradients is None else (losses, gradients)


def _make_cache(hidden: Tensor, weights: Tensor, head: Head) -> Tensor | None:
    """Allocate memory for exponentials, `(classes, n)`: those of all classes in full precision, if groups are used."""
    classes, count = len(head.weight), len(hidden)
    # A cache needs the range of float32. Capped logits are recomputed, since the slope of the cap depends on them.
    if hidden.dtype == torch.float16 or head.softcap is not None:
        return None
    free = CACHE_BYTES if hidden.dtype == weights.dtype else CACHE_BYTES * 3 // 4  # chunks are held in two types
    fitting = free // (classes * hidden.element_size())
    if hidden.dtype == weights.dtype == head.weight.dtype and MIN_GROUP_TOKENS <= fitting < count:
        groups = -(-count // (fitting - fitting % GROUP_MULTIPLE))
        return hidden.new_empty(classes, -(-count // (groups * GROUP_MULTIPLE)) * GROUP_MULTIPLE)
    return hidden.new_empty(min(classes, free // (count * hidden.element_size())), count)


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
        tokens: `(k,)` tokens whose label is in the range.
        rows: `(k,)` rows of those labels in the chunk.
        exponentials: Cached `(c, n)` exponentials of the logits minus `shift`, or None.
        shift: `(n,)`.
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
    """The two passes over chunks of classes, for one group of tokens.

    Products are computed in the type of `hidden`, the rest in that of `weights`; gradients have the type of the head.

    Args:
        hidden: `(n, H)`.
        labels: `(n,)`.
        weights: `(n,)`.
        head: The head.
        cache: Memory for exponentials, `(classes, n or more)`, or None to cache none.
    """

    def __init__(self, hidden: Tensor, labels: Tensor, weights: Tensor, head: Head, cache: Tensor | None) -> None:
        self.hidden, self.weights, self.head, self.dtype = hidden, weights, head, weights.dtype
        self.is_half = hidden.dtype != weights.dtype
        size = MAX_CHUNK_CLASSES
        while size > MIN_CHUNK_CLASSES and size * weights.nbytes > CHUNK_BYTES:
            size //= 2
        self.chunks = _make_chunks(labels, len(head.weight), size)
        self.cache = None if cache is None else cache.flatten()
        size = min(size, len(head.weight))
        self.logits = hidden.new_empty(size, len(hidden))
        self.wide = weights.new_empty(size, len(hidden)) if self.is_half else self.logits

    def _is_enough(self, sums: _Sums) -> Tensor:
        """Whether half precision is enough for these sums, a bool scalar."""
        limit = MAX_SHIFT / torch.finfo(self.hidden.dtype).eps
        enough = (sums.log_partition.abs() <= limit) & (sums.cross_entropy + sums.above_mean).isfinite()
        if self.head.bias is None:
            return enough.all()
        bias = self.head.bias.abs()
        return enough.all() & ((bias <= limit) | bias.isinf()).all()  # excluded classes have bias -inf

    def forward(self, exact_shift: bool = False) -> _Sums | None:
        """Sum over the classes; None if half precision is not enough.

        Args:
            exact_shift: Shift each chunk by the maximum of its own logits, which costs two more passes over them, and
                cache nothing.
        """
        # The logit of a label is `label_shift + label_logit`.
        label_logit, label_shift, total = (torch.zeros_like(self.weights) for _ in range(3))
        reference: Tensor | None = None
        offset: Tensor | None = None
        first_shift: Tensor | None = None
        for chunk in self.chunks:
            near = None if exact_shift or reference is None or offset is None else reference + offset
            cached = None if exact_shift else self._cache_of(chunk.classes)
            # In full precision exponentials are computed where they are cached.
            logits, shift = self._shifted_logits(chunk.classes, near, None if self.is_half else cached)
            first_shift = shift if first_shift is None else first_shift
            label_logit[chunk.tokens] = logits[chunk.rows, chunk.tokens].to(self.dtype)
            label_shift[chunk.tokens] = shift[chunk.tokens]
            if self.head.label_smoothing:
                total += logits.sum(0, dtype=self.dtype) + len(logits) * (shift - first_shift)
            exponentials = self._widened(logits).exp_()
            log_sum = exponentials.sum(0).log_()
            if reference is None or offset is None:
                reference, offset = shift, log_sum
            else:
                before, reference = reference, torch.maximum(reference, shift)
                offset = torch.logaddexp(offset + (before - reference), log_sum + (shift - reference))
            if cached is not None and self.is_half:
                cached.copy_(exponentials)
            chunk.exponentials, chunk.shift = cached, shift
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
        return sums if exact_shift or bool(enough) else self.forward(exact_shift=True)

    def backward(self, sums: _Sums, gradients: Buffers, tokens: slice) -> None:
        """Write the gradients of the hidden states of this group, `tokens`, and write or add to those of the head."""
        head, log_partition = self.head, sums.log_partition
        growth = head.growth(log_partition)
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
            factors = (self.weights * scale).unsqueeze(1)
            self._write(grad.to(self.hidden.dtype), factors, chunk.classes, gradients, tokens)

    def _cache_of(self, classes: slice) -> Tensor | None:
        """Memory for the exponentials of a chunk, `(c, n)`, or None where the cache has ended."""
        count = len(self.hidden)
        if self.cache is None or classes.stop * count > self.cache.numel():
            return None
        return self.cache[classes.start * count : classes.stop * count].view(-1, count)

    def _shifted_logits(
        self, classes: slice, shift: Tensor | None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute logits minus a shift, by default their maximum, and return both; `out` is memory for the logits."""
        head, weight = self.head, self._weight(classes)
        plain = head.bias is None and head.softcap is None
        shift = None if shift is None else shift.to(self.hidden.dtype)
        fused = -shift if shift is not None and plain else None
        logits = self.logits[: len(weight)] if out is None else out
        linear_out(logits, weight, self.hidden, fused, False)
        if not plain:
            logits = self._widened(logits)
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

    def _widened(self, logits: Tensor) -> Tensor:
        """A chunk in the type of the loss."""
        return logits if logits.dtype == self.dtype else self.wide[: len(logits)].copy_(logits)

    def _weight(self, classes: slice) -> Tensor:
        """The weight of a chunk in the type of the products."""
        return self.head.weight[classes].to(self.hidden.dtype)

    def _exponentials(self, chunk: _Chunk, log_partition: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return a chunk's exponentials, their shift, and the slope of the cap."""
        if chunk.exponentials is not None and chunk.shift is not None:
            return chunk.exponentials, chunk.shift, None
        logits, shift = self._shifted_logits(chunk.classes, log_partition)
        cap = self.head.softcap
        slope = None if cap is None else 1 - (logits + shift).div_(cap).square_()
        return logits.exp_(), shift, slope

    def _write(self, grad: Tensor, factors: Tensor, classes: slice, gradients: Buffers, tokens: slice) -> None:
        """Write the gradients that follow from that of a chunk's logits, `grad` `(c, n)` times `factors` `(n, 1)`."""
        weight = self._weight(classes)
        if gradients.hidden is not None:
            gradients.hidden[tokens].addcmul_(linear(grad.t(), weight.t()).to(self.dtype), factors)
        if gradients.bias is not None:
            gradients.bias[classes] += grad.to(self.dtype) @ (factors.squeeze(1) / gradients.bias_factor)
        if gradients.weight is not None:
            rows = (self.hidden * (factors / gradients.weight_factor)).to(self.hidden.dtype)
            if gradients.weight.dtype == grad.dtype:
                linear_out(gradients.weight[classes], grad, rows.t(), None, tokens.start > 0)
            else:  # a head in half precision whose products are computed in float32; its tokens are one group
                gradients.weight[classes] = linear(grad, rows.t())
