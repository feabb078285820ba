"""The fields of tagged grammars: the text of each kind of region, and the text around labels and groups."""

import re
from dataclasses import dataclass, replace
from typing import Self

from ..regions import KINDS
from ..validation import integer

__all__ = ["Shape", "TaggedFields"]


@dataclass(frozen=True)
class Shape:
    """The text of one kind of region: `open pair (join pair)* close`.

    Args:
        kind: One of `KINDS`.
        pair: Text of a point with `{}` for each of its two numbers, such as "({},{})" or "<loc_{}><loc_{}>".
        join: Text between pairs.
        open: Mark before the first pair. It is not part of the coordinates.
        close: Mark after the last pair. It is not part of the coordinates.
    """

    kind: str
    pair: str = "{},{}"
    join: str = ","
    open: str = ""
    close: str = ""

    def text(self, number: str, points: int) -> str:
        """The text of a region with this number of points, with `number` as every number."""
        return self.open + self.join.join([self.pair.format(number, number)] * points) + self.close

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"`kind` must be one of {sorted(KINDS)}, got {self.kind!r}.")
        for name in ("pair", "join", "open", "close"):
            piece = getattr(self, name)
            if not isinstance(piece, str) or re.search(r"[0-9%]", piece):
                raise ValueError(f"`{name}` must be a str without digits and '%', got {piece!r}.")
            slots = 2 if name == "pair" else 0
            if piece.count("{}") != slots:
                raise ValueError(f"`{name}` must contain '{{}}' {slots} times, got {piece!r}.")
        if "{}{}" in self.pair or not (self.join or self.pair[0] != "{" or self.pair[-1] != "}"):
            raise ValueError(f"`pair` and `join` must separate the numbers, got {self.pair!r} and {self.join!r}.")


@dataclass(frozen=True, kw_only=True)
class TaggedFields:
    """The validated fields of a [`TaggedGrammar`].

    Args:
        shapes: The texts of each kind of region. Shapes with the same marks are distinguished by their count of
            numbers. They are tried in the order given, so a longer shape must come before one that it begins with. Of
            several shapes of one kind, all are read and the first is written.
        digits: Zero-padded width of a number. When reading, a number must have exactly this many digits (more only
            where the code needs more). None for no padding.
        decimals: A code of 123 with 3 decimals is written 0.123; 0 for plain integers. With `loose`, numbers with any
            count of decimals are read and rounded.
        label_place: "before", "after" or "none" (labels cannot be written).
        label_open: Text before a label.
        label_close: Text after a label.
        group_open: Text before the first region of a group.
        group_join: Text between regions of a group; None if each region is a group of its own.
        group_close: Text after the last region of a group.
        other_groups: Further pairs of texts that are read as `group_open` and `group_close`. The first is written.
        empty: Text between the marks of a group that has no region, such as "None"; read, not written. It is neither a
            region nor an error. "" for no such text.
        separator: Text between groups. It also ends the text that a label without marks can extend to, as does a line
            break.
        trailing: A token, with `{}` for its number, that may follow the coordinates any number of times and is
            ignored when reading, such as "<seg{}>"; "" for none.
        loose: Whether spaces around punctuation and between the parts are accepted when reading.

    Raises:
        ValueError: If a value is outside its range, or the text could not be read back.
    """

    shapes: tuple[Shape, ...]
    digits: int | None = None
    decimals: int = 0
    label_place: str = "before"
    label_open: str = ""
    label_close: str = ""
    group_open: str = ""
    group_join: str | None = None
    group_close: str = ""
    other_groups: tuple[tuple[str, str], ...] = ()
    empty: str = ""
    separator: str = "\n"
    trailing: str = ""
    loose: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "shapes", tuple(self.shapes))
        if not self.shapes or not all(isinstance(shape, Shape) for shape in self.shapes):
            raise ValueError(f"`shapes` must be a tuple of one or more Shape, got {self.shapes!r}.")
        if len(set(self.shapes)) != len(self.shapes):
            raise ValueError(f"`shapes` must be different, got {self.shapes!r}.")
        if self.digits is not None and not 1 <= integer(self.digits, "digits") <= 9:
            raise ValueError(f"`digits` must be in 1..9 or None, got {self.digits}.")
        if not 0 <= integer(self.decimals, "decimals") <= 6:
            raise ValueError(f"`decimals` must be in 0..6, got {self.decimals}.")
        if self.decimals and self.digits is not None:
            raise ValueError(f"`digits` must be None if `decimals` is not 0, got {self.digits}.")
        if self.label_place not in ("before", "after", "none"):
            raise ValueError(f"`label_place` must be 'before', 'after' or 'none', got {self.label_place!r}.")
        self._check_text()

    def _check_text(self) -> None:
        for name in ("label_open", "label_close", "group_open", "group_close", "empty", "separator", "trailing"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"`{name}` must be a str, got {getattr(self, name)!r}.")
        if self.group_join is not None and not isinstance(self.group_join, str):
            raise ValueError(f"`group_join` must be a str or None, got {self.group_join!r}.")
        if self.trailing and self.trailing.count("{}") != 1:
            raise ValueError(f"`trailing` must contain '{{}}' once, got {self.trailing!r}.")
        if self.empty and not (self.group_open and self.group_close):
            raise ValueError(f"`empty` must be '' without `group_open` and `group_close`, got {self.empty!r}.")
        object.__setattr__(self, "other_groups", tuple(tuple(pair) for pair in self.other_groups))
        if not all(len(pair) == 2 and all(isinstance(mark, str) for mark in pair) for pair in self.other_groups):
            raise ValueError(f"`other_groups` must be pairs of str, got {self.other_groups!r}.")
        for fields in self.readings():
            for shape in self.shapes:
                if not re.search(r"[^\w\s]", fields.opening(shape)):
                    raise ValueError(
                        f"A {shape.kind} must begin with a mark or bracket, got {fields.opening(shape)!r}."
                    )

    def readings(self) -> list[Self]:
        """These fields, and those with each of `other_groups` as the marks of groups."""
        return [
            self,
            *(
                replace(self, group_open=opening, group_close=closing, other_groups=())
                for opening, closing in self.other_groups
            ),
        ]

    def opening(self, shape: Shape) -> str:
        """The text before the first number of a group that begins with this shape."""
        return self.group_open + shape.open + shape.pair.partition("{}")[0]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of region that can be written."""
        return tuple(dict.fromkeys(shape.kind for shape in self.shapes))

    @property
    def ends_late(self) -> bool:
        """Whether the text directly after a region may belong to it: its label, or more of its numbers."""
        closed = self.group_close or all(shape.close for shape in self.shapes)
        return self.label_place == "after" or not (closed or len(self.shapes) == 1)

    @property
    def can_nest(self) -> bool:
        """Whether a bracket after a region, or after spaces, makes it malformed: "[1, 2, 3, 4]]"."""
        closings = (
            (shape.pair.rpartition("{}")[2] + shape.close + self.group_close).rstrip() for shape in self.shapes
        )
        return any(closing.endswith((")", "]")) for closing in closings)
