"""A grammar of regions as JSON objects with one key per number: `{"x_min": 0.1, "y_min": 0.2, ...}`."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal

from .base import QUOTE_LENGTH, Coded, DecodeError, Found, Grammar, check_writable
from .json_attributes import has_number, is_shape, read_attributes, written_attributes
from .json_objects import MAX_DIGITS, cut_list, fault_reason, label_of, lost_text, ordered
from .json_scanner import JsonNumber, JsonObject, JsonString, objects

__all__ = ["NamedJsonGrammar"]

_MAX_LENGTH = 32  # characters of a number


def _decimal(value: object, decimals: int) -> Decimal | str:
    """Return a number, or the reason why it is not valid. With decimals, it may have any count of them."""
    if not isinstance(value, JsonNumber):
        return "is not a number"
    if len(value.token) > _MAX_LENGTH or re.search(r"[eE][+-]?\d{4}", value.token):
        return "is too long"
    number = Decimal(value.token)
    if number < 0:
        return "is negative"
    if number and number.adjusted() > MAX_DIGITS - decimals:
        return "is too large"
    return number if decimals or number == number.to_integral_value() else "is not an integer"


@dataclass(frozen=True, kw_only=True)
class NamedJsonGrammar:
    """Regions as objects with one key per number, such as `{"x": 0.1, "y": 0.2}`.

    Objects are read as in [`JsonGrammar`], with the same errors. Numbers may have an exponent, and decimals, which are
    rounded, unless `decimals` is 0. A further key with a number is an error if its name is that of a coordinate, size
    or angle, such as "width", since the object is then another shape; other further keys are attributes.

    Args:
        keys: Pairs of a kind of region and its keys, in the order x, y.
        sizes: Whether the last two numbers of a box are its width and height, not its second corner.
        aliases: Pairs of another name that is read, such as "w", and the key, such as "width".
        label_key: Key of the label; "" if there are no labels.
        decimals: Maximum number of decimals; a code of 123 with 3 decimals is written 0.123. 0 for integers.
        opening: Text before the first object, with `{}` for the name of the list.
        names: Name of the list per kind in `keys`; () if `opening` has none.
        separator: Text between objects.
        closing: Text after the last object.
    """

    keys: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("box", ("x_min", "y_min", "x_max", "y_max")),
        ("point", ("x", "y")),
    )
    sizes: bool = False
    aliases: tuple[tuple[str, str], ...] = ()
    label_key: str = ""
    decimals: int = 6
    opening: str = '{{"{}": ['
    names: tuple[str, ...] = ("objects", "points")
    separator: str = ", "
    closing: str = "]}"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of region that can be written."""
        return tuple(kind for kind, _ in self.keys)

    @property
    def own_keys(self) -> tuple[str, ...]:
        """The keys that are not attributes."""
        named = [key for _, keys in self.keys for key in keys]
        return (*named, *(alias for alias, _ in self.aliases), *filter(None, [self.label_key]))

    def write(self, regions: Sequence[Coded]) -> str:
        """See [`Grammar`]. A change of kind within the regions begins another list."""
        pieces: list[str] = []
        last = ""
        for region in regions:
            check_writable(region, self.kinds, self.own_keys)
            kind, label = region.kind, region.label
            if label is not None and not self.label_key:
                raise ValueError(f"The format has no labels, got label {label!r}.")
            if kind != last:
                pieces += [self.closing + self.separator] if last else []
                pieces += [self.opening.format(*self.names[self.kinds.index(kind) :])]
            else:
                pieces += [self.separator]
            codes = list(region.codes)
            if self.sizes and kind == "box":
                codes[2:] = codes[2] - codes[0], codes[3] - codes[1]
            keys = dict(self.keys)[kind]
            body = ", ".join(f'"{key}": {self._number(code)}' for key, code in zip(keys, codes, strict=True))
            name = "" if label is None else f', "{self.label_key}": {json.dumps(label, ensure_ascii=False)}'
            further = written_attributes(region, [keys[0] for _, keys in self.keys], shapes=False)
            pieces += ["{", body, name, further, "}"]
            last = kind
        return "".join(pieces) + (self.closing if last else "")

    def _number(self, code: int) -> str:
        """Return a code with at least one decimal, without trailing zeros, or as an integer."""
        if not self.decimals:
            return str(code)
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
            region = fault_reason(item) if item.fault or kind is None else self._region(text, item, kind)
            if isinstance(region, str):
                errors.append(DecodeError(item.start, region))
            else:
                found.append(region)
        return ordered(found, errors + cut_list(text, found, errors), text, self.names)

    def _kind(self, item: JsonObject) -> str | None:
        """Return the kind of region that an object is, or None."""
        members = dict(item.members)
        return next((kind for kind, keys in self.keys if keys[0] in members), None)

    def lost(self, text: str, target: Grammar) -> list[DecodeError]:
        """See [`ReportsLoss`]."""
        regions = []
        for item in objects(text):
            kind = self._kind(item)
            if kind is not None and not item.fault and isinstance(self._region(text, item, kind), Found):
                regions.append(item)
        return lost_text(text, regions, self.own_keys, target)

    def _region(self, text: str, item: JsonObject, kind: str) -> Found | str:
        """Return the region of an object, or the reason why it is not one."""
        renamed = dict(self.aliases)
        members = {renamed.get(key, key): value for key, value in item.members}
        if len(members) != len(item.members):
            return "malformed object: a key occurs twice"
        names = dict(self.keys)[kind]
        numbers: list[Decimal] = []
        for key in names:
            number = _decimal(members.get(key), self.decimals)
            if isinstance(number, str):
                return f"malformed object: {key!r} {number}"
            numbers.append(number)
        if self.sizes and kind == "box":
            numbers[2:] = numbers[0] + numbers[2], numbers[1] + numbers[3]
        known = (*names, self.label_key)
        other = {key: value for key, value in members.items() if key not in known}
        unknown = [
            repr(key[:QUOTE_LENGTH])
            for key, value in other.items()
            if is_shape(key, value) or (key in self.own_keys and has_number(value))
        ]
        if unknown:
            return f"malformed object: unknown keys {', '.join(unknown)} with numbers; a {kind} has {', '.join(names)}"
        label = label_of(members.get(self.label_key, "null")) if self.label_key else None
        if isinstance(label, JsonString):
            return f"malformed object: {self.label_key!r} must be a string"
        used = (*names, *(alias for alias, key in self.aliases if key in names), *filter(None, [self.label_key]))
        attributes = read_attributes(text, item, used)
        if isinstance(attributes, str):
            return attributes
        codes = [int(n.scaleb(self.decimals).quantize(Decimal(1), rounding=ROUND_HALF_UP)) for n in numbers]
        return Found(item.start, item.end, (item.start, item.end), kind, codes, label, attributes=attributes)
