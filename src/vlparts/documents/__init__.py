"""Documents: pages in, Markdown, blocks and pictures of the layout out."""

from .blocks import Block, Cell, PageText, parse_page, table_cells, write_page
from .markdown import page_data, to_markdown
from .pages import Document, Page, find_documents, open_page
from .recognition import DEEPSEEK_OCR_PROMPTS, PageResult, load_ocr_model, recognize
from .run import RunSummary, recognize_documents

__all__ = [
    "DEEPSEEK_OCR_PROMPTS",
    "Block",
    "Cell",
    "Document",
    "Page",
    "PageResult",
    "PageText",
    "RunSummary",
    "find_documents",
    "load_ocr_model",
    "open_page",
    "page_data",
    "parse_page",
    "recognize",
    "recognize_documents",
    "table_cells",
    "to_markdown",
    "write_page",
]
