"""Grammars of regions between marks, as data: `<ref>cat</ref><box>(1,2),(3,4)</box>` and all that is like it."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..quantization import integer
from ..regions import KINDS
from .base import Coded, DecodeError, Found
from .tagged_reading import scan

__all__ = ["Shape", "TaggedGrammar"]


@dataclass(frozen=True)
class Shape:
    """The text of one kind of region: `open pair (join pair)* close`.

    Args:
        kind: One of `KINDS`.
        pair: Text of a point with `{}` for each of its two numbers, such as "({},{})" or "<loc_{}><loc_{}>".
        join: Text between pairs.
        open: Text before the first pair; a mark that does not belong to the coordinates.
        close: Text after the last pair; a mark as well.
    """

    kind: str
    pair: str = "{},{}"
    join: str = ","
    open: str = ""
    close: str = ""

    def text(self, number: str, points: int) -> str:
        """The text of a region of so many points, each number as `number`."""
        return self.open + self.join.join([self.pair.format(number, number)] * points) + self.close

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {sorted(KINDS)}, got {self.kind!r}")
        for name in ("pair", "join", "open", "close"):
            piece = getattr(self, name)
            if not isinstance(piece, str) or re.search(r"[0-9%]", piece):
                raise ValueError(f"{name} must be a str without digits and '%', got {piece!r}")
            if piece.count("{}") != (2 if name == "pair" else 0):
                raise ValueError(f"pair, and nothing else, must hold '{{}}' twice, got {piece!r} for {name}")
        if "{}{}" in self.pair or not (self.join or self.pair[0] != "{" or self.pair[-1] != "}"):
            raise ValueError(f"text must part the numbers, got pair {self.pair!r} and join {self.join!r}")


@dataclass(frozen=True, kw_only=True)
class TaggedGrammar:
    """A grammar of the form `label group_open region (group_join region)* group_close`, or with the label behind.

    A label is written `label_open label label_close`. Regions in a row with the same label are written as one group
    where `group_join` is not None; the regions of a group share the label in front of it (or behind it). With empty
    `group_open` and `group_close`, a region that follows another with exactly `group_join` in between belongs to the
    same group.

    Args:
        shapes: One for each kind of region. Shapes with the same marks are told apart by their count of numbers; they
            are tried in the order given, so that a longer one must stand before one that it begins with.
        digits: Zero-padded width of a number, which must then have just so many digits (more only where the code
            needs more); None for no padding.
        decimals: A code of 123 with 3 decimals is written 0.123; 0 for plain integers. With `loose`, any number of
            decimals is read and rounded to so many.
        label_place: "before", "after" or "none" (labels cannot be written).
        label_open: Text before a label.
        label_close: Text after a label.
        group_open: Text before the first region of a group.
        group_join: Text between regions of a group; None where each region is a group of its own.
        group_close: Text after the last region of a group.
        separator: Text between groups. It also parts a label without marks from what else is there, as does a line
            break.
        trailing: A token, `{}` for its number, that may follow the coordinates any number of times when reading, and
            is passed over, such as "<seg{}>"; "" for none.
        loose: Whether spaces around punctuation and between the parts are accepted when reading.

    Raises:
        ValueError: For a value outside its range, or pieces that could not be read back.
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
    separator: str = "\n"
    trailing: str = ""
    loose: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "shapes", tuple(self.shapes))
        if not self.shapes or not all(isinstance(shape, Shape) for shape in self.shapes):
            raise ValueError(f"shapes must be a tuple of one Shape or more, got {self.shapes!r}")
        if len(set(self.kinds)) != len(self.shapes):
            raise ValueError(f"shapes must be of different kinds, got {self.kinds}")
        if self.digits is not None and not 1 <= integer(self.digits, "digits") <= 9:
            raise ValueError(f"digits must lie in 1..9 or be None, got {self.digits}")
        if not 0 <= integer(self.decimals, "decimals") <= 6:
            raise ValueError(f"decimals must lie in 0..6, got {self.decimals}")
        if self.decimals and self.digits is not None:
            raise ValueError("digits must be None with decimals")
        if self.label_place not in ("before", "after", "none"):
            raise ValueError(f"label_place must be 'before', 'after' or 'none', got {self.label_place!r}")
        self._check_pieces()

    def _check_pieces(self) -> None:
        for name in ("label_open", "label_close", "group_open", "group_close", "separator", "trailing"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a str, got {getattr(self, name)!r}")
        if self.group_join is not None and not isinstance(self.group_join, str):
            raise ValueError(f"group_join must be a str or None, got {self.group_join!r}")
        if self.trailing and self.trailing.count("{}") != 1:
            raise ValueError(f"trailing must hold '{{}}' once, got {self.trailing!r}")
        for shape in self.shapes:
            opening = self.group_open + shape.open + shape.pair.partition("{}")[0]
            if not re.search(r"[^\w\s]", opening):
                raise ValueError(f"a {shape.kind} must begin with a mark or bracket, got {opening!r}")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of region that can be written."""
        return tuple(shape.kind for shape in self.shapes)

    @property
    def ends_late(self) -> bool:
        """Whether what follows a region directly may belong to it: its label, or more of its numbers."""
        closed = self.group_close or all(shape.close for shape in self.shapes)
        return self.label_place == "after" or not (closed or len(self.shapes) == 1)

    def write(self, regions: Sequence[Coded]) -> str:
        """See [`Grammar`]."""
        templates: dict[tuple[str, int], str] = {}
        shapes = {shape.kind: shape for shape in self.shapes}
        number = f"%0{self.digits}d" if self.digits else f"%d.%0{self.decimals}d" if self.decimals else "%d"
        texts = []
        for region in regions:
            kind, codes = region.kind, region.codes
            template = templates.get((kind, len(codes)))
            if template is None:
                if kind not in shapes:
                    raise ValueError(f"a {kind} cannot be written: the format knows {', '.join(self.kinds)}")
                template = shapes[kind].text(number, len(codes) // 2)
                templates[kind, len(codes)] = template
            if self.decimals:
                codes = [part for code in codes for part in divmod(code, 10**self.decimals)]
            texts.append(template % tuple(codes))
        return self.separator.join(self._groups(regions, texts))

    def _groups(self, regions: Sequence[Coded], texts: Sequence[str]) -> Iterator[str]:
        """Put labels and marks around the texts of regions."""
        before = self.label_place == "before"
        marks = [mark for mark in (self.label_open.strip(), self.label_close.strip()) if mark]
        start = 0
        while start < len(regions):
            _, _, label, image, identity, times = regions[start]
            if image or identity is not None or len(times):
                raise ValueError("the format writes regions of one image, without identities and times")
            if label is not None and self.label_place == "none":
                raise ValueError(f"the format has no place for a label, got {label!r}")
            if label is not None and any(mark in label for mark in marks):
                raise ValueError(f"label {label!r} might be read back as another: marks around labels are {marks}")
            end = start + 1
            while self.group_join is not None and end < len(regions) and regions[end][2:] == regions[start][2:]:
                end += 1
            body = self.group_open + (self.group_join or "").join(texts[start:end]) + self.group_close
            name = "" if label is None else self.label_open + label + self.label_close
            yield name + body if before else body + name
            start = end

    def scan(self, text: str) -> tuple[list[Found], list[DecodeError]]:
        """See [`Grammar`]."""
        return scan(self, text)
