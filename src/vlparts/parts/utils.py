"""Small things that many parts share: presets, Auto classes, the ignore index, a check."""

import operator
from copy import deepcopy
from typing import Any, ClassVar, Self

from transformers.modeling_utils import PreTrainedModel

IGNORE_INDEX = -100
"""Label of a token or an image that no loss counts, as in PyTorch and transformers."""


def add_auto_classes(model: PreTrainedModel, **classes: type[PreTrainedModel]) -> None:
    """Let the configuration of a model that is about to be saved name more classes of the model's own file.

    transformers writes the one Auto class that a model is registered for. With this, `AutoModel` also finds the model
    without its head in the same folder.

    Args:
        model: The model. Nothing happens if it is not registered for an Auto class, since its code is not saved then.
        **classes: Classes by the name of their Auto class.
    """
    if model._auto_class is None:
        return
    module = type(model).__module__.split(".")[-1]
    known = getattr(model.config, "auto_map", None) or {}
    model.config.auto_map = known | {name: f"{module}.{one.__name__}" for name, one in classes.items()}


class NamedPresets:
    """Gives a configuration class `presets` and `from_preset`.

    Attributes:
        named_presets: The fields of each preset that differ from the defaults.
    """

    named_presets: ClassVar[dict[str, dict[str, Any]]] = {}

    @classmethod
    def presets(cls) -> tuple[str, ...]:
        """Names that [`from_preset`] takes."""
        return tuple(cls.named_presets)

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> Self:
        """Build a named configuration, with some fields changed.

        Args:
            name: One of [`presets`].
            **changes: Fields that replace those of the preset.

        Raises:
            ValueError: If there is no such preset.
        """
        if name not in cls.named_presets:
            raise ValueError(f"`name` must be one of {', '.join(cls.named_presets)}, got {name!r}.")
        return cls(**{**deepcopy(cls.named_presets[name]), **changes})


def positive_integer(value: object, name: str) -> int:
    """Return `value` as a Python int.

    Args:
        value: Any integer type; not a bool.
        name: Name of the argument in an error message.

    Raises:
        ValueError: If it is not an integer of at least 1.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or number < 1:
        raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
    return number
