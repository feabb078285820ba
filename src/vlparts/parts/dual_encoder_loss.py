"""Contrastive losses of images and texts in blocks of pairs, over all processes.

The matrix of all logits is never materialised: forward and backward compute it block by block, and each process
computes only the rows of its own images. NaViT's chunked loss (arXiv 2307.06304, section 3) is the same idea, without
formulas in the paper; the sums here are exact.

Shapes: n real pairs of this process, N of all processes, D features, c the chunk size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .distributed import SharedBatch
from .utils import positive_integer, refuse_second_derivative

__all__ = ["DEFAULT_CHUNK_SIZE", "sigmoid_contrastive_loss", "softmax_contrastive_loss"]

DEFAULT_CHUNK_SIZE = 1024
# Above it log(1 + exp(x)) equals x in float64; above PyTorch's default of 20 it does not.
_SOFTPLUS_THRESHOLD = 40.0


def softmax_contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    pair_mask: Tensor | None = None,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    group: Any = None,
) -> Tensor:
    """Mean of the image-to-text and text-to-image cross-entropies (CLIP, arXiv 2103.00020, figure 3).

    The logits are `z_ij = logit_scale * image_i . text_j`, with targets `z_ii`. They are computed in blocks of c x c,
    in float32 (float64 for float64 inputs) also under autocast. The loss is differentiable once (`create_graph=True`
    raises a RuntimeError).

    Every process returns the loss of the whole batch, the pairs of all processes, whose numbers of pairs may differ.
    Gradients are those of the sum of the returned values over the processes, so that their mean, as
    DistributedDataParallel computes it, is the gradient of the loss of the whole batch. All processes must call the
    function, and backward, equally often, with the same inputs frozen.

    Args:
        image_features: `(pairs, D)`, not normalised here: normalise them for cosine similarity.
        text_features: `(pairs, D)`; row i is paired with row i of the images.
        logit_scale: The factor itself, not its logarithm; a number, or a tensor with one element.
        pair_mask: `(pairs,)` bool, false at padding. Padding is in no sum and no count, and its gradients are exactly
            zero, also if it holds NaN. None if all pairs are real.
        chunk_size: Side c of a block.
        group: The process group that shares the batch; None for the default group if there is one, "local" for this
            process alone.

    Returns:
        The loss, of shape `()`; zero, with gradients of zero, if no process has a real pair.

    Raises:
        ValueError: If shapes or dtypes do not fit, `chunk_size` is below one, or `group` does not hold this process.
    """
    pairs = _prepare(image_features, text_features, pair_mask, chunk_size)
    scale = _scalar(logit_scale, "logit_scale", image_features, text_features)
    return _SoftmaxLoss.apply(*pairs, scale, chunk_size, SharedBatch(group, pairs[0]))


def sigmoid_contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    pair_mask: Tensor | None = None,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    group: Any = None,
) -> Tensor:
    """Sum of the binary cross-entropies of all pairs, divided by the number of images (SigLIP, arXiv 2303.15343).

    `-1/N sum_ij log sigmoid(s_ij (logit_scale * image_i . text_j + logit_bias))`, with `s_ij` 1 if i = j, otherwise
    -1. Precision, gradients and processes are as in [`softmax_contrastive_loss`].

    Args:
        image_features: `(pairs, D)`, not normalised here: normalise them for cosine similarity.
        text_features: `(pairs, D)`.
        logit_scale: The factor itself, not its logarithm; a number, or a tensor with one element.
        logit_bias: A number, or a tensor with one element.
        pair_mask: `(pairs,)` bool, false at padding.
        chunk_size: Side c of a block.
        group: The process group, None, or "local".

    Returns:
        The loss, of shape `()`.

    Raises:
        ValueError: If shapes or dtypes do not fit, `chunk_size` is below one, or `group` does not hold this process.
    """
    pairs = _prepare(image_features, text_features, pair_mask, chunk_size)
    scale = _scalar(logit_scale, "logit_scale", image_features, text_features)
    bias = _scalar(logit_bias, "logit_bias", image_features, text_features)
    return _SigmoidLoss.apply(*pairs, scale, bias, chunk_size, SharedBatch(group, pairs[0]))


def _prepare(images: Tensor, texts: Tensor, mask: Tensor | None, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Check the inputs and select the real pairs."""
    if images.ndim != 2 or images.shape != texts.shape:
        raise ValueError(
            "`image_features` and `text_features` must have the same shape (pairs, width), got "
            f"{tuple(images.shape)} and {tuple(texts.shape)}."
        )
    positive_integer(chunk_size, "chunk_size")
    if mask is None:
        return images, texts
    if mask.dtype != torch.bool or mask.shape != images.shape[:1]:
        raise ValueError(
            f"`pair_mask` must be bool with shape ({len(images)},), got {mask.dtype} with {tuple(mask.shape)}."
        )
    return images[mask], texts[mask]


def _scalar(value: Tensor | float, name: str, images: Tensor, texts: Tensor) -> Tensor:
    """Convert a number or a tensor with one element to shape `()`, in the dtype of the computation."""
    dtype = torch.promote_types(torch.promote_types(images.dtype, texts.dtype), torch.float32)
    tensor = torch.as_tensor(value, dtype=dtype, device=images.device)
    if tensor.numel() != 1:
        raise ValueError(f"`{name}` must have one element, got shape {tuple(tensor.shape)}.")
    return tensor.reshape(())


@dataclass
class _Pairs:
    """Logits of this process' images with the texts of all processes, in blocks."""

    images: Tensor
    texts: Tensor
    own: slice
    scale: Tensor
    bias: Tensor | None
    chunk_size: int

    def blocks(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield rows, columns and logits `(c, c)` of each block."""
        for rows in _chunks(len(self.images), self.chunk_size):
            images = self.images[rows].to(self.scale.dtype) * self.scale
            for columns in _chunks(len(self.texts), self.chunk_size):
                texts = self.texts[columns].to(self.scale.dtype)
                logits = images @ texts.T if self.bias is None else torch.addmm(self.bias, images, texts.T)
                yield rows, columns, logits

    def positives(self, rows: slice, columns: slice, block: Tensor) -> tuple[slice, Tensor]:
        """Return the rows of a block whose own text is in it, and a view of these entries."""
        start = max(rows.start, columns.start - self.own.start)
        entries = block.diagonal(rows.start + self.own.start - columns.start)
        return slice(start, start + len(entries)), entries

    def gradients(self, needs: tuple[bool, ...], slopes: Iterator[tuple[slice, slice, Tensor]]) -> list[Tensor | None]:
        """Compute the gradients of images `(n, D)`, texts `(N, D)`, scale and bias.

        Args:
            needs: Which of the four are needed.
            slopes: Rows, columns and the derivative of the loss by the logits of each block.
        """
        dtype = self.scale.dtype
        images = torch.zeros_like(self.images, dtype=dtype)
        texts = torch.zeros_like(self.texts, dtype=dtype)
        bias = torch.zeros_like(self.scale)
        for rows, columns, slope in slopes:
            if needs[0] or needs[2]:
                images[rows].addmm_(slope, self.texts[columns].to(dtype))
            if needs[1]:
                texts[columns].addmm_(slope.T, self.images[rows].to(dtype))
            if needs[3]:
                bias += slope.sum()
        scale = (images * self.images).sum()
        gradients = [images.mul_(self.scale), texts.mul_(self.scale), scale, bias]
        return [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)]


def _chunks(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _logsumexp(block: Tensor, dim: int) -> Tensor:
    """Log-sum-exp of finite numbers; four times as fast on a CPU as `torch.logsumexp`, which handles infinities."""
    largest = block.amax(dim, keepdim=True)
    return (block - largest).exp_().sum(dim).log_() + largest.squeeze(dim)


def _without_autocast(tensor: Tensor) -> torch.autocast:
    """Disable autocast, which would compute the logits in half precision."""
    return torch.autocast(tensor.device.type, enabled=False)


class _SoftmaxLoss(torch.autograd.Function):
    """Cross-entropy of rows and columns: streaming log-sum-exps in forward, recomputed softmaxes in backward."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, chunk_size: int, batch: SharedBatch) -> Tensor:
        with _without_autocast(images):
            pairs = _Pairs(images, batch.gather(texts), batch.own, scale, None, chunk_size)
            by_image = scale.new_full((len(images),), -torch.inf)
            by_text = scale.new_full((len(pairs.texts),), -torch.inf)
            positive = scale.new_zeros(len(images))
            for rows, columns, logits in pairs.blocks():
                own_rows, entries = pairs.positives(rows, columns, logits)
                positive[own_rows] = entries
                by_image[rows] = torch.logaddexp(by_image[rows], _logsumexp(logits, 1))
                by_text[columns] = torch.logaddexp(by_text[columns], _logsumexp(logits, 0))
            by_text = batch.logsumexp(by_text)
            loss = batch.sum(((by_image + by_text[batch.own]) / 2 - positive).sum())
        ctx.save_for_backward(images, pairs.texts, scale, by_image, by_text)
        ctx.chunk_size, ctx.batch = chunk_size, batch
        return loss / batch.divisor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("The contrastive losses are")
        images, texts, scale, by_image, by_text = ctx.saved_tensors
        pairs = _Pairs(images, texts, ctx.batch.own, scale, None, ctx.chunk_size)

        def slopes() -> Iterator[tuple[slice, slice, Tensor]]:
            for rows, columns, logits in pairs.blocks():
                slope = (logits - by_image[rows, None]).exp_()
                slope += logits.sub_(by_text[columns]).exp_()
                pairs.positives(rows, columns, slope)[1].sub_(2)
                yield rows, columns, slope

        with _without_autocast(images):
            sums = pairs.gradients((*ctx.needs_input_grad[:3], False), slopes())
            return *_finish(ctx, gradient / 2, sums, texts.dtype)[:3], None, None


class _SigmoidLoss(torch.autograd.Function):
    """Binary cross-entropy of every pair, with sigmoids recomputed in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        texts: Tensor,
        scale: Tensor,
        bias: Tensor,
        chunk_size: int,
        batch: SharedBatch,
    ) -> Tensor:
        with _without_autocast(images):
            pairs = _Pairs(images, batch.gather(texts), batch.own, scale, bias, chunk_size)
            loss = torch.zeros_like(scale)
            for rows, columns, logits in pairs.blocks():
                pairs.positives(rows, columns, logits)[1].neg_()
                loss += F.softplus(logits, threshold=_SOFTPLUS_THRESHOLD).sum()
            loss = batch.sum(loss)
        ctx.save_for_backward(images, pairs.texts, scale, bias)
        ctx.chunk_size, ctx.batch = chunk_size, batch
        return loss / batch.divisor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("The contrastive losses are")
        images, texts, scale, bias = ctx.saved_tensors
        pairs = _Pairs(images, texts, ctx.batch.own, scale, bias, ctx.chunk_size)

        def slopes() -> Iterator[tuple[slice, slice, Tensor]]:
            for rows, columns, logits in pairs.blocks():
                pairs.positives(rows, columns, logits)[1].neg_()
                slope = logits.sigmoid_()
                pairs.positives(rows, columns, slope)[1].neg_()
                yield rows, columns, slope

        with _without_autocast(images):
            sums = pairs.gradients(ctx.needs_input_grad[:4], slopes())
            return *_finish(ctx, gradient, sums, texts.dtype), None, None


def _finish(ctx: Any, gradient: Tensor, sums: list[Tensor | None], text_dtype: torch.dtype) -> list[Tensor | None]:
    """Scale the gradients of the sum to those of the mean, and reduce those of the texts to their process."""
    batch = ctx.batch
    images, texts, *scalars = sums
    weight = batch.sum(gradient.clone()) / batch.divisor
    if images is not None:
        images = images.mul_(weight).to(ctx.saved_tensors[0].dtype)
    if texts is not None:
        texts = batch.sum(texts)[batch.own].mul(weight).to(text_dtype)
    return [images, texts, *(None if scalar is None else scalar * weight for scalar in scalars)]
