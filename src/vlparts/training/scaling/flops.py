"""Floating-point operations of a training step.

A product of R rows with a weight of W numbers takes 2 R W operations (a multiplication and an addition each).
Attention over P pairs of queries and keys with heads of a joint width A takes 4 P A (scores, and the weighted sum of
values); as in PaLM (arXiv 2204.02311, appendix B) and in PyTorch's `FlopCounterMode`, a causal mask does not reduce P.
Norms, activations, embeddings, the loss and the optimizer are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from .units import Unit, is_attention, is_experts

ATTENTION_BACKWARD = 2.5
"""Operations of the backward pass of attention relative to the forward pass: 5 products instead of 2, since fused
kernels compute the scores again (arXiv 2205.14135, algorithm 4)."""


@dataclass(frozen=True)
class Flops:
    """Operations of one pack.

    Args:
        forward: Forward pass.
        backward: Gradients of weights and of inputs.
        recomputed: Forward passes of layers again, with gradient checkpointing.
        by_part: Sum of the three for each part.
    """

    forward: float
    backward: float
    recomputed: float
    by_part: dict[str, float]

    @property
    def total(self) -> float:
        """All operations."""
        return self.forward + self.backward + self.recomputed


def count_flops(units: Sequence[Unit], checkpointing: bool = False) -> Flops:
    """Count the operations of a pack.

    Forward, every unit takes 2 R W + 4 P A. Backward, each weight that is trained takes another 2 R W for its
    gradient, and each product through which a gradient flows to something trained below another 2 R W for the gradient
    of its input, with 2.5 times its attention. So a trained unit takes three times its forward products, a frozen one
    above something trained two times, and one below everything trained its forward pass only. Checkpointing computes
    the layers with gradients again, except for their last product, whose result no gradient needs. Since transformers
    then lets the outputs of all embeddings require gradients, of the patch embedding too, gradients also flow through
    frozen layers below everything trained.

    Args:
        units: The units in order.
        checkpointing: Whether layers are checkpointed.
    """
    forward = backward = recomputed = 0.0
    parts: dict[str, float] = {}
    flows = False  # whether the input of the unit depends on something trained
    for unit in units:
        products = unit.products()
        weights = [(2 * unit.rows * weight.numel() * share, weight.requires_grad) for _, weight, share in products]
        attention = 4 * unit.pairs * attention_width(unit.module)
        ahead = sum(cost for cost, _ in weights) + attention
        back = sum(cost for cost, trains in weights if trains)
        again = 0.0
        if flows or (unit.is_layer and unit.trains):  # a layer begins with a norm, which is trained with it
            back += sum(cost for cost, _ in weights) + ATTENTION_BACKWARD * attention
        if checkpointing and unit.is_layer and (flows or unit.trains):
            last = weights[-1][0] if weights and isinstance(products[-1][0], nn.Linear) else 0.0
            again = ahead - last
        forward, backward, recomputed = forward + ahead, backward + back, recomputed + again
        parts[unit.part] = parts.get(unit.part, 0.0) + ahead + back + again
        flows = flows or unit.trains or checkpointing
    return Flops(forward, backward, recomputed, parts)


def attention_width(module: nn.Module) -> int:
    """Joint width A of the heads of a layer: the input of the last projection of its attention; 0 without one."""
    for one in module.modules():
        if is_attention(one) and not is_experts(one):
            return [child for child in one.children() if isinstance(child, nn.Linear)][-1].in_features
    return 0
