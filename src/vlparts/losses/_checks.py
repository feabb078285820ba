"""Argument checks that several losses share. Values are checked on CPU only, since reading them waits for a device."""

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor


def loss_dtype(values: Tensor) -> torch.dtype:
    """Return the type in which losses are computed: float64 for float64 values, otherwise float32."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def is_integer(values: Tensor) -> bool:
    """Return whether a tensor holds integers, bool excluded."""
    return not values.is_floating_point() and values.dtype != torch.bool


def is_readable(values: Tensor) -> bool:
    """Return whether values can be read without waiting for a device or breaking a compiled graph."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def check_number(value: Any, name: str, *, positive: bool = False) -> None:
    """Check that a number is finite and at least 0, or above 0 if `positive`.

    Raises:
        ValueError: If it is not, or `value` is no number.
    """
    is_number = isinstance(value, Real | Tensor) and not isinstance(value, bool)
    if not is_number or not (value > 0 if positive else value >= 0) or not value < math.inf:
        bound = "above 0" if positive else "of at least 0"
        raise ValueError(f"`{name}` must be a finite number {bound}, got {value!r}.")


def check_fraction(value: Any, name: str) -> None:
    """Check that a number is between 0 and 1.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(value, bool) or not 0 <= value <= 1:
        raise ValueError(f"`{name}` must be between 0 and 1, got {value!r}.")


def check_logits(logits: Tensor, labels: Tensor) -> None:
    """Check that logits are floating-point `(*labels.shape, V)` with V > 0.

    Raises:
        ValueError: If they are not.
    """
    if not logits.is_floating_point() or logits.shape[:-1] != labels.shape or logits.shape[-1:] == (0,):
        raise ValueError(
            f"`logits` must be floating-point of shape {(*labels.shape, 'V')} with V > 0, got {logits.dtype} "
            f"{tuple(logits.shape)}."
        )


def check_labels(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Return the labels as `(N,)` int64.

    Raises:
        ValueError: If labels are not integers, or one is neither a class nor `ignore_index`.
    """
    if not is_integer(labels):
        raise ValueError(f"`labels` must be integers, got {labels.dtype}.")
    flat = labels.reshape(-1).long()
    if is_readable(flat):
        invalid = (flat != ignore_index) & ((flat < 0) | (flat >= num_classes))
        if bool(invalid.any()):
            raise ValueError(
                f"`labels` must be between 0 and {num_classes - 1}, or {ignore_index}, got {int(flat[invalid][0])}."
            )
    return flat


def check_weights(weights: Tensor | None, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """Return weights in `dtype`, or None for None.

    Raises:
        ValueError: If their shape does not fit, or one is negative, infinite or NaN.
    """
    if weights is None:
        return None
    if tuple(weights.shape) != tuple(shape) or weights.dtype == torch.bool:
        raise ValueError(
            f"`{name}` must be numbers of shape {tuple(shape)}, got {weights.dtype} {tuple(weights.shape)}."
        )
    if is_readable(weights):
        valid = torch.isfinite(weights) & (weights >= 0)
        if not bool(valid.all()):
            raise ValueError(f"`{name}` must be finite and at least 0, got {weights.detach()[~valid][0].item()}.")
    return weights.to(dtype)
