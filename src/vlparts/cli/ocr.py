"""The command `python -m vlparts ocr`: pages in, Markdown out."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .errors import exit_on_value_error
from .options import Device, DType, TrustRemoteCode

if TYPE_CHECKING:
    from ..documents import RunSummary

__all__ = ["ocr"]

LOG_SECONDS = 60.0  # between lines on the progress where there is no terminal


def ocr(
    inputs: Annotated[list[Path], typer.Argument(help="Images, PDF files, and folders of them.", exists=True)],
    model: Annotated[Path, typer.Option(help="Folder of the model: saved, or as DeepSeek-OCR is published.")],
    output: Annotated[Path, typer.Option(help="Folder for the results; an interrupted run continues in it.")],
    mode: Annotated[
        str | None, typer.Option(help="Mode of the image processor: tiny, small, base, large, gundam, gundam_m.")
    ] = None,
    prompt: Annotated[
        str, typer.Option(help="Prompt with <image>, or the name of one: markdown, ocr, free, figure, describe.")
    ] = "markdown",
    batch_size: Annotated[int, typer.Option(help="Pages per batch.", min=1)] = 1,
    pages: Annotated[str | None, typer.Option(help="Pages of each document, such as 1-5 or 1,3,8-9.")] = None,
    dpi: Annotated[float, typer.Option(help="Dots per inch at which PDF pages are drawn.")] = 144.0,
    max_image_pixels: Annotated[
        int | None, typer.Option(help="Largest number of pixels of a page; by default Pillow's limit.", min=1)
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Most tokens of a page; a page that reaches it is reported.", min=1)
    ] = 8192,
    device: Device = None,
    dtype: DType = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Recognize the text of documents: Markdown, JSON, figures, and pictures of the layout.

    Exits with code 1 if a page or file could not be read, which is named, and the others are done; with code 2 on
    invalid arguments; and with code 130 after Ctrl-C. The same command continues an interrupted run.
    """
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    progress = _PageProgress(console)
    try:
        with exit_on_value_error(), progress.bar:
            from transformers.utils import logging

            from ..documents import load_ocr_model, recognize_documents
            from ..documents.pages import MAX_IMAGE_PIXELS, parse_page_numbers
            from ..documents.recognition import get_prompt

            numbers = None if pages is None else parse_page_numbers(pages)
            text = get_prompt(prompt)
            logging.disable_progress_bar()  # of the weights
            loaded, processor = load_ocr_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
            summary = recognize_documents(
                inputs,
                output,
                loaded,
                processor,
                prompt=text,
                batch_size=batch_size,
                pages=numbers,
                dpi=dpi,
                max_image_pixels=max_image_pixels or MAX_IMAGE_PIXELS,
                image_options={} if mode is None else {"mode": mode},
                settings=_model_settings(model, loaded),
                on_start=progress.start,
                on_page=progress.advance,
                max_new_tokens=max_new_tokens,
            )
    except (ImportError, OSError) as error:
        console.print(f"error: {error}")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        console.print(f"interrupted: {progress.done} pages are done; the same command continues.")
        raise typer.Exit(130) from None
    console.print(f"{_describe(summary)}. Results are in {output}.")
    for name in summary.unfinished:
        console.print(f"unfinished: {name}: the answer reached {max_new_tokens} tokens.")
    for reason in summary.errors:
        console.print(f"error: {reason}")
    if summary.errors:
        raise typer.Exit(1)


class _PageProgress:
    """A bar on a terminal, and elsewhere a line now and then.

    Args:
        console: Where it is shown.
    """

    def __init__(self, console: Console) -> None:
        self.done = 0
        self._total = 0
        self._console = console
        self._logged = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self.bar.add_task("loading", total=None)

    def start(self, total: int, done: int) -> None:
        """Show how many pages there are, and how many are done already."""
        self.done, self._total = done, total
        self.bar.update(self._task, description="pages", total=total, completed=done)

    def advance(self, name: str) -> None:
        """Count a page that is done or failed."""
        self.done += 1
        self.bar.advance(self._task)
        if self.bar.disable and time.monotonic() - self._logged > LOG_SECONDS:
            self._logged = time.monotonic()
            self._console.print(f"{self.done} of {self._total} pages, {name}")


def _model_settings(folder: Path, model: Any) -> dict[str, Any]:
    """What identifies a model: its folder, when its weights were written, and their dtype."""
    written = [file.stat().st_mtime_ns for file in folder.glob("*.safetensors")]
    return {"model": str(folder.resolve()), "weights written": max(written, default=0), "dtype": str(model.dtype)}


def _describe(summary: "RunSummary") -> str:
    """Counts of a run in words."""
    text = f"{_count(summary.done, 'page')} of {_count(summary.documents, 'document')} recognized"
    if summary.done:
        text += f" in {summary.seconds:.0f} s ({60 * summary.done / summary.seconds:.1f} pages per minute)"
    for count, what in (
        (summary.skipped, "done before"),
        (len(summary.unfinished), "unfinished"),
        (len(summary.errors), "failed"),
    ):
        text += f", {count} {what}" if count else ""
    return text


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
