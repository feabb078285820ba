"""Contrastive losses of images and texts in blocks of pairs, over all processes.

The matrix of all logits is never held: forward and backward compute it block by block, and a process computes only the
rows of its own images. The idea is that of the chunked loss of NaViT (arXiv 2307.06304, section 3); the paper has no
formulas, and the sums here are exact.

Shapes: n real pairs of this process, N of all processes, D features, c the chunk size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .distributed import SharedBatch

__all__ = ["DEFAULT_CHUNK_SIZE", "sigmoid_contrastive_loss", "softmax_contrastive_loss"]

DEFAULT_CHUNK_SIZE = 1024
# Beyond it log(1 + exp(x)) is x to the last bit of float64; PyTorch's own threshold of 20 is not.
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
    """Mean of the image-to-text and the text-to-image cross-entropy (CLIP, arXiv 2103.00020, figure 3).

    The loss of logits `z_ij = logit_scale * image_i . text_j`, whose right answers are `z_ii`. It holds blocks of
    c x c logits, computes in float32 (float64 for float64 inputs) also under autocast, and is differentiable
    once (`create_graph=True` is a RuntimeError).

    Across processes, every process returns the loss of the whole batch, the pairs of all processes, which may have
    different numbers of them. Gradients are those of the sum of the returned values over the processes, so that the
    mean of them over the processes, as DistributedDataParallel takes it, is the gradient of the loss of the whole
    batch. All processes must call the function, and backward, equally often, with the same inputs frozen.

    Args:
        image_features: `(pairs, D)`, taken as they are: normalise them for cosine similarity.
        text_features: `(pairs, D)`; row i belongs to row i of the images.
        logit_scale: The factor itself, not its logarithm; a number, or a tensor with one element.
        pair_mask: `(pairs,)` bool, false at padding: such a pair stands in no sum and no count, and gets gradients of
            exactly zero, whatever it holds. None if all pairs are real.
        chunk_size: Side c of a block.
        group: The process group that shares the batch; None for the default group if there is one, "local" for this
            process alone.

    Returns:
        The loss, of shape `()`; zero, with gradients of zero, if no process has a real pair.

    Raises:
        ValueError: If shapes or types do not fit, `chunk_size` is below one, or `group` is no group of this process.
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
    """Sum over all pairs of the binary cross-entropy, divided by the number of images (SigLIP, arXiv 2303.15343).

    `-1/N sum_ij log sigmoid(s_ij (logit_scale * image_i . text_j + logit_bias))`, with `s_ij` 1 where i = j and -1
    elsewhere. All else is as in [`softmax_contrastive_loss`].

    Args:
        image_features: `(pairs, D)`, taken as they are: normalise them for cosine similarity.
        text_features: `(pairs, D)`.
        logit_scale: The factor itself, not its logarithm; a number, or a tensor with one element.
        logit_bias: A number, or a tensor with one element.
        pair_mask: `(pairs,)` bool, false at padding.
        chunk_size: Side c of a block.
        group: The process group, None, or "local".

    Returns:
        The loss, of shape `()`.

    Raises:
        ValueError: As [`softmax_contrastive_loss`].
    """
    pairs = _prepare(image_features, text_features, pair_mask, chunk_size)
    scale = _scalar(logit_scale, "logit_scale", image_features, text_features)
    bias = _scalar(logit_bias, "logit_bias", image_features, text_features)
    return _SigmoidLoss.apply(*pairs, scale, bias, chunk_size, SharedBatch(group, pairs[0]))


def _prepare(images: Tensor, texts: Tensor, mask: Tensor | None, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Check the inputs and keep the real pairs."""
    if images.ndim != 2 or images.shape != texts.shape:
        raise ValueError(
            "`image_features` and `text_features` must have the same shape (pairs, width), got "
            f"{tuple(images.shape)} and {tuple(texts.shape)}."
        )
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"`chunk_size` must be an integer of at least 1, got {chunk_size!r}.")
    if mask is None:
        return images, texts
    if mask.dtype != torch.bool or mask.shape != images.shape[:1]:
        raise ValueError(
            f"`pair_mask` must be bool with shape ({len(images)},), got {mask.dtype} with {tuple(mask.shape)}."
        )
    return images[mask], texts[mask]


def _scalar(value: Tensor | float, name: str, images: Tensor, texts: Tensor) -> Tensor:
    """Bring a number or a tensor with one element to shape `()`, in the type of the computation."""
    dtype = torch.promote_types(torch.promote_types(images.dtype, texts.dtype), torch.float32)
    tensor = torch.as_tensor(value, dtype=dtype, device=images.device)
    if tensor.numel() != 1:
        raise ValueError(f"`{name}` must have one element, got shape {tuple(tensor.shape)}.")
    return tensor.reshape(())


@dataclass
class _Pairs:
    """All pairs of this process' images with the texts of all processes, block by block."""

    images: Tensor
    texts: Tensor
    own: slice
    scale: Tensor
    bias: Tensor | None
    chunk_size: int

    def blocks(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Rows, columns and the logits `(c, c)` between them."""
        for rows in _chunks(len(self.images), self.chunk_size):
            images = self.images[rows].to(self.scale.dtype) * self.scale
            for columns in _chunks(len(self.texts), self.chunk_size):
                texts = self.texts[columns].to(self.scale.dtype)
                logits = images @ texts.T if self.bias is None else torch.addmm(self.bias, images, texts.T)
                yield rows, columns, logits

    def true(self, rows: slice, columns: slice, block: Tensor) -> tuple[slice, Tensor]:
        """The rows of a block whose own text is in it, and a view of these entries."""
        start = max(rows.start, columns.start - self.own.start)
        entries = block.diagonal(rows.start + self.own.start - columns.start)
        return slice(start, start + len(entries)), entries

    def gradients(self, needs: tuple[bool, ...], slopes: Iterator[tuple[slice, slice, Tensor]]) -> list[Tensor | None]:
        """Gradients of images `(n, D)`, texts `(N, D)`, scale and bias.

        Args:
            needs: Which of the four are wanted.
            slopes: For each block the loss' derivative by its logits.
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
        found = [images.mul_(self.scale), texts.mul_(self.scale), scale, bias]
        return [gradient if needed else None for gradient, needed in zip(found, needs, strict=True)]


def _chunks(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _logsumexp(block: Tensor, dim: int) -> Tensor:
    """Log-sum-exp of finite numbers; four times as fast on a CPU as `torch.logsumexp`, which looks for infinities."""
    largest = block.amax(dim, keepdim=True)
    return (block - largest).exp_().sum(dim).log_() + largest.squeeze(dim)


def _in_full(tensor: Tensor) -> torch.autocast:
    """Switch autocast off, which would compute the logits in half precision."""
    return torch.autocast(tensor.device.type, enabled=False)


def _refuse_graph() -> None:
    """PyTorch's `once_differentiable` lets a second derivative pass as zero where the loss is the end of the graph."""
    if torch.is_grad_enabled():
        raise RuntimeError("The contrastive losses are differentiable once; got `create_graph=True`.")


class _SoftmaxLoss(torch.autograd.Function):
    """Cross-entropy of rows and columns: streaming log-sum-exps forward, the blocks' softmaxes again backward."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, chunk_size: int, batch: SharedBatch) -> Tensor:
        with _in_full(images):
            pairs = _Pairs(images, batch.gather(texts), batch.own, scale, None, chunk_size)
            by_image = scale.new_full((len(images),), -torch.inf)
            by_text = scale.new_full((len(pairs.texts),), -torch.inf)
            true = scale.new_zeros(len(images))
            for rows, columns, logits in pairs.blocks():
                place, entries = pairs.true(rows, columns, logits)
                true[place] = entries
                by_image[rows] = torch.logaddexp(by_image[rows], _logsumexp(logits, 1))
                by_text[columns] = torch.logaddexp(by_text[columns], _logsumexp(logits, 0))
            by_text = batch.logsumexp(by_text)
            loss = batch.sum(((by_image + by_text[batch.own]) / 2 - true).sum())
        ctx.save_for_backward(images, pairs.texts, scale, by_image, by_text)
        ctx.chunk_size, ctx.batch = chunk_size, batch
        return loss / batch.divisor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_graph()
        images, texts, scale, by_image, by_text = ctx.saved_tensors
        pairs = _Pairs(images, texts, ctx.batch.own, scale, None, ctx.chunk_size)

        def slopes() -> Iterator[tuple[slice, slice, Tensor]]:
            for rows, columns, logits in pairs.blocks():
                slope = (logits - by_image[rows, None]).exp_()
                slope += logits.sub_(by_text[columns]).exp_()
                pairs.true(rows, columns, slope)[1].sub_(2)
                yield rows, columns, slope

        with _in_full(images):
            found = pairs.gradients((*ctx.needs_input_grad[:3], False), slopes())
            return *_finish(ctx, gradient / 2, found, texts.dtype)[:3], None, None


class _SigmoidLoss(torch.autograd.Function):
    """Binary cross-entropy of every pair; the blocks' sigmoids are computed again backward."""

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
        with _in_full(images):
            pairs = _Pairs(images, batch.gather(texts), batch.own, scale, bias, chunk_size)
            loss = torch.zeros_like(scale)
            for rows, columns, logits in pairs.blocks():
                pairs.true(rows, columns, logits)[1].neg_()
                loss += F.softplus(logits, threshold=_SOFTPLUS_THRESHOLD).sum()
            loss = batch.sum(loss)
        ctx.save_for_backward(images, pairs.texts, scale, bias)
        ctx.chunk_size, ctx.batch = chunk_size, batch
        return loss / batch.divisor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_graph()
        images, texts, scale, bias = ctx.saved_tensors
        pairs = _Pairs(images, texts, ctx.batch.own, scale, bias, ctx.chunk_size)

        def slopes() -> Iterator[tuple[slice, slice, Tensor]]:
            for rows, columns, logits in pairs.blocks():
                pairs.true(rows, columns, logits)[1].neg_()
                slope = logits.sigmoid_()
                pairs.true(rows, columns, slope)[1].neg_()
                yield rows, columns, slope

        with _in_full(images):
            found = pairs.gradients(ctx.needs_input_grad[:4], slopes())
            return *_finish(ctx, gradient, found, texts.dtype), None, None


def _finish(ctx: Any, gradient: Tensor, found: list[Tensor | None], text_dtype: torch.dtype) -> list[Tensor | None]:
    """Scale the gradients of a sum to those of the mean, and bring those of the texts to their process."""
    batch = ctx.batch
    images, texts, *scalars = found
    weight = batch.sum(gradient.clone()) / batch.divisor
    if images is not None:
        images = images.mul_(weight).to(ctx.saved_tensors[0].dtype)
    if texts is not None:
        texts = batch.sum(texts)[batch.own].mul(weight).to(text_dtype)
    return [images, texts, *(None if scalar is None else scalar * weight for scalar in scalars)]
