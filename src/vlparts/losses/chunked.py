"""Losses of tokens some tokens at a time, so that no second copy of all logits is ever held.

Shapes: N tokens, n of them chosen, V classes.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["chunked_losses"]

# Bytes of the logits of some tokens, in float32; a few copies of them are held.
LOGITS_AT_A_TIME = 32 * 2**20

RowLosses = Callable[[Tensor, Tensor], Tensor]
"""Takes logits `(c, V)` and the places `(c,)` of their tokens, and returns losses `(c,)`; differentiable."""


def chunked_losses(logits: Tensor, counted: Tensor, row_losses: RowLosses) -> Tensor:
    """The losses of tokens that count, and 0 for others, whose logits may be anything and get zero gradients.

    Backward computes each piece again; logits get their gradient in their own type. It is differentiable
    once (`create_graph=True` is a RuntimeError).

    Args:
        logits: `(N, V)`.
        counted: `(N,)` bool.
        row_losses: The loss of each token, from float32 (float64 for float64 logits) and places in the N tokens.

    Returns:
        `(N,)` float32, or float64 for float64 logits.
    """
    if torch.compiler.is_compiling():  # which makes pieces of its own, and takes no shapes that depend on the data
        rows = torch.where(counted.unsqueeze(1), logits, 0).to(_wide(logits))
        return torch.where(counted, row_losses(rows, torch.arange(len(rows), device=rows.device)), 0)
    losses: Tensor = _ChunkedLosses.apply(logits, counted.nonzero().squeeze(1), row_losses)
    return losses


def _wide(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _pieces(logits: Tensor, places: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Places `(c,)`, and their logits `(c, V)` in a wide type, copied."""
    for piece in places.split(max(1, LOGITS_AT_A_TIME // (4 * max(1, logits.shape[1])))):
        yield piece, logits[piece].to(_wide(logits))


class _ChunkedLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, places: Tensor, row_losses: RowLosses) -> Tensor:
        ctx.save_for_backward(logits, places)
        ctx.row_losses = row_losses
        losses = torch.zeros(len(logits), dtype=_wide(logits), device=logits.device)
        for piece, rows in _pieces(logits, places):
            losses[piece] = row_losses(rows, piece)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        if torch.is_grad_enabled():  # `once_differentiable` would let a second derivative pass as zero
            raise RuntimeError("Losses in chunks are differentiable once; got `create_graph=True`.")
        logits, places = ctx.saved_tensors
        gradient = torch.zeros_like(logits)
        for piece, rows in _pieces(logits, places):
            with torch.enable_grad():
                losses = ctx.row_losses(rows.requires_grad_(), piece)
            (of_rows,) = torch.autograd.grad(losses, rows, grad[piece])
            gradient[piece] = of_rows.to(gradient.dtype)
        return gradient, None, None
