"""Blocks of pages as Markdown and as plain data."""

import os
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote

from .blocks import Block, PageText, table_cells

__all__ = ["FIGURE_TYPES", "page_data", "to_markdown"]

FIGURE_TYPES = ("image", "figure")
"""Types of the blocks that are cut out of the page and linked."""
# As the published programs replace them, since not every TeX renderer has the packages.
SUBSTITUTIONS = {"\\coloneqq": ":=", "\\eqqcolon": "=:"}


def to_markdown(page: PageText, figures: Mapping[int, Iterable[str]] | None = None) -> str:
    r"""Return the text of a page without marks of blocks.

    Text, tables (as HTML, which Markdown allows) and formulas stay as the model wrote them, except `\coloneqq` and
    `\eqqcolon`, which become `:=` and `=:`.

    Args:
        page: The page.
        figures: Paths of the pictures of a block, by its index in `page.blocks`; they are linked before its text, with
            percent signs in place of what links may not have.
    """
    parts: list[str] = []
    for index, block in enumerate(page.blocks):
        links = map(quote, map(os.fsencode, (figures or {}).get(index, ())))
        parts.extend(f"![{block.type or 'figure'}]({link})\n" for link in links)
        parts.append(block.text)
    text = "".join(parts)
    for published, replacement in SUBSTITUTIONS.items():
        text = text.replace(published, replacement)
    return text


def page_data(page: PageText) -> dict[str, Any]:
    """Return a page as data that JSON can hold.

    Returns:
        "blocks": a list with "type", "boxes" (left, top, right, bottom in pixels of the page), "text", and for blocks
        with tables "tables": for each a list of cells with "row", "column", "row_span", "column_span" and "text".
        "errors": a list with "position" and "reason". "answer": the answer, unchanged.
    """
    return {
        "blocks": [_block_data(block) for block in page.blocks],
        "errors": [{"position": position, "reason": reason} for position, reason in page.errors],
        "answer": page.answer,
    }


def _block_data(block: Block) -> dict[str, Any]:
    data: dict[str, Any] = {
        "type": block.type,
        "boxes": [[round(edge, 2) for edge in region.xyxy] for region in block.regions],
        "text": block.text,
    }
    tables = table_cells(block.text)
    if tables:
        data["tables"] = [[vars(cell) for cell in cells] for cells in tables]
    return data
