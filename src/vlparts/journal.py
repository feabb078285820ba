"""Journal of a long run: rows of JSON in a file that survives a kill, with the settings that they depend on."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Journal", "folder_state"]


class Journal:
    """A file with the settings of a run in its first line, and one row of results in each further line.

    A row is on disk when `add` returns. A kill can leave an incomplete last line, which is cut off when the journal is
    opened again. Use it in a `with` block, or call `close`.

    Args:
        path: The file; made if it does not exist.
        settings: What the rows depend on, as JSON data.
        argument: The argument that the file belongs to, for error messages.
        restart: Discard the rows of an earlier run, whatever its settings. None where callers do not offer it.

    Raises:
        ValueError: If the file is something else, or the journal of a run with other settings; names the settings.
    """

    def __init__(
        self, path: Path, settings: dict[str, Any], *, argument: str = "output", restart: bool | None = None
    ) -> None:
        self.path = path
        self._argument = argument
        started_anew = "delete the file, or set `restart` to start anew"
        self._advice = "or choose another folder" if restart is None else started_anew
        settings = json.loads(json.dumps(settings))
        if not path.parent.is_dir():
            raise ValueError(f"`{argument}` must be in an existing folder, got {path}.")
        if restart or not path.exists() or not _cut(path):
            path.write_text(json.dumps({"settings": settings}, ensure_ascii=False) + "\n", encoding="utf-8")
        self._check(settings)
        self._file = path.open("a", encoding="utf-8", newline="\n")

    def _check(self, settings: dict[str, Any]) -> None:
        first = next(self._lines())
        found = first.get("settings") if isinstance(first, dict) else None
        if not isinstance(found, dict):
            raise ValueError(f"`{self._argument}`: {self.path} must be the journal of an earlier run, or not exist.")
        names = [name for name in {**found, **settings} if found.get(name) != settings.get(name)]
        if names:
            changes = "; ".join(f"{name}: {found.get(name)!r:.80}, now {settings.get(name)!r:.80}" for name in names)
            raise ValueError(
                f"`{self._argument}`: {self.path} has results of a run with other settings ({changes}). Repeat "
                f"that run, {self._advice}."
            )

    def _lines(self) -> Iterator[Any]:
        with self.path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield json.loads(line)
                except ValueError:
                    raise ValueError(
                        f"`{self._argument}`: {self.path}, line {number} is not a line of a journal."
                    ) from None

    def rows(self) -> Iterator[dict[str, Any]]:
        """Read the rows, one at a time."""
        lines = self._lines()
        next(lines)
        return lines

    def add(self, row: dict[str, Any]) -> None:
        """Write a row to disk."""
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _cut(path: Path, block: int = 2**16) -> int:
    """Cut an incomplete last line off a file and return the size of what is left."""
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - block)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        file.truncate(end)
    return end


def folder_state(folder: Path) -> dict[str, str]:
    """The path of a folder, and a digest of the names, sizes and modification times of the files in it."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        found = path.stat()
        digest.update(f"{path.name}\0{found.st_size}\0{found.st_mtime_ns}\n".encode())
    return {"folder": str(folder.resolve()), "files": digest.hexdigest()[:16]}
