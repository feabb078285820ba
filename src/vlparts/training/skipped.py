"""Records that were skipped while a model is trained, in a file."""

import json
import os
from pathlib import Path

__all__ = ["SkippedRecords"]


class SkippedRecords:
    """A JSON Lines file with one row per record that was skipped, `{"skipped": message}`, whichever process did it.

    Processes may append at the same time, since each row is one write. A row that is incomplete does not count.

    Args:
        path: The file; made with the first row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: dict[str, None] = {}
        self._read = 0

    def add(self, message: str) -> None:
        """Add a record; one that is there already is not added again."""
        if message in self._found or message in self.messages():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        row = json.dumps({"skipped": message}, ensure_ascii=False) + "\n"
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(file, row.encode())
        finally:
            os.close(file)

    def messages(self) -> list[str]:
        """The messages so far."""
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self._read)
                new = file.read().rpartition(b"\n")[0]
            for row in new.splitlines():
                self._found[json.loads(row)["skipped"]] = None
            self._read += len(new) + bool(new)
        return [*self._found]

    def clear(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)
        self._found, self._read = {}, 0
