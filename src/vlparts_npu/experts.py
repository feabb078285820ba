"""Routed experts by grouped products: the implementation `npu_grouped` for transformers.

Tokens are sorted by expert, one product per weight computes all experts, and the weighted results are added up per
token; no step waits for the device. Shapes: T tokens, K experts of a token, E experts, H width, I inner width of an
expert, N = 2 I with a gate, else I; P = T * K pairs.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.activations import ACT2FN
from transformers.integrations import moe
from transformers.integrations.moe import ExpertsInterface

from vlparts.moe.expert_weights import check_routing, get_expert_weights
from vlparts.moe.experts_sorted import sorted_experts_forward
from vlparts.parts.moe_experts import RoutedExperts
from vlparts.parts.ops_activations import swiglu

from .experts_layout import arrange_expert_weights, arrange_once
from .self_check import Kernel, guarded
from .support import supports_experts

NPU_EXPERTS_NAME = "npu_grouped"

SILU_CLASSES = (type(ACT2FN["silu"]), type(ACT2FN["swish"]))


class GroupedProduct(torch.autograd.Function):
    """Each expert's rows `(P, inner)` times its matrix `(E, inner, outer)`; torch_npu has no derivative for it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
        """Rows stand expert after expert; `counts` `(E,)` int64 says how many each has, all P together."""
        ctx.save_for_backward(rows, matrices, counts)
        return _multiply(rows, matrices, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of rows and matrices."""
        rows, matrices, counts = ctx.saved_tensors
        grad, of_rows, of_matrices = grad.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            of_rows = _multiply(grad, matrices.transpose(1, 2), counts)
        if ctx.needs_input_grad[1]:
            # Group type 2 divides the summed axis: one product (inner, outer) for each expert.
            of_matrices = torch.ops.npu.npu_grouped_matmul(
                x=[rows.transpose(0, 1)],
                weight=[grad],
                group_list=counts,
                split_item=3,
                group_type=2,
                group_list_type=1,
            )[0]
        return of_rows, of_matrices, None


def _multiply(rows: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    """Matrices may be a transposed view of contiguous ones, rows may not."""
    return torch.ops.npu.npu_grouped_matmul(
        x=[rows], weight=[matrices], group_list=counts, split_item=2, group_type=0, group_list_type=1
    )[0]


def grouped_experts_npu(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The kernel; arguments and result are those of [`npu_experts_forward`]."""
    weights = get_expert_weights(module, NPU_EXPERTS_NAME)
    experts, dtype = len(weights.up), weights.up.dtype
    if getattr(module, "_is_expert_parallel", True):
        # Experts of other processes: the last one here computes their pairs, with weights of zero.
        top_k_weights = top_k_weights.masked_fill(top_k_index == experts, 0.0)
        top_k_index = top_k_index.clamp(max=experts - 1)
    rows, places = torch.ops.npu.npu_moe_token_permute(tokens=hidden_states.to(dtype), indices=top_k_index)
    counts = _count(top_k_index, experts)
    inner = GroupedProduct.apply(rows, weights.up.transpose(1, 2), counts)
    active = swiglu(inner) if _has_plain_swiglu(module) else weights.activate(inner)
    results = GroupedProduct.apply(active.contiguous(), weights.down.transpose(1, 2), counts)
    output = torch.ops.npu.npu_moe_token_unpermute(
        permuted_tokens=results, sorted_indices=places, probs=top_k_weights.to(dtype)
    )
    return output.to(hidden_states.dtype)


def _has_plain_swiglu(module: Any) -> bool:
    """Whether transformers' own experts have the usual gate with SiLU; those of `vlparts` know the operation."""
    usual, own = getattr(moe, "_default_apply_gate", None), getattr(type(module), "_apply_gate", None)
    return usual is not None and own is usual and isinstance(getattr(module, "act_fn", None), SILU_CLASSES)


def _count(top_k_index: Tensor, experts: int) -> Tensor:
    """Pairs of each expert, `(E,)` int64, without waiting; int64 is slow to add on the device."""
    chosen = top_k_index.flatten()
    counts = torch.zeros(experts, dtype=torch.int32, device=chosen.device)
    return counts.scatter_add_(0, chosen.long(), torch.ones_like(chosen, dtype=torch.int32)).long()


def supports_grouped_experts(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> str | None:
    """Why the kernel is not for these arguments."""
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
        # Expert 2 gets no token: the gradient of its weights must be zero, not what memory held.
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
_guarded = guarded(KERNEL)


def npu_experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Weighted sum of the experts of each token.

    At its first call it brings the weights into the kernel's layout, and says so; see [`arrange_expert_weights`].

    Args:
        module: An experts module of transformers' layout.
        hidden_states: `(T, H)`.
        top_k_index: `(T, K)` int64; E marks an expert of another process, which adds nothing.
        top_k_weights: `(T, K)`. They are rounded to the type of the expert weights.

    Returns:
        `(T, H)` in the type of `hidden_states`.

    Raises:
        ValueError: If the module has another layout, shapes do not fit, or (on CPU) an index is out of range.
    """
    check_routing(hidden_states, top_k_index, top_k_weights, len(get_expert_weights(module, NPU_EXPERTS_NAME).up))
    arrange_once(module, hidden_states)
    return _guarded(module, hidden_states, top_k_index, top_k_weights)


def register_experts() -> None:
    """Offer `npu_grouped` to all models."""
    if NPU_EXPERTS_NAME not in ExpertsInterface():
        ExpertsInterface.register(NPU_EXPERTS_NAME, npu_experts_forward)
