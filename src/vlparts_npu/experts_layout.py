"""The order in which expert weights stand in memory, for grouped products.

Shapes: E experts, H width, I inner width of an expert, N = 2 I with a gate, else I.
"""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import self_check

logger = logging.getLogger(__name__)

WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")


def arrange_expert_weights(model: nn.Module) -> int:
    """Let the weights of all experts in a model stand as the grouped product reads them, row by row of `(E, in, out)`.

    Shapes, values, names and what is saved stay as they are; only strides change. So the products read `(E, N, H)`
    weights through a transposed view that is contiguous, where others would be copied in every call, 12.88 GB for a
    layer of real size. Each parameter is copied once, one at a time, while none is in use: call it after loading and
    before parameters are given to an optimizer. FSDP gathers weights in the order of their shapes again: experts
    under it run the reference.

    `vlparts_merged` reads the other order: after this it copies the first weights in every call.

    Args:
        model: A model with experts modules of transformers' layout, or such a module.

    Returns:
        Bytes that were copied; 0 if all stood so already.

    Raises:
        ValueError: If a weight is a part of a larger tensor, or not an ordinary tensor (sharded).
    """
    copied = 0
    for module in model.modules():
        for name, parameter in _weights(module):
            if _stands_right(module, parameter):
                continue
            if not _can_arrange(parameter):
                raise ValueError(
                    f"`{name}` of {type(module).__name__} is sharded or a part of a larger tensor; arrange the expert "
                    "weights before they are wrapped."
                )
            copied += _arrange(parameter)
    return copied


def arrange_once(module: Any, hidden_states: Tensor) -> None:
    """Arrange the weights of an experts module on the NPU where they stand otherwise, with a warning."""
    if hidden_states.device.type != self_check.DEVICE_TYPE or torch.compiler.is_compiling():
        return
    weights = [(name, x) for name, x in _weights(module) if not _stands_right(module, x)]
    if weights and all(_can_arrange(x) for _, x in weights):
        copied = sum(_arrange(x) for _, x in weights)
        logger.warning(
            "The weights of %s were copied once into the order that npu_grouped reads, %.2f GB. "
            "vlparts_npu.experts_layout.arrange_expert_weights(model), called after loading, does so beforehand.",
            type(module).__name__,
            copied / 1e9,
        )


def _weights(module: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """Weights of three axes of an experts module; none for other modules."""
    named = dict(module.named_parameters(recurse=False))
    if "down_proj" in named and named.keys() & set(WEIGHTS[:2]):
        yield from ((name, named[name]) for name in WEIGHTS if name in named and named[name].ndim == 3)


def _stands_right(module: Any, parameter: Tensor) -> bool:
    """Whether `(E, in, out)` is contiguous; `is_transposed` modules hold that shape, others `(E, out, in)`."""
    wanted = parameter if getattr(module, "is_transposed", False) else parameter.transpose(1, 2)
    return wanted.is_contiguous()


def _can_arrange(parameter: nn.Parameter) -> bool:
    """Whether nobody else looks at the parameter's memory, as far as can be seen."""
    return (
        type(parameter.data) is Tensor
        and not parameter.is_meta
        and parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()
    )


def _arrange(parameter: nn.Parameter) -> int:
    parameter.data = parameter.data.transpose(1, 2).contiguous().transpose(1, 2)
    return parameter.numel() * parameter.element_size()
