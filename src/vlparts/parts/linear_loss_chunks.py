"""Cross-entropies of a linear head, and their gradients, without ever holding all logits.

Two forms, in both of which every piece of the weight's gradient is written once and for all. At once: all logits that
count, with three products, while they are few enough to be held. By vocabulary: the logits of some thousand classes
at a time, twice, first for the partition sums, with four products. Measured in docs/benchmarks.md, with a third that
was not kept: some hundred tokens at a time takes three products as well, but adds to the whole gradient of the weight
each time.

Shapes: N tokens, H width of the head's input, V classes; c classes of a piece.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .linear import define_linear
from .linear_cpu import weight_gradient

define_linear()

# Classes of a piece, in the products and by vocabulary.
CLASSES_AT_A_TIME = 4096
# Bytes of logits that may be held at once.
LOGITS_AT_ONCE = 192 * 2**20


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
            torch.zeros(hidden.shape, dtype=weights.dtype, device=hidden.device) if wanted.hidden else None,
            empty(head.weight) if wanted.weight else None,
            empty(head.bias) if wanted.bias and head.bias is not None else None,
        )
    with torch.autocast(hidden.device.type, enabled=False):  # the types are chosen already
        losses = choose_form(hidden, weights, head, gradients is not None)(hidden, labels, weights, head, gradients)
    if gradients is not None and gradients.hidden is not None:
        gradients.hidden = gradients.hidden.to(hidden.dtype)
    return losses, gradients


Form = Callable[[Tensor, Tensor, Tensor, Head, Gradients | None], Tensor]


def choose_form(hidden: Tensor, weights: Tensor, head: Head, with_gradients: bool) -> Form:
    """The faster form: the product that is saved by holding all logits pays while they are few."""
    held = len(hidden) * len(head.weight) * weights.element_size()
    return _at_once if with_gradients and held <= LOGITS_AT_ONCE else _by_vocabulary


def _pieces(classes: int) -> Iterator[slice]:
    for start in range(0, classes, CLASSES_AT_A_TIME):
        yield slice(start, min(start + CLASSES_AT_A_TIME, classes))


def _logits(hidden: Tensor, head: Head, piece: slice, dtype: torch.dtype) -> Tensor:
    """`(N, c)` in `dtype`, after capping."""
    bias = None if head.bias is None else head.bias[piece]
    logits = torch.ops.vlparts.linear(hidden, head.weight[piece], bias).to(dtype)
    return logits if head.softcap is None else logits.div_(head.softcap).tanh_().mul_(head.softcap)


class _Rows:
    """Some tokens with all that the gradient of their losses needs beside the logits."""

    def __init__(self, hidden: Tensor, labels: Tensor, weights: Tensor, head: Head) -> None:
        self.hidden, self.labels, self.weights, self.head = hidden, labels, weights, head

    def losses(self, of_label: Tensor, partition: Tensor, mean: Tensor | None) -> Tensor:
        """From the logits of the labels, the logarithms of the partition sums, and the mean logits."""
        losses = partition - of_label
        if mean is not None:
            losses = losses + self.head.label_smoothing * (of_label - mean)
        return losses + self.head.z_loss * partition.square() if self.head.z_loss else losses

    def start(self, partition: Tensor) -> None:
        """Get ready for [`add`]. The weights of rows are put on the narrow side of the products."""
        self.partition = partition
        self.weighted = (self.hidden * self.weights.unsqueeze(1)).to(self.hidden.dtype)

    def add(self, log_probabilities: Tensor, piece: slice, into: Gradients) -> None:
        """Write what a piece of the logarithms of probabilities `(N, c)` gives; they are not changed."""
        head, smoothing = self.head, self.head.label_smoothing
        grad = log_probabilities.exp()
        if head.z_loss:
            grad *= 1 + 2 * head.z_loss * self.partition.unsqueeze(1)
        here = ((self.labels >= piece.start) & (self.labels < piece.stop)).nonzero().squeeze(1)
        grad[here, self.labels[here] - piece.start] -= 1 - smoothing
        if smoothing:
            grad -= smoothing / len(head.weight)
        if head.softcap is not None:
            capped = log_probabilities + self.partition.unsqueeze(1)
            grad *= 1 - (capped / head.softcap).square_()
        grad = grad.to(self.hidden.dtype)
        weight = head.weight[piece]
        if into.hidden is not None:
            into.hidden += torch.ops.vlparts.linear(grad, weight.t())
        if into.bias is not None:
            into.bias[piece] = grad.to(self.weights.dtype).t() @ self.weights
        if into.weight is not None:
            _weight_gradient(self.weighted, grad, into.weight[piece])

    def finish(self, into: Gradients) -> None:
        """Bring in the weights of rows that [`add`] left out."""
        if into.hidden is not None:
            into.hidden *= self.weights.unsqueeze(1)


def _weight_gradient(x: Tensor, grad: Tensor, out: Tensor) -> Tensor:
    return weight_gradient(x, grad, out) if x.is_cpu else torch.mm(grad.t(), x, out=out)


def _at_once(hidden: Tensor, labels: Tensor, weights: Tensor, head: Head, gradients: Gradients | None) -> Tensor:
    part = _Rows(hidden, labels, weights, head)
    logits = weights.new_empty(len(hidden), len(head.weight))
    for piece in _pieces(len(head.weight)):
        logits[:, piece] = _logits(hidden, head, piece, weights.dtype)
    of_label = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    mean = logits.mean(1) if head.label_smoothing else None
    torch.log_softmax(logits, 1, out=logits)
    partition = of_label - logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    if gradients is not None:
        part.start(partition)
        for piece in _pieces(len(head.weight)):
            part.add(logits[:, piece], piece, gradients)
        part.finish(gradients)
    return part.losses(of_label, partition, mean)


def _by_vocabulary(hidden: Tensor, labels: Tensor, weights: Tensor, head: Head, gradients: Gradients | None) -> Tensor:
    part = _Rows(hidden, labels, weights, head)
    of_label, total = torch.zeros_like(weights), torch.zeros_like(weights)
    sums = []
    for piece in _pieces(len(head.weight)):
        logits = _logits(hidden, head, piece, weights.dtype)
        here = ((labels >= piece.start) & (labels < piece.stop)).nonzero().squeeze(1)
        of_label[here] = logits[here, labels[here] - piece.start]
        if head.label_smoothing:
            total += logits.sum(1)
        sums.append(logits.logsumexp(1))
    partition = torch.stack(sums).logsumexp(0)
    if gradients is not None:
        part.start(partition)
        for piece in _pieces(len(head.weight)):
            logits = _logits(hidden, head, piece, weights.dtype)
            part.add(logits.sub_(partition.unsqueeze(1)), piece, gradients)
        part.finish(gradients)
    return part.losses(of_label, partition, total / len(head.weight) if head.label_smoothing else None)


FORMS: dict[str, Form] = {"at once": _at_once, "by vocabulary": _by_vocabulary}
"""The two forms by name, for benchmarks and tests."""
