"""Training data as rows of a dataset of the library `datasets`, and each row as a training record.

A [`Source`] has the rows and their reader. The rows of a Parquet or Arrow file are its rows, with images undecoded.
The rows of a JSON Lines file are positions of its lines, and those of tar shards positions of files: so that lines of
different shapes can be mixed, errors name the line, and nothing is copied.
"""

import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from datasets import Dataset, IterableDataset, concatenate_datasets, load_dataset, load_from_disk

from .record_formats import FIELDS
from .records import Line, RecordError, parse_fields
from .source_files import FileState, JsonLines, TarShards, digest, index_lines, index_tars, stream_tars

__all__ = ["Columns", "Reader", "RecordReader", "Source", "open_source"]

_SAVED = ("state.json", "dataset_dict.json")  # files of `save_to_disk`
_ARROW, _PARQUET, _TAR = ".arrow", ".parquet", ".tar"


class Reader(Protocol):
    """Turns rows into the fields of records; small, so that it can be sent to other processes.

    Attributes:
        name: Name of the data in messages.
        root: Folder that relative paths of images refer to.
    """

    name: str
    root: Path

    def fields(self, row: dict[str, Any]) -> dict[str, Any]:
        """The fields of the record of a row, for `parse_record`; ValueError if there are none."""

    def place(self, row: dict[str, Any], index: int | None) -> str:
        """Where a row is, for messages: `index` is its position in the dataset, None where that is unknown."""

    def number(self, row: dict[str, Any], index: int | None) -> int:
        """A number of a row, such as its line, by which random choices are made."""


class Columns:
    """Reads rows whose columns are the fields of records.

    A null in Arrow is a key that is not there: fields that only some blocks or records have are null in all others.

    Args:
        name: Name of the data in messages.
        root: Folder that relative paths of images refer to.
    """

    def __init__(self, name: str, root: Path) -> None:
        self.name = name
        self.root = root

    def fields(self, row: dict[str, Any]) -> dict[str, Any]:
        """The columns of a row without nulls."""
        found: dict[str, Any] = _without_nulls(row)
        return found

    def place(self, row: dict[str, Any], index: int | None) -> str:
        """The row by its position, from 0."""
        return self.name if index is None else f"{self.name}, row {index}"

    def number(self, row: dict[str, Any], index: int | None) -> int:
        """The position of the row, from 1."""
        return 0 if index is None else index + 1


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class RecordReader:
    """Turns rows into records.

    Args:
        reader: Turns a row into fields.
        columns: Names that the data has for fields of records, by the names of ours.
        ignored: Names of the data that are not used.
        sample_weight_field: Field of the records with their loss weight, if any.
    """

    reader: Reader
    columns: Mapping[str, str] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    sample_weight_field: str | None = None

    @property
    def name(self) -> str:
        """Name of the data in messages."""
        return self.reader.name

    @property
    def root(self) -> Path:
        """Folder that relative paths of images refer to."""
        return self.reader.root

    def line(self, row: dict[str, Any], index: int | None = None) -> Line:
        """The record of a row, with its number and weight.

        Args:
            row: The row.
            index: Its position in the dataset, if that is known.

        Raises:
            RecordError: If it is invalid; names the place of the row.
        """
        try:
            fields = self._named(self.reader.fields(row))
            return Line(self.reader.number(row, index), *parse_fields(fields, self.sample_weight_field))
        except ValueError as error:
            raise self.error(row, index, error) from None

    def error(self, row: dict[str, Any], index: int | None, reason: object) -> RecordError:
        """The error of a row, with its place."""
        return RecordError(f"{self.reader.place(row, index)}: {reason}")

    def _named(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields of a record by our names, without those that are ignored."""
        if not self.columns and not self.ignored:
            return fields
        ours = {theirs: name for name, theirs in self.columns.items()}
        found = {ours.get(name, name): value for name, value in fields.items() if name not in self.ignored}
        if len(found) < len(fields.keys() - self.ignored):
            names = ", ".join(repr(name) for name in self.columns if name in fields and self.columns[name] in fields)
            raise ValueError(f"The record has {names} beside what `columns` gives this name.")
        return found

    def check_names(self, names: Sequence[str]) -> None:
        """Check the names of columns.

        Raises:
            ValueError: If one is unknown, or one of `columns` or `ignored` is not there.
        """
        missing = [name for name in (*self.columns.values(), *sorted(self.ignored)) if name not in names]
        if missing:
            raise ValueError(
                f"`columns` and `ignore_columns` must name columns of {self.name}, which are "
                f"{', '.join(map(repr, names))}, got {', '.join(map(repr, missing))}."
            )
        known = {*FIELDS, *self.columns.values(), *self.ignored, self.sample_weight_field}
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(
                f"{self.name} has the columns {', '.join(map(repr, unknown))}, which no training record has. "
                "Give them the names of fields of records in `columns`, such as {'images': 'pictures'}, or name them "
                f"in `ignore_columns`. Fields of records are {', '.join(sorted(FIELDS))}."
            )


@dataclass(frozen=True)
class Source:
    """Rows of training data and what turns them into records.

    Args:
        rows: The rows. Those of a `Dataset` have the format "arrow", in which images are not decoded.
        records: Turns a row, as a dictionary, into a record.
        identity: Digest of what the rows are, for caches: the path, size and time of modification of the files, or the
            fingerprint of a dataset. None for data that is an `IterableDataset`.
    """

    rows: Dataset | IterableDataset
    records: RecordReader
    identity: str | None

    def __len__(self) -> int:
        return len(self.rows)

    def listed(self, indices: Sequence[int] | slice) -> list[dict[str, Any]]:
        """Rows of a map-style source as dictionaries."""
        found: list[dict[str, Any]] = self.rows[indices].to_pylist()
        return found

    def lines(self, on_error: str = "raise") -> Iterator[Line]:
        """Yield the records in order, one at a time; with "skip", without those that are invalid."""
        rows = self.rows if isinstance(self.rows, IterableDataset) else self._all_listed()
        for index, row in enumerate(rows):
            try:
                yield self.records.line(row, index)
            except RecordError:
                if on_error == "raise":
                    raise

    def _all_listed(self, chunk: int = 64) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self), chunk):
            yield from self.listed(slice(start, start + chunk))


def open_source(
    data: str | Path | Dataset | IterableDataset,
    *,
    streaming: bool = False,
    argument: str = "data",
    columns: Mapping[str, str] | None = None,
    ignore_columns: Sequence[str] = (),
    sample_weight_field: str | None = None,
    num_shards: int = 64,
) -> Source:
    """Open training data.

    Args:
        data: A JSON Lines file; a Parquet or Arrow file; a folder of Parquet, Arrow or tar files, or of
            `Dataset.save_to_disk`; a WebDataset tar shard, or a pattern of such files like "shards/*.tar"; or a
            dataset of the library `datasets`.
        streaming: Return an `IterableDataset`, which reads what it yields, with `state_dict`. Files of Parquet and
            Arrow are then not copied to the cache, and tar shards not indexed.
        argument: Name of `data` in messages.
        columns: Names that the data has for fields of records, by the names of ours, such as `{"images": "pictures"}`.
        ignore_columns: Names of columns, fields or extensions that are not used.
        sample_weight_field: Field of the records with their loss weight, if any.
        num_shards: Number of shards of a stream of a JSON Lines file or a `Dataset`.

    Raises:
        ValueError: If the data does not exist, is none of these, has unknown columns, or is an `IterableDataset`
            without `streaming`.
    """
    rows, reader, identity = _open(data, streaming, argument, tuple(ignore_columns))
    renamed = dict(columns or {})
    records = RecordReader(reader, renamed, frozenset(ignore_columns), sample_weight_field)
    if isinstance(reader, Columns) and rows.column_names is not None:
        records.check_names(rows.column_names)
    if streaming and isinstance(rows, Dataset):
        rows = rows.to_iterable_dataset(num_shards=min(num_shards, len(rows)))
    settings = [identity, renamed, sorted(ignore_columns), sample_weight_field, str(reader.root.resolve())]
    found = None if identity is None else digest(settings)
    if isinstance(rows, IterableDataset):
        return Source(rows.decode(False) if rows.features else rows, records, found)
    return Source(rows.with_format("arrow"), records, found)


def _open(
    data: str | Path | Dataset | IterableDataset, streaming: bool, argument: str, ignored: Sequence[str]
) -> tuple[Dataset | IterableDataset, Reader, Any]:
    """The rows, their reader, and what they are as JSON data."""
    if isinstance(data, IterableDataset):
        if not streaming:
            raise ValueError(
                f"`{argument}` must be a Dataset unless it is streamed, got an IterableDataset; pass streaming=True."
            )
        return data, Columns(f"`{argument}`", Path()), None
    if isinstance(data, Dataset):
        if data.format["type"] == "custom":
            raise ValueError(f"`{argument}` must be a Dataset without a transform, got one with `set_transform`.")
        return data, Columns(f"`{argument}`", Path()), data._fingerprint
    path = Path(data)
    if any((path / name).exists() for name in _SAVED):
        return _load_from_disk(path, argument), Columns(str(path), path), [*map(FileState.of, sorted(path.iterdir()))]
    files = _find_files(path, argument)
    kind = files[0].suffix.lower()
    if kind == _TAR:
        shards = TarShards(files, str(path), ignored)
        return stream_tars(shards) if streaming else index_tars(shards), shards, [*shards.files]
    if kind in (_PARQUET, _ARROW):
        names = [str(one) for one in files]
        reader = Columns(str(path), path if path.is_dir() else files[0].parent)
        states = [FileState.of(one) for one in files]
        if kind == _ARROW and not streaming:
            return concatenate_datasets([Dataset.from_file(one) for one in names]), reader, states
        builder = kind.removeprefix(".")
        return load_dataset(builder, data_files=names, split="train", streaming=streaming), reader, states
    lines = JsonLines(path)
    return index_lines(lines), lines, [lines.file]


def _load_from_disk(folder: Path, argument: str) -> Dataset:
    found = load_from_disk(folder)
    if not isinstance(found, Dataset):
        raise ValueError(f"`{argument}` {folder} has the splits {', '.join(found)}; expected the folder of one.")
    return found


def _find_files(path: Path, argument: str) -> list[Path]:
    """The file, the data files of a folder, or those that match a pattern, sorted."""
    if path.is_file():
        return [path]
    if path.is_dir():
        files = [one for one in sorted(path.iterdir()) if one.suffix.lower() in (_PARQUET, _ARROW, _TAR)]
    else:
        files = [Path(one) for one in sorted(glob.glob(str(path))) if Path(one).is_file()]
    if not files:
        raise ValueError(
            f"`{argument}` must be a JSON Lines file, got {path}, which is not a file; a folder or a pattern must "
            "have Parquet, Arrow or tar files."
        )
    kinds = sorted({one.suffix.lower() for one in files})
    if len(kinds) > 1:
        raise ValueError(f"`{argument}` {path} must have files of one kind, got {', '.join(kinds)}.")
    return files
