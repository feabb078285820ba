"""Comparison of the values and gradients of two implementations."""

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
    """Copy tensors and modules to a device, floating-point tensors to a dtype; other arguments are passed on.

    Views of one storage are copied to views of one storage, with their strides.
    """
    storages: dict[tuple[int, torch.dtype], Tensor] = {}

    def convert(value: Any) -> Any:
        if isinstance(value, nn.Module):
            return copy.deepcopy(value).to(device=device, dtype=dtype)
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage()
        name = (storage._cdata, value.dtype)
        if name not in storages:
            whole = torch.empty(0, dtype=value.dtype, device=value.device).set_(storage)
            target = dtype if value.is_floating_point() else None
            storages[name] = whole.to(device=device, dtype=target, copy=True)
        copied = storages[name].as_strided(value.shape, value.stride(), value.storage_offset())
        return copied.requires_grad_(value.requires_grad)

    return tuple(pytree.tree_map(convert, arguments))


def values_and_gradients(function: Callable[..., Any], arguments: Arguments) -> list[Tensor | None]:
    """Return the outputs on the CPU, then the gradients of a weighted sum of them with respect to all inputs."""
    outputs = [x for x in pytree.tree_leaves(function(*arguments)) if isinstance(x, Tensor)]
    inputs = list(_inputs_with_grad(arguments))
    differentiable = [x for x in outputs if x.requires_grad]
    gradients: Sequence[Tensor | None] = []
    if inputs and differentiable:
        weights = [_output_weights(x).to(x.device) for x in differentiable]
        gradients = torch.autograd.grad(differentiable, inputs, weights, allow_unused=True)
    return [None if x is None else x.detach().cpu() for x in (*outputs, *gradients)]


def _output_weights(output: Tensor) -> Tensor:
    """Integers from -3 to 3, which differ between neighbours and are exact in every dtype."""
    return ((torch.arange(output.numel()) % 7).reshape(output.shape) - 3).to(output.dtype)


def _inputs_with_grad(arguments: Arguments) -> Iterator[Tensor]:
    for value in pytree.tree_leaves(arguments):
        if isinstance(value, Tensor) and value.requires_grad:
            yield value
        elif isinstance(value, nn.Module):
            yield from (x for x in value.parameters() if x.requires_grad)


def find_difference(found: Sequence[Tensor | None], expected: Sequence[Tensor | None], tolerance: Tolerance) -> str:
    """Describe the first difference between two lists of tensors.

    Args:
        found: Tensors of a kernel; None for a gradient that it does not compute.
        expected: Tensors of its reference.
        tolerance: Largest error allowed, relative to the largest magnitude of the expected tensor; one number, or one
            per dtype of the found tensors. Integers must be equal.

    Returns:
        The description; an empty string if there is no difference.
    """
    if len(found) != len(expected):
        return f"{len(found)} tensors and gradients instead of {len(expected)}"
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if ours is None and theirs is None:
            continue
        if ours is None or theirs is None:
            return f"tensor {index}: a gradient is missing"
        error = _tensor_difference(ours, theirs, tolerance)
        if error:
            return f"tensor {index}: {error}"
    return ""


def _tensor_difference(found: Tensor, expected: Tensor, tolerance: Tolerance) -> str:
    if found.shape != expected.shape:
        return f"shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
    if found.is_floating_point() != expected.is_floating_point():
        return f"{found.dtype} instead of {expected.dtype}"
    if not expected.is_floating_point():
        return "" if torch.equal(found.long(), expected.long()) else "integers differ"
    if not expected.numel():
        return ""
    allowed = tolerance[found.dtype] if isinstance(tolerance, dict) else tolerance
    scale = expected.double().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    error = ((found.double() - expected.double()).abs().max() / scale).item()
    return "" if error <= allowed else f"relative error {error:.1e}, allowed {allowed:.1e}"  # NaN fails
