"""The experts implementation `vlparts_merged`: every expert for every token, as one computation.

All experts are one wide MLP: the first product is one matrix, the second sums over the experts, and routing weights
are coefficients between them, 0 for experts that were not chosen. That is E / K times the arithmetic and reads all
weights, but it takes some ten kernels however many experts there are, sorts nothing, and never waits for the device:
MindSpore NLP's form for DeepSeek-OCR's 64 experts, for devices where starting a kernel is what costs. On CPU it loses,
by far at few tokens.

Shapes: T tokens, K experts of a token, E experts, H width, I inner width of an expert, N = 2 I with a gate, else I.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ExpertsInterface

from ..parts import ops_linear  # noqa: F401 (defines the operation)
from .expert_weights import ExpertWeights, check_routing, get_expert_weights

MERGED_EXPERTS_NAME = "vlparts_merged"

# Largest number of activations before the gate that are held at a time.
ACTIVATIONS_AT_A_TIME = 2**26


def merged_experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Weighted sum of the experts of each token, over all experts.

    An expert that gives infinity or NaN for a token spoils that token's output also where it was not chosen.

    Args:
        module: An experts module of transformers' layout.
        hidden_states: `(T, H)`.
        top_k_index: `(T, K)` int64; E marks an expert of another process, which counts as not chosen.
        top_k_weights: `(T, K)`.

    Returns:
        `(T, H)` in the type of `hidden_states`.

    Raises:
        ValueError: If the module has another layout, shapes do not fit, or (on CPU) an index is out of range.
    """
    weights = get_expert_weights(module, MERGED_EXPERTS_NAME)
    experts, width = weights.up.shape[:2]
    check_routing(hidden_states, top_k_index, top_k_weights, experts)
    coefficients = top_k_weights.new_zeros(len(hidden_states), experts + 1)
    coefficients = coefficients.scatter_add(1, top_k_index, top_k_weights)[:, :experts]
    inputs, coefficients = hidden_states.to(weights.up.dtype), coefficients.to(weights.up.dtype)
    step = max(1, ACTIVATIONS_AT_A_TIME // (experts * width))
    if torch.compiler.is_compiling() or len(inputs) <= step:
        return _merged(weights, inputs, coefficients).to(hidden_states.dtype)
    pieces = zip(inputs.split(step), coefficients.split(step), strict=True)
    return torch.cat([_merged(weights, *piece) for piece in pieces]).to(hidden_states.dtype)


def _merged(weights: ExpertWeights, inputs: Tensor, coefficients: Tensor) -> Tensor:
    """`(T, H)` from `(T, H)` and `(T, E)`."""
    bias = None if weights.up_bias is None else weights.up_bias.flatten()
    inner = torch.ops.vlparts.linear(inputs, weights.up.flatten(0, 1), bias)
    active = weights.activate(inner.unflatten(1, weights.up.shape[:2])) * coefficients.unsqueeze(-1)
    down = weights.down.transpose(1, 2)
    if down.is_contiguous():  # transposed layouts: the sum over the experts happens inside of one product
        output = active.flatten(1) @ down.flatten(0, 1)
    else:
        output = torch.bmm(active.transpose(0, 1), down).sum(0)
    return output if weights.down_bias is None else output + coefficients @ weights.down_bias


if MERGED_EXPERTS_NAME not in ExpertsInterface():
    ExpertsInterface.register(MERGED_EXPERTS_NAME, merged_experts_forward)
