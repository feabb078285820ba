"""The experts implementation `vlparts_sorted`: token-expert pairs sorted by expert, in chunks that fit the cache.

On CPU each product is that of one expert with its tokens, by the fastest kernel, written to where the next step reads
it. Elementwise steps between the products run for many experts at once, in memory that is reused. On other devices and
in compiled programs it is transformers' `grouped_mm`.

Shapes: T tokens, K experts per token, E experts, H width, I intermediate size of an expert, N = 2 I with a gate, I
without; P pairs of a token and an expert.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.integrations.moe import grouped_mm_experts_forward

from ..kernels.cpu.linear import Product, form_of, get_form, linear_cpu, weight_gradient, write_product
from ..parts.moe_experts import check_routing
from ..parts.ops_library import define_operation
from ..parts.utils import refuse_second_derivative
from .expert_weights import ExpertWeights, get_expert_weights

SORTED_EXPERTS_NAME = "vlparts_sorted"

# Pairs per chunk, unless one expert has more. Activations are then still in the cache when they are used again, and
# their memory is not returned to the system in between.
CHUNK_PAIRS = 2048

# From this many experts in a chunk PyTorch's grouped product is used: its loop has less overhead than one in Python.
MIN_GROUPED_EXPERTS = 9

# Whether a device uses the implementation of this file: the dispatcher decides. Compiled programs do not.
_use_sorted_experts = define_operation("use_sorted_experts(Tensor hidden_states) -> bool", lambda hidden_states: False)
torch.library.impl("vlparts::use_sorted_experts", ("CPU", "AutogradCPU"), lambda hidden_states: True)


def sorted_experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute the weighted sum of each token's experts, expert by expert.

    Args:
        module: An experts module in transformers' layout.
        hidden_states: `(T, H)`.
        top_k_index: `(T, K)` int64; under expert parallelism E marks an expert of another process, which is skipped.
        top_k_weights: `(T, K)`.

    Returns:
        `(T, H)` in the type of `hidden_states`.

    Raises:
        ValueError: If the module has another layout, shapes do not fit, or (on CPU) an index is out of range.
    """
    weights = get_expert_weights(module, SORTED_EXPERTS_NAME)
    check_routing(module, hidden_states, top_k_index, top_k_weights)
    if not _use_sorted_experts(hidden_states):
        return grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
    inputs = hidden_states.to(weights.up.dtype)
    tensors = (inputs, top_k_weights, *weights[:4])
    pairs = _sort_pairs(top_k_index, len(weights.up))
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        output = _SortedExperts.apply(*tensors, weights.activate, pairs)
    else:
        output, _ = _forward(inputs, top_k_weights, weights, pairs, save_inner=False)
    return output.to(hidden_states.dtype)


class _Segment(NamedTuple):
    """The pairs of one expert, `start` to `end` in sorted order."""

    expert: int
    start: int
    end: int


class _SortedPairs(NamedTuple):
    """Token-expert pairs sorted by expert, without those of experts of other processes.

    Attributes:
        slots: `(P,)` int64, index of each pair in the flattened `(T, K)` routing.
        tokens: `(P,)` int64, token of each pair.
        positions: `(T, K)` int64, position of each pair of the routing in sorted order; P for skipped pairs.
        ends: `(E,)` int32, end of each expert's pairs.
        chunks: Segments of the experts that have pairs, in chunks of about `CHUNK_PAIRS` pairs.
    """

    slots: Tensor
    tokens: Tensor
    positions: Tensor
    ends: Tensor
    chunks: list[list[_Segment]]


def _sort_pairs(top_k_index: Tensor, num_experts: int) -> _SortedPairs:
    experts, slots = torch.sort(top_k_index.flatten(), stable=True)
    ends = torch.searchsorted(experts, torch.arange(num_experts, dtype=experts.dtype), right=True, out_int32=True)
    chunks = _make_chunks(ends.tolist())
    count = chunks[-1][-1].end if chunks else 0
    slots = slots[:count]
    positions = torch.full_like(top_k_index, count, dtype=torch.int64)
    positions.view(-1)[slots] = torch.arange(count)
    return _SortedPairs(slots, slots // max(top_k_index.shape[1], 1), positions, ends, chunks)


def _make_chunks(ends: list[int]) -> list[list[_Segment]]:
    chunks: list[list[_Segment]] = []
    start = 0
    for expert, end in enumerate(ends):
        if start < end:
            if not chunks or end - chunks[-1][0].start > CHUNK_PAIRS:
                chunks.append([])
            chunks[-1].append(_Segment(expert, start, end))
        start = end
    return chunks


def _forward(
    inputs: Tensor, top_k_weights: Tensor, weights: ExpertWeights, pairs: _SortedPairs, save_inner: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute the output `(T, H)`, and with `save_inner` return the inputs of the activation, `(P, N)`."""
    factors = top_k_weights.detach().flatten()[pairs.slots]
    results = inputs.new_empty(len(pairs.slots) + 1, weights.down.shape[1])
    saved = inputs.new_empty(len(pairs.slots), weights.up.shape[1]) if save_inner else None
    with torch.no_grad():
        for chunk in pairs.chunks:
            rows = slice(chunk[0].start, chunk[-1].end)
            tokens = inputs.index_select(0, pairs.tokens[rows])
            inner = _multiply(tokens, weights.up, weights.up_bias, chunk, pairs.ends)
            if saved is not None:
                saved[rows] = inner
            result = _multiply(weights.activate(inner), weights.down, weights.down_bias, chunk, pairs.ends)
            torch.mul(result, factors[rows].unsqueeze(1), out=results[rows])
        return _sum_pairs(results, pairs), saved


def _sum_pairs(values: Tensor, pairs: _SortedPairs) -> Tensor:
    """Sum the pairs of each token, `(T, width)` from `(P + 1, width)`, whose last row is that of skipped pairs."""
    values[-1] = 0
    # PyTorch sums bfloat16 in float32.
    return values.index_select(0, pairs.positions.flatten()).view(*pairs.positions.shape, values.shape[1]).sum(1)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, chunk: list[_Segment], ends: Tensor) -> Tensor:
    """Multiply each pair of a chunk, `(pairs, inner)`, by its expert's matrix of `weight` `(E, outer, inner)`."""
    first = chunk[0].start
    if bias is None and _use_grouped_mm(x, weight, chunk):
        experts = slice(chunk[0].expert, chunk[-1].expert + 1)
        return F.grouped_mm(x, weight[experts].transpose(1, 2), offs=ends[experts] - first)
    if len(chunk) == 1:
        return linear_cpu(x, weight[chunk[0].expert], None if bias is None else bias[chunk[0].expert])
    output = x.new_empty(len(x), weight.shape[1])
    counts = [end - start for _, start, end in chunk]
    forms: dict[int, Product] = {}  # by the number of rows: to find it takes as long as a small product
    for (expert, _, _), rows, target in zip(chunk, x.split(counts), output.split(counts), strict=True):
        inputs = rows, weight[expert], None if bias is None else bias[expert]
        if len(rows) not in forms:
            forms[len(rows)] = get_form(*inputs)
        write_product(forms[len(rows)], target, *inputs, add=False)
    return output


def _use_grouped_mm(x: Tensor, weight: Tensor, chunk: list[_Segment]) -> bool:
    """Return whether PyTorch's grouped product supports these operands and is not slower.

    It needs rows of a multiple of 16 bytes, and is not slower with many experts if `linear_cpu` has no faster product.
    """
    outer, inner = weight.shape[1:]
    if len(chunk) < MIN_GROUPED_EXPERTS or (outer | inner) * x.element_size() % 16:
        return False
    rows, transposed = len(x) // len(chunk), not weight[0].is_contiguous()
    is_supported = x.dtype in (torch.float32, torch.bfloat16)
    return is_supported and form_of(x.dtype, rows, inner, outer, transposed=transposed) == "pytorch"


class _SortedExperts(torch.autograd.Function):
    """The experts with a backward pass that also runs expert by expert."""

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
        pairs: _SortedPairs,
    ) -> Tensor:
        weights = ExpertWeights(up, up_bias, down, down_bias, activate)
        output, saved = _forward(inputs, top_k_weights, weights, pairs, save_inner=True)
        ctx.save_for_backward(inputs, top_k_weights, up, up_bias, down, down_bias, saved)
        ctx.activate, ctx.pairs = activate, pairs
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative(f"experts_implementation={SORTED_EXPERTS_NAME!r} is")
        inputs, top_k_weights, up, up_bias, down, down_bias, saved = ctx.saved_tensors
        weights = ExpertWeights(up, up_bias, down, down_bias, ctx.activate)
        return *_backward(ctx.needs_input_grad, inputs, top_k_weights, weights, saved, grad, ctx.pairs), None, None


def _backward(
    needs_grad: tuple[bool, ...],
    inputs: Tensor,
    top_k_weights: Tensor,
    weights: ExpertWeights,
    saved: Tensor,
    grad: Tensor,
    pairs: _SortedPairs,
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of the first six inputs of [`_SortedExperts`] that need one."""
    needs_inputs, needs_factors, *needs_weights = needs_grad[:6]
    factors = top_k_weights.flatten()[pairs.slots]
    grad_pairs = inputs.new_empty(len(pairs.slots) + 1, inputs.shape[1]) if needs_inputs else None
    grad_factors = torch.zeros_like(top_k_weights).view(-1) if needs_factors else None
    grad_weights = [
        _allocate_gradient(weight, pairs.chunks) if weight is not None and needed else None
        for weight, needed in zip(weights[:4], needs_weights, strict=True)
    ]
    for chunk in pairs.chunks:
        rows = slice(chunk[0].start, chunk[-1].end)
        slots, tokens = pairs.slots[rows], pairs.tokens[rows]
        grad_output, factor = grad.index_select(0, tokens), factors[rows].unsqueeze(1)
        with torch.enable_grad():
            inner = saved[rows].detach().requires_grad_()
            active = weights.activate(inner)
        grad_active = _multiply(grad_output, weights.down.transpose(1, 2), None, chunk, pairs.ends)  # without factor
        if grad_factors is not None:
            grad_factors[slots] = (active.detach() * grad_active).sum(-1).to(grad_factors.dtype)
        (grad_inner,) = torch.autograd.grad(active, inner, (grad_active * factor).to(grad.dtype))
        if grad_pairs is not None:
            grad_pairs[rows] = _multiply(grad_inner, weights.up.transpose(1, 2), None, chunk, pairs.ends)
        grad_result = (grad_output * factor).to(grad.dtype)
        _write_weight_gradients(
            inputs.index_select(0, tokens), grad_inner, active.detach(), grad_result, chunk, grad_weights
        )
        if grad_factors is not None and weights.down_bias is not None:
            biases = torch.cat([weights.down_bias[[one.expert]].expand(one.end - one.start, -1) for one in chunk])
            grad_factors[slots] += (grad_output * biases).sum(-1).to(grad_factors.dtype)
    grad_inputs = None if grad_pairs is None else _sum_pairs(grad_pairs, pairs)
    return grad_inputs, None if grad_factors is None else grad_factors.view_as(top_k_weights), *grad_weights


def _write_weight_gradients(
    inputs: Tensor,
    grad_inner: Tensor,
    active: Tensor,
    grad_result: Tensor,
    chunk: list[_Segment],
    gradients: list[Tensor | None],
) -> None:
    """Write the gradients of the weights and biases of a chunk's experts that are allocated."""
    first = chunk[0].start
    for x, grad, (weight, bias) in ((inputs, grad_inner, gradients[:2]), (active, grad_result, gradients[2:])):
        for expert, start, end in chunk:
            rows = slice(start - first, end - first)
            if weight is not None:
                weight_gradient(x[rows], grad[rows], weight[expert])
            if bias is not None:
                bias[expert] = grad[rows].sum(0)


def _allocate_gradient(weight: Tensor, chunks: list[list[_Segment]]) -> Tensor:
    """Return an uninitialised gradient of all experts' weights, with zeros for experts without pairs."""
    gradient = torch.empty_like(weight)
    start = 0
    for expert in [*(segment.expert for chunk in chunks for segment in chunk), len(weight)]:
        if start < expert:
            gradient[start:expert].zero_()
        start = expert + 1
    return gradient
