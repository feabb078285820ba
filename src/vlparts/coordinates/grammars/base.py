"""What a grammar of coordinate text takes and gives: regions whose coordinates are integer codes."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

__all__ = ["Coded", "DecodeError", "Found", "Grammar"]


class Coded(NamedTuple):
    """A region to write.

    Attributes:
        kind: One of `KINDS`.
        codes: Integers in the order of the text: two for each point (or what the format's numbers make of a region).
        label: Text of the region, or None.
        image: Index of its image, from 0.
        identity: Number of the object that the region shows, or None.
        times: Seconds, one for each point of a track; () for other kinds.
    """

    kind: str
    codes: Sequence[int]
    label: str | None = None
    image: int = 0
    identity: int | None = None
    times: Sequence[float] = ()


class Found(NamedTuple):
    """A region that was read: `start` to `end` are its coordinates in the text, the marks around them not included.

    The other attributes are those of [`Coded`]. `outer` is the span of all that belongs to it: its label, marks and,
    for the first and last of several under one label, the marks around them all.
    """

    start: int
    end: int
    outer: tuple[int, int]
    kind: str
    codes: Sequence[int]
    label: str | None = None
    image: int = 0
    identity: int | None = None
    times: Sequence[float] = ()


class DecodeError(NamedTuple):
    """One thing in a text that could not be read: its position (an index into the str) and the reason."""

    position: int
    reason: str


class Grammar(Protocol):
    """Writes and reads the text of regions. A grammar holds no state: one object serves all threads."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of region that can be written."""

    @property
    def separator(self) -> str:
        """What stands between two texts of regions that follow each other."""

    def write(self, regions: Sequence[Coded]) -> str:
        """The regions as text, in the order given; "" for none where the grammar has no text for an empty list.

        Raises:
            ValueError: If a region holds something that the grammar cannot say (its kind, a label, an image other than
                the first, an identity).
        """

    def scan(self, text: str) -> tuple[list[Found], list[DecodeError]]:
        """All regions of any text, and all that was meant as one and is none, each in order of the text.

        Never raises; takes time linear in the text. Codes are nonnegative integers of at most 9 digits (longer numbers
        are errors), and are not compared with the range of the format.
        """
