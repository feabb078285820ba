"""The experts implementation `vlparts_merged`: all experts for every token, as one wide MLP.

The routing weights are coefficients between its two matrix products, 0 for experts that were not chosen. That is E / K
times the arithmetic and reads all weights, but it takes about ten kernels whatever the number of experts, sorts
nothing, and never waits for the device. MindSpore NLP uses this form for the 64 experts of DeepSeek-OCR. It is meant
for devices on which kernel launches dominate; on CPU it is slower, by far with few tokens.

Shapes: T tokens, K experts per token, E experts, H width, I intermediate size of an expert, N = 2 I with a gate, I
without.
"""

from typing import Any

import torch
from torch import Tensor

from ..parts import ops_linear  # noqa: F401 (defines the operation)
from ..parts.moe_experts import check_routing
from .expert_weights import ExpertWeights, get_expert_weights

MERGED_EXPERTS_NAME = "vlparts_merged"

# Largest number of activations before the gate, E * N per token, in a chunk of tokens.
MAX_ACTIVATIONS = 2**26


def merged_experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute the weighted sum of each token's experts by evaluating all experts.

    An infinite or NaN result of any expert makes the token's output infinite or NaN, even if that expert was not
    chosen.

    Args:
        module: An experts module in transformers' layout.
        hidden_states: `(T, H)`.
        top_k_index: `(T, K)` int64; under expert parallelism E marks an expert of another process, which adds nothing.
        top_k_weights: `(T, K)`.

    Returns:
        `(T, H)` in the type of `hidden_states`.

    Raises:
        ValueError: If the module has another layout, shapes do not fit, or (on CPU) an index is out of range.
    """
    weights = get_expert_weights(module, MERGED_EXPERTS_NAME)
    experts, width = weights.up.shape[:2]
    check_routing(module, hidden_states, top_k_index, top_k_weights)
    coefficients = top_k_weights.new_zeros(len(hidden_states), experts + 1)
    coefficients = coefficients.scatter_add(1, top_k_index, top_k_weights)[:, :experts]
    inputs, coefficients = hidden_states.to(weights.up.dtype), coefficients.to(weights.up.dtype)
    chunk_size = max(1, MAX_ACTIVATIONS // (experts * width))
    if torch.compiler.is_compiling() or len(inputs) <= chunk_size:
        return _dense_experts(weights, inputs, coefficients).to(hidden_states.dtype)
    chunks = zip(inputs.split(chunk_size), coefficients.split(chunk_size), strict=True)
    return torch.cat([_dense_experts(weights, *chunk) for chunk in chunks]).to(hidden_states.dtype)


def _dense_experts(weights: ExpertWeights, inputs: Tensor, coefficients: Tensor) -> Tensor:
    """Compute outputs `(T, H)` from inputs `(T, H)` and coefficients `(T, E)`."""
    bias = None if weights.up_bias is None else weights.up_bias.flatten()
    inner = torch.ops.vlparts.linear(inputs, weights.up.flatten(0, 1), bias)
    active = weights.activate(inner.unflatten(1, weights.up.shape[:2])) * coefficients.unsqueeze(-1)
    down = weights.down.transpose(1, 2)
    if down.is_contiguous():  # transposed layouts: one product also sums over the experts
        output = active.flatten(1) @ down.flatten(0, 1)
    else:
        output = torch.bmm(active.transpose(0, 1), down).sum(0)
    return output if weights.down_bias is None else output + coefficients @ weights.down_bias
