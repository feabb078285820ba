"""What a model of two towers asks of each of them."""

import inspect
from typing import Any

from transformers.modeling_utils import PreTrainedModel

__all__ = ["check_inputs", "check_same_weights", "find_tower", "input_names"]


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
