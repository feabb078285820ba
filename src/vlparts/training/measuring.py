"""Lengths of the samples of a source, from the headers of images and the texts, kept in the cache of `datasets`."""

import hashlib
import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import datasets
import numpy as np
import pyarrow as pa
from datasets import Features, Value

from .encoding import Measured, Sample
from .records import PageRecord, Record, RecordError
from .source_files import cache_folder, digest
from .sources import RecordReader, Source

__all__ = ["Encoder", "Lengths", "measure_samples"]

_FEATURES = Features(
    {
        "length": Value("int32"),
        "image_tokens": Value("int32"),
        "targets": Value("int32"),
        "weighted": Value("bool"),
        "error": Value("string"),
    }
)
_BATCH = 128  # records per call; with images in memory, this many are read at once
_VERSIONS = ("vlparts", "transformers", "tokenizers", "pillow")


class Encoder(Protocol):
    """Encodes records to samples, and measures them without pixels.

    Attributes:
        processor: A processor with a method `save_pretrained`.
        max_length: Maximum length of a sample; None for no limit.
    """

    processor: Any
    max_length: int | None

    @property
    def settings(self) -> dict[str, Any]:
        """What lengths depend on beside the processor and the records, as JSON data."""

    def __call__(self, record: Record | PageRecord, number: int = 0) -> Sample:
        """Encode a record; ValueError if that is not possible."""

    def measure(self, records: list[tuple[Record | PageRecord, int]]) -> list[Measured | ValueError]:
        """The lengths of the samples of records with their numbers, whatever `max_length` is."""

    def too_long(self, length: int, image_tokens: int) -> ValueError:
        """The error of a sample that is longer than `max_length`."""


@dataclass(frozen=True)
class Lengths:
    """The usable rows of a source.

    Args:
        rows: `(n,)` int64: positions of the rows.
        lengths: `(n,)` int32: tokens of each sample.
        targets: Number of tokens with loss, over all of them.
        weighted: Whether a record has a loss weight of its own.
        skipped: Error messages of the other rows.
        cache: File that keeps the lengths.
    """

    rows: np.ndarray
    lengths: np.ndarray
    targets: int
    weighted: bool
    skipped: list[str]
    cache: Path


def measure_samples(
    source: Source,
    encoder: Encoder,
    on_error: str = "raise",
    *,
    check_pixels: bool = False,
    num_proc: int | None = None,
    progress: bool = True,
) -> Lengths:
    """Measure the samples of a source, or load their lengths if the same source was measured before.

    The cache is found by the source, the content of the processor, the settings of the encoder and the versions of
    vlparts, transformers, tokenizers and Pillow. Image files that the records name are not part of it.

    Args:
        source: Rows of a `Dataset`.
        encoder: Encodes the records.
        on_error: "raise" on an invalid record, or "skip" it.
        check_pixels: Encode each record once, so that damaged images are found now.
        num_proc: Number of processes; None for this one.
        progress: Show a progress bar.

    Raises:
        RecordError: If a record is invalid under "raise", or none is valid.
    """
    key = digest([source.identity, _processor_digest(encoder.processor), encoder.settings, check_pixels, _versions()])
    cache = cache_folder() / f"lengths-{key}.arrow"
    rows = source.rows
    with _progress_bars(progress):
        measured = rows.map(
            _Measure(source.records, encoder, on_error, check_pixels),
            batched=True,
            batch_size=_BATCH,
            with_indices=True,
            remove_columns=rows.column_names,
            features=_FEATURES,
            cache_file_name=str(cache),
            new_fingerprint=key,
            load_from_cache_file=True,
            num_proc=None if num_proc is None else min(num_proc, len(rows)) or None,
            desc=f"Measuring {Path(source.records.name).name}",
        )
    return _usable(measured.data, source, encoder, on_error, cache)


@dataclass(frozen=True)
class _Measure:
    """Measures a batch of rows in any process."""

    records: RecordReader
    encoder: Encoder
    on_error: str
    check_pixels: bool

    def __call__(self, table: pa.Table, indices: list[int]) -> dict[str, Any]:
        rows = table.to_pylist()
        found: list[Measured | RecordError] = []
        weighted = [False] * len(rows)
        valid = []
        for place, (row, index) in enumerate(zip(rows, indices, strict=True)):
            try:
                line = self.records.line(row, index)
            except RecordError as error:
                found.append(error)
                continue
            found.append(RecordError())
            weighted[place] = line.weight is not None
            valid.append((place, line))
        measured = self._measured([(line.record, line.number) for _, line in valid])
        for (place, _), one in zip(valid, measured, strict=True):
            if isinstance(one, ValueError):
                found[place] = self.records.error(rows[place], indices[place], one)
            else:
                found[place] = one
        if self.on_error == "raise":
            for one in found:
                if isinstance(one, RecordError):
                    raise one
        empty = Measured(0, 0, 0)
        numbers = np.array([one if isinstance(one, Measured) else empty for one in found], dtype=np.int32)
        return {
            "length": numbers[:, 0],
            "image_tokens": numbers[:, 1],
            "targets": numbers[:, 2],
            "weighted": weighted,
            "error": [None if isinstance(one, Measured) else str(one) for one in found],
        }

    def _measured(self, records: list[tuple[Record | PageRecord, int]]) -> list[Measured | ValueError]:
        measured = self.encoder.measure(records)
        if not self.check_pixels:
            return measured
        found: list[Measured | ValueError] = []
        for one, (record, number) in zip(measured, records, strict=True):
            try:
                if isinstance(one, Measured) and not _exceeds(one.length, self.encoder.max_length):
                    self.encoder(record, number)
                found.append(one)
            except ValueError as error:
                found.append(error)
        return found


def _exceeds(length: int, limit: int | None) -> bool:
    return limit is not None and length > limit


def _usable(table: Any, source: Source, encoder: Encoder, on_error: str, cache: Path) -> Lengths:
    """The rows without an error that are not too long."""
    lengths = table.column("length").to_numpy()
    errors = table.column("error")
    valid = ~errors.is_valid().to_numpy()
    limit = encoder.max_length
    usable = valid if limit is None else valid & (lengths <= limit)
    skipped = []
    for index in np.flatnonzero(~usable).tolist():
        if not valid[index]:
            error = RecordError(errors[index].as_py())
        else:
            reason = encoder.too_long(int(lengths[index]), table.column("image_tokens")[index].as_py())
            (row,) = source.listed([index])
            error = source.records.error(row, index, reason)
        if on_error == "raise":
            raise error
        skipped.append(str(error))
    if not usable.any():
        first = f" First skipped: {skipped[0]}" if skipped else ""
        raise RecordError(
            f"{source.records.name}: expected at least one valid record, got none ({len(skipped)} skipped).{first}"
        )
    rows = np.flatnonzero(usable)
    targets = int(table.column("targets").to_numpy()[rows].sum(dtype=np.int64))
    weighted = bool(table.column("weighted").to_numpy()[rows].any())
    return Lengths(rows, np.ascontiguousarray(lengths[rows]), targets, weighted, skipped, cache)


def _processor_digest(processor: Any) -> str:
    """Digest of the files that a processor saves: tokenizer, chat template and options of the image processor."""
    found = hashlib.sha256()
    with TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                found.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def _versions() -> list[str]:
    return [importlib.metadata.version(name) for name in _VERSIONS]


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """Without `shown`, the progress bars of `datasets` are off, as they may be already."""
    if shown or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
