"""The command `python -m vlparts evaluate`: answers, regions, time and memory with fewer vision tokens."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .errors import exit_on_value_error
from .options import Device, DType, TrustRemoteCode

__all__ = ["evaluate"]


def evaluate(
    model: Annotated[Path, typer.Option(help="Folder of the model and its processor.")],
    data: Annotated[Path, typer.Option(help="Records in JSON Lines; the last turn of the assistant is the answer.")],
    token_ratio: Annotated[
        float | None,
        typer.Option(help="Shares of the tokens of an image, such as 1 0.5 0.25; by default the model as it is."),
    ] = None,
    more_ratios: Annotated[list[float] | None, typer.Argument(hidden=True)] = None,
    method: Annotated[
        str,
        typer.Option(help="merge_similar, prune_diverse, prune_by_norm, prune_by_attention or average_pool."),
    ] = "merge_similar",
    output: Annotated[Path | None, typer.Option(help="Folder for evaluation.json and evaluation.png.")] = None,
    limit: Annotated[int | None, typer.Option(help="Number of records; by default all.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Questions per batch.", min=1)] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.", min=1)] = 64,
    coordinate_format: Annotated[
        str | None, typer.Option("--format", help="Format of regions; by default openPangu's.")
    ] = None,
    device: Device = None,
    dtype: DType = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Compare a model's answers with records, with all vision tokens and with fewer."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    ratios = [] if token_ratio is None else [token_ratio, *(more_ratios or ())]
    with exit_on_value_error():
        if more_ratios and token_ratio is None:
            raise ValueError(f"Numbers must follow `--token-ratio`, got {more_ratios}.")
        from transformers.utils import logging

        from ..documents import load_ocr_model
        from ..evaluation import evaluate_tokens, read_questions, write_evaluations

        logging.disable_progress_bar()
        loaded, processor = load_ocr_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        questions = read_questions(data, processor, limit=limit, coordinate_format=coordinate_format)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("answers", total=len(questions) * max(1, len(ratios)))
            results = evaluate_tokens(
                loaded,
                processor,
                questions,
                ratios or None,
                method=method,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                coordinate_format=coordinate_format,
                on_batch=lambda count: progress.advance(task, count),
            )
        if output is not None:
            write_evaluations(results, output, model=str(model), data=str(data), method=method)
    means = [name for name in ("accuracy", "iou") if any(getattr(one, name) is not None for one in results)]
    titles = {"iou": "IoU"}
    table = Table("share", "tokens", *(titles.get(name, name) for name in means), "first token", "total", "memory")
    for one in results:
        table.add_row(
            "-" if one.token_ratio is None else f"{one.token_ratio:g}",
            f"{one.image_tokens:.1f}",
            *(str(getattr(one, name)) for name in means),
            f"{1e3 * one.first_token_seconds:.0f} ms",
            f"{one.seconds:.1f} s",
            f"{one.peak_mib:.0f} MiB",
        )
    Console().print(table)
    if output is not None:
        console.print(f"Answers and plot in {output}.", markup=False)
