"""Bin packing: which items share a sequence of fixed capacity.

The strategies are those of NaViT (arXiv 2307.06304, appendix A.3) and its successors. [`FirstFitPacker`] takes items
one by one, for streams of data.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from torch import Tensor

from ..parts.utils import positive_integer

__all__ = ["FirstFitPacker", "plan_packing"]

Item = TypeVar("Item")


class FirstFitPacker(Generic[Item]):
    """Online first-fit bin packing: each item goes into the oldest open bin with room.

    At most `open_bins` bins are open: when one more is needed, the fullest is closed (the oldest of equals), since it
    wastes the least room. A full bin is closed at once.

    Args:
        capacity: Largest sum of lengths in a bin.
        max_items: Largest number of items in a bin; None for no limit.
        open_bins: Largest number of open bins. 8 to 32 waste hardly more room than any larger number.

    Raises:
        ValueError: If a limit is not an integer of at least 1.
    """

    def __init__(self, capacity: int, max_items: int | None = None, open_bins: int = 16) -> None:
        self.capacity = positive_integer(capacity, "capacity")
        self.max_items = None if max_items is None else positive_integer(max_items, "max_items")
        self.open_bins = positive_integer(open_bins, "open_bins")
        self._bins: list[list[Item]] = []  # open bins in order of opening
        self._room: list[int] = []

    def add(self, item: Item, length: int) -> list[list[Item]]:
        """Add one item.

        Args:
            item: Any object.
            length: Its length, from 1 to `capacity`.

        Returns:
            The bins that this item closed, each with its items in the order added: none, one, or two (the fullest one
            to make room, and the new one that the item fills).

        Raises:
            ValueError: If the length is not a positive integer or exceeds `capacity`.
        """
        if positive_integer(length, "length") > self.capacity:
            raise ValueError(f"`length` is {length}, which exceeds capacity={self.capacity}.")
        closed = []
        chosen = next((index for index, room in enumerate(self._room) if room >= length), len(self._room))
        if chosen == len(self._room):
            if chosen == self.open_bins:
                closed.append(self._close(self._room.index(min(self._room))))
                chosen -= 1
            self._bins.append([])
            self._room.append(self.capacity)
        self._bins[chosen].append(item)
        self._room[chosen] -= length
        if not self._room[chosen] or len(self._bins[chosen]) == self.max_items:
            closed.append(self._close(chosen))
        return closed

    def flush(self) -> list[list[Item]]:
        """Close all open bins and return them, oldest first."""
        bins, self._bins, self._room = self._bins, [], []
        return bins

    def state_dict(self) -> dict[str, Any]:
        """Open bins: `{"bins": [{"items": [...], "length": int}, ...]}`, with the items as they were given."""
        open_bins = zip(self._bins, self._room, strict=True)
        return {"bins": [{"items": list(items), "length": self.capacity - room} for items, room in open_bins]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore open bins.

        Args:
            state: Result of `state_dict`.

        Raises:
            ValueError: If an open bin has no room or no items, or the bins exceed a limit of this packer.
        """
        bins = state["bins"]
        if len(bins) > self.open_bins:
            raise ValueError(f"`state` has {len(bins)} open bins, expected at most open_bins={self.open_bins}.")
        for index, one in enumerate(bins):
            if not 0 < one["length"] < self.capacity:
                raise ValueError(
                    f"`state['bins'][{index}]` has length {one['length']}, expected 1 to {self.capacity - 1} for an "
                    f"open bin of capacity={self.capacity}."
                )
            if not one["items"] or (self.max_items is not None and len(one["items"]) >= self.max_items):
                raise ValueError(
                    f"`state['bins'][{index}]` has {len(one['items'])} items, expected at least one and fewer than "
                    f"max_items={self.max_items}."
                )
        self._bins = [list(one["items"]) for one in bins]
        self._room = [self.capacity - one["length"] for one in bins]

    def _close(self, index: int) -> list[Item]:
        del self._room[index]
        return self._bins.pop(index)


def plan_packing(
    lengths: Iterable[int] | Tensor,
    capacity: int,
    *,
    max_items: int | None = None,
    strategy: str = "first_fit",
    open_bins: int = 16,
    oversize: str = "raise",
) -> list[list[int]]:
    """Distribute items over bins so that the lengths in a bin sum to at most `capacity`.

    Each index occurs in exactly one bin. The result is deterministic.

    - "first_fit": items in the given order, see [`FirstFitPacker`]. O(n * open_bins).
    - "best_fit_decreasing": longest item first, each into the fullest bin with room. O(n log n) comparisons.
    - "next_fit": one open bin, which keeps the order of the items across bins. O(n).

    Args:
        lengths: Positive integer length of each item (patches of an image, tokens of a sample).
        capacity: Largest sum of lengths in a bin.
        max_items: Largest number of items in a bin; None for no limit.
        strategy: One of the names above.
        open_bins: Largest number of open bins of "first_fit"; ignored by the other strategies.
        oversize: What to do with an item longer than `capacity`: "raise", or "own_bin" for a bin of its own (which
            exceeds `capacity`).

    Returns:
        Item indices per bin: bins in the order of opening, items in the order added.

    Raises:
        ValueError: If a length is not a positive integer, an item exceeds `capacity` with `oversize="raise"`, a limit
            is below 1, or `strategy` or `oversize` is unknown.
    """
    if strategy not in _STRATEGIES:
        raise ValueError(f"`strategy` must be one of {sorted(_STRATEGIES)}, got {strategy!r}.")
    if oversize not in ("raise", "own_bin"):
        raise ValueError(f"`oversize` must be 'raise' or 'own_bin', got {oversize!r}.")
    capacity = positive_integer(capacity, "capacity")
    open_bins = positive_integer(open_bins, "open_bins")
    limit = None if max_items is None else positive_integer(max_items, "max_items")
    items = lengths.tolist() if isinstance(lengths, Tensor) else lengths
    sizes = [positive_integer(size, f"lengths[{index}]") for index, size in enumerate(items)]
    if oversize == "raise":
        for index, size in enumerate(sizes):
            if size > capacity:
                raise ValueError(
                    f"`lengths[{index}]` is {size}, which exceeds capacity={capacity}. Shrink the item, "
                    "raise `capacity`, or pass oversize='own_bin'."
                )
    return _STRATEGIES[strategy](sizes, capacity, limit or max(len(sizes), 1), open_bins)


def _first_fit(sizes: list[int], capacity: int, max_items: int, open_bins: int) -> list[list[int]]:
    packer: FirstFitPacker[int] = FirstFitPacker(capacity, max_items, open_bins)
    bins: list[list[int]] = []
    for index, size in enumerate(sizes):
        bins += [[index]] if size > capacity else packer.add(index, size)
    return sorted(bins + packer.flush())  # by first item, which is the order of opening


def _best_fit_decreasing(sizes: list[int], capacity: int, max_items: int, open_bins: int) -> list[list[int]]:
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, bin), sorted
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fullest = bisect_left(rooms, (sizes[index], -1))
        if fullest < len(rooms):
            free, chosen = rooms.pop(fullest)
        else:
            free, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(index)
        if free > sizes[index] and len(bins[chosen]) < max_items:
            insort(rooms, (free - sizes[index], chosen))
    return bins


def _next_fit(sizes: list[int], capacity: int, max_items: int, open_bins: int) -> list[list[int]]:
    bins: list[list[int]] = []
    free = 0
    for index, size in enumerate(sizes):
        if not bins or size > free or len(bins[-1]) == max_items:
            bins.append([])
            free = capacity
        bins[-1].append(index)
        free -= size
    return bins


_STRATEGIES: dict[str, Callable[[list[int], int, int, int], list[list[int]]]] = {
    "first_fit": _first_fit,
    "best_fit_decreasing": _best_fit_decreasing,
    "next_fit": _next_fit,
}
