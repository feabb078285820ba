"""The passes over a file of records by which it is filtered: check, score, ask."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tqdm.auto import tqdm

from ...coordinates.io.json_lines import parse_object
from ...journal import Journal
from ..records import PageRecord, Record, RecordError, numbered_lines
from .answers import answer_batch, encode_question
from .perplexity import encode, like_length, score_batch, select_lowest
from .texts import open_record, read_questions, scored_text

__all__ = ["RecordPasses", "RecordStatus"]

T = TypeVar("T")


class RecordStatus(IntEnum):
    """Status of a line of a file."""

    ABSENT = 0
    VALID = 1
    EMPTY = 2  # a record without a token to score
    INVALID = 3


class _Ids(NamedTuple):
    """Token ids of the scored text of a record, or of one of its questions."""

    line: int
    question: int
    ids: list[int]


class RecordPasses:
    """Passes over a file of records, with one status, perplexity and number of tokens in memory for each line.

    Args:
        source: JSON Lines file.
        model: A causal language model.
        tokenizer: Its tokenizer.
        text: Text whose perplexity is computed, see [`scored_text`]; None for no perplexity.
        max_length: As in [`compute_perplexities`].
        progress: Show progress bars on a terminal.

    Attributes:
        status: Status of each line, `(lines + 1,)` uint8; lines are counted from 1.
        perplexities: Perplexity of each line, `(lines + 1,)` float64; NaN where there is none.
        tokens: Number of scored tokens, `(lines + 1,)` int32.
        digest: Digest of the file's content.
    """

    def __init__(
        self, source: Path, model: Any, tokenizer: Any, text: str | None, max_length: int | None, progress: bool
    ) -> None:
        self.source, self.model, self.tokenizer = source, model, tokenizer
        self.text, self.max_length = text, max_length
        self._hide = None if progress else True  # None hides the bar where there is no terminal
        self.status = np.zeros(0, dtype=np.uint8)
        self.perplexities = np.zeros(0)
        self.tokens = np.zeros(0, dtype=np.int32)
        self.digest = ""

    def check(self, on_error: str) -> None:
        """Find the status of every line.

        Args:
            on_error: "raise" on the first invalid record, or "skip" it.

        Raises:
            RecordError: If a record is invalid and `on_error` is "raise", or if no record is valid.
        """
        status, digest = bytearray(1), hashlib.sha256()
        for number, line in self.counted(numbered_lines(self.source), "checking"):
            digest.update(b"%d " % number + line)
            found, reason = self.line_status(line)
            if found == RecordStatus.INVALID and on_error == "raise":
                raise self._error(number, reason)
            status.extend(bytes(number - len(status)))
            status.append(found)
        self.status, self.digest = np.frombuffer(status, dtype=np.uint8), digest.hexdigest()
        if not np.isin(self.status, (RecordStatus.VALID, RecordStatus.EMPTY)).any():
            raise RecordError(f"{self.source}: expected at least one valid record, got none.")

    def line_status(self, line: bytes) -> tuple[RecordStatus, str]:
        """Return the status of a line, and the reason if it is not valid."""
        try:
            record = open_record(parse_object(line))
            if self.text is not None and len(self._encode(record)) < 2:
                return RecordStatus.EMPTY, "The text has no token to score."
        except RecursionError:
            return RecordStatus.INVALID, "The JSON is nested too deeply."
        except ValueError as error:
            return RecordStatus.INVALID, str(error)
        return RecordStatus.VALID, ""

    def _encode(self, record: Record | PageRecord) -> list[int]:
        return encode(self.model, self.tokenizer, scored_text(record, self.text or "all"), self.max_length)

    def score(self, journal: Journal, batch_size: int) -> None:
        """Compute the perplexities of valid records that are not in a journal, and enter them into it.

        Args:
            journal: The journal.
            batch_size: Records per batch.

        Raises:
            ValueError: If a perplexity is not finite.
        """
        self.perplexities = np.full(len(self.status), np.nan)
        self.tokens = np.zeros(len(self.status), dtype=np.int32)
        wanted = self.status == RecordStatus.VALID

        def compute(batch: list[_Ids]) -> dict[str, Any]:
            found = score_batch(self.model, [item.ids for item in batch])
            for item, one in zip(batch, found, strict=True):
                if one.value is None or not math.isfinite(one.value):
                    raise self._error(item.line, f"`model` must give a finite perplexity, got {one.value}.")
            return {"perplexity": [one.value for one in found], "tokens": [one.tokens for one in found]}

        items = (_Ids(number, 0, self._encode(record)) for number, record in self._records(wanted))
        with tqdm(total=int(wanted.sum()), desc="scoring", disable=self._hide, leave=False) as bar:
            for row in _replay(journal, items, batch_size, compute):
                self.perplexities[row["line"]], self.tokens[row["line"]] = row["perplexity"], row["tokens"]
                bar.update(len(row["line"]))

    def select(self, keep: float, max_perplexity: float | None) -> np.ndarray:
        """Choose lines by perplexity.

        Args:
            keep: As in [`select_lowest`].
            max_perplexity: Largest perplexity, instead of a share; None for a share.

        Returns:
            `(lines + 1,)` bool.
        """
        if max_perplexity is not None:
            return self.perplexities <= max_perplexity  # False for NaN
        selected = np.zeros(len(self.status), dtype=bool)
        selected[select_lowest(self.perplexities, keep)] = True
        return selected

    def ask(
        self,
        journal: Journal,
        batch_size: int,
        selected: np.ndarray,
        max_new_tokens: int,
        template_options: dict[str, Any] | None,
    ) -> None:
        """Answer the questions of records without their images that are not in a journal, and enter them into it.

        Args:
            journal: The journal.
            batch_size: Questions per batch.
            selected: The lines whose questions are asked, `(lines + 1,)` bool.
            max_new_tokens: As in [`generate_answers`].
            template_options: As in [`generate_answers`].

        Raises:
            RecordError: If the chat template cannot render a question.
        """

        def items() -> Iterator[_Ids]:
            for number, record in self.counted(self._records(selected), "asking without images", selected):
                for index, question in enumerate(read_questions(record)):
                    try:
                        ids = encode_question(self.model, self.tokenizer, question, max_new_tokens, template_options)
                    except ValueError as error:
                        raise self._error(number, error) from None
                    yield _Ids(number, index, ids)

        def compute(batch: list[_Ids]) -> dict[str, Any]:
            prompts = [item.ids for item in batch]
            answers = answer_batch(self.model, self.tokenizer, prompts, max_new_tokens)
            return {"question": [item.question for item in batch], "answer": answers}

        for _ in _replay(journal, items(), batch_size, compute):
            pass

    def _records(self, wanted: np.ndarray) -> Iterator[tuple[int, Record | PageRecord]]:
        """Read the records of the lines that are True in `wanted`."""
        for number, line in numbered_lines(self.source):
            if wanted[number]:
                yield number, open_record(parse_object(line))

    def counted(self, items: Iterable[T], name: str, among: np.ndarray | None = None) -> Iterator[T]:
        """Yield items with a progress bar.

        Args:
            items: The items.
            name: Name of the bar.
            among: An array with one nonzero value for each item; None if their number is unknown.
        """
        total = None if among is None else int(np.count_nonzero(among))
        yield from tqdm(items, total=total, desc=name, disable=self._hide, leave=False)

    def _error(self, number: int, reason: object) -> RecordError:
        return RecordError(f"{self.source}, line {number}: {reason}")


def _replay(
    journal: Journal, items: Iterable[_Ids], batch_size: int, compute: Callable[[list[_Ids]], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield a row for each batch of items: from the journal as far as it goes, then computed and entered into it."""
    rows = journal.rows()
    for batch in like_length(items, batch_size, lambda item: len(item.ids)):
        lines = [item.line for item in batch]
        row = next(rows, None)
        if row is None:
            row = {"line": lines, **compute(batch)}
            journal.add(row)
        elif row.get("line") != lines:
            raise ValueError(f"{journal.path} does not fit to the records; delete it, or set `restart` to start anew.")
        yield row
