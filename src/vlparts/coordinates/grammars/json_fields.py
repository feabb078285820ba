"""A grammar of regions as JSON objects with one key per number: `{"x_min": 0.1, "y_min": 0.2, ...}`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal

from .base import QUOTE_LENGTH, Coded, DecodeError, Found, check_writable
from .json_objects import MAX_DIGITS, cut_list, fault_reason, lost_text, ordered
from .json_scanner import JsonList, JsonNumber, JsonObject, objects

__all__ = ["NamedJsonGrammar"]

_MAX_LENGTH = 32  # characters of a number


def _fraction(value: object, decimals: int) -> int | str:
    """Return the code of a number with decimals, rounded half up, or the reason why it has none."""
    if not isinstance(value, JsonNumber):
        return "is not a number"
    if len(value.token) > _MAX_LENGTH or re.search(r"[eE][+-]?\d{4}", value.token):
        return "is too long"
    number = Decimal(value.token)
    if number < 0:
        return "is negative"
    if number and number.adjusted() > MAX_DIGITS - decimals:
        return "is too large"
    return int(number.scaleb(decimals).quantize(Decimal(1), rounding=ROUND_HALF_UP))


def _has_number(value: object) -> bool:
    """Whether a JSON value is a number or contains one."""
    if isinstance(value, JsonList):
        return any(map(_has_number, value.items))
    if isinstance(value, JsonObject):
        return any(_has_number(member) for _, member in value.members)
    return isinstance(value, JsonNumber)


@dataclass(frozen=True, kw_only=True)
class NamedJsonGrammar:
    """Regions as objects with one key per number, such as `{"x": 0.1, "y": 0.2}`.

    Objects are read as in [`JsonGrammar`], with the same errors. Numbers may have decimals and an exponent; they are
    rounded. A further key with a number, such as a width, is an error.

    Args:
        keys: Pairs of a kind of region and its keys, in the order x, y.
        decimals: Maximum number of decimals; a code of 123 with 3 decimals is written 0.123.
        opening: Text before the first object, with `{}` for the name of the list.
        names: Name of the list per kind in `keys`.
        separator: Text between objects.
        closing: Text after the last object.
    """

    keys: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("box", ("x_min", "y_min", "x_max", "y_max")),
        ("point", ("x", "y")),
    )
    decimals: int = 6
    opening: str = '{{"{}": ['
    names: tuple[str, ...] = ("objects", "points")
    separator: str = ", "
    closing: str = "]}"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of region that can be written."""
        return tuple(kind for kind, _ in self.keys)

    def write(self, regions: Sequence[Coded]) -> str:
        """See [`Grammar`]. A change of kind within the regions begins another list."""
        pieces: list[str] = []
        last = ""
        for region in regions:
            check_writable(region, self.kinds)
            kind, codes, label, *_ = region
            if label is not None:
                raise ValueError(f"The format has no labels, got label {label!r}.")
            if kind != last:
                pieces += [self.closing + self.separator] if last else []
                pieces += [self.opening.format(self.names[self.kinds.index(kind)])]
            else:
                pieces += [self.separator]
            body = ", ".join(
                f'"{key}": {self._number(code)}' for key, code in zip(dict(self.keys)[kind], codes, strict=True)
            )
            pieces += ["{", body, "}"]
            last = kind
        return "".join(pieces) + (self.closing if last else "")

    def _number(self, code: int) -> str:
        """Return a code with at least one decimal, without trailing zeros."""
        whole, part = divmod(code, 10**self.decimals)
        return f"{whole}.{str(part).zfill(self.decimals).rstrip('0') or '0'}"

    def scan(self, text: str) -> tuple[list[Found], list[DecodeError]]:
        """See [`Grammar`]."""
        found: list[Found] = []
        errors: list[DecodeError] = []
        first_keys = [keys[0] for _, keys in self.keys]
        for item in objects(text):
            if item.fault == "single quotes":
                head = text[item.start : item.start + 16]
                if any(f"'{key}'" in head for key in first_keys):
                    errors.append(DecodeError(item.start, fault_reason(item)))
                continue
            kind = self._kind(item)
            if kind is None and not (item.fault == "unfinished" and not item.members):
                continue
            region = fault_reason(item) if item.fault or kind is None else self._region(item, kind)
            if isinstance(region, str):
                errors.append(DecodeError(item.start, region))
            else:
                found.append(region)
        return ordered(found, errors + cut_list(text, found, errors), text, self.names)

    def _kind(self, item: JsonObject) -> str | None:
        """Return the kind of region that an object is, or None."""
        members = dict(item.members)
        return next((kind for kind, keys in self.keys if keys[0] in members), None)

    def lost(self, text: str) -> list[DecodeError]:
        """See [`ReportsLoss`]."""
        regions, known = [], [key for _, keys in self.keys for key in keys]
        for item in objects(text):
            kind = self._kind(item)
            if kind is not None and not item.fault and isinstance(self._region(item, kind), Found):
                regions.append(item)
        return lost_text(text, regions, known)

    def _region(self, item: JsonObject, kind: str) -> Found | str:
        """Return the region of an object, or the reason why it is not one."""
        members = dict(item.members)
        codes: list[int] = []
        names = dict(self.keys)[kind]
        for key in names:
            code = _fraction(members.get(key), self.decimals)
            if isinstance(code, str):
                return f"malformed object: {key!r} {code}"
            codes.append(code)
        unknown = [
            repr(key[:QUOTE_LENGTH]) for key, value in members.items() if key not in names and _has_number(value)
        ]
        if unknown:
            return f"malformed object: unknown keys {', '.join(unknown)} with numbers; a {kind} has {', '.join(names)}"
        if len(members) != len(item.members):
            return "malformed object: a key occurs twice"
        return Found(item.start, item.end, (item.start, item.end), kind, codes)
