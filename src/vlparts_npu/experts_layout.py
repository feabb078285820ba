"""Memory layout of expert weights for grouped matmuls.

Shapes: `E` experts, `H` width, `I` inner width of an expert, `N = 2 * I` with a gate, else `I`.
"""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import self_check

logger = logging.getLogger(__name__)

WEIGHT_NAMES = ("gate_up_proj", "up_proj", "down_proj")


def arrange_expert_weights(model: nn.Module) -> int:
    """Copy the weights of all experts of a model to the layout of the grouped matmul: contiguous as `(E, in, out)`.

    Shapes, values, names and saved files do not change, only strides. The kernel then reads `(E, N, H)` weights
    through a contiguous transposed view; weights in another layout would be copied in every call, in bfloat16 12.88 GB
    for 256 experts with H = 4096 and I = 2048. Parameters are copied one at a time. Call this after loading, and
    before an optimizer takes the parameters. FSDP gathers weights contiguous in their shapes, so experts under FSDP
    run the reference.

    `vlparts_merged` needs the original layout; after this it copies the first weights in every call.

    Args:
        model: A model with experts modules in transformers' layout, or such a module.

    Returns:
        Bytes copied; 0 if all weights had the layout already.

    Raises:
        ValueError: If a weight is sharded or a view of a larger tensor.
    """
    copied = 0
    for module in model.modules():
        for name, parameter in _weights(module):
            if _is_arranged(module, parameter):
                continue
            if not _can_arrange(parameter):
                raise ValueError(
                    f"`{name}` of {type(module).__name__} is sharded or a view of a larger tensor. Call "
                    "`arrange_expert_weights` before the model is wrapped."
                )
            copied += _arrange(parameter)
    return copied


def arrange_once(module: Any, hidden_states: Tensor) -> None:
    """Copy the weights of an experts module on the NPU to the kernel's layout if they have another, with a warning."""
    if hidden_states.device.type != self_check.DEVICE_TYPE or torch.compiler.is_compiling():
        return
    weights = [(name, x) for name, x in _weights(module) if not _is_arranged(module, x)]
    if weights and all(_can_arrange(x) for _, x in weights):
        copied = sum(_arrange(x) for _, x in weights)
        logger.warning(
            "The weights of %s were copied to the memory layout of `npu_grouped`, %.2f GB. To copy them in advance, "
            "call `vlparts_npu.experts_layout.arrange_expert_weights(model)` after loading.",
            type(module).__name__,
            copied / 1e9,
        )


def _weights(module: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """Weights with three axes of an experts module; none for other modules."""
    named = dict(module.named_parameters(recurse=False))
    if "down_proj" in named and named.keys() & set(WEIGHT_NAMES[:2]):
        yield from ((name, named[name]) for name in WEIGHT_NAMES if name in named and named[name].ndim == 3)


def _is_arranged(module: Any, parameter: Tensor) -> bool:
    """Whether a weight is contiguous as `(E, in, out)`, the shape in `is_transposed` modules; else `(E, out, in)`."""
    matrices = parameter if getattr(module, "is_transposed", False) else parameter.transpose(1, 2)
    return matrices.is_contiguous()


def _can_arrange(parameter: nn.Parameter) -> bool:
    """Whether the parameter is an ordinary tensor that fills its storage."""
    return (
        type(parameter.data) is Tensor
        and not parameter.is_meta
        and parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()
    )


def _arrange(parameter: nn.Parameter) -> int:
    parameter.data = parameter.data.transpose(1, 2).contiguous().transpose(1, 2)
    return parameter.numel() * parameter.element_size()
