"""Boundaries of segments as host integers, kept beside the tensor that holds them on a device.

Kernels that want lengths on the host would otherwise wait for the device in every layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_NAME = "_vlparts_bounds"


def remember_bounds(cu_seqlens: Tensor, bounds: Sequence[int]) -> Tensor:
    """Hand the values of boundaries over, so that no kernel copies them from the device.

    A copy of the tensor, on another device too, does not know them. What is written into the tensor later makes them
    void, except for tensors made under `torch.inference_mode`, which cannot tell.

    Args:
        cu_seqlens: `(segments + 1,)` cumulative lengths.
        bounds: The same numbers.

    Returns:
        `cu_seqlens` itself.

    Raises:
        ValueError: If there are not as many numbers as boundaries.
    """
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] != len(bounds):
        raise ValueError(
            f"`bounds` must hold one number for each boundary of `cu_seqlens` {tuple(cu_seqlens.shape)}, got "
            f"{len(bounds)}."
        )
    setattr(cu_seqlens, _NAME, (_version(cu_seqlens), tuple(int(bound) for bound in bounds)))
    return cu_seqlens


def read_bounds(cu_seqlens: Tensor) -> Sequence[int]:
    """The boundaries on the host: those remembered, otherwise a copy, which is remembered.

    Args:
        cu_seqlens: `(segments + 1,)` cumulative lengths.
    """
    known = known_bounds(cu_seqlens)
    if known is not None:
        return known
    bounds = tuple(cu_seqlens.tolist())
    if _version(cu_seqlens) is not None:
        setattr(cu_seqlens, _NAME, (_version(cu_seqlens), bounds))
    return bounds


def known_bounds(cu_seqlens: Tensor) -> Sequence[int] | None:
    """The boundaries if they are remembered; never waits, and knows nothing while compiling.

    Args:
        cu_seqlens: `(segments + 1,)` cumulative lengths.
    """
    kept = None if torch.compiler.is_compiling() else getattr(cu_seqlens, _NAME, None)
    return kept[1] if kept is not None and kept[0] == _version(cu_seqlens) else None


def _version(tensor: Tensor) -> int | None:
    """How often the tensor was written; None where nothing counts it."""
    return None if torch.is_inference(tensor) else tensor._version
