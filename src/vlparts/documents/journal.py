"""The journal of an output folder: its settings, its documents, and a line for each page that is done."""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

__all__ = ["Journal"]

PREFIX = ".vlparts_ocr"
JOURNAL = f"{PREFIX}.jsonl"
LOCK = f"{PREFIX}.lock"


class Journal:
    """Which pages of which documents are done in a folder, and their answers.

    The first line has the settings. A line for each document has its path, size and time of modification, and the name
    of its results; a line for each page has its answer. A document that has changed since gets a new line, and its
    pages are to be done again. Lines are only appended, so that a kill loses at most those of one batch.

    Args:
        folder: A new or empty folder, or that of an interrupted or finished run with the same settings.
        paths: Paths of the documents of the run.
        settings: What the results depend on, as JSON data.

    Raises:
        ValueError: If the folder cannot be made or written, is used by another run, has files and no journal, or has
            pages with other settings, or if the journal is damaged.
    """

    def __init__(self, folder: Path, paths: Sequence[Path], settings: dict[str, Any]) -> None:
        self.names: dict[str, str] = {}
        """Names of results by the absolute path of the document."""
        self.rows: defaultdict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
        """Rows of pages that are done, by name and page number."""
        self._stamps: dict[str, list[int]] = {}
        self._path = folder / JOURNAL
        self._lock = FileLock(folder / LOCK, timeout=0)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"`output` must be a folder, got the file {folder}.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            foreign = any(not path.name.startswith(PREFIX) for path in folder.iterdir())
            if foreign and not self._path.exists():
                raise ValueError(f"`output` must be a new or empty folder, or that of an earlier run, got {folder}.")
            self._lock.acquire()
        except Timeout:
            raise ValueError(f"`output` {folder} is in use by another run.") from None
        except (OSError, NotImplementedError) as error:  # the latter without locks
            raise ValueError(f"`output` {folder} cannot be written: {error}") from None
        try:
            self._file = self._open(json.loads(json.dumps(settings)))
            self._enter_documents(paths)
        except BaseException:
            self._lock.release()
            raise

    def _open(self, settings: dict[str, Any]) -> Any:
        """Read the journal, if there is one, and open it for further lines."""
        data = self._path.read_bytes() if self._path.exists() else b""
        # A kill can leave an incomplete last line, which is cut off.
        lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
        found = self._read(lines) if lines else None
        if self.rows and found != settings:
            raise ValueError(_difference(self._path.parent, found or {}, settings))
        if found != settings:  # no page depends on them yet
            self.names, self._stamps, lines = {}, {}, [_line({"settings": settings})]
            self._path.write_bytes(lines[0])
        file = self._path.open("r+b")
        file.truncate(sum(map(len, lines)))
        file.seek(0, os.SEEK_END)
        return file

    def _read(self, lines: Iterable[bytes]) -> Any:
        """Read lines, and return the settings."""
        settings = None
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                if number == 1:
                    settings = row["settings"]
                elif "path" in row:
                    self._enter(row)
                else:
                    self.rows[row["document"]][row["page"]] = row
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"`output` has a damaged journal: {self._path}, line {number}.") from None
        return settings

    def _enter(self, row: dict[str, Any]) -> None:
        """Enter a document; rows of an earlier version are dropped."""
        self.names[row["path"]], self._stamps[row["path"]] = row["document"], row["file"]
        self.rows.pop(row["document"], None)

    def _enter_documents(self, paths: Sequence[Path]) -> None:
        names = _choose_names(list(map(os.path.abspath, paths)), self.names)
        new = []
        for path in map(os.path.abspath, paths):
            status = os.stat(path)
            stamp = [status.st_size, status.st_mtime_ns]
            if self._stamps.get(path) != stamp:
                row = {"document": names[path], "path": path, "file": stamp}
                self._enter(row)
                new.append(row)
        self._append(new)

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Enter the pages of a batch.

        Args:
            rows: For each page "document", the name, "page", its number, and further JSON data.
        """
        added = list(rows)
        self._append(added)
        for row in added:
            self.rows[row["document"]][row["page"]] = row

    def _append(self, rows: Sequence[dict[str, Any]]) -> None:
        self._file.write(b"".join(map(_line, rows)))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the journal; another run can use the folder."""
        try:
            self._file.close()
        finally:
            self._lock.release()


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row).encode("ascii") + b"\n"


def _difference(folder: Path, found: dict[str, Any], settings: dict[str, Any]) -> str:
    names = sorted(name for name in found.keys() | settings.keys() if found.get(name) != settings.get(name))
    listed = ", ".join(f"{name} {found.get(name)!r}, not {settings.get(name)!r}" for name in names)
    return f"`output` {folder} has results with other settings: {listed}. Choose another folder."


def _choose_names(paths: Sequence[str], known: dict[str, str]) -> dict[str, str]:
    """Choose a name for the results of each path: its stem, or so much of its end that no two are the same.

    Args:
        paths: Absolute paths.
        known: Names of earlier runs, which stay.
    """
    names = dict(known)
    # Some file systems do not distinguish cases.
    taken = {name.casefold() for name in known.values()}
    shared = Counter(name.casefold() for path in set(paths) for name in set(_possible_names(path)))
    for path in paths:
        if path not in names:
            free = (name for name in _possible_names(path) if shared[name.casefold()] == 1)
            name = next((name for name in free if name.casefold() not in taken), None)
            if name is None:
                raise ValueError(f"Inputs must have different names, got {path} beside others.")
            names[path] = name
            taken.add(name.casefold())
    return names


def _possible_names(path: str) -> Iterator[str]:
    parts = Path(path).parts
    yield Path(path).stem
    for count in range(1, len(parts)):
        yield "_".join(parts[-count:])
