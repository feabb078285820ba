"""Values and gradients of two implementations, compared on small inputs."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Arguments = tuple[Any, ...]
Tolerance = float | dict[torch.dtype, float]


def copy_arguments(
    arguments: Arguments, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Arguments:
    """Copy tensors and modules to a device, and what is floating point to a type; the rest stays.

    Tensors that are parts of one stay so, with their strides.
    """
    memories: dict[tuple[int, torch.dtype], Tensor] = {}

    def convert(value: Any) -> Any:
        if isinstance(value, nn.Module):
            return copy.deepcopy(value).to(device=device, dtype=dtype)
        if not isinstance(value, Tensor):
            return value
        kind = dtype if value.is_floating_point() else None
        storage = value.untyped_storage()
        name = (storage._cdata, value.dtype)
        if name not in memories:
            whole = torch.empty(0, dtype=value.dtype, device=value.device).set_(storage)
            memories[name] = whole.to(device=device, dtype=kind, copy=True)
        copied = memories[name].as_strided(value.shape, value.stride(), value.storage_offset())
        return copied.requires_grad_(value.requires_grad)

    return tuple(pytree.tree_map(convert, arguments))


def values_and_gradients(function: Callable[..., Any], arguments: Arguments) -> list[Tensor | None]:
    """The results, and the gradients of a weighted sum of them, on the CPU."""
    outputs = [x for x in pytree.tree_leaves(function(*arguments)) if isinstance(x, Tensor)]
    inputs = list(_differentiable(arguments))
    scored = [x for x in outputs if x.requires_grad]
    gradients: Sequence[Tensor | None] = []
    if inputs and scored:
        weights = [_weights(x).to(x.device) for x in scored]
        gradients = torch.autograd.grad(scored, inputs, weights, allow_unused=True)
    return [None if x is None else x.detach().cpu() for x in (*outputs, *gradients)]


def _weights(like: Tensor) -> Tensor:
    """Weights that differ from place to place, small integers, which every type holds exactly."""
    return ((torch.arange(like.numel()) % 7).reshape(like.shape) - 3).to(like.dtype)


def _differentiable(arguments: Arguments) -> Iterator[Tensor]:
    for value in pytree.tree_leaves(arguments):
        if isinstance(value, Tensor) and value.requires_grad:
            yield value
        elif isinstance(value, nn.Module):
            yield from (x for x in value.parameters() if x.requires_grad)


def find_difference(found: Sequence[Tensor | None], expected: Sequence[Tensor | None], tolerance: Tolerance) -> str:
    """Say where two lists of tensors differ.

    Args:
        found: Tensors of a kernel; None for a gradient that it does not give.
        expected: Those of its reference.
        tolerance: Largest error allowed, relative to the largest magnitude of the expected tensor; one number, or one
            for each type of the found tensors. Integers must be equal.

    Returns:
        The first difference in words; empty for none.
    """
    if len(found) != len(expected):
        return f"{len(found)} tensors and gradients in place of {len(expected)}"
    for place, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if ours is None and theirs is None:
            continue
        fault = "a gradient is missing" if ours is None or theirs is None else _difference(ours, theirs, tolerance)
        if fault:
            return f"tensor {place}: {fault}"
    return ""


def _difference(found: Tensor, expected: Tensor, tolerance: Tolerance) -> str:
    if found.shape != expected.shape:
        return f"shape {tuple(found.shape)} in place of {tuple(expected.shape)}"
    if found.is_floating_point() != expected.is_floating_point():
        return f"{found.dtype} in place of {expected.dtype}"
    if not expected.is_floating_point():
        return "" if torch.equal(found.long(), expected.long()) else "integers differ"
    if not expected.numel():
        return ""
    allowed = tolerance[found.dtype] if isinstance(tolerance, dict) else tolerance
    scale = expected.double().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    error = ((found.double() - expected.double()).abs().max() / scale).item()
    return "" if error <= allowed else f"relative error {error:.1e}, allowed {allowed:.1e}"  # NaN is not allowed
