"""Records that were left out while a model is trained, in a file."""

import json
from pathlib import Path

__all__ = ["SkippedRecords"]


class SkippedRecords:
    """A JSON Lines file with one row per record that was left out, `{"skipped": message}`, whichever process did it.

    Args:
        path: The file; made with the first row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, message: str) -> None:
        """Add a record; one that is there already is not added again."""
        if message not in self.messages():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"skipped": message}, ensure_ascii=False) + "\n")

    def messages(self) -> list[str]:
        """The messages so far."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["skipped"] for line in lines]
