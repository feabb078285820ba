"""Endless rows of a source in shuffled order, whose state is positions only."""

import random
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple, Protocol

from ..parts.utils import positive_integer

__all__ = ["Row", "RowSource", "Rows", "ShuffledRows"]

_EMPTY_EPOCHS = 10  # in a row; readers of small shards may have no row in some epochs


class Rows(Protocol):
    """One pass over rows, which can continue from a state."""

    def __iter__(self) -> Iterator[Any]:
        """Yield the rows from the state on."""

    def state_dict(self) -> dict[str, Any]:
        """JSON data from which the row after the last one yielded is found."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration continue from a state."""


class RowSource(Protocol):
    """Rows that readers share.

    Attributes:
        name: What the source is called in error messages.
    """

    name: str

    def rows(self, share: int, shares: int, epoch: int) -> Rows:
        """The rows of one of several shares, which together have every row once, in the order of an epoch."""


class Row(NamedTuple):
    """A row that was read.

    Args:
        number: How many rows of the share were read before it, over all epochs.
        epoch: Its epoch.
        before: State of the reader before the row.
        value: The row.
    """

    number: int
    epoch: int
    before: dict[str, Any]
    value: Any


class ShuffledRows:
    """The rows of one share of a source, epoch after epoch, each epoch in an order of its own.

    Each row is drawn at random from a buffer, which is filled in the order of reading and emptied at the end of an
    epoch, so that each epoch has every row of the share once. The draws depend on the seed, the share, the epoch and
    their number only.

    A state has the numbers of the rows in the buffer. To continue, rows are read again from the oldest one that is
    needed, usually less than ten times the size of the buffer, and nothing else is done with them.

    Args:
        source: The source.
        share: Which share, from 0.
        shares: Number of shares.
        size: Rows in the buffer; 1 keeps the order of reading.
        seed: Seed of the draws.

    Raises:
        ValueError: If `size` is not an integer of at least 1.
    """

    def __init__(self, source: RowSource, share: int, shares: int, size: int, seed: int) -> None:
        self.source = source
        self.share, self.shares = share, shares
        self.size = positive_integer(size, "size")
        self.seed = f"{seed}-{share}-{shares}"
        self._buffer: list[Row] = []
        self._next = self._drawn = 0
        self._open(0)

    def draw(self) -> Row:
        """Draw the next row.

        Raises:
            ValueError: If the share has no rows.
        """
        for _ in range(_EMPTY_EPOCHS):
            if self._fill():
                break
            self._open(self._epoch + 1)
            self._drawn = 0
        else:
            raise ValueError(
                f"{self.source.name}: expected at least one row for each of {self.shares} readers (processes times "
                f"DataLoader workers), got none for reader {self.share + 1} in {_EMPTY_EPOCHS} epochs."
            )
        chosen = random.Random(f"{self.seed}-{self._epoch}-{self._drawn}").randrange(len(self._buffer))
        self._drawn += 1
        self._buffer[chosen], self._buffer[-1] = self._buffer[-1], self._buffer[chosen]
        return self._buffer.pop()

    def state_dict(self, kept: Collection[Row] = ()) -> dict[str, Any]:
        """JSON data from which the draws continue.

        Args:
            kept: Earlier draws that `load_state_dict` shall return.
        """
        oldest = min([*self._buffer, *kept], default=None)
        if oldest is None:
            first = {"number": self._next, "epoch": self._epoch, "before": self._rows.state_dict()}
        else:
            first = {"number": oldest.number, "epoch": oldest.epoch, "before": oldest.before}
        buffer = [row.number for row in self._buffer]
        return {"first": first, "next": self._next, "epoch": self._epoch, "drawn": self._drawn, "buffer": buffer}

    def load_state_dict(self, state: dict[str, Any], kept: Collection[int] = ()) -> dict[int, Row]:
        """Continue from a state of the same source, share and size.

        Args:
            state: Result of `state_dict`.
            kept: Numbers of the earlier draws that were given to it.

        Returns:
            These draws by number.

        Raises:
            ValueError: If the source has fewer rows than before.
        """
        first = state["first"]
        wanted = {*state["buffer"], *kept}
        found: dict[int, Row] = {}
        self._next = first["number"]
        self._open(first["epoch"], first["before"])
        while self._next < state["next"] or self._epoch < state["epoch"]:
            row = self._read()
            if row is not None and row.number in wanted:
                found[row.number] = row
            elif row is None and self._epoch == state["epoch"]:
                raise ValueError(f"{self.source.name} has changed: expected the rows of the run that is resumed.")
            elif row is None:
                self._open(self._epoch + 1)
        self._drawn = state["drawn"]
        self._buffer = [found[number] for number in state["buffer"]]
        return {number: found[number] for number in kept}

    def _open(self, epoch: int, state: dict[str, Any] | None = None) -> None:
        self._epoch = epoch
        self._rows = self.source.rows(self.share, self.shares, epoch)
        if state is not None:
            self._rows.load_state_dict(state)
        self._iterator: Iterator[Any] | None = iter(self._rows)

    def _fill(self) -> int:
        """Fill the buffer from the epoch and return the number of rows in it."""
        while len(self._buffer) < self.size and (row := self._read()) is not None:
            self._buffer.append(row)
        return len(self._buffer)

    def _read(self) -> Row | None:
        """The next row of the epoch; None at its end."""
        if self._iterator is None:
            return None
        before = self._rows.state_dict()
        try:
            value = next(self._iterator)
        except StopIteration:
            self._iterator = None
            return None
        self._next += 1
        return Row(self._next - 1, self._epoch, before, value)
