"""What a model of two towers asks of each of them.

From the tokens of texts to one vector for each, and what padding examples become.

Shapes: B texts, S tokens of a text, D width, n examples (images or texts).
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
    """The tower that a model is or holds.

    Args:
        model: A tower, a model with two towers (CLIP, ...), or a tower with a head.
        name: "vision" or "text".

    Raises:
        ValueError: If it is no model.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"`{name}` must be a model or a configuration, got {type(model).__name__}.")
    inner = getattr(model, f"{name}_model", None)
    return inner if isinstance(inner, PreTrainedModel) else model.base_model


def check_same_weights(name: str, tower: PreTrainedModel, rebuilt: PreTrainedModel) -> None:
    """Compare the names of a tower's weights with those of what loading will build.

    Args:
        name: "vision" or "text", for the error message.
        tower: The tower that is given.
        rebuilt: What its configuration builds.

    Raises:
        ValueError: If they differ, for example by a pooling head; names some that do.
    """
    differing = sorted(tower.state_dict().keys() ^ rebuilt.state_dict().keys())
    if differing:
        raise ValueError(
            f"`{name}` {type(tower).__name__} does not have the weights of the {type(rebuilt).__name__} that its "
            f"configuration builds: {', '.join(differing[:4])}{', ...' if len(differing) > 4 else ''} "
            "stand in one of them only."
        )


def input_names(tower: PreTrainedModel) -> dict[str, bool]:
    """Inputs that a tower's forward names, and whether it needs them."""
    return {
        name: parameter.default is parameter.empty
        for name, parameter in inspect.signature(tower.forward).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    }


def check_inputs(tower: PreTrainedModel, names: dict[str, bool], given: dict[str, Any], optional: set[str]) -> None:
    """Check that a tower gets what it needs and takes what it gets.

    Args:
        tower: The tower, for the error message.
        names: What [`input_names`] returned.
        given: The inputs.
        optional: Names that only some towers take; others pass.

    Raises:
        ValueError: If an input is missing, or the tower does not take it.
    """
    for name, needed in names.items():
        if needed and name not in given:
            raise ValueError(f"`{name}` must be given for the tower {type(tower).__name__}, got None.")
    for name in given:
        if name in optional and name not in names:
            raise ValueError(f"The tower {type(tower).__name__} takes no `{name}`.")


def pool_tokens(hidden_states: Tensor, attention_mask: Tensor | None, pooling: str) -> Tensor:
    """One vector for each text, wherever the padding stands.

    Args:
        hidden_states: `(B, S, D)`.
        attention_mask: `(B, S)`, 0 at padding; None if there is none.
        pooling: "last" or "first" token that is not padding, or the "mean" of those tokens.

    Returns:
        `(B, D)`. What a text of padding alone gives means nothing.

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
    places = torch.arange(length, device=hidden_states.device).expand(batch, length)
    if pooling == "last":
        places = places.masked_fill(~real, 0).amax(1)
    else:
        places = places.masked_fill(~real, length - 1).amin(1)
    return hidden_states[torch.arange(batch, device=hidden_states.device), places]


def example_mask(mask: Tensor | None, inputs: Tensor | None, name: str, examples: int) -> Tensor | None:
    """Which examples are real and which are padding.

    Args:
        mask: `(n,)` bool, or None to look into `inputs`.
        inputs: `(n, anything)`, whose row is zeros for a padding example (the grids of images, the attention mask of
            texts). Anything else than a matrix tells nothing.
        name: Name of the mask, for the error message.
        examples: n.

    Returns:
        `(n,)` bool, or None if all are real.

    Raises:
        ValueError: If the mask has another type or shape.
    """
    if mask is None:
        return None if inputs is None or inputs.ndim != 2 else (inputs != 0).any(-1)
    if mask.dtype != torch.bool or mask.shape != (examples,):
        raise ValueError(f"`{name}` must be bool with shape ({examples},), got {mask.dtype} with {tuple(mask.shape)}.")
    return mask


def blank_padding(pooled: Tensor, mask: Tensor | None) -> Tensor:
    """`(n, D)` with zeros for padding examples, so that nothing of them reaches a gradient further on."""
    return pooled if mask is None else pooled.masked_fill(~mask.to(pooled.device).unsqueeze(-1), 0.0)
