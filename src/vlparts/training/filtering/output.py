"""Files that the filter writes: kept records with their scores, and the report on every record."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from ...coordinates.grammars.json_scanner import JsonObject, objects
from ...coordinates.io.json_lines import json_line, parse_object
from ..record_formats import SCORES
from ..records import numbered_lines
from .answers import is_same_answer
from .passes import RecordPasses, RecordStatus
from .texts import open_record, read_questions

__all__ = ["FilterSummary", "write_output"]

NOTES = 20  # records that are named in a summary; a report has all


@dataclass
class FilterSummary:
    """What came of a filter.

    Attributes:
        kept: Number of records that were kept.
        dropped: Number of dropped records by reason: "perplexity", "answerable", "empty" or "invalid".
        empty: Number of records without a token to score, kept or not.
        max_perplexity: Largest perplexity of a kept record; None if none was scored.
        notes: Lines and reasons of the first 20 records that are empty or invalid.
    """

    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    empty: int = 0
    max_perplexity: float | None = None
    notes: list[str] = field(default_factory=list)


def _line_with_scores(line: str, fields: dict[str, Any], scores: dict[str, Any]) -> str:
    """Return the line of a record with scores under `filter_scores`; no other character changes.

    Scores that the record has already stay, unless they have the same names.

    Args:
        line: The text of the line.
        fields: Its object.
        scores: JSON values by name; nothing is written if there are none.
    """
    if scores:
        written = json_line({**fields.get(SCORES, {}), **scores}).rstrip("\n")
        start = end = line.rindex("}")
        if SCORES in fields:
            *_, outer = objects(line, depth=len(line))
            spans = (value for key, value in outer.members if json.loads(f'"{key}"') == SCORES)
            start, end = next((one.start, one.end) for one in spans if isinstance(one, JsonObject))
        else:
            written = f'{", " if fields else ""}"{SCORES}": {written}'
        line = f"{line[:start]}{written}{line[end:]}"
    return line if line.endswith("\n") else f"{line}\n"


@contextmanager
def _whole_file(path: Path | None) -> Iterator[IO[str] | None]:
    """Open a file to write that replaces `path` at the end of the block if no exception occurs; None for None."""
    if path is None:
        yield None
        return
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


class _Answers:
    """The answers of a journal, read as far as they are needed: those of the window at hand are in memory."""

    def __init__(self, rows: Iterator[dict[str, Any]]) -> None:
        self._rows = rows
        self._read: dict[tuple[int, int], str | None] = {}

    def take(self, line: int, index: int) -> str | None:
        """Return the answer to a question of a line, once."""
        while (line, index) not in self._read:
            row = next(self._rows)
            self._read.update(zip(zip(row["line"], row["question"], strict=True), row["answer"], strict=True))
        return self._read.pop((line, index))


def write_output(
    passes: RecordPasses,
    target: Path,
    report: Path | None,
    selected: np.ndarray,
    answers: Iterator[dict[str, Any]] | None,
) -> FilterSummary:
    """Write the kept records and the report.

    Args:
        passes: The finished passes over the records.
        target: File of the kept records.
        report: File with one line for each record; None for none.
        selected: The lines that are kept unless their questions are answered, `(lines + 1,)` bool.
        answers: The rows of the journal of answers; None if no question was asked.
    """
    summary = FilterSummary()
    answered = None if answers is None else _Answers(answers)
    with _whole_file(target) as output, _whole_file(report) as reported:
        for number, line in passes.counted(numbered_lines(passes.source), "writing", passes.status):
            fields = parse_object(line) if selected[number] else {}
            scores = _scores(passes, number)
            reason = _perplexity_reason(passes.status[number], selected[number])
            if reason is None and answered is not None:
                reason = _answer_reason(number, fields, answered, scores)
            if reason is None and output is not None:
                output.write(_line_with_scores(line.decode(), fields, scores))
            if passes.status[number] in (RecordStatus.EMPTY, RecordStatus.INVALID):
                scores["error"] = passes.line_status(line)[1]
            _count(summary, passes.status[number], number, reason, scores)
            if reported is not None:
                outcome = {"kept": True} if reason is None else {"kept": False, "reason": reason}
                reported.write(json_line({"line": number, **outcome, **scores}))
    return summary


def _scores(passes: RecordPasses, number: int) -> dict[str, Any]:
    if passes.text is None or passes.status[number] == RecordStatus.INVALID:
        return {}
    scored = passes.status[number] == RecordStatus.VALID
    return {
        "perplexity": float(passes.perplexities[number]) if scored else None,
        "tokens": int(passes.tokens[number]),
    }


def _perplexity_reason(status: int, selected: bool) -> str | None:
    """Why a record is dropped before its questions are asked; None if it is not."""
    if status == RecordStatus.INVALID:
        return "invalid"
    if selected:
        return None
    return "empty" if status == RecordStatus.EMPTY else "perplexity"


def _answer_reason(number: int, fields: dict[str, Any], answered: _Answers, scores: dict[str, Any]) -> str | None:
    """Why a record is dropped by its answers, which are added to `scores`; None if it is not."""
    questions = read_questions(open_record(fields))
    if not questions:
        return None
    answers = [answered.take(number, index) for index in range(len(questions))]
    scores["answers"] = answers
    pairs = zip(answers, questions, strict=True)
    same = (answer is not None and is_same_answer(answer, one.answer, one.text) for answer, one in pairs)
    return "answerable" if all(same) else None


def _count(summary: FilterSummary, status: int, number: int, reason: str | None, scores: dict[str, Any]) -> None:
    summary.empty += int(status == RecordStatus.EMPTY)
    if "error" in scores and len(summary.notes) < NOTES:
        summary.notes.append(f"line {number}: {scores['error']}")
    if reason is not None:
        summary.dropped[reason] += 1
        return
    summary.kept += 1
    if scores.get("perplexity") is not None:
        summary.max_perplexity = max(scores["perplexity"], summary.max_perplexity or 0.0)
