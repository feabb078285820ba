"""The file of the records that training skips."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

__all__ = ["SKIPPED", "Skipped", "SkippedRecords"]

SKIPPED = "skipped.jsonl"
"""Name of the file in the folder of a run."""


class Skipped(NamedTuple):
    """A record that was skipped.

    Args:
        place: Where it is, such as "train.jsonl, line 3".
        reason: What is wrong with it.
    """

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


class SkippedRecords:
    """Appends records to a file of JSON Lines with `place` and `reason`, each place once.

    Several processes may append to one file, since each line is one write.

    Args:
        path: The file; made with the first record. Places in it are not added again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places = {one.place for one in self.read()}

    def add(self, records: Iterable[Skipped]) -> None:
        """Append the records that are not in the file, as far as this object and its constructor know."""
        for record in records:
            if record.place in self._places:
                continue
            self._places.add(record.place)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(file, (json.dumps(record._asdict(), ensure_ascii=False) + "\n").encode())
            finally:
                os.close(file)

    def read(self) -> list[Skipped]:
        """The records in the file."""
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().splitlines(keepends=True)
        return [Skipped(**json.loads(line)) for line in lines if line.endswith(b"\n")]
