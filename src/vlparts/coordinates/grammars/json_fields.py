"""A grammar of regions as JSON with a key for each number: `{"x_min": 0.1, "y_min": 0.2, ...}`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal

from .base import Coded, DecodeError, Found
from .json_objects import cut_list, fault_of, in_order
from .json_scanner import JsonNumber, JsonObject, objects

__all__ = ["NamedJsonGrammar"]

_DIGITS = 9
_LONGEST = 32  # characters of a number


def _fraction(value: object, decimals: int) -> int | str:
    """Return the code of a number with decimals, rounded half up, or what is wrong with it."""
    if not isinstance(value, JsonNumber):
        return "is no number"
    if len(value.token) > _LONGEST or re.search(r"[eE][+-]?\d{4}", value.token):
        return "is too long"
    number = Decimal(value.token)
    if number < 0:
        return "is negative"
    if number and number.adjusted() > _DIGITS - decimals:
        return "is too large"
    return int(number.scaleb(decimals).quantize(Decimal(1), rounding=ROUND_HALF_UP))


@dataclass(frozen=True, kw_only=True)
class NamedJsonGrammar:
    """Regions as objects with a key for each number, such as `{"x": 0.1, "y": 0.2}`.

    Read and refused as in [`JsonGrammar`]; numbers may have decimals and an exponent, and are rounded.

    Args:
        keys: Pairs of a kind of region and its keys, in the order x, y.
        decimals: Decimals of a number at most; a code of 123 with 3 decimals is written 0.123.
        opening: Text before the first object, with `{}` for the name of the list.
        names: For each kind in `keys`, the name of the list.
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
        """See [`Grammar`]; kinds that change within the regions begin another list."""
        pieces: list[str] = []
        last = ""
        for kind, codes, label, image, identity, times in regions:
            if kind not in self.kinds or label is not None or image or identity is not None or len(times):
                raise ValueError(f"the format writes no labels, and of one image: {', '.join(self.kinds)}")
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
        """A code with its decimals, at least one, without zeros behind."""
        whole, part = divmod(code, 10**self.decimals)
        return f"{whole}.{str(part).zfill(self.decimals).rstrip('0') or '0'}"

    def scan(self, text: str) -> tuple[list[Found], list[DecodeError]]:
        """See [`Grammar`]."""
        found: list[Found] = []
        errors: list[DecodeError] = []
        marks = [keys[0] for _, keys in self.keys]
        for item in objects(text):
            if item.fault == "single quotes":
                head = text[item.start : item.start + 16]
                if any(f"'{mark}'" in head for mark in marks):
                    errors.append(DecodeError(item.start, fault_of(item)))
                continue
            members = dict(item.members)
            kind = next((kind for kind, keys in self.keys if keys[0] in members), None)
            if kind is None and not (item.fault == "unfinished" and not item.members):
                continue
            region = fault_of(item) if item.fault or kind is None else self._region(item, kind, members)
            if isinstance(region, str):
                errors.append(DecodeError(item.start, region))
            else:
                found.append(region)
        return in_order(found, errors + cut_list(text, found, errors), text)

    def _region(self, item: JsonObject, kind: str, members: dict[str, object]) -> Found | str:
        """The region that an object is, or why it is none."""
        codes: list[int] = []
        for key in dict(self.keys)[kind]:
            code = _fraction(members.get(key), self.decimals)
            if isinstance(code, str):
                return f"malformed object: {key!r} {code}"
            codes.append(code)
        if len(members) != len(item.members):
            return "malformed object: a key twice"
        return Found(item.start, item.end, (item.start, item.end), kind, codes)
