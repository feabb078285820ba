"""Cross-entropies of a linear head, and their gradients, without ever holding all logits.

Some thousand classes at a time, in two passes. The first takes the logits of a piece less a shift for each token, the
best estimate so far of the logarithm of its partition sum, and adds up their exponentials, which are kept while there
is room. The second takes the pieces once more, makes what was not kept anew, and writes the gradients: three products
for a piece that was kept, four for another, and every piece of the weight's gradient is written once and for all. What
is kept is right but for a factor for each token, which goes to the narrow side of the products.

A piece is `(c, N)`, classes before tokens: so the shift is a bias of the first product, the gradient of the weight
needs no piece turned over, and little but exponentials and sums is left beside the products. Measured in
docs/benchmarks.md, with the forms that were not kept.

Shapes: N tokens, H width of the head's input, V classes; c classes of a piece.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..parts import ops_linear  # noqa: F401 (defines the operation)

# Classes of a piece, and fewer for so many tokens that it would take more bytes than that.
CLASSES_AT_A_TIME = 2048
PIECE_BYTES = 64 * 2**20
LEAST_CLASSES = 64
# Bytes of exponentials that are kept from the first pass for the second.
KEPT_BYTES = 128 * 2**20


class Head(NamedTuple):
    """A linear head and how its logits become losses.

    Attributes:
        weight: `(V, H)`.
        bias: `(V,)` or None.
        softcap: Logits z become `softcap * tanh(z / softcap)`; None for none.
        label_smoothing: Share of the loss that all classes have in equal parts.
        z_loss: Weight of the squared logarithm of the partition sum.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    label_smoothing: float
    z_loss: float


class Wanted(NamedTuple):
    """Of what gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


@dataclass
class Gradients:
    """Gradients of the weighted sum of losses: `(N, H)`, `(V, H)`, `(V,)`, each None where it is not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def head_losses(
    hidden: Tensor, labels: Tensor, weights: Tensor, head: Head, wanted: Wanted
) -> tuple[Tensor, Gradients | None]:
    """The loss of each token, and the gradients of their weighted sum.

    Args:
        hidden: `(N, H)` in the type of the head's weight.
        labels: `(N,)` int64 from 0 to V - 1.
        weights: `(N,)` float32 or float64, the weight of each token.
        head: The head.
        wanted: What gradients are wanted.

    Returns:
        `(N,)` in the type of `weights`, and the gradients, None where none is wanted.
    """
    gradients = None
    empty = torch.empty_like if len(hidden) else torch.zeros_like  # without tokens, no piece is written
    if any(wanted):
        gradients = Gradients(
            weights.new_zeros(hidden.shape) if wanted.hidden else None,
            empty(head.weight) if wanted.weight else None,
            empty(head.bias) if wanted.bias and head.bias is not None else None,
        )
    with torch.autocast(hidden.device.type, enabled=False):  # the types are chosen already
        losses = _losses(hidden, labels, weights, head, gradients) if len(hidden) else torch.zeros_like(weights)
    if gradients is not None and gradients.hidden is not None:
        gradients.hidden = gradients.hidden.to(hidden.dtype)
    return losses, gradients


def _losses(hidden: Tensor, labels: Tensor, weights: Tensor, head: Head, into: Gradients | None) -> Tensor:
    """As [`head_losses`], with the gradients written to `into`."""
    tokens = _Tokens(hidden.contiguous(), labels, weights, head)
    sums = tokens.add_up(keep=into is not None)
    if into is not None:
        tokens.differentiate(sums, into)
    return sums.losses(head)


class _Sums(NamedTuple):
    """Of each token `(N,)`: the logit of its label, the logarithm of its partition sum, and its mean logit.

    The mean is 0 where no label smoothing asks for it.
    """

    of_label: Tensor
    partition: Tensor
    mean: Tensor

    def losses(self, head: Head) -> Tensor:
        """The loss of each token, `(N,)`."""
        losses = self.partition - self.of_label
        if head.label_smoothing:
            losses = losses + head.label_smoothing * (self.of_label - self.mean)
        return losses + head.z_loss * self.partition.square() if head.z_loss else losses


@dataclass
class _Piece:
    """Some classes, the tokens `(n,)` whose label is among them, and the places `(n,)` of those labels in the piece.

    Kept are the exponentials `(c, N)` of the logits less a shift `(N,)`.
    """

    classes: slice
    tokens: Tensor
    places: Tensor
    exponentials: Tensor | None = None
    shift: Tensor | None = None


def _cut(labels: Tensor, classes: int, size: int) -> list[_Piece]:
    """Pieces of `size` classes, the last of what is left; counts of tokens are read once."""
    starts = torch.arange(0, classes + size, size, device=labels.device)
    order = labels.argsort()
    edges = torch.searchsorted(labels[order], starts).tolist()
    pieces = []
    for start, first, last in zip(range(0, classes, size), edges, edges[1:], strict=False):
        tokens = order[first:last]
        pieces.append(_Piece(slice(start, min(start + size, classes)), tokens, labels[tokens] - start))
    return pieces


class _Tokens:
    """Tokens and their head, in pieces of classes."""

    def __init__(self, hidden: Tensor, labels: Tensor, weights: Tensor, head: Head) -> None:
        self.hidden, self.weights, self.head, self.dtype = hidden, weights, head, weights.dtype
        classes = CLASSES_AT_A_TIME
        while classes > LEAST_CLASSES and classes * weights.nbytes > PIECE_BYTES:
            classes //= 2
        self.pieces = _cut(labels, len(head.weight), classes)

    def add_up(self, keep: bool, careful: bool = False) -> _Sums:
        """The first pass.

        Args:
            keep: Whether the exponentials are wanted again.
            careful: Take each shift from the piece's own logits, which costs two more passes over them, and in half
                precision the product once more.
        """
        # What is kept needs the range of float32, and of capped logits the slope of the cap is needed too.
        wide = self.hidden.dtype != torch.float16 and self.head.softcap is None
        room = KEPT_BYTES if keep and wide and not careful else 0
        of_label, total = torch.zeros_like(self.weights), torch.zeros_like(self.weights)
        partition = lowest = None
        for piece in self.pieces:
            logits, shift = self._shifted(piece.classes, None if careful else partition)
            lowest = shift if lowest is None else lowest
            of_label[piece.tokens] = logits[piece.places, piece.tokens].to(self.dtype) + shift[piece.tokens]
            if self.head.label_smoothing:
                total += logits.sum(0, dtype=self.dtype) + len(logits) * shift
            exponentials = logits.to(self.dtype).exp_()
            here = exponentials.sum(0).log_().add_(shift)
            partition = here if partition is None else torch.logaddexp(partition, here)
            room -= exponentials.numel() * self.hidden.element_size()
            piece.exponentials = exponentials.to(self.hidden.dtype) if room >= 0 else None
            piece.shift = shift
        assert partition is not None
        assert lowest is not None
        # The first shift is the lowest. Too far below, exponentials have left the range of numbers, or may have.
        if not careful and not bool((partition - lowest <= math.log(torch.finfo(self.dtype).max) / 2).all()):
            return self.add_up(keep, careful=True)
        return _Sums(of_label, partition, total / len(self.head.weight))

    def differentiate(self, sums: _Sums, into: Gradients) -> None:
        """The second pass: write all gradients."""
        head, partition = self.head, sums.partition
        growth = 1 + 2 * head.z_loss * partition
        uniform = head.label_smoothing / len(head.weight)
        # Rounded once, and not before 1 is taken away: for a token that the model is sure of nothing would be left.
        at_label = growth * (sums.of_label - partition).exp() - (1 - head.label_smoothing) - uniform
        for piece in self.pieces:
            grad, shift, slope = self._exponentials(piece, partition)
            scale = (shift - partition).exp()
            if head.z_loss:
                grad *= growth
            if uniform:
                grad -= uniform / scale
            grad[piece.places, piece.tokens] = (at_label / scale)[piece.tokens].to(grad.dtype)
            if slope is not None:
                grad *= slope
            self._write(grad.to(self.hidden.dtype), (self.weights * scale).unsqueeze(1), piece.classes, into)

    def _shifted(self, classes: slice, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits less a shift, which is their maximum where none is given, and what the shift was."""
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
            shift = logits.amax(0).clamp_min_(torch.finfo(self.hidden.dtype).min)  # -inf rules a class out
            if logits.dtype != self.dtype:  # once more, to round in proportion to what is left of the logits
                return self._shifted(classes, shift)
        if fused is None:
            logits -= shift
        return logits, shift.to(self.dtype)

    def _exponentials(self, piece: _Piece, partition: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Those of a piece, their shift, and the slope of the cap."""
        if piece.exponentials is not None and piece.shift is not None:
            kept, piece.exponentials = piece.exponentials, None
            return kept, piece.shift, None
        logits, shift = self._shifted(piece.classes, partition)
        cap = self.head.softcap
        slope = None if cap is None else 1 - (logits + shift).div_(cap).square_()
        return logits.exp_(), shift, slope

    def _write(self, grad: Tensor, factors: Tensor, classes: slice, into: Gradients) -> None:
        """Bring in the gradient `(c, N)` of some logits but for the factors `(N, 1)` of tokens."""
        weight = self.head.weight[classes]
        if into.hidden is not None:
            into.hidden.addcmul_(torch.ops.vlparts.linear(grad.t(), weight.t()).to(self.dtype), factors)
        if into.bias is not None:
            into.bias[classes] = grad.to(self.dtype) @ factors.squeeze(1)
        if into.weight is not None:
            rows = (self.hidden * factors).to(self.hidden.dtype)
            into.weight[classes] = torch.ops.vlparts.linear(grad, rows.t())
