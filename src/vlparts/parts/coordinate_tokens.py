"""The tokens of coordinates: ids, vocabularies of location tokens, marker tokens of regions."""

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["LOCATION_STYLES", "MARKER_NAMES", "CoordinateTokenIds", "LocationTokens", "location_tokens_from"]

MARKER_NAMES: tuple[str, ...] = ("box_start", "box_end", "point_start", "point_end", "label_start", "label_end")
"""Roles of marker tokens; a `_start` and its `_end` are given together."""


@dataclass(frozen=True)
class LocationTokens:
    """A vocabulary of added tokens, one per code, instead of digits.

    Args:
        template: Text of a token, with one replacement field for the code, for example `"<loc{:04d}>"`.
        levels: Number of tokens; codes are 0 to `levels - 1`.
        per_point: 2 if a point is written as two tokens, one per axis; 1 if a token is a cell of a square grid of
            `levels` cells, row by row.

    Raises:
        ValueError: If the template does not give `levels` distinct texts, or a number is out of range.
    """

    template: str
    levels: int = 1000
    per_point: int = 2

    def __post_init__(self) -> None:
        if isinstance(self.levels, bool) or not isinstance(self.levels, int) or self.levels < 2:
            raise ValueError(f"`levels` must be an integer of at least 2, got {self.levels!r}.")
        if self.per_point not in (1, 2):
            raise ValueError(f"`per_point` must be 1 or 2, got {self.per_point!r}.")
        if self.per_point == 1 and round(self.levels**0.5) ** 2 != self.levels:
            raise ValueError(f"`levels` must be a square number if `per_point` is 1, got {self.levels}.")
        try:
            texts = self.texts()
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"`template` must have one field for an integer, got {self.template!r}.") from error
        if len(set(texts)) != self.levels or any(text != text.strip() or not text for text in texts):
            raise ValueError(f"`template` must give a distinct text for each code, got {self.template!r}.")

    def texts(self) -> list[str]:
        """Return the texts of the tokens, indexed by code."""
        return [self.template.format(code) for code in range(self.levels)]


LOCATION_STYLES: dict[str, LocationTokens] = {
    "rex": LocationTokens("<{}>"),
    "padded": LocationTokens("<loc_{:03d}>"),
    "florence": LocationTokens("<loc_{}>"),
    "paligemma": LocationTokens("<loc{:04d}>", levels=1024),
    "kosmos": LocationTokens("<patch_index_{:04d}>", levels=1024, per_point=1),
}
"""Vocabularies of published models: Rex-Omni, Florence-2, PaliGemma (y before x), Kosmos-2 (32 x 32 cells)."""


def location_tokens_from(value: object) -> LocationTokens | None:
    """Return the vocabulary that a style's name, a dictionary of fields or a `LocationTokens` describes.

    Raises:
        ValueError: If `value` is none of these.
    """
    if value is None or isinstance(value, LocationTokens):
        return value
    if isinstance(value, str) and value in LOCATION_STYLES:
        return LOCATION_STYLES[value]
    if isinstance(value, Mapping) and "template" in value and set(value) <= {"template", "levels", "per_point"}:
        return LocationTokens(**value)
    raise ValueError(
        f"`location_tokens` must be None, one of {sorted(LOCATION_STYLES)} or a LocationTokens, got {value!r}."
    )


@dataclass(frozen=True)
class CoordinateTokenIds:
    """Ids of the tokens of coordinates.

    Args:
        digits: Ids of the ten digits, 0 first.
        opening: Id of "(".
        comma: Id of ",", inside a pair and between two pairs.
        closing: Id of ")".
        width: Digits of a code.
        locations: Ids of the location tokens, indexed by code; empty if codes are digits.
        per_point: Number of location tokens per point.
        markers: Ids of the marker tokens, by names of `MARKER_NAMES`.
    """

    digits: tuple[int, ...]
    opening: int
    comma: int
    closing: int
    width: int = 3
    locations: tuple[int, ...] = ()
    per_point: int = 2
    markers: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.digits) != 10:
            raise ValueError(f"`digits` must hold ten ids, got {len(self.digits)}.")
        if not 1 <= self.width <= 9:
            raise ValueError(f"`width` must lie in 1..9, got {self.width}.")
        if self.per_point not in (1, 2):
            raise ValueError(f"`per_point` must be 1 or 2, got {self.per_point!r}.")
        unknown = sorted(set(self.markers) - set(MARKER_NAMES))
        if unknown:
            raise ValueError(f"`markers` has the unknown names {unknown}; known are {list(MARKER_NAMES)}.")
        ids = [*self.digits, self.opening, self.comma, self.closing, *self.locations, *self.markers.values()]
        if len(set(ids)) != len(ids) or min(ids) < 0:
            wrong = sorted({one for one in ids if one < 0 or ids.count(one) > 1})
            raise ValueError(f"All ids must be distinct and not negative, got {wrong[:5]}.")
