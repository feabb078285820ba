"""Per-token losses computed in chunks of tokens, so that no second copy of all logits is held.

Shapes: N tokens, c tokens of a chunk, V classes.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..parts.utils import refuse_second_derivative
from ._checks import loss_dtype

# Bytes of a chunk's logits in float32. A few copies of them are alive at a time.
CHUNK_BYTES = 32 * 2**20

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""Maps logits `(c, V)` and the indices `(c,)` of their tokens to losses `(c,)`; differentiable."""


def chunked_losses(logits: Tensor, mask: Tensor, loss_function: LossFunction) -> Tensor:
    """Compute the losses of the tokens in `mask`; other losses are 0, and other logits get zero gradients.

    Backward recomputes each chunk, and the gradient has the type of `logits`. The result is differentiable once
    (`create_graph=True` is a RuntimeError).

    Args:
        logits: `(N, V)`; outside of `mask` they may be anything.
        mask: `(N,)` bool.
        loss_function: Computes losses from float32 logits (float64 for float64) and token indices.

    Returns:
        `(N,)` float32, or float64 for float64 logits.
    """
    if torch.compiler.is_compiling():  # the compiler tiles on its own, and needs shapes that do not depend on data
        rows = torch.where(mask.unsqueeze(1), logits, 0).to(loss_dtype(logits))
        return torch.where(mask, loss_function(rows, torch.arange(len(rows), device=rows.device)), 0)
    losses: Tensor = _ChunkedLosses.apply(logits, mask.nonzero().squeeze(1), loss_function)
    return losses


def _chunks(logits: Tensor, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield token indices `(c,)` and a copy of their logits `(c, V)` in the type of the loss."""
    for chunk in tokens.split(max(1, CHUNK_BYTES // (4 * max(1, logits.shape[1])))):
        yield chunk, logits[chunk].to(loss_dtype(logits))


class _ChunkedLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, loss_function: LossFunction) -> Tensor:
        ctx.save_for_backward(logits, tokens)
        ctx.loss_function = loss_function
        losses = torch.zeros(len(logits), dtype=loss_dtype(logits), device=logits.device)
        for chunk, rows in _chunks(logits, tokens):
            losses[chunk] = loss_function(rows, chunk)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        refuse_second_derivative("Losses in chunks are")
        logits, tokens = ctx.saved_tensors
        grad_logits = torch.zeros_like(logits)
        for chunk, rows in _chunks(logits, tokens):
            with torch.enable_grad():
                losses = ctx.loss_function(rows.requires_grad_(), chunk)
            (grad_rows,) = torch.autograd.grad(losses, rows, grad[chunk])
            grad_logits[chunk] = grad_rows.to(grad_logits.dtype)
        return grad_logits, None, None
