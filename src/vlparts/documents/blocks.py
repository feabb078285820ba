"""Answers of document models: text with marks of blocks, such as DeepSeek-OCR's, to blocks and back.

A mark is `<|ref|>type<|/ref|><|det|>[[x1, y1, x2, y2], ...]<|/det|>`; the text of a block follows its mark.
"""

import re
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from typing import Any

from ..coordinates import decode, encode
from ..coordinates.regions import Region

__all__ = ["Block", "Cell", "PageText", "parse_page", "table_cells", "write_page"]

FORMAT = "deepseek_ocr"
# A mark ends at the next "<|" that does not belong to it, so that a damaged one does not take in the next.
_TEXT = r"((?:[^<]|<(?!\|))*)"
_MARK = re.compile(rf"<\|ref\|>{_TEXT}<\|/ref\|><\|det\|>{_TEXT}<\|/det\|>")
# What a damaged mark leaves: from its first token to the end of the line.
_STRAY = re.compile(r"<\|/?(?:ref|det)\|>[^\n]*")


@dataclass(frozen=True)
class Block:
    """A part of a page.

    Attributes:
        type: What the model calls it, such as "title", "text", "table" or "image"; None for text before the first
            mark.
        regions: Its boxes, in pixels of the page; several if it is divided, none without a mark.
        text: Its text, unchanged, with the line breaks around it.
        position: Index of its first character, that of the mark if it has one, in the answer.
    """

    type: str | None
    regions: tuple[Region, ...]
    text: str
    position: int


@dataclass(frozen=True)
class PageText:
    """The answer for a page, divided into blocks.

    Attributes:
        blocks: In the order of the answer. Without their marks, their texts are the answer.
        errors: Positions in the answer and reasons of marks that are damaged. Such a mark stays in the text of its
            block.
        answer: The answer, unchanged.
    """

    blocks: tuple[Block, ...]
    errors: tuple[tuple[int, str], ...]
    answer: str


def parse_page(answer: str, page_size: tuple[int, int]) -> PageText:
    """Divide the answer for a page into blocks. Text is never evaluated or changed.

    Args:
        answer: The model's answer, with its special tokens except the one that ends it.
        page_size: Width and height of the page in pixels.

    Raises:
        ValueError: If the answer is not a str or the size is not two positive integers.
    """
    decoded = decode(answer, page_size, FORMAT, on_error="collect")
    starts = [first for first, _ in decoded.spans]
    damaged = [error.position for error in decoded.errors]
    marks = []
    for mark in _MARK.finditer(answer):
        inside = slice(*(bisect_left(starts, place) for place in mark.span()))
        if decoded.regions[inside] and not _any_between(damaged, *mark.span()):
            marks.append((mark.start(), mark.end(), mark[1], decoded.regions[inside]))
    if not marks or marks[0][0] > 0:
        marks.insert(0, (0, 0, None, ()))
    ends = [start for start, *_ in marks[1:]] + [len(answer)]
    blocks = []
    errors = [(error.position, error.reason) for error in decoded.errors]
    for (position, start, kind, regions), end in zip(marks, ends, strict=True):
        blocks.append(Block(kind, regions, answer[start:end], position))
        for stray in _STRAY.finditer(answer, start, end):
            if not _any_between(damaged, *stray.span()):
                errors.append((stray.start(), f"damaged mark {stray[0][:80]!r}"))
    return PageText(tuple(blocks), tuple(sorted(errors)), answer)


def _any_between(places: list[int], start: int, end: int) -> bool:
    """Whether one of the ascending places is at least `start` and less than `end`."""
    return bisect_left(places, start) < bisect_left(places, end)


def write_page(blocks: Iterable[Block], page_size: tuple[int, int], *, on_outside: str = "raise") -> str:
    """Write blocks as the answer for a page; [`parse_page`] reads them back.

    Text is written unchanged, so its line breaks are those of the answer. Boxes become codes from 0 to 999.

    Args:
        blocks: The blocks. Their positions are not used. Only the first may be without a mark (type None, no boxes).
        page_size: Width and height of the page in pixels.
        on_outside: What to do with a box that leaves the page: "raise"; "clamp" it to the edges; or "skip" it, and the
            block with its text if none of its boxes is left.

    Raises:
        ValueError: If a box leaves the page under "raise", or a block would be read back as another one, as with marks
            in its text; names the block by its index.
    """
    written: dict[int, Block] = {}
    parts: list[str] = []
    for index, block in enumerate(blocks):
        try:
            part = _write_block(block, page_size, on_outside)
        except ValueError as error:
            raise ValueError(f"`blocks[{index}]`: {error}") from None
        if part:
            written[index] = block
            parts.append(part)
    answer = "".join(parts)
    read = iter(parse_page(answer, page_size).blocks if answer else ())
    for index, block in written.items():
        found = next(read, None)
        if found is None or (found.type, found.text) != (block.type, block.text):
            raise ValueError(
                f"`blocks[{index}]` of type {block.type!r:.80} and text {block.text!r:.80} would not be read back; "
                "types and texts must have no marks, and all blocks but the first a type."
            )
    return answer


def _write_block(block: Block, page_size: tuple[int, int], on_outside: str) -> str:
    """The mark and the text of a block; empty if all of its boxes are skipped."""
    if (block.type is None) != (not block.regions):
        raise ValueError(f"Expected a type and boxes, or neither, got {block.type!r} and {len(block.regions)} boxes.")
    regions = [replace(region, label=block.type) for region in block.regions]
    mark = encode(regions, page_size, FORMAT, on_outside=on_outside)
    return mark + block.text if mark or not regions else ""


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        row: Index of its first row.
        column: Index of its first column.
        row_span: Number of its rows.
        column_span: Number of its columns.
        text: Its text, without markup.
    """

    row: int
    column: int
    row_span: int
    column_span: int
    text: str


def table_cells(text: str) -> list[list[Cell]]:
    """Read the cells of all HTML tables in a text, cell by cell; spans keep later cells in their columns.

    Args:
        text: Any text, such as that of a block.

    Returns:
        The cells of each table, in the order of the text. Cells that are not closed end where the next one starts.
    """
    reader = _TableReader()
    reader.feed(text)
    reader.close()
    reader.finish()
    return reader.tables


class _TableReader(HTMLParser):
    """Collect cells; a cell takes the first column of its row that no span covers."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tables: list[list[Cell]] = []
        self._taken: set[tuple[int, int]] = set()
        self._row = -1
        self._open: tuple[int, int] | None = None
        self._text: list[str] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.finish()
            self.tables.append([])
            self._taken, self._row, self._inside = set(), -1, True
        elif tag == "tr" and self._inside:
            self._close_cell()
            self._row += 1
        elif tag in ("td", "th") and self._inside:
            self._close_cell()
            self._row = max(self._row, 0)
            spans = dict(attrs)
            self._open = (_span(spans.get("rowspan")), _span(spans.get("colspan")))
        elif tag == "br" and self._open is not None:
            self._text.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th", "tr"):
            self._close_cell()
        elif tag == "table":
            self.finish()

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self._text.append(data)

    def finish(self) -> None:
        """End the table at hand."""
        self._close_cell()
        self._inside = False

    def _close_cell(self) -> None:
        if self._open is None:
            return
        rows, columns = self._open
        column = 0
        while (self._row, column) in self._taken:
            column += 1
        self._taken.update((self._row + down, column + across) for down in range(rows) for across in range(columns))
        self.tables[-1].append(Cell(self._row, column, rows, columns, "".join(self._text).strip()))
        self._open, self._text = None, []


def _span(value: Any) -> int:
    """A span of 1 to 1000, as browsers limit it; 1 if it is no number."""
    digits = str(value or "").strip()
    if not (digits.isascii() and digits.isdecimal()):
        return 1
    return min(max(int(digits[:8]), 1), 1000)
