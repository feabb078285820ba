"""A linear head, and the gradients that its loss writes chunk by chunk.

Shapes: N tokens, H input width of the head, V classes.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Largest entry of a float16 gradient, up to a factor of 2; the type ranges from 6e-8 to 65504.
FLOAT16_PEAK = 1024


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

    def growth(self, log_partition: Tensor) -> Tensor:
        """Gradient of a token's loss with respect to its log-partition function."""
        return 1 + 2 * self.z_loss * log_partition


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


@dataclass
class Buffers:
    """Gradients that are being written; None where none is needed.

    Attributes:
        hidden: `(N, H)` in the type of the loss.
        weight: `(V, H)`, to be multiplied by `weight_factor`.
        bias: `(V,)`, to be multiplied by `bias_factor`; at first zero, to be added to.
        weight_factor: 1, or a scalar tensor.
        bias_factor: 1, or a scalar tensor.
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    weight_factor: Tensor | float = 1.0
    bias_factor: Tensor | float = 1.0

    def finish(self, dtype: torch.dtype, check: bool) -> HeadGradients | None:
        """Return the gradients in the type of the head, `dtype`.

        With `check` the result is None if products in half precision have overflowed.
        """
        hidden = None
        if self.hidden is not None:
            hidden = _rounded(self.hidden, dtype, check)
            if hidden is None:
                return None
        weight = None if self.weight is None else Gradient(self.weight, self.weight_factor)
        bias = None if self.bias is None else Gradient(self.bias, self.bias_factor)
        return HeadGradients(hidden, weight, bias)


def make_buffers(hidden: Tensor, weights: Tensor, head: Head, needs_grad: NeedsGrad, log_partition: Tensor) -> Buffers:
    """Allocate the gradients that are needed.

    Args:
        hidden: `(N, H)`.
        weights: `(N,)`, the weight of each token, in the type of the loss.
        head: The head.
        needs_grad: Which inputs need a gradient.
        log_partition: Log-partition function of each token, `(N,)`; only used in float16.
    """
    buffers = Buffers(
        weights.new_zeros(hidden.shape) if needs_grad.hidden else None,
        torch.empty_like(head.weight) if needs_grad.weight else None,
        torch.zeros_like(head.bias) if needs_grad.bias and head.bias is not None else None,
    )
    if head.weight.dtype == torch.float16:  # bounds of the gradients, so that none overflows or vanishes
        bounds = weights * head.growth(log_partition).abs().clamp_min(1)
        buffers.bias_factor = _float16_factor(bounds.sum())
        buffers.weight_factor = _float16_factor((bounds * hidden.abs().amax(1)).sum())
    return buffers


def no_tokens(hidden: Tensor, head: Head, needs_grad: NeedsGrad) -> HeadGradients:
    """Gradients of zero."""
    inputs = (hidden, head.weight, head.bias)
    zeros = (
        Gradient(torch.zeros_like(one)) if needed and one is not None else None
        for one, needed in zip(inputs, needs_grad, strict=True)
    )
    return HeadGradients(*zeros)


def _rounded(gradient: Tensor, dtype: torch.dtype, check: bool) -> Gradient | None:
    if dtype != torch.float16:
        return Gradient(gradient.to(dtype))
    peak = gradient.abs().amax()
    if check and not bool(peak.isfinite()):
        return None
    factor = _float16_factor(peak)
    return Gradient(gradient.div_(factor).half(), factor)


def _float16_factor(peak: Tensor) -> Tensor:
    """Factor that is taken out of a float16 gradient whose entries are up to `peak`."""
    return torch.where(peak > 0, peak / FLOAT16_PEAK, 1.0)
