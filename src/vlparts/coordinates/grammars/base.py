"""The interface of coordinate grammars: regions whose coordinates are integer codes."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from ..json_values import NO_ATTRIBUTES, QUOTE_LENGTH, Attributes

__all__ = [
    "QUOTE_LENGTH",
    "Coded",
    "DecodeError",
    "Found",
    "Grammar",
    "ReportsLoss",
    "Suspicion",
    "WritesAttributes",
    "check_attributes",
    "check_writable",
]


class Coded(NamedTuple):
    """A region to write.

    Attributes:
        kind: One of `KINDS`.
        codes: Integers in the order of the text: two per point, or as the format's numbers define.
        label: Label of the region, or None.
        image: Index of its image, from 0.
        identity: Number of the object that the region shows, or None.
        times: Seconds, one per point of a track; () for other kinds.
        attributes: What else the text says about the region.
    """

    kind: str
    codes: Sequence[int]
    label: str | None = None
    image: int = 0
    identity: int | None = None
    times: Sequence[float] = ()
    attributes: Attributes = NO_ATTRIBUTES


class Found(NamedTuple):
    """A region that was read. `start` to `end` is the span of its coordinates in the text, without marks.

    `outer` is the span of the whole region: its label and marks, and, for the first and last region under one label,
    the marks around all of them. The other attributes are those of [`Coded`].
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
    attributes: Attributes = NO_ATTRIBUTES


class DecodeError(NamedTuple):
    """A part of a text that cannot be read: its position (an index into the str) and the reason."""

    position: int
    reason: str


class Suspicion(DecodeError):
    """A part of a text that looks like coordinates of a format but is neither a region nor a malformed one."""

    __slots__ = ()


class Grammar(Protocol):
    """Writes and reads the text of regions. A grammar is stateless, so threads can share it."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of region that can be written."""

    @property
    def separator(self) -> str:
        """The text between two consecutive regions."""

    def write(self, regions: Sequence[Coded]) -> str:
        """Return the regions as text, in the order given; "" for none unless the grammar has a text for an empty list.

        Raises:
            ValueError: If the grammar cannot express a region: its kind, label, image, identity or times.
        """

    def scan(self, text: str) -> tuple[list[Found], list[DecodeError]]:
        """Return the regions of any text, and malformed or unfinished ones as errors, each in the order of the text.

        Never raises; takes time linear in the length of the text. Codes are nonnegative integers of at most 9 digits
        (longer numbers are errors); they are not compared with the range of the format.
        """


@runtime_checkable
class ReportsLoss(Protocol):
    """A grammar whose regions can come with text that a [`Found`] does not contain, such as a mask."""

    def lost(self, text: str, target: Grammar) -> list[DecodeError]:
        """Return each part of a text that is lost when `target` writes its regions, in the order of the text."""


@runtime_checkable
class WritesAttributes(Protocol):
    """A grammar that can write the attributes of regions."""

    @property
    def own_keys(self) -> tuple[str, ...]:
        """The names that an attribute cannot have, since the grammar uses them itself."""


def check_writable(region: Coded, kinds: Sequence[str], own_keys: Sequence[str] | None = None) -> None:
    """Raise ValueError if a region has another kind than `kinds`, an image index, identity or times, or attributes.

    With `own_keys`, attributes are allowed, see [`check_attributes`].
    """
    if region.kind not in kinds:
        raise ValueError(f"A {region.kind} cannot be written: the format has {', '.join(kinds)}.")
    if region.image or region.identity is not None or len(region.times):
        raise ValueError("The format writes regions of one image, without identities and times.")
    check_attributes(region, own_keys)


def check_attributes(region: Coded, own_keys: Sequence[str] | None = None) -> None:
    """Raise ValueError if a region has an attribute whose name is in `own_keys`, or any if that is None."""
    for name in region.attributes:
        if own_keys is None:
            raise ValueError(f"Attribute {name!r} cannot be written: the format has no place for attributes.")
        if name in own_keys:
            raise ValueError(f"Attribute {name!r} cannot be written: the format uses this name itself.")
