"""JSON Lines files and tar shards as rows of positions: what a row holds is read from the file on access."""

import hashlib
import json
import os
import tarfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import datasets
import pyarrow as pa
from datasets import Dataset, IterableDataset
from PIL import Image

from ..coordinates.io.json_lines import parse_object, without_bom
from .record_images import ImageBytes

__all__ = ["FileState", "JsonLines", "TarShards", "cache_folder", "digest", "index_lines", "index_tars", "stream_tars"]

_CHUNK = 2**16  # rows of a record batch
_TAR_ROW = pa.schema(
    {"shard": pa.int32(), "key": pa.string(), "names": pa.list_(pa.string()), "spans": pa.list_(pa.int64())}
)


class FileState(NamedTuple):
    """A file, by which results that depend on its content are cached: path, size, and time of modification in ns."""

    path: str
    size: int
    mtime: int

    @classmethod
    def of(cls, path: Path) -> "FileState":
        """The state of a file now."""
        found = path.stat()
        return cls(str(path.resolve()), found.st_size, found.st_mtime_ns)


def digest(value: Any) -> str:
    """Hexadecimal digest of JSON data, 32 characters."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def cache_folder() -> Path:
    """Folder of indices and lengths in the cache of `datasets`; the variable HF_DATASETS_CACHE moves it."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "vlparts"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@lru_cache(maxsize=32)
def _open(state: FileState) -> BinaryIO:
    """The file; read by position, so that processes can share it."""
    return Path(state.path).open("rb", buffering=0)


def _read(state: FileState, start: int, size: int) -> bytes:
    found = os.pread(_open(state).fileno(), size, start)
    while 0 < len(found) < size and (more := os.pread(_open(state).fileno(), size - len(found), start + len(found))):
        found += more
    if len(found) < size:
        raise ValueError(f"{state.path} has become shorter since it was opened.")
    return found


class JsonLines:
    """Reads rows of [`index_lines`]: the objects in the lines of a file.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.root = path.parent
        self.file = FileState.of(path)

    def fields(self, row: dict[str, Any]) -> dict[str, Any]:
        """The JSON object in the line of a row.

        Raises:
            ValueError: If there is none.
        """
        line = _read(self.file, row["start"], row["size"])
        try:
            return parse_object(without_bom(line) if row["line"] == 1 else line)
        except RecursionError:
            raise ValueError("The JSON is nested too deeply.") from None

    def place(self, row: dict[str, Any], index: int | None) -> str:
        """The file and line of a row."""
        return f"{self.name}, line {row['line']}"

    def number(self, row: dict[str, Any], index: int | None) -> int:
        """The line number, from 1."""
        return int(row["line"])


def index_lines(reader: JsonLines) -> Dataset:
    """Number, first byte and size of each line of a JSON Lines file that is not empty."""

    def tables() -> Iterator[pa.Table]:
        numbers, starts, sizes = (array("q") for _ in range(3))
        at = 0
        with Path(reader.file.path).open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if (without_bom(line) if number == 1 else line).strip():
                    numbers.append(number)
                    starts.append(at)
                    sizes.append(len(line))
                at += len(line)
        yield pa.table({"line": pa.array(numbers), "start": pa.array(starts), "size": pa.array(sizes)})

    return _indexed("lines", [reader.file], tables)


class TarShards:
    """Reads rows of [`index_tars`]: the samples of WebDataset tar shards, as the fields of records.

    A sample is the files with one name up to the first dot. It has images, and either "json", the fields of a record
    without its images, or "txt", a caption. Where the fields have images, they are names of files of the sample.

    Args:
        paths: The shards.
        name: The file, folder or pattern that they come from.
        ignored: Extensions of files that are not used.
    """

    def __init__(self, paths: Sequence[Path], name: str, ignored: Sequence[str] = ()) -> None:
        self.name = name
        self.root = paths[0].parent
        self.files = [FileState.of(path) for path in paths]
        self.ignored = frozenset(ignored)

    def fields(self, row: dict[str, Any]) -> dict[str, Any]:
        """The fields of the record of a sample.

        Raises:
            ValueError: If it has files that are unknown, or not one of "json" and "txt".
        """
        spans = iter(row["spans"])
        found = {name: (next(spans), next(spans)) for name in row["names"] if name not in self.ignored}
        texts = [name for name in found if name in ("json", "txt")]
        unknown = [name for name in found if name not in texts and not _is_image(name)]
        if unknown:
            raise ValueError(
                f"The sample has files of unknown types: {', '.join(unknown)}; expected images with 'json' or 'txt'. "
                "Name those that are not used in `ignore_columns`."
            )
        if len(texts) != 1:
            raise ValueError(
                f"The sample must have either 'json' or 'txt', got {' and '.join(texts) or 'neither'}; one of two can "
                "be named in `ignore_columns`."
            )
        shard = self.files[row["shard"]]
        content = _read(shard, *found.pop(texts[0]))
        images = {name: ImageBytes(_read(shard, *span), f"{row['key']}.{name}") for name, span in found.items()}
        if texts == ["txt"]:
            return _caption(content, list(images.values()))
        return _with_images(parse_object(content), row["key"], images)

    def place(self, row: dict[str, Any], index: int | None) -> str:
        """The shard and key of a sample."""
        return f"{self.files[row['shard']].path}, sample {row['key']}"

    def number(self, row: dict[str, Any], index: int | None) -> int:
        """A number of the sample, from its key."""
        return int(digest([row["shard"], row["key"]])[:8], 16)


def _is_image(name: str) -> bool:
    return f".{name.rpartition('.')[2].lower()}" in Image.registered_extensions()


def _caption(content: bytes, images: list[ImageBytes]) -> dict[str, Any]:
    try:
        text = content.decode().strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"The file 'txt' is not valid UTF-8: {error}.") from None
    shown = [{"type": "image"} for _ in images]
    turns = [{"role": "user", "content": shown}, {"role": "assistant", "content": text}]
    return {"images": images, "messages": turns}


def _with_images(fields: dict[str, Any], key: str, images: dict[str, ImageBytes]) -> dict[str, Any]:
    """Put the images of a sample into its fields."""
    names = [name for name in ("image", "images", "page") if fields.get(name) is not None]
    if not images:
        return fields
    if not names:
        return {**fields, "images": list(images.values())}
    known = {**images, **{one.name: one for one in images.values()}}
    changed = dict(fields)
    for name in names:
        given = fields[name] if isinstance(fields[name], list) else [fields[name]]
        missing = [one for one in given if not isinstance(one, str) or one not in known]
        if missing:
            raise ValueError(
                f"{name}: Expected names of files of the sample, {', '.join(images)}, got {missing[0]!r:.80}; "
                f"the field can be named in `ignore_columns`."
            )
        found = [known[one] for one in given]
        changed[name] = found if isinstance(fields[name], list) else found[0]
    return changed


def index_tars(reader: TarShards) -> Dataset:
    """Shard, key, names of files, and their first bytes and sizes in turn, of each sample of tar shards."""

    def tables() -> Iterator[pa.Table]:
        for number in range(len(reader.files)):
            yield pa.Table.from_pylist([*_samples(reader.files, [number])], _TAR_ROW)

    return _indexed("tars", reader.files, tables)


def stream_tars(reader: TarShards) -> IterableDataset:
    """The same rows without an index of all shards; a shard of the dataset is a tar shard."""
    numbers = list(range(len(reader.files)))
    return IterableDataset.from_generator(_samples, gen_kwargs={"files": tuple(reader.files), "numbers": numbers})


def _samples(files: Sequence[FileState], numbers: list[int]) -> Iterator[dict[str, Any]]:
    for number in numbers:
        row: dict[str, Any] | None = None
        try:
            with tarfile.open(files[number].path, "r:") as shard:
                for member in shard:
                    folder, _, file = member.name.rpartition("/")
                    start, _, extension = file.partition(".")
                    if not member.isfile() or not start or not extension:
                        continue
                    key = f"{folder}/{start}" if folder else start
                    if row is None or row["key"] != key:
                        if row is not None:
                            yield row
                        row = {"shard": number, "key": key, "names": [], "spans": []}
                    row["names"].append(extension)
                    row["spans"] += [member.offset_data, member.size]
        except tarfile.TarError as error:
            raise ValueError(f"{files[number].path} is not an uncompressed tar file: {error}.") from None
        if row is not None:
            yield row


def _indexed(kind: str, files: list[FileState], tables: Callable[[], Iterator[pa.Table]]) -> Dataset:
    """The table of an index from the cache, made if it is not there."""
    path = cache_folder() / f"{kind}-{digest([kind, *files])}.arrow"
    if not path.exists():
        scratch = path.with_suffix(f".{os.getpid()}")
        writer: Any = None
        for table in tables():
            writer = writer or pa.ipc.new_stream(str(scratch), table.schema)
            writer.write_table(table, _CHUNK)
        writer.close()
        scratch.replace(path)
    return Dataset.from_file(str(path))
