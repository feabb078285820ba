"""Further Auto classes of a checkpoint, beside the one that transformers writes.

Named configurations, which every part's configuration offers in the same way.
"""

from copy import deepcopy
from typing import Any, ClassVar, Self

from transformers.modeling_utils import PreTrainedModel


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
