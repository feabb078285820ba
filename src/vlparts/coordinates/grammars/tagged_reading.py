"""Reading the text of tagged grammars."""

import re
from collections.abc import Callable, Sequence

from ..json_values import NO_ATTRIBUTES
from .base import QUOTE_LENGTH, DecodeError, Found
from .tagged_fields import TaggedFields
from .tagged_patterns import Patterns, compiled

__all__ = ["empty_groups", "scan"]

_TAG_LENGTH = 64  # characters of an opening tag, at most, that are looked for at the end of a text
_Codes = tuple[int, ...]


def scan(grammar: TaggedFields, text: str) -> tuple[list[Found], list[DecodeError]]:
    """See [`Grammar`]."""
    patterns = compiled(grammar)
    kinds, number, separator = patterns.kinds, patterns.number, grammar.separator
    codes_of = _scaled_codes(grammar.decimals) if grammar.decimals else _integer_codes
    adjacent = grammar.group_join if not (grammar.group_open or grammar.group_close) else None
    label_before, label_after = grammar.label_place == "before", grammar.label_place == "after"
    found: list[Found] = []
    errors: list[DecodeError] = []
    groups: list[tuple[int, int, int]] = []  # with labels after: index of the first region, start and end of the match
    label: str | None = None
    end, after_region = 0, False
    for match in patterns.region.finditer(text):
        start, stop = match.span()
        index = match.lastindex
        if index is None or index not in kinds:  # malformed, or a group that says that there is no region
            errors += [_error(grammar, text, match, patterns)] if index is None else []
            if label_after:
                groups.append((len(found), start, stop))
            end, after_region = stop, False
            continue
        kind, coordinates, numbers, further, starts_match = kinds[index]
        first, last = match.span(coordinates)
        texts = match.group(*numbers) if numbers else number.findall(text, first, last)
        first, outer_start, gap = start if starts_match else first, start, text[end:start]
        if label_after:
            groups.append((len(found), start, stop))
        elif adjacent is not None and after_region and gap == adjacent:
            outer_start = end
        elif label_before and gap and gap != separator:
            label, label_start = _label_before(grammar, gap)
            outer_start = end + label_start
        else:
            label = None
        more = _further_regions(match, further, patterns, codes_of) if further and match[further] else ()
        outer = (outer_start, last if more else stop)
        found.append(
            tuple.__new__(Found, (first, last, outer, kind, codes_of(texts), label, 0, None, (), NO_ATTRIBUTES))
        )
        for position, (first, last, kind, codes) in enumerate(more, 1):
            outer = (outer[1], stop if position == len(more) else last)
            found.append(tuple.__new__(Found, (first, last, outer, kind, codes, label, 0, None, (), NO_ATTRIBUTES)))
        end, after_region = stop, True
    if label_after:
        _add_labels_after(grammar, text, found, groups)
    return found, errors + _cut_tag(text, end, patterns)


def empty_groups(grammar: TaggedFields, text: str) -> list[tuple[int, int]]:
    """Return start and end of each group that says that there is no region, with its marks and without its label."""
    if not grammar.empty:
        return []
    patterns = compiled(grammar)
    matches = patterns.region.finditer(text)
    return [match.span() for match in matches if match.lastindex and match.lastindex not in patterns.kinds]


def _integer_codes(texts: Sequence[str]) -> _Codes:
    return tuple(map(int, texts))


def _scaled_codes(decimals: int) -> Callable[[Sequence[str]], _Codes]:
    """Return a function from the texts of numbers to codes: 0.123 with three decimals is 123."""
    factor = 10**decimals
    return lambda texts: tuple([int(float(text) * factor + 0.5) for text in texts])


def _further_regions(
    match: re.Match[str], group: int, patterns: Patterns, codes_of: Callable[[Sequence[str]], _Codes]
) -> list[tuple[int, int, str, _Codes]]:
    """Return start, end, kind and codes of the regions of a group after its first."""
    result = []
    for one in patterns.further.finditer(match.string, *match.span(group)):
        kind, coordinates, numbers, _, _ = patterns.further_kinds[one.lastindex or 0]
        start, end = one.span(coordinates)
        texts = one.group(*numbers) if numbers else patterns.number.findall(match.string, start, end)
        result.append((start, end, kind, codes_of(texts)))
    return result


def _label_before(grammar: TaggedFields, gap: str) -> tuple[str | None, int]:
    """Return the label at the end of `gap`, and where it starts, marks included; (None, len(gap)) without a label."""
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


def _label_after(grammar: TaggedFields, gap: str) -> tuple[str | None, int]:
    """Return the label at the beginning of `gap`, and where it ends, marks included; (None, 0) without a label."""
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


def _add_labels_after(
    grammar: TaggedFields, text: str, found: list[Found], groups: Sequence[tuple[int, int, int]]
) -> None:
    """Give the regions of each group the label that follows it. `groups` includes malformed ones, without regions."""
    bounds = [*groups, (len(found), len(text), len(text))][1:]
    for (first, _, stop), (last, following, _) in zip(groups, bounds, strict=True):
        label, size = _label_after(grammar, text[stop:following])
        if label is None or first == last:
            continue
        for index in range(first, last):
            found[index] = found[index]._replace(label=label)
        item = found[last - 1]
        found[last - 1] = item._replace(outer=(item.outer[0], item.outer[1] + size))


def _error(grammar: TaggedFields, text: str, match: re.Match[str], patterns: Patterns) -> DecodeError:
    """Return the error of a malformed or unfinished region."""
    start, end = match.span()
    closed = end < len(text) or (text[-1] in ")]\uff09\uff3d\u3011" and not _ends_with_tag(grammar))
    examples = [text_ for mark, text_ in patterns.expected if text.startswith(mark, start)] or [
        patterns.expected[0][1]
    ]
    quoted = repr(text[start : min(end, start + QUOTE_LENGTH)])
    expected = " or ".join(map(repr, dict.fromkeys(examples)))
    state = "malformed" if closed else "unfinished"
    return DecodeError(start, f"{state} coordinates {quoted}: expected {expected} with ASCII digits")


def _ends_with_tag(grammar: TaggedFields) -> bool:
    """Whether regions end with a tag."""
    return "<" in grammar.group_close or any("<" in shape.close for shape in grammar.shapes)


def _cut_tag(text: str, end: int, patterns: Patterns) -> list[DecodeError]:
    """Return an error if the text after `end` ends with the beginning of an opening tag."""
    tail = text[max(end, len(text) - _TAG_LENGTH) :]
    for size in range(len(tail), 0, -1):
        piece = tail[-size:]
        if not piece.isalnum() and any(tag.startswith(piece) and tag != piece for tag in patterns.tags):
            return [DecodeError(len(text) - size, f"unfinished coordinates {piece!r}: the text ends within a mark")]
    return []
