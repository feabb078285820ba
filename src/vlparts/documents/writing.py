"""Write the results of documents into a folder: Markdown, JSON, figures and pictures of the layout; resumable.

The journal gets the pages of each batch before the files that are made from it are written, so that an interrupted run
continues with the pages that are not in it.
"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from ..show import boxes
from .blocks import PageText, parse_page
from .journal import Journal
from .markdown import FIGURE_TYPES, page_data, to_markdown
from .pages import Document, Page
from .recognition import PageResult

__all__ = ["OutputFolder"]

LAYOUT_DPI = 150
LAYOUT_SIZE = (1050, 2100)  # of pictures, which are 7 inches wide and up to 14 inches high


class OutputFolder:
    """The output of a run over documents.

    For a document `report.pdf` the folder gets `report.md`, `report.json`, `report_layout_1.png` and so on for each
    page with boxes (`scan_layout.png` for an image), and the figures in `report_figures/`. Documents with the same
    name without suffix get their complete names, and if these are the same, also those of their folders
    (`first_scan.png.md`); names stay in later runs.

    Args:
        folder: A new or empty folder, or that of an interrupted or finished run with the same settings; not one of
            the documents'.
        documents: The documents of the run.
        settings: What the results depend on, as JSON data. A folder with pages of other settings is refused.

    Raises:
        ValueError: If the folder cannot be made or written, holds an input, is used by another run, has files and no
            journal, or has pages with other settings.
    """

    def __init__(
        self, folder: str | os.PathLike[str], documents: Sequence[Document], settings: dict[str, Any]
    ) -> None:
        self.folder = Path(folder)
        for document in documents:
            if document.path.parent.resolve() == self.folder.resolve():
                raise ValueError(
                    f"`output` must not be a folder of inputs, got {folder}, which holds {document.path}."
                )
        self._journal = Journal(self.folder, [document.path for document in documents], settings)
        self.names = {document.path: self._journal.names[os.path.abspath(document.path)] for document in documents}

    def is_done(self, document: Document, page: int) -> bool:
        """Whether a page is in the journal."""
        return page in self._journal.rows[self.names[document.path]]

    def add(self, results: Iterable[PageResult]) -> None:
        """Write figures and layout pictures of pages, and enter the pages into the journal; pages with errors are not.

        Args:
            results: The results of one batch.
        """
        rows = []
        for result in results:
            if result.text is None or result.image is None or not isinstance(result.page, Page):
                continue
            document, number = result.page.document, result.page.number
            name = self.names[document.path]
            figures = self._save_figures(name, number, result.image, result.text)
            self._save_layout(name, number if document.num_pages > 1 else None, result.image, result.text)
            rows.append(
                {
                    "document": name,
                    "page": number,
                    "size": list(result.image.size),
                    "finished": result.finished,
                    "num_tokens": result.num_tokens,
                    "figures": figures,
                    "answer": result.text.answer,
                }
            )
        self._journal.add(rows)

    def write_document(self, document: Document, pages: Sequence[int], errors: dict[int, str]) -> None:
        """Write the Markdown and JSON of a document from the journal, with the pages of earlier runs.

        Args:
            document: The document.
            pages: Numbers of its pages that were asked for now.
            errors: Reasons of the pages that could not be read, by number.
        """
        name = self.names[document.path]
        parts, data = [], []
        rows = self._journal.rows[name]
        for number in sorted({*pages, *rows}):
            row = rows.get(number)
            if row is None:
                reason = errors.get(number, "not recognized")
                parts.append(f"<!-- page {number}: {_comment(reason)} -->\n")
                data.append({"page": number, "error": reason})
                continue
            page = parse_page(row["answer"], tuple(row["size"]))
            figures = {int(index): paths for index, paths in row["figures"].items()}
            unfinished = "" if row["finished"] else ", unfinished"
            parts.append(f"<!-- page {number}{unfinished} -->\n{to_markdown(page, figures).strip()}\n")
            entry = {name: row[name] for name in ("page", "size", "finished", "num_tokens", "figures")}
            data.append(entry | page_data(page))
        _write(self.folder / f"{name}.md", "\n".join(parts))
        content = {"document": str(document.path), "num_pages": document.num_pages, "pages": data}
        _write(self.folder / f"{name}.json", json.dumps(content, ensure_ascii=False, indent=1) + "\n")

    def close(self) -> None:
        """Close the journal; another run can use the folder."""
        self._journal.close()

    def _save_figures(self, name: str, number: int, image: Image.Image, page: PageText) -> dict[int, list[str]]:
        """Cut figures out of a page; returns their paths by the index of their block."""
        paths: dict[int, list[str]] = {}
        folder = self.folder / f"{name}_figures"
        for index, block in enumerate(page.blocks):
            if block.type not in FIGURE_TYPES:
                continue
            for region in block.regions:
                left, top, right, bottom = (round(edge) for edge in region.xyxy)
                box = (left, top, max(right, left + 1), max(bottom, top + 1))
                folder.mkdir(exist_ok=True)
                path = folder / f"page{number}_{sum(map(len, paths.values())) + 1}.png"
                image.crop(box).save(path)
                paths.setdefault(index, []).append(f"{folder.name}/{path.name}")
        return paths

    def _save_layout(self, name: str, number: int | None, image: Image.Image, page: PageText) -> None:
        """Draw the boxes of a page, if it has some, with the types of their blocks."""
        if image.width > LAYOUT_SIZE[0] or image.height > LAYOUT_SIZE[1]:  # Matplotlib has 60 bytes for each pixel
            image = ImageOps.contain(image, LAYOUT_SIZE)
        regions = [region for block in parse_page(page.answer, image.size).blocks for region in block.regions]
        if regions:
            suffix = "" if number is None else f"_{number}"
            figure = boxes(image, regions).get_figure(root=True)
            if figure is not None:
                figure.savefig(self.folder / f"{name}_layout{suffix}.png", dpi=LAYOUT_DPI)


def _comment(text: str) -> str:
    """Text that does not end an HTML comment."""
    return text.replace("--", "- -")


def _write(path: Path, text: str) -> None:
    """Write a file that is whole or absent."""
    part = path.with_name(path.name + ".part")
    # Bytes of paths that are no text are written as escapes, which JSON has too.
    part.write_bytes(text.encode("utf-8", "backslashreplace"))
    os.replace(part, path)
