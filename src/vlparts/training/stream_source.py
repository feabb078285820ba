"""Streamed sources of training data, divided among readers by shards."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from datasets import IterableDataset

from .encoding import Sample
from .sources import Columns, RecordReader, Source

__all__ = ["StreamSource"]


class StreamRow(NamedTuple):
    """A row of a stream.

    Args:
        shard: Its shard.
        position: Its position in the shard.
        columns: Its values.
    """

    shard: int
    position: int
    columns: dict[str, Any]


class StreamSource:
    """A source that readers share, and the encoder of its records.

    In each epoch the shards of the source have another order. Where there are as many shards as readers or more,
    reader i takes every n-th shard from the i-th on; otherwise readers take turns on the rows of one shard. So in each
    epoch the readers together have every row once, and no reader has the same shards in all epochs.

    Args:
        source: The source, opened with `streaming`.
        encoder: Encodes a record and its number to a sample.
        seed: Seed of the order of the shards.
        task: Index of the source among several, for losses by task.

    Raises:
        ValueError: If the rows have a shuffle buffer, or are divided among processes already.
    """

    def __init__(self, source: Source, encoder: Callable[..., Sample], seed: int, task: int = 0) -> None:
        if not isinstance(source.rows, IterableDataset):
            raise ValueError(f"`source` must be opened with streaming=True, got a {type(source.rows).__name__}.")
        if source.rows._distributed is not None:
            raise ValueError(
                f"{source.records.name} must not be divided by `split_dataset_by_node`; each process takes a share."
            )
        if _has_shuffle_buffer(source.rows._ex_iterable):
            raise ValueError(
                f"{source.records.name} must not be shuffled by `IterableDataset.shuffle`, whose buffer is not in its "
                "state; set `shuffle_buffer`."
            )
        self.name = source.records.name
        self.encoder = encoder
        self.seed = seed
        self.task = task
        self._rows = source.rows
        self._records = source.records

    def rows(self, share: int, shares: int, epoch: int) -> "_SharedRows":
        """The rows of one of several shares in the order of an epoch."""
        order = list(range(self._rows.num_shards))
        random.Random(f"{self.seed}-{epoch}").shuffle(order)
        if len(order) >= shares:
            return _SharedRows(self._rows, order[share::shares], epoch, 0, 1)
        readers = len(range(share % len(order), shares, len(order)))
        return _SharedRows(self._rows, [order[share % len(order)]], epoch, share // len(order), readers)

    def encode(self, row: StreamRow) -> Sample:
        """The sample of a row.

        Raises:
            RecordError: If it has none; names the place and the reason.
        """
        records = self._reader(row)
        line = records.line(row.columns, row.position)
        try:
            sample = self.encoder(line.record, line.number)
        except ValueError as error:
            raise records.error(row.columns, row.position, error) from None
        return replace(sample, weight=1.0 if line.weight is None else line.weight, task=self.task)

    def _reader(self, row: StreamRow) -> RecordReader:
        """The reader of a row, which names the shard where positions are those in a shard."""
        reader = self._records.reader
        if self._rows.num_shards == 1 or not isinstance(reader, Columns):
            return self._records
        return replace(self._records, reader=Columns(f"{reader.name}, shard {row.shard}", reader.root))


def _has_shuffle_buffer(rows: Any) -> bool:
    """Whether the pipeline of an IterableDataset has a shuffle buffer."""
    before = [one for name in ("ex_iterable", "ex_iterables") for one in _listed(getattr(rows, name, None))]
    return type(rows).__name__ == "BufferShuffledExamplesIterable" or any(map(_has_shuffle_buffer, before))


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [] if value is None else [value]


class _SharedRows:
    """Every n-th row of each of some shards, from the `first` one on."""

    def __init__(self, rows: IterableDataset, shards: list[int], epoch: int, first: int, step: int) -> None:
        self.rows, self.shards, self.epoch = rows, shards, epoch
        self.first, self.step = first, step
        self._at: dict[str, Any] = {"shard": 0, "position": 0, "rows": None}

    def __iter__(self) -> Iterator[StreamRow]:
        start = self._at
        for index in range(start["shard"], len(self.shards)):
            shard = self.rows.shard(self.rows.num_shards, self.shards[index])
            shard.set_epoch(self.epoch)
            first = 0
            if index == start["shard"] and start["rows"] is not None:
                shard.load_state_dict(start["rows"])
                first = start["position"]
            # In batches of one: iteration over rows leaves shards out in a DataLoader worker.
            for position, batch in enumerate(shard.iter(batch_size=1), first):
                if position % self.step == self.first:
                    self._at = {"shard": index, "position": position + 1, "rows": shard.state_dict()}
                    yield StreamRow(self.shards[index], position, {name: one[0] for name, one in batch.items()})

    def state_dict(self) -> dict[str, Any]:
        return self._at

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._at = state
