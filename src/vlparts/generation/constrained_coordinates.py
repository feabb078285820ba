"""Constrained generation: a logits processor that allows only tokens that continue the grammar of coordinates.

A region has a fixed number of tokens, since every pair of coordinates has. Its tokens are numbered slots: slot 0
starts it, and the number of tokens since then is the next slot. Tables of slots, indexed per row, say which token or
which codes fit.

Shapes: B rows, S tokens of a row, V vocabulary; K kinds of region, N slots of the longest.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ..parts.coordinate_tokens import CoordinateTokenIds

__all__ = ["PAIRS_OF_KIND", "CoordinateLogitsProcessor"]

PAIRS_OF_KIND: dict[str, int] = {"point": 1, "box": 2, "quad": 4}
"""Number of coordinate pairs in a region of each kind."""

MODES = ("free", "answer")


@dataclass(frozen=True)
class _Slot:
    """One token of a region.

    Attributes:
        token: Id of the only token that fits; -1 for a token of a code.
        digit: Index of the digit in its code; 0 for a location token.
        start: Slot of the first digit of its code.
        lower: First slot of the code that is the lower bound of this one; -1 for none.
    """

    token: int = -1
    digit: int = 0
    start: int = 0
    lower: int = -1


@dataclass(frozen=True)
class _SlotTables:
    """The slots of all kinds of region.

    Attributes:
        token: Int64 `(K, N)`, id of the only token that fits; -1 for a token of a code, and past the end.
        digit: Int64 `(K, N)`, index of the digit in its code.
        start: Int64 `(K, N)`, slot of the first digit of the code.
        lower: Int64 `(K, N)`, first slot of the lower bound of the code, or -1.
        lengths: Int64 `(K,)`, number of slots of a region.
        anchors: Int64 `(K, A)`, slots whose token may also start a region, slot 0 included; -1 past the end.
    """

    token: Tensor
    digit: Tensor
    start: Tensor
    lower: Tensor
    lengths: Tensor
    anchors: Tensor

    def to(self, device: torch.device) -> "_SlotTables":
        """Return the tables on a device."""
        return _SlotTables(**{name: table.to(device) for name, table in vars(self).items()})


def _make_tables(ids: CoordinateTokenIds, kinds: tuple[str, ...], ordered: bool) -> _SlotTables:
    """Return the tables of some kinds of region."""
    regions = [_make_slots(ids, kind, ordered) for kind in kinds]
    columns: dict[str, Any] = {
        name: _pad_rows([[getattr(slot, name) for slot in slots] for slots in regions])
        for name in ("token", "digit", "start", "lower")
    }
    lengths = torch.tensor([len(slots) for slots in regions])
    return _SlotTables(**columns, lengths=lengths, anchors=_pad_rows([_find_anchors(slots) for slots in regions]))


def _make_slots(ids: CoordinateTokenIds, kind: str, ordered: bool) -> list[_Slot]:
    """Return the slots of a region."""
    start, end = ids.markers.get(f"{kind}_start"), ids.markers.get(f"{kind}_end")
    slots = [] if start is None else [_Slot(start)]
    code_starts: list[int] = []

    def add_code(num_digits: int) -> None:
        axes = 1 if ids.locations and ids.per_point == 1 else 2
        lower = code_starts[-axes] if ordered and kind == "box" and len(code_starts) >= axes else -1
        code_starts.append(len(slots))
        slots.extend(_Slot(digit=digit, start=code_starts[-1], lower=lower) for digit in range(num_digits))

    for pair in range(PAIRS_OF_KIND[kind]):
        if ids.locations:
            for _ in range(ids.per_point):
                add_code(1)
            continue
        slots.extend([_Slot(ids.comma)] if pair else [])
        slots.append(_Slot(ids.opening))
        add_code(ids.width)
        slots.append(_Slot(ids.comma))
        add_code(ids.width)
        slots.append(_Slot(ids.closing))
    return slots if end is None else [*slots, _Slot(end)]


def _find_anchors(slots: list[_Slot]) -> list[int]:
    """Return the slots whose token is that of slot 0; all location tokens if slot 0 is one."""
    if slots[0].token < 0:
        return [index for index, slot in enumerate(slots) if slot.token < 0]
    return [index for index, slot in enumerate(slots) if slot.token == slots[0].token]


def _pad_rows(rows: list[list[int]]) -> Tensor:
    """Return rows of different lengths as int64 `(rows, longest)`, padded with -1."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[-1] * (longest - len(row))] for row in rows])


class CoordinateLogitsProcessor(LogitsProcessor):
    """Allow only tokens that continue the grammar of coordinates.

    Text is free until a token starts a region: a start marker if the tokenizer has markers, otherwise "(" or a
    location token. From there to the end of the region only tokens that fit are allowed. The state is recomputed from
    the generated tokens in every call, so beams may be reordered and rows added or removed.

    Other tokens may contain a parenthesis too, such as " (". Pass them as `forbidden`
    (`tokenizer.token_ids_with("(")`) if free text must not contain anything that looks like a region.

    Args:
        ids: The tokens of coordinates, from `PaddedCoordinateTokenizer.coordinate_token_ids()`.
        prompt_length: Number of prompt tokens in `input_ids`, padding included (`input_ids.shape[1]` before
            generation), which are ignored. 0 if generation starts from embeddings.
        eos_token_id: Id, or ids, that end an answer. After one of them only they are allowed.
        mode: "free" for text with any number of regions; "answer" for one region, after a label of up to
            `max_label_tokens`, and then the end.
        kinds: Kinds of region to allow, of "point", "box" and "quad". Default: those that have markers, or "box".
            Without markers only one kind is possible.
        levels: Codes are from 0 to `levels - 1`. Default: all that the digits or the location tokens can express.
        ordered: Whether the second point of a box must be neither left of the first nor above it.
        max_label_tokens: Maximum length of the label in the mode "answer", in tokens.
        max_length: Length of `input_ids` at which generation stops. Regions that would not fit are not started.
        forbidden: Ids of tokens that are not allowed outside regions.

    Raises:
        ValueError: If an argument is invalid; when called, if there are fewer tokens than `prompt_length` or the
            scores do not cover an id.
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
        self.mode, self.kinds, self.levels = mode, _check_kinds(ids, kinds), _check_levels(ids, levels)
        self.tables = _make_tables(ids, self.kinds, ordered)
        starts = self.tables.token[:, 0].tolist()
        self.starts = list(ids.locations[: self.levels]) if starts[0] < 0 else starts
        label_markers = {token for name, token in ids.markers.items() if name.startswith("label_")}
        self.forbidden = sorted({*forbidden, *ids.locations, *ids.markers.values()} - label_markers)
        self._check_arguments()

    def _check_arguments(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"`mode` must be one of {MODES}, got {self.mode!r}.")
        if not isinstance(self.prompt_length, int) or self.prompt_length < 0:
            raise ValueError(f"`prompt_length` must be a non-negative integer, got {self.prompt_length!r}.")
        if not isinstance(self.max_label_tokens, int) or self.max_label_tokens < 0:
            raise ValueError(f"`max_label_tokens` must be a non-negative integer, got {self.max_label_tokens!r}.")
        used = {*self.ids.digits, self.ids.opening, self.ids.comma, self.ids.closing, *self.forbidden}
        if not self.eos or used & set(self.eos) or min(self.eos) < 0:
            raise ValueError(f"`eos_token_id` must be ids that coordinates do not use, got {self.eos}.")
        needed = self.prompt_length + int(self.tables.lengths.min())
        if self.mode == "answer" and self.max_length is not None and self.max_length < needed:
            raise ValueError(f"`max_length` must be at least {needed} for prompt and region, got {self.max_length}.")

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores, minus infinity for tokens that are not allowed.

        Args:
            input_ids: Int64 `(B, S)`, prompt and generated tokens.
            scores: `(B, V)` of the next token; not modified.
        """
        self._check_call(input_ids, scores)
        # The first column, -1, matches no id: it means "no region yet", so that the first token can be looked up.
        generated = torch.nn.functional.pad(input_ids[:, self.prompt_length :], (1, 0), value=-1)
        kind, slot = self._find_slot(generated)
        inside = slot < self.tables.lengths.to(slot.device)[kind]
        allowed = self._allowed_outside(input_ids.shape[1], scores)[None]
        if self.mode == "answer":
            started = _is_in(generated, self.starts).any(1)
            allowed = torch.where(started[:, None], _mask(scores, self.eos), allowed)
        allowed = torch.where(inside[:, None], self._allowed_inside(generated, kind, slot, scores), allowed)
        # Rows that have ended, and rows in which nothing fits because given tokens violate the grammar, may only end.
        ended = _is_in(generated, self.eos).any(1, keepdim=True) | ~allowed.any(1, keepdim=True)
        allowed = torch.where(ended, _mask(scores, self.eos), allowed)
        # If other processors have excluded all allowed tokens, these become equally likely.
        excluded = ~(allowed & (scores > -torch.inf)).any(1, keepdim=True)
        return torch.where(excluded, 0.0, scores).masked_fill(~allowed, -torch.inf)

    def _check_call(self, input_ids: Tensor, scores: Tensor) -> None:
        if input_ids.shape[1] < self.prompt_length:
            raise ValueError(
                f"`input_ids` must have at least `prompt_length` = {self.prompt_length} tokens, got "
                f"{tuple(input_ids.shape)}."
            )
        largest = max(*self.forbidden, *self.eos, *self.ids.digits, self.ids.opening, self.ids.comma, self.ids.closing)
        if largest >= scores.shape[1]:
            raise ValueError(f"`scores` must cover the id {largest}, got {scores.shape[1]} ids; resize the model.")

    def _find_slot(self, generated: Tensor) -> tuple[Tensor, Tensor]:
        """Return the kind of the last region of each row and the next slot, int64 `(B,)` each.

        Outside of a region the slot is past the region's end.
        """
        tables = self.tables.to(generated.device)
        is_start = _is_in(generated, self.starts)
        last = (is_start * torch.arange(generated.shape[1], device=generated.device)).amax(1)
        kind = (generated.gather(1, last[:, None]) == tables.token[:, 0]).int().argmax(1)
        # A region may contain its start token several times: the count says which of them was the last.
        per_region = (tables.anchors[kind] >= 0).sum(1)
        anchor = tables.anchors[kind].gather(1, ((is_start.sum(1) - 1) % per_region)[:, None])[:, 0]
        return kind, torch.where(last > 0, anchor + generated.shape[1] - last, tables.token.shape[1])

    def _allowed_outside(self, length: int, scores: Tensor) -> Tensor:
        """Return which tokens are allowed outside of regions after `length` tokens, bool `(V,)`."""
        lengths = self.tables.lengths.tolist()
        remaining = sum(lengths) if self.max_length is None else self.max_length - length
        if len(self.kinds) == 1:
            starts = self.starts if lengths[0] <= remaining else []
        else:
            starts = [start for start, needed in zip(self.starts, lengths, strict=True) if needed <= remaining]
        text = ~_mask(scores, [*self.forbidden, *self.starts])
        if self.mode == "free":
            return text | _mask(scores, starts)
        if length - self.prompt_length >= self.max_label_tokens or min(lengths) >= remaining:
            return _mask(scores, starts or self.eos)
        return (text & ~_mask(scores, self.eos)) | _mask(scores, starts)

    def _allowed_inside(self, generated: Tensor, kind: Tensor, slot: Tensor, scores: Tensor) -> Tensor:
        """Return which tokens fit the next slot of each row, bool `(B, V)`; undefined for rows outside of regions."""
        tables = self.tables.to(generated.device)
        index = kind, slot.clamp(max=tables.token.shape[1] - 1)
        token, digit, start, lower = (
            table[index][:, None] for table in (tables.token, tables.digit, tables.start, tables.lower)
        )
        origin = generated.shape[1] - slot[:, None]
        minimum = torch.where(lower < 0, 0, self._read_code(generated, origin + lower, self.ids.width))
        fixed = torch.arange(scores.shape[1], device=scores.device) == token
        if self.ids.locations:
            code_tokens, fits = self.ids.locations[: self.levels], self._fitting_locations(minimum)
        else:
            prefix = self._read_code(generated, origin + start, digit)
            code_tokens, fits = self.ids.digits, self._fitting_digits(prefix, digit, minimum)
        allowed = torch.zeros_like(fixed)
        allowed[:, list(code_tokens)] = fits & (token < 0)
        return allowed | fixed

    def _read_code(self, generated: Tensor, first: Tensor, count: Tensor | int) -> Tensor:
        """Return the value `(B, 1)` of the code at column `first`, or of its first `count` digits."""
        code_tokens = torch.tensor(self.ids.locations or self.ids.digits, device=generated.device)
        value = torch.zeros_like(first)
        for digit in range(1 if self.ids.locations else self.ids.width):
            token = generated.gather(1, (first + digit).clamp(0, generated.shape[1] - 1))
            found = (token == code_tokens).int().argmax(1, keepdim=True)
            value = torch.where(torch.as_tensor(digit < count, device=value.device), value * 10 + found, value)
        return value

    def _fitting_digits(self, prefix: Tensor, digit: Tensor, minimum: Tensor) -> Tensor:
        """Return which digits lead to a code from `minimum` to `levels - 1`, bool `(B, 10)`."""
        unit = 10 ** (self.ids.width - 1 - digit).clamp(min=0)
        smallest = (prefix * 10 + torch.arange(10, device=prefix.device)) * unit
        return (smallest <= self.levels - 1) & (smallest + unit - 1 >= minimum)

    def _fitting_locations(self, minimum: Tensor) -> Tensor:
        """Return which location tokens are at least `minimum`, on a grid in both axes, bool `(B, levels)`."""
        codes = torch.arange(self.levels, device=minimum.device)
        if self.ids.per_point == 2:
            return codes >= minimum
        side = math.isqrt(len(self.ids.locations))
        return (codes // side >= minimum // side) & (codes % side >= minimum % side)


def _is_in(tokens: Tensor, ids: Sequence[int]) -> Tensor:
    """Return which tokens are among the ids, bool of the shape of `tokens`."""
    return torch.isin(tokens, torch.tensor(ids, device=tokens.device))


def _mask(scores: Tensor, ids: Sequence[int]) -> Tensor:
    """Return bool `(V,)`, true at the ids."""
    mask = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
    mask[list(ids)] = True
    return mask


def _check_kinds(ids: CoordinateTokenIds, kinds: Sequence[str] | None) -> tuple[str, ...]:
    """Return the kinds of region to allow."""
    marked = tuple(kind for kind in PAIRS_OF_KIND if f"{kind}_start" in ids.markers)
    found = (marked or ("box",)) if kinds is None else tuple(kinds)
    if isinstance(kinds, str) or not found or not set(found) <= set(PAIRS_OF_KIND) or len(set(found)) < len(found):
        raise ValueError(f"`kinds` must be distinct names of {list(PAIRS_OF_KIND)}, got {kinds!r}.")
    if len(found) > 1 and not set(found) <= set(marked):
        raise ValueError(f"`kinds` can be several only if each has markers, got {list(found)} and {list(marked)}.")
    return found


def _check_levels(ids: CoordinateTokenIds, levels: int | None) -> int:
    """Return the number of codes."""
    maximum = len(ids.locations) or 10**ids.width
    if levels is None:
        return maximum
    minimum = maximum if ids.locations and ids.per_point == 1 else 1  # a grid needs all its cells
    if isinstance(levels, bool) or not isinstance(levels, int) or not minimum <= levels <= maximum:
        raise ValueError(f"`levels` must be an integer from {minimum} to {maximum}, got {levels!r}.")
    return levels
