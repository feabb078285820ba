"""The command `python -m vlparts soup`: the mean of models, uniform, weighted or greedy."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .errors import exit_on_value_error

__all__ = ["soup"]


def soup(
    folders: Annotated[list[Path], typer.Argument(help="Folders of the same model with other weights.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write, new or empty.")],
    weights: Annotated[str | None, typer.Option(help="Weight of each folder, such as 1,2,1.")] = None,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Add models as long as the score of their mean does not fall.")
    ] = False,
    evaluate: Annotated[
        str | None,
        typer.Option(help="Command with {folder} that prints the score as its last line; run without a shell."),
    ] = None,
    lower_is_better: Annotated[bool, typer.Option("--lower-is-better", help="A lower score is better.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Discard the scores of an interrupted run.")] = False,
) -> None:
    """Average the weights of models of one architecture, such as several fine-tunes of one model."""
    console = Console(stderr=True)
    with exit_on_value_error():
        from ..checkpoints.soup import average_folders, command_evaluator, greedy_soup

        if greedy != (evaluate is not None):
            raise ValueError("`--greedy` and `--evaluate` must be given together.")
        if evaluate is None:
            if lower_is_better or restart:
                raise ValueError("`--lower-is-better` and `--restart` must be given with `--greedy` only.")
            left: Sequence[str] = average_folders(folders, output, weights=_numbers(weights))
            console.print(f"Mean of {len(folders)} folders in {output}.", highlight=False, soft_wrap=True)
        else:
            if weights is not None:
                raise ValueError("`--weights` must be given without `--greedy`.")
            result = greedy_soup(
                folders,
                output,
                command_evaluator(evaluate),
                lower_is_better=lower_is_better,
                settings={"command": evaluate},
                restart=restart,
                on_score=lambda members, score: console.print(
                    f"{' + '.join(members)}: {score:g}", highlight=False, soft_wrap=True, markup=False
                ),
            )
            left = result.not_copied
            Console().print(_table(result))
            console.print(f"Mean of {len(result.folders)} folders in {output}.", highlight=False, soft_wrap=True)
    if left:
        console.print(f"Not copied: {', '.join(left)}.", highlight=False, soft_wrap=True, markup=False)


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(one) for one in text.split(",")]
    except ValueError:
        raise ValueError(f"`--weights` must be numbers with commas between them, got {text!r}.") from None


def _table(result: Any) -> Table:
    table = Table("mean of", "score", "kept")
    for trial in result.trials:
        table.add_row(Text(" + ".join(trial.folders)), f"{trial.score:g}", "yes" if trial.kept else "")
    return table
