"""A format: how a family of models writes regions of an image as text, as data."""

import datetime
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ..frames.rules import FrameRule, Original
from ..grammars.base import Grammar
from ..quantization import Numbers
from ..regions import KINDS

__all__ = ["DEFAULT", "FORMATS", "CoordinateFormat", "get_format", "register_format"]

DEFAULT = "openpangu"
"""Name of the format that is used where none is named."""

_formats: "dict[str, CoordinateFormat]" = {}


@dataclass(frozen=True, kw_only=True)
class CoordinateFormat:
    """How a family of models writes regions.

    Args:
        name: Name of the format: lower case, digits and underscores.
        numbers: The codes of coordinates.
        grammar: The text around them.
        frame: The image that the numbers measure, from the size of the original image (see [`frames`]).
        y_first: Kinds of region whose coordinates stand in the order y, x.
        source: Where the rule is published: repository and file, or documentation.
        date: When it was read there, as YYYY-MM-DD.
        assumed: Names of what the source does not say, each with what was taken here, such as
            "rounding: nearest". These are parameters: change them with `dataclasses.replace`.

    Raises:
        ValueError: For a name, kind or date that cannot be, or a part that is none.
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
            raise ValueError(f"name must be a str of lower case letters, digits and underscores, got {self.name!r}")
        for part, methods in (("numbers", ("to_codes", "to_points", "error_bound")), ("grammar", ("write", "scan"))):
            missing = [name for name in methods if not callable(getattr(getattr(self, part), name, None))]
            if missing:
                raise ValueError(f"{part} must have the method {missing[0]}(), got {getattr(self, part)!r}")
        if not callable(self.frame):
            raise ValueError(f"frame must be a rule such as Original(), got {self.frame!r}")
        for part in ("y_first", "assumed"):
            if isinstance(getattr(self, part), str):
                raise ValueError(f"{part} must be a tuple of str, got {getattr(self, part)!r}")
            object.__setattr__(self, part, tuple(getattr(self, part)))
        for kind in self.y_first:
            if kind not in self.grammar.kinds:
                raise ValueError(f"y_first must hold kinds of the grammar, {self.grammar.kinds}, got {kind!r}")
        if self.date:
            _check_date(self.date)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of region that the format can write, of `KINDS`."""
        return tuple(kind for kind in KINDS if kind in self.grammar.kinds)

    @property
    def separator(self) -> str:
        """What stands between two texts of regions that follow each other."""
        return self.grammar.separator


def _check_date(date: object) -> None:
    """Raise ValueError unless `date` is a day as YYYY-MM-DD."""
    try:
        if not isinstance(date, str) or len(date) != 10:
            raise ValueError
        datetime.date.fromisoformat(date)
    except ValueError:
        raise ValueError(f"date must be a day as YYYY-MM-DD, got {date!r}") from None


FORMATS: Mapping[str, CoordinateFormat] = MappingProxyType(_formats)
"""The formats by name; grows with [`register_format`]."""


def register_format(format: CoordinateFormat, *, overwrite: bool = False) -> CoordinateFormat:
    """Make a format known by its name.

    Args:
        format: The format.
        overwrite: Whether it may take the place of another of that name.

    Returns:
        The format.

    Raises:
        ValueError: If `format` is no CoordinateFormat, or the name is taken by a different one.
    """
    if not isinstance(format, CoordinateFormat):
        raise ValueError(f"format must be a CoordinateFormat, got {format!r}")
    if not overwrite and _formats.get(format.name, format) != format:
        raise ValueError(f"the name {format.name!r} is taken by another format; overwrite=True replaces it")
    _formats[format.name] = format
    return format


def get_format(format: CoordinateFormat | str | None) -> CoordinateFormat:
    """Return a format from itself, from its name in `FORMATS`, or the default, openPangu's, for None.

    Raises:
        ValueError: For an unknown name or another type.
    """
    if format is None:
        return _formats[DEFAULT]
    if isinstance(format, str) and format in _formats:
        return _formats[format]
    if isinstance(format, CoordinateFormat):
        return format
    raise ValueError(f"format must be a CoordinateFormat or one of {sorted(_formats)}, got {format!r}")
