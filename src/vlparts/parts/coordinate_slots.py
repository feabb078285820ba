"""What a region of coordinates is made of, token by token, as tables that a batch can look up.

A region has a fixed number of tokens, since every pair has. Its tokens are slots: slot 0 is the token that begins it,
and the number of tokens since then says which slot comes next.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .coordinate_tokens import CoordinateTokenIds

__all__ = ["PAIRS_OF_KIND", "SlotTables", "slot_tables"]

PAIRS_OF_KIND: dict[str, int] = {"point": 1, "box": 2, "quad": 4}
"""Points with which a region of each kind is written."""


@dataclass(frozen=True)
class Slot:
    """One token of a region.

    Args:
        token: Id of the only token that fits; -1 where a code is written.
        position: Which digit of its code the slot is; 0 for a location token.
        start: Slot at which its code begins.
        lower: Slot at which the code begins that this one must reach; -1 where there is none.
    """

    token: int = -1
    position: int = 0
    start: int = 0
    lower: int = -1


@dataclass(frozen=True)
class SlotTables:
    """The slots of all kinds of region; K kinds, N slots of the longest.

    Args:
        token: Int64 `(K, N)`; -1 where a code is written, and past the end.
        position: Int64 `(K, N)`, digit of the code.
        start: Int64 `(K, N)`, slot at which the code begins.
        lower: Int64 `(K, N)`, slot at which the code's lower bound begins, or -1.
        lengths: Int64 `(K,)`, slots of a region.
        anchors: Int64 `(K, A)`, slots that hold a token like the first one, the first included; -1 past the end.
    """

    token: Tensor
    position: Tensor
    start: Tensor
    lower: Tensor
    lengths: Tensor
    anchors: Tensor

    def to(self, device: torch.device) -> "SlotTables":
        """Return the tables on a device."""
        return SlotTables(**{name: table.to(device) for name, table in vars(self).items()})


def _region(ids: CoordinateTokenIds, kind: str, ordered: bool) -> list[Slot]:
    """Return the slots of a region of the kind."""
    start, end = ids.markers.get(f"{kind}_start"), ids.markers.get(f"{kind}_end")
    slots = [] if start is None else [Slot(start)]
    begins: list[int] = []

    def write_code(length: int) -> None:
        axes = 1 if ids.locations and ids.per_point == 1 else 2
        bound = begins[-axes] if ordered and kind == "box" and len(begins) >= axes else -1
        begins.append(len(slots))
        slots.extend(Slot(position=digit, start=begins[-1], lower=bound) for digit in range(length))

    for pair in range(PAIRS_OF_KIND[kind]):
        if ids.locations:
            for _ in range(ids.per_point):
                write_code(1)
            continue
        slots.extend([Slot(ids.comma)] if pair else [])
        slots.append(Slot(ids.opening))
        write_code(ids.width)
        slots.append(Slot(ids.comma))
        write_code(ids.width)
        slots.append(Slot(ids.closing))
    return slots if end is None else [*slots, Slot(end)]


def _anchors(ids: CoordinateTokenIds, slots: list[Slot]) -> list[int]:
    """Return the slots whose token is, like the first one's, one with which regions begin."""
    if slots[0].token < 0:
        return [index for index, slot in enumerate(slots) if slot.token < 0]
    return [index for index, slot in enumerate(slots) if slot.token == slots[0].token]


def _table(rows: list[list[int]]) -> Tensor:
    """Return rows of different lengths as int64 `(rows, longest)`, filled with -1."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[-1] * (longest - len(row))] for row in rows])


def slot_tables(ids: CoordinateTokenIds, kinds: tuple[str, ...], ordered: bool) -> SlotTables:
    """Return the tables of the kinds of region.

    Args:
        ids: The tokens of coordinates.
        kinds: Names of `PAIRS_OF_KIND`.
        ordered: Whether the second point of a box may not lie left of the first, nor above it.
    """
    regions = [_region(ids, kind, ordered) for kind in kinds]
    columns: dict[str, Any] = {
        name: _table([[getattr(slot, name) for slot in slots] for slots in regions])
        for name in ("token", "position", "start", "lower")
    }
    lengths = torch.tensor([len(slots) for slots in regions])
    return SlotTables(**columns, lengths=lengths, anchors=_table([_anchors(ids, slots) for slots in regions]))
