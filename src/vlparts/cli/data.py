"""The data commands: `python -m vlparts data filter`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import exit_on_value_error
from .options import Device, DType, TrustRemoteCode

__all__ = ["app"]

app = typer.Typer(help="Select training records.", no_args_is_help=True)


@app.command("filter")
def filter_data(
    data: Annotated[Path, typer.Argument(help="JSON Lines file of training records.")],
    model: Annotated[Path, typer.Option(help="Folder of a causal language model with its tokenizer.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON Lines file to write.")],
    keep: Annotated[
        float | None,
        typer.Option(help="Share of records to keep, those of lowest perplexity; 0.2 without any of the filters."),
    ] = None,
    max_perplexity: Annotated[
        float | None, typer.Option(help="Largest perplexity to keep, instead of a share.")
    ] = None,
    drop_answerable: Annotated[
        bool, typer.Option("--drop-answerable", help="Drop records that the model answers without the image.")
    ] = False,
    text: Annotated[
        str, typer.Option(help="Text to score: assistant (captions, answers) or all turns.")
    ] = "assistant",
    on_empty: Annotated[str, typer.Option(help="Policy for records without text to score: drop or keep.")] = "drop",
    on_error: Annotated[str, typer.Option(help="Policy for invalid records: raise or skip.")] = "raise",
    batch_size: Annotated[int, typer.Option(help="Records or questions per batch.")] = 8,
    max_length: Annotated[
        int | None, typer.Option(help="Score only the first tokens of a text; by default a longer text is an error.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 32,
    template_options: Annotated[
        str | None,
        typer.Option(help="Variables of the chat template, such as '{\"enable_thinking\": false}'."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="JSON Lines file to write with scores and outcome of every record.")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Discard the results of an earlier run.")] = False,
    device: Device = None,
    dtype: DType = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Keep the records of low perplexity, and those whose questions need the image.

    An interrupted command continues where it was if it is given again.
    """
    with exit_on_value_error():
        from ..journal import folder_state
        from ..training.filtering import filter_records, load_language_model

        options = _json_object(template_options)
        loaded, tokenizer = load_language_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        summary = filter_records(
            data,
            output,
            loaded,
            tokenizer,
            keep=keep,
            max_perplexity=max_perplexity,
            drop_answerable=drop_answerable,
            text=text,
            on_empty=on_empty,
            on_error=on_error,
            batch_size=batch_size,
            max_length=max_length,
            max_new_tokens=max_new_tokens,
            template_options=options,
            report=report,
            restart=restart,
            settings={"model": folder_state(model)},
        )
    for note in summary.notes:
        typer.echo(note, err=True)
    unnamed = summary.empty + summary.dropped["invalid"] - len(summary.notes)
    if unnamed:
        typer.echo(f"{unnamed} further records are empty or invalid; `--report` writes all.", err=True)
    total = summary.kept + summary.dropped.total()
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(summary.dropped.items()))
    dropped = f"; dropped: {reasons}" if reasons else ""
    largest = "" if summary.max_perplexity is None else f" Largest perplexity: {summary.max_perplexity:.4g}."
    typer.echo(f"{summary.kept} of {total} records kept{dropped}.{largest}", err=True)


def _json_object(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"`--template-options` must be a JSON object, got {text!r}: {error}.") from None
    if not isinstance(value, dict):
        raise ValueError(f"`--template-options` must be a JSON object, got {text!r}.")
    return value
