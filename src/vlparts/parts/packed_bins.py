"""Packing plans: which items share a sequence of fixed capacity.

The bin packing strategies are the ones that NaViT (arXiv 2307.06304, appendix A.3) and its successors use. First fit
is also there as an object that takes items one by one, for data whose end is far or unknown.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from torch import Tensor

from .utils import positive_integer

__all__ = ["FirstFitPacker", "plan_packing"]

Item = TypeVar("Item")


class FirstFitPacker(Generic[Item]):
    """Put items into bins as they come, each into the oldest open bin with room.

    At most `open_bins` bins stay open: when one more is needed, the fullest one is closed (the oldest of equals),
    because it is the one that loses the least room. A bin that can take nothing more is closed at once.

    Args:
        capacity: largest sum of lengths in a bin.
        max_items: largest number of items in a bin; `None` for no limit.
        open_bins: how many bins stay open. 8 to 32 lose hardly more room than any number.

    Raises:
        ValueError: a limit is not an integer of at least one.
    """

    def __init__(self, capacity: int, max_items: int | None = None, open_bins: int = 16) -> None:
        self.capacity = positive_integer(capacity, "capacity")
        self.max_items = None if max_items is None else positive_integer(max_items, "max_items")
        self.open_bins = positive_integer(open_bins, "open_bins")
        self._bins: list[list[Item]] = []  # open bins in order of opening
        self._room: list[int] = []

    def add(self, item: Item, length: int) -> list[list[Item]]:
        """Place one item.

        Args:
            item: whatever the bins shall hold.
            length: its length, from 1 to `capacity`.

        Returns:
            The bins that this item closed, each with its items in the order placed: none, one, or two (the fullest
            one to make place, and the new one that the item fills).

        Raises:
            ValueError: the length is not a positive integer, or exceeds `capacity`.
        """
        if positive_integer(length, "length") > self.capacity:
            raise ValueError(f"length is {length}, which exceeds capacity={self.capacity}")
        closed = []
        chosen = next((place for place, room in enumerate(self._room) if room >= length), len(self._room))
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
        """Close all open bins and return them, the oldest first."""
        bins, self._bins, self._room = self._bins, [], []
        return bins

    def state_dict(self) -> dict[str, Any]:
        """What is open: `{"bins": [{"items": [...], "length": int}, ...]}`, with the items as they were given."""
        open_bins = zip(self._bins, self._room, strict=True)
        return {"bins": [{"items": list(items), "length": self.capacity - room} for items, room in open_bins]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Args:
            state: as `state_dict` returns it.

        Raises:
            ValueError: an open bin has no room or no items, or the bins exceed a limit of this packer.
        """
        bins = state["bins"]
        if len(bins) > self.open_bins:
            raise ValueError(f"state has {len(bins)} open bins, more than open_bins={self.open_bins}")
        for index, one in enumerate(bins):
            if not 0 < one["length"] < self.capacity:
                raise ValueError(
                    f"bins[{index}] of state has length {one['length']}; an open bin of capacity={self.capacity} has "
                    f"1..{self.capacity - 1}"
                )
            if not one["items"] or (self.max_items is not None and len(one["items"]) >= self.max_items):
                raise ValueError(
                    f"bins[{index}] of state has {len(one['items'])} items; an open bin has at least one, and less "
                    f"than max_items={self.max_items}"
                )
        self._bins = [list(one["items"]) for one in bins]
        self._room = [self.capacity - one["length"] for one in bins]

    def _close(self, place: int) -> list[Item]:
        del self._room[place]
        return self._bins.pop(place)


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

    Every index occurs in exactly one bin, and equal input gives equal output.

    - `first_fit`: takes items as they come, see [`FirstFitPacker`]. O(n * open_bins).
    - `best_fit_decreasing`: needs all items beforehand; longest first, each into the bin that it fills best.
      O(n log n) comparisons.
    - `next_fit`: one open bin; keeps the order of the items across bins. O(n).

    Args:
        lengths: positive integer length of each item (patches of an image, tokens of a sample).
        capacity: largest sum of lengths in a bin.
        max_items: largest number of items in a bin; `None` for no limit.
        strategy: one of the names above.
        open_bins: how many bins `first_fit` keeps open; the other strategies ignore it.
        oversize: what happens to an item longer than `capacity`: `"raise"`, or `"own_bin"` for a bin of its
            own (which then exceeds `capacity`).

    Returns:
        Item indices per bin: bins in the order of opening, items in the order placed.

    Raises:
        ValueError: a length is not a positive integer, an item exceeds `capacity` while `oversize="raise"`,
            a limit is below one, or `strategy` or `oversize` is unknown.
    """
    if strategy not in _STRATEGIES:
        raise ValueError(f"strategy must be one of {sorted(_STRATEGIES)}, got {strategy!r}")
    if oversize not in ("raise", "own_bin"):
        raise ValueError(f"oversize must be 'raise' or 'own_bin', got {oversize!r}")
    capacity = positive_integer(capacity, "capacity")
    open_bins = positive_integer(open_bins, "open_bins")
    limit = None if max_items is None else positive_integer(max_items, "max_items")
    items = lengths.tolist() if isinstance(lengths, Tensor) else lengths
    sizes = [positive_integer(size, f"lengths[{index}]") for index, size in enumerate(items)]
    if oversize == "raise":
        for index, size in enumerate(sizes):
            if size > capacity:
                raise ValueError(
                    f"lengths[{index}] is {size}, which exceeds capacity={capacity}; shrink the item, "
                    "raise the capacity, or pass oversize='own_bin'"
                )
    return _STRATEGIES[strategy](sizes, capacity, limit or max(len(sizes), 1), open_bins)


def _first_fit(sizes: list[int], capacity: int, max_items: int, open_bins: int) -> list[list[int]]:
    packer: FirstFitPacker[int] = FirstFitPacker(capacity, max_items, open_bins)
    bins: list[list[int]] = []
    for index, size in enumerate(sizes):
        bins += [[index]] if size > capacity else packer.add(index, size)
    return sorted(bins + packer.flush())  # by the first item, which opened the bin


def _best_fit_decreasing(sizes: list[int], capacity: int, max_items: int, open_bins: int) -> list[list[int]]:
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, bin), sorted
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = bisect_left(rooms, (sizes[index], -1))
        if at < len(rooms):
            free, chosen = rooms.pop(at)
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
