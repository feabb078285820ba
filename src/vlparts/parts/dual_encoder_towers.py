"""Checks, pooling and padding examples of the towers of a dual encoder.

Shapes: B texts, S tokens per text, D width, n examples (images or texts).
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

__all__ = [
    "blank_padding",
    "check_inputs",
    "check_same_weights",
    "example_mask",
    "find_tower",
    "input_names",
    "pool_tokens",
]


def find_tower(model: Any, name: str) -> PreTrainedModel:
    """Return the vision or text tower of a model.

    Args:
        model: A tower, a dual encoder (CLIP, ...), or a tower with a head.
        name: "vision" or "text".

    Raises:
        ValueError: If `model` is not a model.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"`{name}` must be a model or a configuration, got {type(model).__name__}.")
    inner = getattr(model, f"{name}_model", None)
    return inner if isinstance(inner, PreTrainedModel) else model.base_model


def check_same_weights(name: str, tower: PreTrainedModel, rebuilt: PreTrainedModel) -> None:
    """Check that a tower has the state dict keys of the model that its configuration builds.

    Args:
        name: "vision" or "text", for the error message.
        tower: The given tower.
        rebuilt: The model that its configuration builds.

    Raises:
        ValueError: If keys differ, for example by a pooling head; names some of them.
    """
    differing = sorted(tower.state_dict().keys() ^ rebuilt.state_dict().keys())
    if differing:
        raise ValueError(
            f"`{name}` {type(tower).__name__} does not have the weights of the {type(rebuilt).__name__} that its "
            f"configuration builds: {', '.join(differing[:4])}{', ...' if len(differing) > 4 else ''} "
            "are in one of them only."
        )


def input_names(tower: PreTrainedModel) -> dict[str, bool]:
    """Return the arguments of a tower's `forward`, with True for required ones."""
    return {
        name: parameter.default is parameter.empty
        for name, parameter in inspect.signature(tower.forward).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    }


def check_inputs(tower: PreTrainedModel, names: dict[str, bool], given: dict[str, Any], optional: set[str]) -> None:
    """Check that a tower gets the inputs that it needs, and takes the inputs that it gets.

    Args:
        tower: The tower, for the error message.
        names: Result of [`input_names`].
        given: The inputs.
        optional: Names of inputs that only some towers take; inputs with other names are not checked.

    Raises:
        ValueError: If an input is missing, or the tower does not take it.
    """
    for name, is_required in names.items():
        if is_required and name not in given:
            raise ValueError(f"`{name}` must be given for the tower {type(tower).__name__}, got None.")
    for name in given:
        if name in optional and name not in names:
            raise ValueError(f"The tower {type(tower).__name__} takes no `{name}`.")


def pool_tokens(hidden_states: Tensor, attention_mask: Tensor | None, pooling: str) -> Tensor:
    """Pool the tokens of each text, with padding on either side.

    Args:
        hidden_states: `(B, S, D)`.
        attention_mask: `(B, S)`, 0 at padding; None without padding.
        pooling: "last" or "first" token that is not padding, or the "mean" of those tokens.

    Returns:
        `(B, D)`; undefined for a text of padding only.

    Raises:
        ValueError: If the mask does not have the shape of the tokens.
    """
    batch, length, _ = hidden_states.shape
    if attention_mask is None:
        attention_mask = hidden_states.new_ones(batch, length)
    if attention_mask.shape != (batch, length):
        raise ValueError(f"`attention_mask` must have shape {(batch, length)}, got {tuple(attention_mask.shape)}.")
    real = attention_mask.to(hidden_states.device).bool()
    if pooling == "mean":
        total = hidden_states.masked_fill(~real.unsqueeze(-1), 0.0).sum(1)
        return total / real.sum(1, keepdim=True).clamp(min=1).to(total.dtype)
    positions = torch.arange(length, device=hidden_states.device).expand(batch, length)
    if pooling == "last":
        chosen = positions.masked_fill(~real, 0).amax(1)
    else:
        chosen = positions.masked_fill(~real, length - 1).amin(1)
    return hidden_states[torch.arange(batch, device=hidden_states.device), chosen]


def example_mask(mask: Tensor | None, inputs: Tensor | None, name: str, examples: int) -> Tensor | None:
    """Return the mask of the examples that are not padding.

    Args:
        mask: `(n,)` bool, or None to derive it from `inputs`.
        inputs: `(n, columns)`, with a row of zeros for each padding example (grids of images, attention mask of
            texts). Tensors that are not matrices mark no padding.
        name: Name of the mask, for the error message.
        examples: n.

    Returns:
        `(n,)` bool, or None without padding.

    Raises:
        ValueError: If the mask has another dtype or shape.
    """
    if mask is None:
        return None if inputs is None or inputs.ndim != 2 else (inputs != 0).any(-1)
    if mask.dtype != torch.bool or mask.shape != (examples,):
        raise ValueError(f"`{name}` must be bool with shape ({examples},), got {mask.dtype} with {tuple(mask.shape)}.")
    return mask


def blank_padding(pooled: Tensor, mask: Tensor | None) -> Tensor:
    """Set the rows of padding examples in `(n, D)` to zero, so that later gradients do not depend on them."""
    return pooled if mask is None else pooled.masked_fill(~mask.to(pooled.device).unsqueeze(-1), 0.0)
