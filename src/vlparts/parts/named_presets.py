"""Named configurations, which every part's configuration offers in the same way."""

from copy import deepcopy
from typing import Any, ClassVar, Self


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
