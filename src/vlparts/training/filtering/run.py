"""Filter a file of training records by the scores of a language model."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ...journal import Journal
from ...parts.utils import positive_integer
from .output import FilterSummary, write_output
from .passes import RecordPasses, RecordStatus
from .perplexity import check_max_length, check_share
from .texts import TEXTS

__all__ = ["filter_records", "load_language_model"]

KEEP = 0.2
"""Share of the records that is kept by default, as in POINTS1.5 (arXiv 2412.08443)."""


def load_language_model(
    folder: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer from a local folder with safetensors.

    Args:
        folder: A folder that `AutoModelForCausalLM` and `AutoTokenizer` read.
        device: The device; None for an accelerator if there is one, else the CPU.
        dtype: Dtype of the weights, or its name; "auto" for that of the files.
        trust_remote_code: Whether to run code that is in the folder.

    Returns:
        The model in evaluation mode, and the tokenizer.

    Raises:
        ValueError: If it is no such folder, or the dtype is unknown.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise ValueError(f"`model` must be a folder with a config.json, got {path}.")
    named = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else torch.float32
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise ValueError(f"`dtype` must be 'auto' or the name of a floating-point dtype, got {dtype!r}.")
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"`model` {path} cannot be loaded: {error}") from error
    if device is None:
        device = torch.accelerator.current_accelerator() or "cpu"
    return model.eval().to(device), tokenizer


def filter_records(
    data: str | Path,
    output: str | Path,
    model: Any,
    tokenizer: Any,
    *,
    keep: float | None = None,
    max_perplexity: float | None = None,
    drop_answerable: bool = False,
    text: str = "assistant",
    on_empty: str = "drop",
    on_error: str = "raise",
    batch_size: int = 8,
    max_length: int | None = None,
    max_new_tokens: int = 32,
    template_options: dict[str, Any] | None = None,
    report: str | Path | None = None,
    restart: bool = False,
    settings: dict[str, Any] | None = None,
    progress: bool = True,
) -> FilterSummary:
    """Write the records of low perplexity, and those whose questions need the image, to a new file.

    Records are read one at a time and written in their order, each as it is with its scores under `filter_scores`:
    `perplexity` and `tokens`, and the model's `answers` without the image. Besides the model, memory holds about 20
    bytes per line of the file, and the token ids of 64 batches. Results are kept in `output`.perplexity.jsonl and
    `output`.answers.jsonl, from which an interrupted run continues; a kill loses at most the batch at hand. Another
    `keep` or `max_perplexity` is applied without scoring again.

    Args:
        data: JSON Lines file of records, in any shape that training reads; they may have other keys too.
        output: JSON Lines file to write.
        model: A causal language model of transformers in evaluation mode.
        tokenizer: Its tokenizer.
        keep: Share of records to keep, those of lowest perplexity, see [`select_lowest`]. Of records without text none
            is counted. 0.2 if none of the three filters is given.
        max_perplexity: Largest perplexity to keep, instead of a share.
        drop_answerable: Drop records whose questions the model all answers as the record does, see [`read_questions`],
            [`generate_answers`] and [`is_same_answer`]. Records that cannot be judged so are kept. Only records that
            the perplexity does not drop are asked.
        text: Text whose perplexity is computed, see [`scored_text`].
        on_empty: "drop" or "keep" records without a token to score.
        on_error: "raise" on an invalid record, before any is scored, or "skip" it.
        batch_size: Records, or questions, per batch.
        max_length: As in [`compute_perplexities`]. Without it, a text that is too long for the model is an error.
        max_new_tokens: As in [`generate_answers`].
        template_options: As in [`generate_answers`].
        report: JSON Lines file to write with one line for each record: `line`, `kept`, `reason` if it is dropped, and
            scores or error.
        restart: Discard results of an earlier run.
        settings: What the results depend on besides these arguments, as JSON data, such as the name of the model.
        progress: Show progress bars on a terminal.

    Returns:
        Counts.

    Raises:
        ValueError: If an argument is invalid, if `output` has results of a run with other settings and `restart` is
            off, or if the model gives a perplexity that is not finite.
        RecordError: If a record is invalid and `on_error` is "raise", if none is valid, or if the chat template cannot
            render a question.
    """
    if keep is None and max_perplexity is None and not drop_answerable:
        keep = KEEP
    _check_options(keep, max_perplexity, text, on_empty, on_error)
    positive_integer(batch_size, "batch_size")
    positive_integer(max_new_tokens, "max_new_tokens")
    check_max_length(max_length, model)
    source, target = Path(data), Path(output)
    report_path = None if report is None else Path(report)
    journals = {name: target.with_name(f"{target.name}.{name}.jsonl") for name in ("perplexity", "answers")}
    _check_paths(source, target, report_path, journals.values())
    scored = keep is not None or max_perplexity is not None
    passes = RecordPasses(source, model, tokenizer, text if scored else None, max_length, progress)

    passes.check(on_error)
    known: dict[str, Any] = {
        "data": passes.digest,
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch_size": batch_size,
        **(settings or {}),
    }
    selected = passes.status == RecordStatus.VALID
    if scored:
        known |= {"text": text, "max_length": max_length}
        with Journal(journals["perplexity"], known, restart=restart) as journal:
            passes.score(journal, batch_size)
        selected = passes.select(1 if keep is None else keep, max_perplexity)
        if on_empty == "keep":
            selected |= passes.status == RecordStatus.EMPTY
        known |= {"keep": keep, "max_perplexity": max_perplexity, "on_empty": on_empty}
    if not drop_answerable:
        return write_output(passes, target, report_path, selected, None)
    known |= {"max_new_tokens": max_new_tokens, "template_options": template_options}
    with Journal(journals["answers"], known, restart=restart) as journal:
        passes.ask(journal, batch_size, selected, max_new_tokens, template_options)
        return write_output(passes, target, report_path, selected, journal.rows())


def _check_options(keep: Any, max_perplexity: Any, text: str, on_empty: str, on_error: str) -> None:
    if keep is not None and max_perplexity is not None:
        raise ValueError(f"Only one of `keep` and `max_perplexity` may be given, got {keep} and {max_perplexity}.")
    if keep is not None:
        check_share(keep)
    number = isinstance(max_perplexity, (int, float)) and not isinstance(max_perplexity, bool)
    if max_perplexity is not None and not (number and math.isfinite(max_perplexity) and max_perplexity >= 1):
        raise ValueError(f"`max_perplexity` must be a finite number of at least 1, got {max_perplexity!r}.")
    for name, value, known in (
        ("text", text, TEXTS),
        ("on_empty", on_empty, ("drop", "keep")),
        ("on_error", on_error, ("raise", "skip")),
    ):
        if value not in known:
            raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}.")


def _check_paths(source: Path, target: Path, report: Path | None, journals: Iterable[Path]) -> None:
    if not source.is_file():
        raise ValueError(f"`data` must be a JSON Lines file, got {source}, which is not a file.")
    taken = {source.resolve(): "data", **{path.resolve(): "a journal of `output`" for path in journals}}
    for name, path in (("output", target), ("report", report)):
        if path is None:
            continue
        if not path.parent.is_dir() or path.is_dir():
            raise ValueError(f"`{name}` must be a file in an existing folder, got {path}.")
        if path.resolve() in taken:
            raise ValueError(f"`{name}` must be a file of its own, got {path}, which is {taken[path.resolve()]}.")
        taken[path.resolve()] = name
