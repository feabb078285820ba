"""Packs of samples from sources that are read once in order, without a pass over them before training."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch.utils.data import IterableDataset, get_worker_info

from ..parts.utils import positive_integer
from .bins import FirstFitPacker
from .encoding import Sample
from .records import RecordError
from .shuffled_rows import Row, RowSource, ShuffledRows

__all__ = ["PackStream", "SampleSource", "StreamedPack"]


class SampleSource(RowSource, Protocol):
    """Rows that readers share, and the samples in them."""

    def encode(self, row: Any) -> Sample:
        """The sample of a row.

        Raises:
            RecordError: If it has none; names the place and the reason.
        """


@dataclass(frozen=True)
class StreamedPack:
    """A pack of a stream.

    Args:
        samples: Its samples, sorted by length.
        stream: Which of the streams of its process it is from.
        state: State of this stream after the pack, as JSON data.
        skipped: Error messages of the broken records that were met since the pack before.
        error: What ends training, such as a broken record; such a pack has no samples.
    """

    samples: list[Sample]
    stream: int
    state: dict[str, Any]
    skipped: list[str]
    error: ValueError | None = None


class _Item(NamedTuple):
    source: int
    row: Row
    sample: Sample

    def place(self) -> list[int]:
        """What a state has of the item."""
        return [self.source, self.row.number, len(self.sample)]


class PackStream(IterableDataset[StreamedPack]):
    """Packs from sources that are mixed by weights, shuffled in buffers and packed in the order of the samples.

    Endless: each source is read epoch after epoch. Each process and each DataLoader worker of it reads a share of its
    own. The packs depend on the arguments, the share, and the number of shares only. Samples that are in no pack at
    the end of an epoch are in packs of the next one, so none is lost.

    The next sample is of the source that is the furthest behind its weight, counting samples, so that the shares are
    kept at all times. Bins are those of [`FirstFitPacker`].

    Args:
        sources: The sources.
        capacity: Tokens of a pack.
        max_items: Maximum number of samples in a pack; None for no limit.
        weights: A positive weight for each source; only ratios matter. None for equal ones.
        shuffle_buffer: Rows in the buffer of each source and reader.
        seed: Seed of the shuffles.
        process: Which process this is, from 0.
        processes: Number of processes.
        on_error: "raise" on a broken record, or "skip" it.

    Attributes:
        states: State of each stream of this process to start from, by its number; empty to start from the beginning.
        first: The stream whose pack comes first.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        sources: Sequence[SampleSource],
        capacity: int,
        max_items: int | None = None,
        *,
        weights: Sequence[float] | None = None,
        shuffle_buffer: int = 1000,
        seed: int = 0,
        process: int = 0,
        processes: int = 1,
        on_error: str = "raise",
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f"`on_error` must be 'raise' or 'skip', got {on_error!r}.")
        if not sources:
            raise ValueError("`sources` must have at least one source, got none.")
        weights = [1.0] * len(sources) if weights is None else [*weights]
        if len(weights) != len(sources) or not all(0 < one < math.inf for one in weights):
            raise ValueError(f"`weights` must be a positive number for each of {len(sources)} sources, got {weights}.")
        self.sources = sources
        self.capacity = positive_integer(capacity, "capacity")
        self.max_items = None if max_items is None else positive_integer(max_items, "max_items")
        self.weights = [weight / sum(weights) for weight in weights]
        self.shuffle_buffer = positive_integer(shuffle_buffer, "shuffle_buffer")
        self.seed = seed
        self.process, self.processes = process, processes
        self.on_error = on_error
        self.states: dict[int, dict[str, Any]] = {}
        self.first = 0

    def settings(self) -> dict[str, Any]:
        """What a state depends on, as JSON data."""
        return {
            "data": dict(zip([source.name for source in self.sources], self.weights, strict=True)),
            "capacity": self.capacity,
            "max_items": self.max_items,
            "shuffle_buffer": self.shuffle_buffer,
            "seed": self.seed,
            "processes": self.processes,
        }

    def __iter__(self) -> Iterator[StreamedPack]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        stream = (worker + self.first) % workers  # a DataLoader takes the packs of its workers in turns
        packs = _Packs(self, stream, self.process * workers + stream, self.processes * workers)
        try:
            if stream in self.states:
                packs.load_state_dict(self.states[stream])
            while True:
                yield packs.next_pack()
        except ValueError as error:  # not raised here: a DataLoader adds the traceback of its worker to the message
            yield StreamedPack([], stream, {}, [], error)


class _Packs:
    """The packs of one share of the sources."""

    def __init__(self, config: PackStream, stream: int, share: int, shares: int) -> None:
        self.config, self.stream = config, stream
        size, seed = config.shuffle_buffer, config.seed
        self._rows = [ShuffledRows(one, share, shares, size, seed) for one in config.sources]
        self._counts = [0] * len(config.sources)  # samples of each source
        self._failing: dict[int, int] = {}  # epoch since which a source had broken records only
        self._packer: FirstFitPacker[_Item] = FirstFitPacker(config.capacity, config.max_items)
        self._ready: list[list[_Item]] = []
        self._skipped: list[str] = []

    def next_pack(self) -> StreamedPack:
        while not self._ready:
            item = self._next_item()
            self._ready += self._packer.add(item, len(item.sample))
        # Attention batches adjacent samples of equal length without copies.
        samples = sorted((item.sample for item in self._ready.pop(0)), key=len)
        skipped, self._skipped = self._skipped, []
        return StreamedPack(samples, self.stream, self.state_dict(), skipped)

    def _next_item(self) -> _Item:
        total = sum(self._counts) + 1
        behind = [weight * total - count for weight, count in zip(self.config.weights, self._counts, strict=True)]
        source = behind.index(max(behind))
        while True:
            row = self._rows[source].draw()
            try:
                item = _Item(source, row, self.config.sources[source].encode(row.value))
            except RecordError as error:
                if self.config.on_error == "raise":
                    raise
                self._skip(source, row, error)
                continue
            self._failing.pop(source, None)
            self._counts[source] += 1
            return item

    def _skip(self, source: int, row: Row, error: RecordError) -> None:
        self._skipped.append(str(error))
        if row.epoch > self._failing.setdefault(source, row.epoch) + 1:
            raise RecordError(
                f"{self.config.sources[source].name}: expected at least one valid record for each reader, got none in "
                f"an epoch. Last skipped: {error}"
            )

    def state_dict(self) -> dict[str, Any]:
        bins = [one["items"] for one in self._packer.state_dict()["bins"]]
        items = [item for one in (*bins, *self._ready) for item in one]
        kept = [[item.row for item in items if item.source == source] for source in range(len(self._rows))]
        return {
            "rows": [rows.state_dict(draws) for rows, draws in zip(self._rows, kept, strict=True)],
            "counts": [*self._counts],
            "bins": [[item.place() for item in one] for one in bins],
            "ready": [[item.place() for item in one] for one in self._ready],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        places = [place for one in (*state["bins"], *state["ready"]) for place in one]
        draws = [
            rows.load_state_dict(before, [number for where, number, _ in places if where == source])
            for source, (rows, before) in enumerate(zip(self._rows, state["rows"], strict=True))
        ]
        bins, self._ready = (
            [[self._restore(draws, *place) for place in one] for one in state[name]] for name in ("bins", "ready")
        )
        lengths = [sum(len(item.sample) for item in one) for one in bins]
        open_bins = [{"items": one, "length": length} for one, length in zip(bins, lengths, strict=True)]
        self._packer.load_state_dict({"bins": open_bins})
        self._counts = [*state["counts"]]

    def _restore(self, draws: list[dict[int, Row]], source: int, number: int, length: int) -> _Item:
        item = _Item(source, row := draws[source][number], self.config.sources[source].encode(row.value))
        if len(item.sample) != length:
            raise ValueError(
                f"{self.config.sources[source].name} has changed: expected a sample of {length} tokens as in the run "
                f"that is resumed, got {len(item.sample)}."
            )
        return item
