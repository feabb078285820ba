"""Memory of what a forward pass keeps for the backward pass.

Shapes: D width, A joint width of the heads, V width of values (and of keys), I inner width of an MLP, K experts per
token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from .units import Unit, is_attention, is_experts, is_norm

Precision = Literal["float32", "mixed", "bfloat16"]


@dataclass(frozen=True)
class Kept:
    """Bytes that a pack keeps.

    Args:
        units: Of all units, or with checkpointing of the inputs of the layers and of what is outside of layers.
        largest: With checkpointing, of the layer that keeps most, which exists for one layer at a time; else 0.
        casts: Of the copies of weights in bfloat16 that autocast makes, until the backward pass has used them.
        loss: Of the logits and the loss at their largest, beside `units`.
        logits: Of the gradient of the logits alone, when that of the head is computed.
    """

    units: float
    largest: float
    casts: float
    loss: float
    logits: float


def count_kept(units: Sequence[Unit], precision: Precision, checkpointing: bool = False) -> Kept:
    """Count what a pack keeps.

    A unit keeps what its gradients need, if something in it or below it is trained; see [`layer_bytes`]. With
    checkpointing a layer keeps its input alone.

    Logits of a pack are computed at once, and in float32: 4 bytes for each of T x vocabulary of the logarithms of the
    probabilities, of their gradient, and of the gradient of the logits, 12 in all. (The loss without all logits,
    `linear_weighted_cross_entropy`, is not what composed models call.)

    Autocast makes a copy in bfloat16 of each weight, which is kept for the gradient of the input; with checkpointing,
    of the trained weights only, and until the end of the forward pass.

    Args:
        units: The units in order.
        precision: "float32", "mixed" (float32 parameters under bfloat16 autocast), or "bfloat16".
        checkpointing: Whether layers are checkpointed.
    """
    total = largest = casts = 0.0
    flows = False
    for unit in units:
        if flows or unit.trains:
            kept = layer_bytes(unit, precision, flows) if unit.is_layer else module_bytes(unit, precision, flows)
            if unit.is_layer and checkpointing:
                largest = max(largest, kept)
                total += unit.rows * _width(unit.module) * _stream_bytes(unit, precision)
            else:
                total += kept
            if precision == "mixed":
                cast = (weight for _, weight, _ in unit.products())
                casts += sum(2.0 * one.numel() for one in cast if one.requires_grad or not checkpointing)
        flows = flows or unit.trains or checkpointing  # as in `count_flops`
    head = units[-1]
    vocabulary = head.module.out_features
    assert isinstance(vocabulary, int)
    size = head.rows * vocabulary
    return Kept(total, largest, casts, 12 * size, 4 * size)


def layer_bytes(unit: Unit, precision: Precision, flows: bool) -> float:
    """Count the bytes that a layer keeps.

    R rows times the sum of

    - norms: their input D, as a float32 copy in RMS norms; RMS norms of PyTorch operations also the normalized D;
    - attention: the input D of the projections, queries A, keys V and values V after rotation, the output A; a joint
      projection of queries, keys and values is kept too, since the values are a view of it, and norms of queries and
      keys keep those before and after normalization;
    - an MLP: its input D, its inner width I before and after the activation; a gated MLP also the other factor and the
      product, so D + 4 I;
    - experts: the same for K rows, whose inputs are copied: K (D + 4 I), and their outputs K D, which the gradients of
      the routing weights need.

    Inputs of products are kept only for weights that are trained. Under autocast each product keeps a copy of its own
    in bfloat16 of its float32 input.

    Args:
        unit: The layer.
        precision: As in [`count_kept`].
        flows: Whether its input depends on something trained.
    """
    compute, per_row = 4 if precision == "float32" else 2, 0.0
    attentions = [one for one in unit.module.modules() if is_attention(one)]
    inside = {id(one) for attention in attentions for one in attention.modules()}
    for attention in attentions:
        per_row += _attention_bytes(attention, unit, precision)
    for module in unit.module.modules():
        if id(module) in inside:
            continue
        if is_norm(module):
            per_row += _norm_bytes(module, next(module.parameters()).shape[-1], _stream_bytes(unit, precision))
        elif is_experts(module):
            per_row += _experts_bytes(module, unit, compute)
        else:
            per_row += _mlp_bytes([one for one in module.children() if isinstance(one, nn.Linear)], precision)
    return unit.rows * per_row


def _stream_bytes(unit: Unit, precision: Precision) -> int:
    """Bytes of a number between layers: under autocast embeddings are float32, patches are not."""
    return 4 if precision == "float32" or (precision == "mixed" and unit.part == "text") else 2


def _width(module: nn.Module) -> int:
    """Width D of a layer: that of its first norm."""
    return next(next(one.parameters()).shape[-1] for one in module.modules() if is_norm(one))


def _norm_bytes(norm: nn.Module, width: float, stream: int) -> float:
    if isinstance(norm, nn.LayerNorm):
        return width * stream
    return width * (4 + (stream if next(norm.parameters()).requires_grad else 0))


def _inputs(products: Sequence[nn.Linear], precision: Precision) -> float:
    """Bytes of the input that products share."""
    trained = [one for one in products if one.weight.requires_grad]
    if not trained:
        return 0.0
    copies = {"float32": 4, "mixed": 2 * len(trained), "bfloat16": 2}
    return float(trained[0].in_features * copies[precision])


def _attention_bytes(attention: nn.Module, unit: Unit, precision: Precision) -> float:
    *projections, output = [one for one in attention.children() if isinstance(one, nn.Linear)]
    compute = 4 if precision == "float32" else 2
    joint, queries = sum(one.out_features for one in projections), output.in_features
    keys = (joint - queries) / 2
    norms = [one for one in attention.children() if is_norm(one)]
    kept = compute * (queries + keys + keys + queries)  # the second queries are the output
    if len(projections) == 1:
        kept += compute * (queries + keys)
    if norms:
        separate = 0 if len(projections) == 1 and isinstance(norms[0], nn.LayerNorm) else 1
        kept += separate * _norm_bytes(norms[0], queries + keys, compute)
    return kept + _inputs(projections, precision)


def _experts_bytes(experts: nn.Module, unit: Unit, compute: int) -> float:
    down = [one for one in experts.parameters(recurse=False) if one.ndim == 3][-1]
    count, width = down.shape[0], _width(unit.module)
    inner, trained = down.numel() / count / width, 1 if down.requires_grad else 0
    return compute * unit.share * count * ((1 + trained) * width + (3 + trained) * inner)


def _mlp_bytes(products: Sequence[nn.Linear], precision: Precision) -> float:
    """Bytes per row of an MLP of two products, or of three with a gate; 0 for fewer."""
    if len(products) < 2:
        return 0.0
    compute, inner = 4 if precision == "float32" else 2, products[-1].in_features
    factors = 3 if len(products) > 2 else 1  # before the activation; with a gate also after it, and the other factor
    result = 1 if products[-1].weight.requires_grad else 0
    return compute * inner * (factors + result) + _inputs(products[:-1], precision)


def module_bytes(unit: Unit, precision: Precision, flows: bool) -> float:
    """Bytes that a module outside of layers keeps: the input of a norm, or of a product whose weight is trained."""
    module, compute = unit.module, 4 if precision == "float32" else 2
    if is_norm(module):
        return unit.rows * _norm_bytes(module, next(module.parameters()).shape[-1], _stream_bytes(unit, precision))
    if isinstance(module, nn.Linear):
        outputs = module.out_features if unit.part == "projector" else 0  # the input of the activation that follows
        return unit.rows * compute * (module.in_features * module.weight.requires_grad + outputs)
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return unit.rows * compute * module.in_channels * module.weight.requires_grad
    return 0.0
