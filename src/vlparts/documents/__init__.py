"""Documents: pages in, Markdown, blocks and pictures of the layout out."""

from .blocks import Block, Cell, PageText, parse_page, table_cells
from .markdown import page_data, to_markdown

__all__ = ["Block", "Cell", "PageText", "page_data", "parse_page", "table_cells", "to_markdown"]
