"""Reading tagged grammars."""

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .base import DecodeError, Found
from .tagged_patterns import Patterns, compiled

if TYPE_CHECKING:
    from .tagged import TaggedGrammar

__all__ = ["scan"]

_QUOTED = 40  # characters of the text that a message quotes at most
_Codes = tuple[int, ...]


def _whole(texts: Sequence[str]) -> _Codes:
    return tuple(map(int, texts))


def _scaled(decimals: int) -> Callable[[Sequence[str]], _Codes]:
    """What makes codes of numbers with decimals: 0.123 with three is 123."""
    factor = 10**decimals
    return lambda texts: tuple([int(float(text) * factor + 0.5) for text in texts])


def _further(
    match: re.Match[str], at: int, patterns: Patterns, codes: Callable[[Sequence[str]], _Codes]
) -> list[tuple[int, int, str, _Codes]]:
    """The regions of a group after its first."""
    result = []
    for one in patterns.further.finditer(match.string, *match.span(at)):
        kind, place, numbers, _, _ = patterns.further_kinds[one.lastindex or 0]
        start, end = one.span(place)
        texts = one.group(*numbers) if numbers else patterns.number.findall(match.string, start, end)
        result.append((start, end, kind, codes(texts)))
    return result


def _label_before(grammar: "TaggedGrammar", gap: str) -> tuple[str | None, int]:
    """The label that ends a text, and where it begins, its marks included; there it ends where there is none."""
    opening, closing = grammar.label_open.strip(), grammar.label_close.strip()
    text = gap.rstrip()
    if not text.endswith(closing):
        return None, len(gap)
    text = text.removesuffix(closing)
    if opening:
        at = text.rfind(opening)
        label = text[at + len(opening) :].strip() if at >= 0 else ""
    else:
        separator = grammar.separator.strip() or grammar.separator
        at = text.rfind(separator) + len(separator) if separator and separator in text else 0
        at = max(at, text.rfind("\n") + 1)
        at += len(text[at:]) - len(text[at:].lstrip())
        label = text[at:]
    return (label, at) if label else (None, len(gap))


def _label_after(grammar: "TaggedGrammar", gap: str) -> tuple[str | None, int]:
    """The label that begins a text, and where it ends, its marks included."""
    opening, closing = grammar.label_open.strip(), grammar.label_close.strip()
    text = gap.lstrip()
    skipped = len(gap) - len(text)
    if not text.startswith(opening):
        return None, 0
    text = text.removeprefix(opening)
    end = text.find(closing) if closing else len(text)
    if end < 0:
        return None, 0
    label = text[:end]
    if not closing:
        separator = grammar.separator.strip() or grammar.separator
        label = label.partition(separator)[0] if separator else label
        label = label.partition("\n")[0].rstrip()
    size = skipped + len(opening) + len(label) + len(closing)
    label = label.strip()
    return (label, size) if label else (None, 0)


def _fault(grammar: "TaggedGrammar", text: str, match: re.Match[str], patterns: Patterns) -> DecodeError:
    """Why a match is no region."""
    start, end = match.span()
    closed = end < len(text) or (text[-1] in ")]\uff09\uff3d\u3011" and not _has_end(grammar))
    wanted = [example for mark, example in patterns.marks if text.startswith(mark, start)] or [patterns.marks[0][1]]
    quoted = repr(text[start : min(end, start + _QUOTED)])
    expected = " or ".join(map(repr, dict.fromkeys(wanted)))
    how = "malformed" if closed else "unfinished"
    return DecodeError(start, f"{how} coordinates {quoted}: expected {expected} with ASCII digits")


def _has_end(grammar: "TaggedGrammar") -> bool:
    """Whether regions end with a tag."""
    return "<" in grammar.group_close or any("<" in shape.close for shape in grammar.shapes)


def _cut_opening(text: str, end: int, patterns: Patterns) -> list[DecodeError]:
    """The beginning of an opening mark at the end of the text, which was cut there."""
    tail = text[max(end, len(text) - 64) :]
    for size in range(min(len(tail), 64), 0, -1):
        piece = tail[-size:]
        if not piece.isalnum() and any(mark.startswith(piece) and mark != piece for mark in patterns.openings):
            return [DecodeError(len(text) - size, f"unfinished coordinates {piece!r}: the text ends within a mark")]
    return []


def scan(grammar: "TaggedGrammar", text: str) -> tuple[list[Found], list[DecodeError]]:
    """See [`Grammar`]."""
    patterns = compiled(grammar)
    kinds, number, separator = patterns.kinds, patterns.number, grammar.separator
    codes_of = _scaled(grammar.decimals) if grammar.decimals else _whole
    adjacent = grammar.group_join if not (grammar.group_open or grammar.group_close) else None
    labelled, behind = grammar.label_place == "before", grammar.label_place == "after"
    found: list[Found] = []
    errors: list[DecodeError] = []
    groups: list[tuple[int, int, int]] = []  # with labels behind: the first region of each, and its span
    label: str | None = None
    end, after_region = 0, False
    for match in patterns.region.finditer(text):
        start, stop = match.span()
        index = match.lastindex
        if index is None:
            errors.append(_fault(grammar, text, match, patterns))
            if behind:
                groups.append((len(found), start, stop))
            end, after_region = stop, False
            continue
        kind, at, numbers, further, bare = kinds[index]
        first, last = match.span(at)
        texts = match.group(*numbers) if numbers else number.findall(text, first, last)
        first, begin, gap = start if bare else first, start, text[end:start]
        if behind:
            groups.append((len(found), start, stop))
        elif adjacent is not None and after_region and gap == adjacent:
            begin = end
        elif labelled and gap and gap != separator:
            label, place = _label_before(grammar, gap)
            begin = end + place
        else:
            label = None
        more = _further(match, further, patterns, codes_of) if further and match[further] else ()
        outer = (begin, last if more else stop)
        found.append(tuple.__new__(Found, (first, last, outer, kind, codes_of(texts), label, 0, None, ())))
        for place, (first, last, kind, codes) in enumerate(more, 1):
            outer = (outer[1], stop if place == len(more) else last)
            found.append(tuple.__new__(Found, (first, last, outer, kind, codes, label, 0, None, ())))
        end, after_region = stop, True
    if behind:
        _add_labels_behind(grammar, text, found, groups)
    return found, errors + _cut_opening(text, end, patterns)


def _add_labels_behind(
    grammar: "TaggedGrammar", text: str, found: list[Found], groups: Sequence[tuple[int, int, int]]
) -> None:
    """Give the regions of each group the label that follows it; `groups` holds broken ones too, without regions."""
    bounds = [*groups, (len(found), len(text), len(text))][1:]
    for (first, _, stop), (last, following, _) in zip(groups, bounds, strict=True):
        label, size = _label_after(grammar, text[stop:following])
        if label is None or first == last:
            continue
        for place in range(first, last):
            found[place] = found[place]._replace(label=label)
        item = found[last - 1]
        found[last - 1] = item._replace(outer=(item.outer[0], item.outer[1] + size))
