"""Recognize documents and write the results into a folder."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from .pages import DPI, MAX_IMAGE_PIXELS, Document, Page, find_documents
from .recognition import DEEPSEEK_OCR_PROMPTS, PageResult, get_prompt, recognize
from .writing import OutputFolder

__all__ = ["RunSummary", "recognize_documents"]


@dataclass
class RunSummary:
    """What came of a run.

    Attributes:
        documents: Number of documents that could be opened.
        done: Number of pages recognized now.
        skipped: Number of pages that were done before.
        unfinished: Pages whose answers reached the limit of tokens, of those recognized now.
        errors: Why files and pages could not be read.
        seconds: Duration of the recognition, without loading the model.
    """

    documents: int = 0
    done: int = 0
    skipped: int = 0
    unfinished: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    seconds: float = 0.0


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
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    image_options: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    on_start: Callable[[int, int], None] | None = None,
    on_page: Callable[[str], None] | None = None,
    **generation_options: Any,
) -> RunSummary:
    """Recognize documents and write one Markdown and one JSON file for each, with figures and pictures of layouts.

    Pages that are done already in `output` are not done again, unless their document has changed since. A page or file
    that cannot be read is reported, and the others are done.

    Args:
        inputs: Images, PDF files, and folders of them.
        output: A new or empty folder, or that of an earlier run with the same settings.
        model: As in [`recognize`]; so are `processor`, `prompt`, `batch_size`, `dpi`, `max_image_pixels`,
            `image_options` and `generation_options`.
        processor: Its processor.
        prompt: The prompt, or its name.
        batch_size: Pages per batch.
        pages: Numbers of the pages of each document, from 1; None for all. Those that it does not have are left out.
        dpi: Dots per inch of PDF pages.
        max_image_pixels: Largest number of pixels of a page.
        image_options: Options of the image processor.
        settings: Further settings, such as the name of the model, that an earlier run in `output` must have had.
        on_start: Called with the number of pages of all documents, and how many of them are done already.
        on_page: Called with the name of each page that is done or failed.
        **generation_options: Arguments of `generate`.

    Returns:
        Counts of documents and pages, and errors.

    Raises:
        ValueError: If an argument is invalid, or no document has a page of `pages`; see [`find_documents`],
            [`recognize`] and [`OutputFolder`].
        OSError: If a file cannot be written.
    """
    summary = RunSummary()
    chosen: dict[Document, list[Page]] = {}
    for found in find_documents(inputs):
        if isinstance(found, Document):
            chosen[found] = found.pages(pages)
        else:
            summary.errors.append(str(found))
    summary.documents = len(chosen)
    if chosen and not any(chosen.values()):
        raise ValueError(f"`pages` must have a page of one of the documents, got {list(pages or ())}.")
    open_pages: list[Page] = []  # filled below, once all arguments are known to be valid
    results = recognize(
        model,
        processor,
        open_pages,
        prompt=prompt,
        batch_size=batch_size,
        dpi=dpi,
        max_image_pixels=max_image_pixels,
        image_options=image_options,
        **generation_options,
    )
    known = {"prompt": get_prompt(prompt), "dpi": dpi, "image_options": image_options or {}}
    folder = OutputFolder(output, list(chosen), known | {"generation": generation_options} | (settings or {}))
    try:
        for document, asked in chosen.items():
            open_pages.extend(page for page in asked if not folder.is_done(document, page.number))
        total = sum(map(len, chosen.values()))
        summary.skipped = total - len(open_pages)
        if on_start is not None:
            on_start(total, summary.skipped)
        start = time.perf_counter()
        _write(folder, chosen, open_pages, _batches(results, batch_size), summary, on_page)
        summary.seconds = time.perf_counter() - start
    finally:
        folder.close()
    return summary


def _write(
    folder: OutputFolder,
    chosen: dict[Document, list[Page]],
    open_pages: list[Page],
    batches: Iterable[list[PageResult]],
    summary: RunSummary,
    on_page: Callable[[str], None] | None,
) -> None:
    """Write results batch by batch, and each document after its last page."""
    left = Counter(page.document for page in open_pages)
    failed: dict[Document, dict[int, str]] = {document: {} for document in chosen}

    def write_if_done(document: Document) -> None:
        if chosen[document] and not left[document]:
            folder.write_document(document, [page.number for page in chosen[document]], failed[document])

    for document in chosen:
        write_if_done(document)
    for batch in batches:
        folder.add(batch)
        for result in batch:
            assert isinstance(result.page, Page)
            document = result.page.document
            if result.error is not None:
                summary.errors.append(result.error)
                failed[document][result.page.number] = result.error
            else:
                summary.done += 1
                summary.unfinished.extend([] if result.finished else [str(result.page)])
            left[document] -= 1
            write_if_done(document)
            if on_page is not None:
                on_page(str(result.page))


def _batches(results: Iterable[PageResult], size: int) -> Iterator[list[PageResult]]:
    remaining = iter(results)
    while batch := list(islice(remaining, size)):
        yield batch
