"""The command `python -m vlparts ocr`: pages in, Markdown out."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .errors import exit_on_value_error

__all__ = ["ocr"]


def ocr(
    inputs: Annotated[list[Path], typer.Argument(help="Images, PDF files, and folders of them.")],
    model: Annotated[Path, typer.Option(help="Folder of the model: saved, or as DeepSeek-OCR is published.")],
    output: Annotated[Path, typer.Option(help="Folder for the results; an interrupted run continues in it.")],
    mode: Annotated[
        str | None, typer.Option(help="Mode of the image processor: tiny, small, base, large, gundam, gundam_m.")
    ] = None,
    prompt: Annotated[
        str, typer.Option(help="Prompt with <image>, or the name of one: markdown, ocr, free, figure, describe.")
    ] = "markdown",
    batch_size: Annotated[int, typer.Option(help="Pages per batch.")] = 1,
    pages: Annotated[str | None, typer.Option(help="Pages of each document, such as 1-5 or 1,3,8-9.")] = None,
    dpi: Annotated[float, typer.Option(help="Dots per inch at which PDF pages are drawn.")] = 144.0,
    max_new_tokens: Annotated[
        int, typer.Option(help="Most tokens of a page; a page that reaches it is reported.")
    ] = 8192,
    device: Annotated[str | None, typer.Option(help="Device, such as cuda; by default an accelerator if any.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Type of the weights, such as bfloat16; auto for that of the files.")
    ] = "auto",
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that is in the folder of the model.")] = False,
) -> None:
    """Recognize the text of documents: Markdown, JSON, figures, and pictures of the layout.

    Exits with code 1 if a page or file could not be read; the others are done.
    """
    console = Console(stderr=True)
    with exit_on_value_error():
        from ..documents import DEEPSEEK_OCR_PROMPTS, load_ocr_model, recognize_documents
        from ..documents.pages import parse_page_numbers

        numbers = None if pages is None else parse_page_numbers(pages)
        loaded, processor = load_ocr_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        options: dict[str, Any] = {} if mode is None else {"mode": mode}
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task("pages")
            summary = recognize_documents(
                inputs,
                output,
                loaded,
                processor,
                prompt=DEEPSEEK_OCR_PROMPTS.get(prompt, prompt),
                batch_size=batch_size,
                pages=numbers,
                dpi=dpi,
                image_options=options,
                settings={"model": str(model.resolve())},
                on_start=lambda total, done: progress.update(task, total=total, completed=done),
                on_page=lambda name: progress.advance(task),
                max_new_tokens=max_new_tokens,
            )
    done = f"{summary.done} pages recognized" + (f", {summary.skipped} done before" if summary.skipped else "")
    console.print(f"{done}. Results are in {output}.", highlight=False, soft_wrap=True)
    for name in summary.unfinished:
        console.print(
            f"unfinished: {name}: the answer reached {max_new_tokens} tokens.", highlight=False, soft_wrap=True
        )
    for error in summary.errors:
        console.print(f"error: {error}", highlight=False, soft_wrap=True, markup=False)
    if summary.errors:
        raise typer.Exit(1)
