"""Reads the weights of transformers' experts modules, for the experts implementations of this package.

Shapes: E experts, H width, I inner width of an expert, N = 2 I with a gate, else I.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class ExpertWeights(NamedTuple):
    """The weights of all experts, each matrix as in `torch.nn.functional.linear`.

    Attributes:
        up: `(E, N, H)`; with a gate, gate and input stacked.
        up_bias: `(E, N)` or None.
        down: `(E, H, I)`.
        down_bias: `(E, H)` or None.
        activate: From `(rows, N)` to `(rows, I)`.
    """

    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    activate: Callable[[Tensor], Tensor]


def get_expert_weights(module: Any, name: str) -> ExpertWeights:
    """Read the weights of an experts module in transformers' layout, transposed or not, with or without biases.

    Args:
        module: A module decorated with `use_experts_implementation`.
        name: Name of the implementation, for the error message.

    Raises:
        ValueError: If the experts have a norm after each expert, which the implementations here do not have, or
            another layout.
    """
    if getattr(module, "has_post_expert_norm", False):
        raise ValueError(
            f"experts_implementation={name!r} has no norm after each expert, which {type(module).__name__} needs; "
            "choose 'eager' or 'grouped_mm'."
        )
    has_gate = getattr(module, "has_gate", True)
    first = "gate_up_proj" if has_gate else "up_proj"
    up: Any = getattr(module, first, None)
    down: Any = getattr(module, "down_proj", None)
    if not all(isinstance(weight, Tensor) and weight.ndim == 3 for weight in (up, down)):
        raise ValueError(
            f"experts_implementation={name!r} takes experts with `{first}` and `down_proj` of three axes, which "
            f"{type(module).__name__} does not have."
        )
    if getattr(module, "is_transposed", False):
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    has_bias = getattr(module, "has_bias", False)
    return ExpertWeights(
        up,
        getattr(module, f"{first}_bias") if has_bias else None,
        down,
        module.down_proj_bias if has_bias else None,
        module._apply_gate if has_gate else module.act_fn,
    )
