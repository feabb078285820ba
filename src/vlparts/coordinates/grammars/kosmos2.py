"""Kosmos-2's grammar, boxes as two cells of a grid: `<object><patch_index_0044><patch_index_0863></object>`."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
from numpy.typing import NDArray

from .base import QUOTE_LENGTH, Coded, DecodeError, Found, check_writable

__all__ = ["CellNumbers", "KosmosGrammar"]

_TOLERANCE = 1e-6  # in cells: a point this close to an edge is on it
_JOIN = "</delimiter_of_multi_objects/>"
_CELL = re.compile(r"<patch_index_([0-9]++)>")
_OBJECT = re.compile(r"<object>((?:\s*+<patch_index_[0-9]++>|\s*+</delimiter_of_multi_objects/>)*+)\s*+(</object>)?+")
_STRAY = re.compile(r"<(?:patch_ind|delimiter_of|/delimiter_of)[a-z_/]*+[0-9]*+>?+")
_TAIL = re.compile(r"<(?:/?[a-z_]*+[0-9]*+)\Z")
_PHRASE = re.compile(r"<phrase>([^<]++)</phrase>\s*+")
_MARKS = ("<object>", "</object>", "<patch_index_", "</phrase>", _JOIN)


@dataclass(frozen=True)
class CellNumbers:
    """A box as the indices of two cells of a grid of `side` x `side`, counted along rows.

    The first cell contains the upper left corner, the second the lower right one: columns `floor(x1 * n / W)` and
    `ceil(x2 * n / W) - 1`. A box is read with its corners at the centres of the two cells, or, if both are in one row
    or one column, at the outer corners of the cells. Every pair in which the second cell is neither left of nor above
    the first is written again as it was read.

    A box of zero width or height, which the published rule rejects, is written as the cells that contain it.

    Args:
        side: Cells per side.

    Raises:
        ValueError: If `side` is not an integer of at least 2.
    """

    side: int = 32

    def __post_init__(self) -> None:
        if isinstance(self.side, bool) or not isinstance(self.side, int) or self.side < 2:
            raise ValueError(f"`side` must be an integer of at least 2, got {self.side!r}.")

    def to_codes(self, points: NDArray[np.float64], counts: Sequence[int], size: tuple[int, int]) -> list[list[int]]:
        """See [`Numbers`]: two cells per box.

        Raises:
            ValueError: If a region does not have two points.
        """
        if any(count != 2 for count in counts):
            raise ValueError(f"`counts` must be 2 for every region, as cells are those of boxes, got {list(counts)}.")
        scaled = points.reshape(-1, 2, 2) * self.side / np.asarray(size, dtype=np.float64)
        low = np.clip(np.floor(scaled[:, 0] + _TOLERANCE), 0, self.side - 1)
        high = np.maximum(np.clip(np.ceil(scaled[:, 1] - _TOLERANCE) - 1, 0, self.side - 1), low)
        cells = np.stack([low, high], axis=1).astype(np.int64)
        codes: list[list[int]] = (cells[..., 1] * self.side + cells[..., 0]).tolist()
        return codes

    def to_points(self, codes: Sequence[Sequence[int]], size: tuple[int, int]) -> list[list[tuple[float, float]]]:
        """See [`Numbers`].

        Raises:
            ValueError: If a code is out of range, or the second cell is left of or above the first.
        """
        result = []
        for first, second in codes:
            if not (0 <= first < self.side**2 and 0 <= second < self.side**2):
                raise ValueError(f"Code {max(first, second)} is above the largest code {self.side**2 - 1}.")
            y1, x1 = divmod(first, self.side)
            y2, x2 = divmod(second, self.side)
            if x2 < x1 or y2 < y1:
                raise ValueError(f"Cell {second} is left of or above cell {first}.")
            inset = 0.0 if x1 == x2 or y1 == y2 else 0.5
            result.append(
                [
                    ((x1 + inset) * size[0] / self.side, (y1 + inset) * size[1] / self.side),
                    ((x2 + 1 - inset) * size[0] / self.side, (y2 + 1 - inset) * size[1] / self.side),
                ]
            )
        return result

    def error_bound(self, size: tuple[int, int]) -> tuple[float, float]:
        """See [`Numbers`]: a cell for boxes within one row or column, half a cell for others."""
        return size[0] / self.side, size[1] / self.side


@dataclass(frozen=True)
class KosmosGrammar:
    """Kosmos-2's text: phrases with the cells of their boxes.

    Consecutive boxes with the same label make one object. When reading, spaces are accepted between the parts, as its
    processor writes them into prompts, and around a label.

    Args:
        separator: Text between objects.
    """

    separator: str = " "

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of region that can be written."""
        return ("box",)

    def write(self, regions: Sequence[Coded]) -> str:
        """See [`Grammar`]."""
        for region in regions:
            check_writable(region, self.kinds)
        texts = []
        for label, run in groupby(regions, key=lambda region: region.label):
            if label is not None and (not label or "<" in label):
                raise ValueError(f"A label must not be empty or contain '<', which begins a mark, got {label!r}.")
            cells = _JOIN.join("".join(f"<patch_index_{code:04d}>" for code in region.codes) for region in run)
            name = "" if label is None else f"<phrase>{label}</phrase>"
            texts.append(f"{name}<object>{cells}</object>")
        return self.separator.join(texts)

    def scan(self, text: str) -> tuple[list[Found], list[DecodeError]]:
        """See [`Grammar`]."""
        found: list[Found] = []
        errors: list[DecodeError] = []
        end = 0
        for match in _OBJECT.finditer(text):
            errors += _stray(text, end, match.start())
            reason = _read_object(text, end, match, found)
            if reason:
                errors.append(DecodeError(match.start(), f"{reason} in {match[0][:QUOTE_LENGTH]!r}"))
            end = len(text) if reason and reason.startswith("unfinished") else match.end()
        errors += _stray(text, end, len(text))
        return found, errors


def _stray(text: str, start: int, end: int) -> Iterator[DecodeError]:
    """Yield errors for cells outside of objects, and for a mark that is cut off at the end of the text."""
    for match in _STRAY.finditer(text, start, end):
        yield DecodeError(match.start(), f"malformed object: {match[0][:QUOTE_LENGTH]!r} without <object> before it")
    if end == len(text):
        tail = _TAIL.search(text, max(start, end - len(_JOIN)), end)
        if tail and any(mark.startswith(tail[0]) for mark in _MARKS) and not _STRAY.match(text, tail.start()):
            yield DecodeError(tail.start(), f"unfinished mark {tail[0]!r}")


def _read_object(text: str, before: int, match: re.Match[str], found: list[Found]) -> str | None:
    """Add the boxes of an object to `found`; returns the reason if it has none."""
    if not match[2]:
        rest = text[match.end() : match.end() + len(_JOIN)]
        cut = match.end() + len(rest) == len(text) and (not rest or rest[0] == "<" and ">" not in rest)
        return "unfinished object: no </object>" if cut else "malformed object: expected cells and </object>"
    start, end = match.span(1)
    pieces = [start, *(at.start() for at in re.finditer(_JOIN, text[start:end])), end]
    pieces[1:-1] = [start + at for at in pieces[1:-1]]
    boxes = []
    for first, last in pairwise(pieces):
        cells = list(_CELL.finditer(text, first, last))
        if len(cells) != 2:
            return f"malformed object: a box has two cells, got {len(cells)}"
        if max(len(cell[1]) for cell in cells) > 9:
            return "malformed object: a number has more than 9 digits"
        boxes.append(cells)
    label, outer = None, match.start()
    opened = text.rfind("<phrase>", before, match.start())
    closed = _PHRASE.fullmatch(text, opened, match.start()) if opened >= 0 else None
    if closed:
        label, outer = closed[1].strip() or None, opened
    for index, cells in enumerate(boxes):
        span = (cells[0].start(), cells[1].end())
        whole = (outer if index == 0 else span[0], match.end() if index + 1 == len(boxes) else span[1])
        found.append(Found(*span, whole, "box", [int(cell[1]) for cell in cells], label))
    return None
