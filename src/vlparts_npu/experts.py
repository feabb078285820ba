"""Routed experts by grouped matmuls: transformers' experts implementation `npu_grouped`.

Tokens are sorted by expert, one grouped matmul per weight computes all experts, and the weighted results are summed
per token. No step synchronizes with the device.

Shapes: `T` tokens, `K` experts per token, `E` experts, `H` width, `I` inner width of an expert, `N = 2 * I` with a
gate, else `I`; `P = T * K` pairs of a token and an expert.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN
from transformers.integrations import moe
from transformers.integrations.moe import ExpertsInterface

from vlparts.moe.expert_weights import get_expert_weights
from vlparts.moe.experts_sorted import sorted_experts_forward
from vlparts.parts.moe_experts import RoutedExperts, check_routing, is_expert_parallel
from vlparts.parts.ops_activations import swiglu
from vlparts.parts.utils import refuse_second_derivative

from .experts_layout import arrange_expert_weights, arrange_once
from .self_check import Kernel, with_fallback
from .support import supports_experts

NPU_EXPERTS_NAME = "npu_grouped"

SILU_CLASSES = (type(ACT2FN["silu"]), type(ACT2FN["swish"]))


class GroupedMatmul(torch.autograd.Function):
    """Rows `(P, inner)` times the matrices `(E, inner, outer)` of their experts.

    torch_npu has no derivative for `npu_grouped_matmul`.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
        """Multiply rows sorted by expert; `counts` `(E,)` int64 is the number of rows per expert."""
        ctx.save_for_backward(rows, matrices, counts)
        return _grouped_matmul(rows, matrices, counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of rows and matrices."""
        refuse_second_derivative(f"experts_implementation={NPU_EXPERTS_NAME!r} is")
        rows, matrices, counts = ctx.saved_tensors
        grad, grad_rows, grad_matrices = grad.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            grad_rows = _grouped_matmul(grad, matrices.transpose(1, 2), counts)
        if ctx.needs_input_grad[1]:
            # Group type 2 divides the summed axis: one (inner, outer) matrix per expert.
            grad_matrices = torch.ops.npu.npu_grouped_matmul(
                x=[rows.transpose(0, 1)],
                weight=[grad],
                group_list=counts,
                split_item=3,
                group_type=2,
                group_list_type=1,
            )[0]
        return grad_rows, grad_matrices, None


def _grouped_matmul(rows: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    """`npu_grouped_matmul`, whose matrices may be a transposed view of contiguous ones, its rows not."""
    return torch.ops.npu.npu_grouped_matmul(
        x=[rows], weight=[matrices], group_list=counts, split_item=2, group_type=0, group_list_type=1
    )[0]


def grouped_experts_npu(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Routed experts; arguments and result are those of [`npu_experts_forward`]."""
    weights = get_expert_weights(module, NPU_EXPERTS_NAME)
    num_experts, dtype = len(weights.up), weights.up.dtype
    if is_expert_parallel(module):
        # Pairs with experts of other processes go to the last expert here, with weight zero.
        top_k_weights = top_k_weights.masked_fill(top_k_index == num_experts, 0.0)
        top_k_index = top_k_index.clamp(max=num_experts - 1)
    rows, sorted_indices = torch.ops.npu.npu_moe_token_permute(tokens=hidden_states.to(dtype), indices=top_k_index)
    counts = _count_pairs(top_k_index, num_experts)
    gate_up = GroupedMatmul.apply(rows, weights.up.transpose(1, 2), counts)
    activated = swiglu(gate_up) if _has_default_swiglu(module) else weights.activate(gate_up)
    results = GroupedMatmul.apply(activated.contiguous(), weights.down.transpose(1, 2), counts)
    output = torch.ops.npu.npu_moe_token_unpermute(
        permuted_tokens=results, sorted_indices=sorted_indices, probs=top_k_weights.to(dtype)
    )
    return output.to(hidden_states.dtype)


def _has_default_swiglu(module: Any) -> bool:
    """Whether transformers' experts use its default gate with SiLU; experts of `vlparts` call the operation."""
    default, own = getattr(moe, "_default_apply_gate", None), getattr(type(module), "_apply_gate", None)
    return default is not None and own is default and isinstance(getattr(module, "act_fn", None), SILU_CLASSES)


def _count_pairs(top_k_index: Tensor, num_experts: int) -> Tensor:
    """Number of pairs per expert, `(E,)` int64, without synchronizing; added in int32, since int64 is slow."""
    index = top_k_index.flatten()
    counts = torch.zeros(num_experts, dtype=torch.int32, device=index.device)
    return counts.scatter_add_(0, index.long(), torch.ones_like(index, dtype=torch.int32)).long()


def supports_grouped_experts(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> str | None:
    """Return why the kernel does not support these arguments, or None if it does."""
    weights = get_expert_weights(module, NPU_EXPERTS_NAME)
    has_biases = weights.up_bias is not None or weights.down_bias is not None
    return supports_experts(hidden_states, top_k_index, weights.up, weights.down, has_biases)


def _inputs() -> list[tuple[Any, ...]]:
    cases = []
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        config: Any = SimpleNamespace(num_experts=5, hidden_size=32, moe_intermediate_size=16, hidden_act="silu")
        module = RoutedExperts(config)
        for parameter in module.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
        arrange_expert_weights(module.to(dtype))
        hidden = torch.randn(9, 32, generator=generator).to(dtype).requires_grad_()
        scores = torch.rand(9, 4, generator=generator)
        # Expert 2 gets no token: the gradient of its weights must be zero, not uninitialized memory.
        index = scores.topk(2).indices
        index = torch.where(index >= 2, index + 1, index)
        cases.append((module, hidden, index, torch.rand(9, 2, generator=generator).to(dtype).requires_grad_()))
    return cases


KERNEL = Kernel(
    name=NPU_EXPERTS_NAME,
    run=grouped_experts_npu,
    reference=sorted_experts_forward,
    make_inputs=_inputs,
    supports=supports_grouped_experts,
    tolerance={torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2},
)
_with_fallback = with_fallback(KERNEL)


def npu_experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Weighted sum of the experts of each token.

    The first call copies the weights to the kernel's memory layout, with a warning; see [`arrange_expert_weights`].

    Args:
        module: An experts module of transformers' layout.
        hidden_states: `(T, H)`.
        top_k_index: `(T, K)` int64; under expert parallelism `E` is an expert of another process, which adds nothing.
        top_k_weights: `(T, K)`, rounded to the dtype of the expert weights.

    Returns:
        `(T, H)` in the dtype of `hidden_states`.

    Raises:
        ValueError: If the module has another layout, shapes do not fit, or (on CPU) an index is out of range.
    """
    check_routing(module, hidden_states, top_k_index, top_k_weights)
    arrange_once(module, hidden_states)
    return _with_fallback(module, hidden_states, top_k_index, top_k_weights)


def register_experts() -> None:
    """Register `npu_grouped` for all models."""
    if NPU_EXPERTS_NAME not in ExpertsInterface():
        ExpertsInterface.register(NPU_EXPERTS_NAME, npu_experts_forward)
