"""The experts implementation `vlparts_sorted`: tokens sorted by expert, some thousands at a time.

On CPU each product is that of one expert with its tokens, by the faster of PyTorch's two libraries, written where the
next step reads it; what lies between the products is computed for many experts at once, in memory that is used again.
On other devices, and in compiled programs, it is transformers' `grouped_mm`.

Shapes: T tokens, K experts of a token, E experts, H width, I inner width of an expert, N = 2 I with a gate, else I;
P pairs of a token and an expert, sorted by expert.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward

from ..kernels.cpu.linear import linear_cpu, onednn_is_faster, weight_gradient
from .expert_weights import ExpertWeights, check_routing, get_expert_weights

SORTED_EXPERTS_NAME = "vlparts_sorted"

# Pairs that are computed at a time, but for an expert that has more: what lies between the products is then used again
# before it leaves the cache, and its memory is not returned to the system in between.
PAIRS_AT_A_TIME = 2048


# From so many experts on PyTorch's grouped product is taken, whose loop costs less than one in Python.
GROUPED_FROM = 9


class _Piece(NamedTuple):
    """The pairs of one expert: `start` to `end` in the sorted order."""

    expert: int
    start: int
    end: int


class _Plan(NamedTuple):
    """Pairs in the order of their experts; pairs with experts of other processes are left out.

    Attributes:
        slots: `(P,)` int64, place of each pair among the T * K of the routing.
        tokens: `(P,)` int64, its token.
        places: `(T, K)` int64, where the pairs of the routing stand among the sorted; P for those that were left out.
        ends: `(E,)` int32, where each expert's pairs end.
        groups: Experts that have pairs, some at a time.
    """

    slots: Tensor
    tokens: Tensor
    places: Tensor
    ends: Tensor
    groups: list[list[_Piece]]


def sorted_experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Weighted sum of the experts of each token.

    Args:
        module: An experts module of transformers' layout.
        hidden_states: `(T, H)`.
        top_k_index: `(T, K)` int64; E marks an expert of another process, which is skipped.
        top_k_weights: `(T, K)`.

    Returns:
        `(T, H)` in the type of `hidden_states`.

    Raises:
        ValueError: If the module has another layout, shapes do not fit, or (on CPU) an index is out of range.
    """
    weights = get_expert_weights(module, SORTED_EXPERTS_NAME)
    check_routing(hidden_states, top_k_index, top_k_weights, len(weights.up))
    if torch.compiler.is_compiling() or not torch.ops.vlparts.experts_one_by_one(hidden_states):
        return grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
    inputs = hidden_states.to(weights.up.dtype)
    tensors = (inputs, top_k_weights, *weights[:4])
    plan = _plan(top_k_index, len(weights.up))
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        output = _SortedExperts.apply(*tensors, weights.activate, plan)
    else:
        output, _ = _forward(inputs, top_k_weights, weights, plan, keep=False)
    return output.to(hidden_states.dtype)


def _plan(top_k_index: Tensor, num_experts: int) -> _Plan:
    experts, slots = torch.sort(top_k_index.flatten(), stable=True)
    ends = torch.searchsorted(experts, torch.arange(num_experts, dtype=experts.dtype), right=True, out_int32=True)
    groups = _groups(ends.tolist())
    used = groups[-1][-1].end if groups else 0
    slots = slots[:used]
    places = torch.full_like(top_k_index, used, dtype=torch.int64)
    places.view(-1)[slots] = torch.arange(used)
    return _Plan(slots, slots // max(top_k_index.shape[1], 1), places, ends, groups)


def _groups(ends: list[int]) -> list[list[_Piece]]:
    groups: list[list[_Piece]] = []
    start = 0
    for expert, end in enumerate(ends):
        if start < end:
            if not groups or end - groups[-1][0].start > PAIRS_AT_A_TIME:
                groups.append([])
            groups[-1].append(_Piece(expert, start, end))
        start = end
    return groups


def _takes_grouped(x: Tensor, weight: Tensor, group: list[_Piece]) -> bool:
    """Whether PyTorch's own loop over experts takes these, and is no slower.

    It takes rows of whole 16 bytes, and is no slower for many experts where there is no faster product.
    """
    outer, inner = weight.shape[1:]
    if len(group) < GROUPED_FROM or (outer | inner) * x.element_size() % 16:
        return False
    if x.dtype == torch.float32:
        return not onednn_is_faster(len(x) // len(group), inner, outer)
    return x.dtype == torch.bfloat16


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, group: list[_Piece], ends: Tensor) -> Tensor:
    """The pairs of a group `(pairs, inner)`, each times its expert's `(outer, inner)` of `(E, outer, inner)`."""
    first = group[0].start
    if bias is None and _takes_grouped(x, weight, group):
        experts = slice(group[0].expert, group[-1].expert + 1)
        return F.grouped_mm(x, weight[experts].transpose(1, 2), offs=ends[experts] - first)
    if len(group) == 1:
        return linear_cpu(x, weight[group[0].expert], None if bias is None else bias[group[0].expert])
    output = x.new_empty(len(x), weight.shape[1])
    for expert, start, end in group:
        rows = x[start - first : end - first]
        target = output[start - first : end - first]
        if x.dtype == torch.float32:
            target.copy_(linear_cpu(rows, weight[expert], None if bias is None else bias[expert]))
        elif bias is None:
            torch.mm(rows, weight[expert].t(), out=target)
        else:
            torch.addmm(bias[expert], rows, weight[expert].t(), out=target)
    return output


def _sum_of_pairs(rows: Tensor, plan: _Plan) -> Tensor:
    """`(T, width)` from `(P + 1, width)`, whose last row stands for pairs that were left out."""
    rows[-1] = 0
    # PyTorch sums bfloat16 in float32.
    return rows.index_select(0, plan.places.flatten()).view(*plan.places.shape, rows.shape[1]).sum(1)


def _forward(
    inputs: Tensor, top_k_weights: Tensor, weights: ExpertWeights, plan: _Plan, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """The output `(T, H)`; and with `keep` what came before the activation, `(P, N)`."""
    factors = top_k_weights.detach().flatten()[plan.slots]
    results = inputs.new_empty(len(plan.slots) + 1, weights.down.shape[1])
    kept = inputs.new_empty(len(plan.slots), weights.up.shape[1]) if keep else None
    with torch.no_grad():
        for group in plan.groups:
            pairs = slice(group[0].start, group[-1].end)
            tokens = inputs.index_select(0, plan.tokens[pairs])
            inner = _multiply(tokens, weights.up, weights.up_bias, group, plan.ends)
            if kept is not None:
                kept[pairs] = inner
            result = _multiply(weights.activate(inner), weights.down, weights.down_bias, group, plan.ends)
            torch.mul(result, factors[pairs].unsqueeze(1), out=results[pairs])
        return _sum_of_pairs(results, plan), kept


class _SortedExperts(torch.autograd.Function):
    """The experts with a backward pass that works expert by expert as well."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        top_k_weights: Tensor,
        up: Tensor,
        up_bias: Tensor | None,
        down: Tensor,
        down_bias: Tensor | None,
        activate: Any,
        plan: _Plan,
    ) -> Tensor:
        weights = ExpertWeights(up, up_bias, down, down_bias, activate)
        output, kept = _forward(inputs, top_k_weights, weights, plan, keep=True)
        ctx.save_for_backward(inputs, top_k_weights, up, up_bias, down, down_bias, kept)
        ctx.activate, ctx.plan = activate, plan
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, top_k_weights, up, up_bias, down, down_bias, kept = ctx.saved_tensors
        weights = ExpertWeights(up, up_bias, down, down_bias, ctx.activate)
        return *_backward(ctx.needs_input_grad, inputs, top_k_weights, weights, kept, grad, ctx.plan), None, None


def _backward(
    needed: tuple[bool, ...],
    inputs: Tensor,
    top_k_weights: Tensor,
    weights: ExpertWeights,
    kept: Tensor,
    grad: Tensor,
    plan: _Plan,
) -> tuple[Tensor | None, ...]:
    """The gradients of the first six inputs of [`_SortedExperts`], as far as they are needed."""
    needs_inputs, needs_factors, *needs_weights = needed[:6]
    factors = top_k_weights.flatten()[plan.slots]
    rows = inputs.new_empty(len(plan.slots) + 1, inputs.shape[1]) if needs_inputs else None
    grad_factors = torch.zeros_like(top_k_weights).view(-1) if needs_factors else None
    wanted = zip(weights[:4], needs_weights, strict=True)
    grads = [_room(weight, plan.groups) if weight is not None and need else None for weight, need in wanted]
    for group in plan.groups:
        pairs = slice(group[0].start, group[-1].end)
        slots, tokens = plan.slots[pairs], plan.tokens[pairs]
        of_output, factor = grad.index_select(0, tokens), factors[pairs].unsqueeze(1)
        with torch.enable_grad():
            inner = kept[pairs].detach().requires_grad_()
            active = weights.activate(inner)
        before = _multiply(of_output, weights.down.transpose(1, 2), None, group, plan.ends)
        if grad_factors is not None:
            grad_factors[slots] = (active.detach() * before).sum(-1).to(grad_factors.dtype)
        (of_inner,) = torch.autograd.grad(active, inner, (before * factor).to(grad.dtype))
        if rows is not None:
            rows[pairs] = _multiply(of_inner, weights.up.transpose(1, 2), None, group, plan.ends)
        weighted = (of_output * factor).to(grad.dtype)
        _weight_gradients(inputs.index_select(0, tokens), of_inner, active.detach(), weighted, group, grads)
        if grad_factors is not None and weights.down_bias is not None:
            biases = torch.cat([weights.down_bias[[one.expert]].expand(one.end - one.start, -1) for one in group])
            grad_factors[slots] += (of_output * biases).sum(-1).to(grad_factors.dtype)
    grad_inputs = None if rows is None else _sum_of_pairs(rows, plan)
    return grad_inputs, None if grad_factors is None else grad_factors.view_as(top_k_weights), *grads


def _weight_gradients(
    inputs: Tensor,
    of_inner: Tensor,
    active: Tensor,
    of_output: Tensor,
    group: list[_Piece],
    grads: list[Tensor | None],
) -> None:
    """Write the gradients of the weights and biases of a group's experts, as far as there is room for them."""
    first = group[0].start
    for x, grad, (weight, bias) in ((inputs, of_inner, grads[:2]), (active, of_output, grads[2:])):
        for expert, start, end in group:
            pairs = slice(start - first, end - first)
            if weight is not None:
                weight_gradient(x[pairs], grad[pairs], weight[expert])
            if bias is not None:
                bias[expert] = grad[pairs].sum(0)


def _room(weight: Tensor, groups: list[list[_Piece]]) -> Tensor:
    """Room for the gradient of all experts' weights, with zeros for experts without pairs."""
    room = torch.empty_like(weight)
    start = 0
    for expert in [*(piece.expert for group in groups for piece in group), len(weight)]:
        if start < expert:
            room[start:expert].zero_()
        start = expert + 1
    return room


def _define_operation() -> None:
    """Register once per process, also where several copies of this file are imported."""
    if not hasattr(torch.ops.vlparts, "experts_one_by_one"):
        name = "vlparts::experts_one_by_one"
        torch.library.define(name, "(Tensor hidden_states) -> bool")
        torch.library.impl(name, "CompositeImplicitAutograd", lambda hidden_states: False)
        torch.library.impl(name, ("CPU", "AutogradCPU"), lambda hidden_states: True)
    if SORTED_EXPERTS_NAME not in ExpertsInterface():
        ExpertsInterface.register(SORTED_EXPERTS_NAME, sorted_experts_forward)


_define_operation()
