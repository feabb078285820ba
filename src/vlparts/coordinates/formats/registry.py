"""Formats as data: how a family of models writes regions as text."""

import datetime
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from ..frames.processed import Processed
from ..frames.rules import FrameRule, Original
from ..grammars.base import Grammar
from ..quantization import Numbers
from ..regions import KINDS

__all__ = ["DEFAULT", "FORMATS", "CoordinateFormat", "as_seen", "get_format", "register_format"]

DEFAULT = "openpangu"
"""Name of the default format."""

_formats: "dict[str, CoordinateFormat]" = {}


@dataclass(frozen=True, kw_only=True)
class CoordinateFormat:
    """How a family of models writes regions.

    Args:
        name: Name of the format: lower case, digits and underscores.
        numbers: Converts between coordinates and codes.
        grammar: Writes and reads the text of codes.
        frame: Rule that returns the [`Frame`] whose pixels the codes measure, for the size of an original image.
        y_first: Kinds of region whose coordinates are in the order y, x.
        source: Where the rule is published: repository and file, or documentation.
        date: Date on which the source was read, as YYYY-MM-DD.
        assumed: What the source does not say, with the value used here, such as "rounding: nearest". Change such
            values with `dataclasses.replace`.

    Raises:
        ValueError: If a value is invalid.
    """

    name: str
    numbers: Numbers
    grammar: Grammar
    frame: FrameRule = field(default_factory=Original)
    y_first: tuple[str, ...] = ()
    source: str = ""
    date: str = ""
    assumed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[a-z0-9_]+", self.name):
            raise ValueError(f"`name` must be a str of lower case letters, digits and underscores, got {self.name!r}.")
        for part, methods in (("numbers", ("to_codes", "to_points", "error_bound")), ("grammar", ("write", "scan"))):
            missing = [name for name in methods if not callable(getattr(getattr(self, part), name, None))]
            if missing:
                raise ValueError(f"`{part}` must have the method {missing[0]}(), got {getattr(self, part)!r}.")
        if not callable(self.frame):
            raise ValueError(f"`frame` must be a rule such as Original(), got {self.frame!r}.")
        for part in ("y_first", "assumed"):
            if isinstance(getattr(self, part), str):
                raise ValueError(f"`{part}` must be a tuple of str, got {getattr(self, part)!r}.")
            object.__setattr__(self, part, tuple(getattr(self, part)))
        for kind in self.y_first:
            if kind not in self.grammar.kinds:
                raise ValueError(f"`y_first` must contain kinds of the grammar, {self.grammar.kinds}, got {kind!r}.")
        if self.date:
            _check_date(self.date)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of region that the format can write, of `KINDS`."""
        return tuple(kind for kind in KINDS if kind in self.grammar.kinds)

    @property
    def separator(self) -> str:
        """The text between two consecutive regions."""
        return self.grammar.separator


def _check_date(date: object) -> None:
    """Raise ValueError unless `date` is a date as YYYY-MM-DD."""
    try:
        if not isinstance(date, str) or len(date) != 10:
            raise ValueError
        datetime.date.fromisoformat(date)
    except ValueError:
        raise ValueError(f"`date` must be a date as YYYY-MM-DD, got {date!r}.") from None


FORMATS: Mapping[str, CoordinateFormat] = MappingProxyType(_formats)
"""The registered formats by name, see [`register_format`]."""


def register_format(format: CoordinateFormat, *, overwrite: bool = False) -> CoordinateFormat:
    """Register a format by its name.

    Args:
        format: The format.
        overwrite: Whether to replace another format with this name.

    Returns:
        The format.

    Raises:
        ValueError: If `format` is not a CoordinateFormat, or the name belongs to a different one.
    """
    if not isinstance(format, CoordinateFormat):
        raise ValueError(f"`format` must be a CoordinateFormat, got {format!r}.")
    if not overwrite and _formats.get(format.name, format) != format:
        raise ValueError(f"Another format has the name {format.name!r}; `overwrite=True` replaces it.")
    _formats[format.name] = format
    return format


def get_format(format: CoordinateFormat | str | None) -> CoordinateFormat:
    """Return a format by its name in `FORMATS`, a format unchanged, or the default, openPangu's, for None.

    Raises:
        ValueError: If the name is unknown, or `format` is of another type.
    """
    if format is None:
        return _formats[DEFAULT]
    if isinstance(format, str) and format in _formats:
        return _formats[format]
    if isinstance(format, CoordinateFormat):
        return format
    raise ValueError(f"`format` must be a CoordinateFormat or one of {sorted(_formats)}, got {format!r}.")


def as_seen(format: "CoordinateFormat | str | None", processor: Any) -> CoordinateFormat:
    """Return a format for images as an image processor gives them to a model.

    Numbers relative to the image are then relative to what the model sees: with a centre crop or padding, the crop or
    the padded image. A processor that only resizes changes nothing, and neither does a format with a frame of its own.
    The name of the format stays, and it is not registered.

    Args:
        format: A format or its name; None for the default.
        processor: An image processor, or a processor that has one, see [`Processed`].

    Raises:
        ValueError: If the format is unknown.
    """
    found = get_format(format)
    return found if found.frame != Original() else replace(found, frame=Processed(processor, relative=True))
