"""Generation that keeps to the grammar of coordinates, so that every region it writes can be read.

What a region of coordinates is made of, token by token, as tables that a batch can look up.

A region has a fixed number of tokens, since every pair has. Its tokens are slots: slot 0 is the token that begins it,
and the number of tokens since then says which slot comes next.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ..parts.coordinate_tokens import CoordinateTokenIds

__all__ = ["PAIRS_OF_KIND", "CoordinateLogitsProcessor", "SlotTables", "slot_tables"]


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


_MODES = ("free", "answer")


class CoordinateLogitsProcessor(LogitsProcessor):
    """Allow only the tokens with which the grammar of coordinates can go on.

    Text is free until a token begins a region: a start marker where the tokens have markers, otherwise "(", or a
    location token. From there to the region's end only tokens that fit are allowed. The state is read from the tokens
    generated so far, and nothing is kept between calls, so beams may be reordered and rows may come and go.

    A parenthesis can also be part of another token, such as " (". Name those in `forbidden`
    (`tokenizer.token_ids_with("(")` finds them) where free text must not hold anything that looks like a region.

    Args:
        ids: The tokens of coordinates, from `PaddedCoordinateTokenizer.coordinate_token_ids()`.
        prompt_length: Tokens of the prompt in `input_ids`, padding included (`input_ids.shape[1]` before generation);
            what stands there is not looked at. 0 where generation starts from embeddings.
        eos_token_id: Id, or ids, that end an answer. After one, nothing else may follow.
        mode: "free" for text with any number of regions; "answer" for one region, with a label before it if
            `max_label_tokens` allows, and then the end.
        kinds: Kinds of region that may be written, of "point", "box" and "quad". By default those that have markers,
            or "box" alone; without markers there can only be one.
        levels: Codes run from 0 to `levels - 1`; by default all that the digits, or the location tokens, can write.
        ordered: Whether the second point of a box may be neither left of the first nor above it.
        max_label_tokens: Longest label in the mode "answer", in tokens.
        max_length: Length of `input_ids` at which generation stops. A region that would not fit is not begun.
        forbidden: Tokens that are never allowed outside a region.

    Raises:
        ValueError: For an invalid argument; when called, for fewer tokens than the prompt has or for scores that do
            not cover an id.
    """

    def __init__(
        self,
        ids: CoordinateTokenIds,
        prompt_length: int,
        eos_token_id: int | Sequence[int],
        *,
        mode: str = "free",
        kinds: Sequence[str] | None = None,
        levels: int | None = None,
        ordered: bool = True,
        max_label_tokens: int = 0,
        max_length: int | None = None,
        forbidden: Iterable[int] = (),
    ) -> None:
        self.ids = ids
        self.eos = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
        self.prompt_length, self.max_label_tokens, self.max_length = prompt_length, max_label_tokens, max_length
        self.mode, self.kinds, self.levels = mode, _checked_kinds(ids, kinds), _checked_levels(ids, levels)
        self.tables = slot_tables(ids, self.kinds, ordered)
        starts = self.tables.token[:, 0].tolist()
        self.starts = list(ids.locations[: self.levels]) if starts[0] < 0 else starts
        self.never = sorted({*forbidden, *ids.locations, *ids.markers.values()} - self._label_markers())
        self._check()

    def _label_markers(self) -> set[int]:
        """Return the markers that may stand in free text."""
        return {token for name, token in self.ids.markers.items() if name.startswith("label_")}

    def _check(self) -> None:
        """Raise ValueError for arguments that do not fit together."""
        if self.mode not in _MODES:
            raise ValueError(f"`mode` must be one of {_MODES}, got {self.mode!r}.")
        if not isinstance(self.prompt_length, int) or self.prompt_length < 0:
            raise ValueError(f"`prompt_length` must be a non-negative integer, got {self.prompt_length!r}.")
        if not isinstance(self.max_label_tokens, int) or self.max_label_tokens < 0:
            raise ValueError(f"`max_label_tokens` must be a non-negative integer, got {self.max_label_tokens!r}.")
        own = {*self.ids.digits, self.ids.opening, self.ids.comma, self.ids.closing, *self.never}
        if not self.eos or own & set(self.eos) or min(self.eos) < 0:
            raise ValueError(f"`eos_token_id` must be ids that coordinates do not use, got {self.eos}.")
        needed = self.prompt_length + int(self.tables.lengths.min())
        if self.mode == "answer" and self.max_length is not None and self.max_length < needed:
            raise ValueError(f"`max_length` must be at least {needed} for prompt and region, got {self.max_length}.")

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores with minus infinity for what does not fit.

        Args:
            input_ids: Int64 `(B, S)`, the prompt and what was generated.
            scores: `(B, V)`, of the next token. Not changed.
        """
        self._check_call(input_ids, scores)
        # A first column that matches nothing makes room for rows without a region, and for the first token.
        written = torch.nn.functional.pad(input_ids[:, self.prompt_length :], (1, 0), value=-1)
        kind, slot = self._state(written)
        inside = slot < self.tables.lengths.to(slot.device)[kind]
        allowed = self._outside(input_ids.shape[1], scores)[None]
        if self.mode == "answer":
            begun = _matches(written, self.starts).any(1)
            allowed = torch.where(begun[:, None], _mask(scores, self.eos), allowed)
        allowed = torch.where(inside[:, None], self._inside(written, kind, slot, scores), allowed)
        # Nothing fits after tokens that broke the grammar before this processor saw them: the end is left, as it is
        # for a row that has ended.
        ended = _matches(written, self.eos).any(1, keepdim=True) | ~allowed.any(1, keepdim=True)
        allowed = torch.where(ended, _mask(scores, self.eos), allowed)
        # Where other processors left nothing that fits, everything that fits is as good.
        lost = ~(allowed & (scores > -torch.inf)).any(1, keepdim=True)
        return torch.where(lost, 0.0, scores).masked_fill(~allowed, -torch.inf)

    def _check_call(self, input_ids: Tensor, scores: Tensor) -> None:
        """Raise ValueError if the call does not fit the arguments."""
        if input_ids.shape[1] < self.prompt_length:
            raise ValueError(f"`prompt_length` is {self.prompt_length}, but `input_ids` is {tuple(input_ids.shape)}.")
        largest = max(*self.never, *self.eos, *self.ids.digits, self.ids.opening, self.ids.comma, self.ids.closing)
        if largest >= scores.shape[1]:
            raise ValueError(f"`scores` must cover the id {largest}, got {scores.shape[1]} ids; resize the model.")

    def _state(self, written: Tensor) -> tuple[Tensor, Tensor]:
        """Return which kind of region each row began last and which slot comes next, int64 `(B,)` each.

        Outside a region, the slot lies past the region's end.
        """
        tables = self.tables.to(written.device)
        begins = _matches(written, self.starts)
        last = (begins * torch.arange(written.shape[1], device=written.device)).amax(1)
        kind = (written.gather(1, last[:, None]) == tables.token[:, 0]).int().argmax(1)
        # A region may hold several tokens like its first: their count says which of them was the last.
        per_region = (tables.anchors[kind] >= 0).sum(1)
        anchor = tables.anchors[kind].gather(1, ((begins.sum(1) - 1) % per_region)[:, None])[:, 0]
        return kind, torch.where(last > 0, anchor + written.shape[1] - last, tables.token.shape[1])

    def _outside(self, length: int, scores: Tensor) -> Tensor:
        """Return what is allowed outside a region after `length` tokens, bool `(V,)`."""
        lengths = self.tables.lengths.tolist()
        room = sum(lengths) if self.max_length is None else self.max_length - length
        if len(self.kinds) == 1:
            begin = self.starts if lengths[0] <= room else []
        else:
            begin = [start for start, needed in zip(self.starts, lengths, strict=True) if needed <= room]
        text = ~_mask(scores, [*self.never, *self.starts])
        if self.mode == "free":
            return text | _mask(scores, begin)
        if length - self.prompt_length >= self.max_label_tokens or min(lengths) >= room:
            return _mask(scores, begin or self.eos)
        return (text & ~_mask(scores, self.eos)) | _mask(scores, begin)

    def _inside(self, written: Tensor, kind: Tensor, slot: Tensor, scores: Tensor) -> Tensor:
        """Return what fits the next slot of each row, bool `(B, V)`; rows outside a region do not matter."""
        tables = self.tables.to(written.device)
        place = kind, slot.clamp(max=tables.token.shape[1] - 1)
        token, position, start, lower = (
            one[place][:, None] for one in (tables.token, tables.position, tables.start, tables.lower)
        )
        origin = written.shape[1] - slot[:, None]
        least = torch.where(lower < 0, 0, self._read(written, origin + lower, self.ids.width))
        fixed = torch.arange(scores.shape[1], device=scores.device) == token
        if self.ids.locations:
            codes, fitting = self.ids.locations[: self.levels], self._fitting_locations(least)
        else:
            prefix = self._read(written, origin + start, position)
            codes, fitting = self.ids.digits, self._fitting_digits(prefix, position, least)
        allowed = torch.zeros_like(fixed)
        allowed[:, list(codes)] = fitting & (token < 0)
        return allowed | fixed

    def _read(self, written: Tensor, first: Tensor, count: Tensor | int) -> Tensor:
        """Return the value `(B, 1)` of the code, or of its first `count` digits, that begins in column `first`."""
        words = self.ids.locations or self.ids.digits
        words_here = torch.tensor(words, device=written.device)
        value = torch.zeros_like(first)
        for digit in range(1 if self.ids.locations else self.ids.width):
            token = written.gather(1, (first + digit).clamp(0, written.shape[1] - 1))
            found = (token == words_here).int().argmax(1, keepdim=True)
            value = torch.where(torch.as_tensor(digit < count, device=value.device), value * 10 + found, value)
        return value

    def _fitting_digits(self, prefix: Tensor, position: Tensor, least: Tensor) -> Tensor:
        """Return which digits lead to a code from `least` to `levels - 1`, bool `(B, 10)`."""
        unit = 10 ** (self.ids.width - 1 - position).clamp(min=0)
        smallest = (prefix * 10 + torch.arange(10, device=prefix.device)) * unit
        return (smallest <= self.levels - 1) & (smallest + unit - 1 >= least)

    def _fitting_locations(self, least: Tensor) -> Tensor:
        """Return which location tokens lie neither before `least` nor, for cells of a grid, left of it."""
        codes = torch.arange(self.levels, device=least.device)
        if self.ids.per_point == 2:
            return codes >= least
        side = math.isqrt(len(self.ids.locations))
        return (codes // side >= least // side) & (codes % side >= least % side)


def _matches(tokens: Tensor, ids: Sequence[int]) -> Tensor:
    """Return which tokens are among the ids."""
    return torch.isin(tokens, torch.tensor(ids, device=tokens.device))


def _mask(scores: Tensor, ids: Sequence[int]) -> Tensor:
    """Return bool `(V,)`, true at the ids."""
    mask = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
    mask[list(ids)] = True
    return mask


def _checked_kinds(ids: CoordinateTokenIds, kinds: Sequence[str] | None) -> tuple[str, ...]:
    """Return the kinds of region, or raise ValueError."""
    marked = tuple(kind for kind in PAIRS_OF_KIND if f"{kind}_start" in ids.markers)
    found = (marked or ("box",)) if kinds is None else tuple(kinds)
    if isinstance(kinds, str) or not found or not set(found) <= set(PAIRS_OF_KIND) or len(set(found)) < len(found):
        raise ValueError(f"`kinds` must be distinct names of {list(PAIRS_OF_KIND)}, got {kinds!r}.")
    if len(found) > 1 and not set(found) <= set(marked):
        raise ValueError(f"`kinds` can only be several where each has markers, got {list(found)} and {list(marked)}.")
    return found


def _checked_levels(ids: CoordinateTokenIds, levels: int | None) -> int:
    """Return the number of codes, or raise ValueError."""
    most = len(ids.locations) or 10**ids.width
    if levels is None:
        return most
    grid = ids.locations and ids.per_point == 1
    if isinstance(levels, bool) or not isinstance(levels, int) or not 1 <= levels <= most or (grid and levels < most):
        raise ValueError(f"`levels` must be an integer from {most if grid else 1} to {most}, got {levels!r}.")
    return levels
