"""Recognize documents and write the results into a folder."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from .pages import DPI, Document, find_documents
from .recognition import DEEPSEEK_OCR_PROMPTS, recognize
from .writing import OutputFolder

__all__ = ["RunSummary", "recognize_documents"]


@dataclass
class RunSummary:
    """What came of a run.

    Attributes:
        done: Number of pages recognized now.
        skipped: Number of pages that were done before.
        unfinished: Pages whose answers reached the limit of tokens, of those recognized now.
        errors: Why files and pages could not be read.
    """

    done: int = 0
    skipped: int = 0
    unfinished: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def recognize_documents(
    inputs: Iterable[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    model: Any,
    processor: Any,
    *,
    prompt: str = DEEPSEEK_OCR_PROMPTS["markdown"],
    batch_size: int = 1,
    pages: Sequence[int] | None = None,
    dpi: float = DPI,
    image_options: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    on_start: Callable[[int, int], None] | None = None,
    on_page: Callable[[str], None] | None = None,
    **generation_options: Any,
) -> RunSummary:
    """Recognize documents and write one Markdown and one JSON file for each, with figures and pictures of layouts.

    Pages that are done already in `output` are not done again. A page or file that cannot be read is reported, and the
    others are done.

    Args:
        inputs: Images, PDF files, and folders of them.
        output: A new or empty folder, or that of an earlier run with the same settings.
        model: As in [`recognize`]; so are `processor`, `prompt`, `batch_size`, `dpi`, `image_options` and
            `generation_options`.
        processor: Its processor.
        prompt: The prompt.
        batch_size: Pages per batch.
        pages: Numbers of the pages of each document, from 1; None for all.
        dpi: Dots per inch of PDF pages.
        image_options: Options of the image processor.
        settings: Further settings, such as the name of the model, that an earlier run in `output` must have had.
        on_start: Called with the number of pages of all documents, and how many of them are done already.
        on_page: Called with the name of each page that is done or failed.
        **generation_options: Arguments of `generate`.

    Returns:
        Counts of pages, and errors.

    Raises:
        ValueError: If an argument is invalid; see [`find_documents`] and [`OutputFolder`].
    """
    summary = RunSummary()
    documents: list[Document] = []
    for found in find_documents(inputs):
        if isinstance(found, Document):
            documents.append(found)
        else:
            summary.errors.append(str(found))
    known = {"prompt": prompt, "dpi": dpi, "image_options": image_options or {}, "generation": generation_options}
    folder = OutputFolder(output, documents, known | (settings or {}))
    try:
        chosen = {document.path: document.pages(pages) for document in documents}
        open_pages = [
            page
            for document in documents
            for page in chosen[document.path]
            if not folder.is_done(document, page.number)
        ]
        total = sum(map(len, chosen.values()))
        summary.skipped = total - len(open_pages)
        if on_start is not None:
            on_start(total, summary.skipped)
        failed: dict[Any, dict[int, str]] = {document.path: {} for document in documents}
        left = {document.path: 0 for document in documents}
        for page in open_pages:
            left[page.document.path] += 1
        for document in documents:
            if not left[document.path]:
                folder.write_document(document, [page.number for page in chosen[document.path]], {})
        results = recognize(
            model,
            processor,
            open_pages,
            prompt=prompt,
            batch_size=batch_size,
            dpi=dpi,
            image_options=image_options,
            **generation_options,
        )
        for batch in _batches(results, batch_size):
            folder.add(batch)
            for result in batch:
                document = result.page.document
                if result.error is not None:
                    summary.errors.append(result.error)
                    failed[document.path][result.page.number] = result.error
                else:
                    summary.done += 1
                    summary.unfinished.extend([] if result.finished else [str(result.page)])
                left[document.path] -= 1
                if not left[document.path]:
                    numbers = [page.number for page in chosen[document.path]]
                    folder.write_document(document, numbers, failed[document.path])
                if on_page is not None:
                    on_page(str(result.page))
    finally:
        folder.close()
    return summary


def _batches(results: Iterable[Any], size: int) -> Iterator[list[Any]]:
    remaining = iter(results)
    while batch := list(islice(remaining, size)):
        yield batch
