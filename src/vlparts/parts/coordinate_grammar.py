"""The grammar of coordinate text: pairs of zero-padded codes, written and found in linear time."""

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .coordinate_formats import JOIN, CoordinateFormat

__all__ = ["DecodeError", "Found", "pair_texts", "read_pairs", "scan"]

_COMMAS = ",\uff0c\u3001\u060c"  # ASCII, full-width, ideographic, Arabic
_GAP = re.compile(rf"[\s{_COMMAS}]*+")  # what may stand between pairs that were meant as one region
_BEGUN = re.compile(rf"\s*+[{_COMMAS}][\s{_COMMAS}]*+\Z")  # a text that ends where another pair should follow
_QUOTED = 40  # characters of the text that a message quotes at most


class DecodeError(NamedTuple):
    """One thing in a text that could not be read: its position (an index into the str) and the reason."""

    position: int
    reason: str


class Found(NamedTuple):
    """A region in a text, from `start` to `end`: its codes as written, 2 or 4, and its label."""

    start: int
    end: int
    codes: tuple[str, ...]
    label: str | None


def _blank(pairs: int, digits: int) -> tuple[NDArray[np.uint8], NDArray[np.intp]]:
    """Return the bytes of `pairs` joined pairs of zeros, and where the digits stand `(pairs, 2, digits)`."""
    row = np.frombuffer(JOIN.join(["(" + "0" * digits + "," + "0" * digits + ")"] * pairs).encode(), np.uint8)
    return row, np.flatnonzero(row == ord("0")).reshape(pairs, 2, digits)


@lru_cache(maxsize=8)
def _digits(digits: int, levels: int) -> NDArray[np.uint8]:
    """Return the digits of every code as ASCII, `(levels, digits)`."""
    powers = 10 ** np.arange(digits - 1, -1, -1)
    return (np.arange(levels)[:, None] // powers % 10 + ord("0")).astype(np.uint8)


def pair_texts(codes: NDArray[np.int64], fmt: CoordinateFormat) -> list[str]:
    """Write each row of `codes` (n, p, 2) as p joined pairs, by filling fixed-width rows of bytes."""
    row, columns = _blank(codes.shape[1], fmt.digits)
    chars = np.tile(row, (len(codes), 1))
    chars[:, columns] = _digits(fmt.digits, fmt.levels)[codes]
    text, width = chars.tobytes().decode("ascii"), len(row)
    return [text[start : start + width] for start in range(0, len(text), width)]


def read_pairs(texts: Sequence[str], pairs: int, fmt: CoordinateFormat) -> NDArray[np.int64] | int:
    """Read texts that each hold `pairs` joined pairs and nothing else.

    Args:
        texts: n texts.
        pairs: p, the pairs in each text.
        fmt: The format.

    Returns:
        int64 codes `(n, p, 2)`, or the index of the first text that is not of this form.
    """
    row, columns = _blank(pairs, fmt.digits)
    for index, text in enumerate(texts):
        if len(text) != len(row) or not text.isascii():
            return index
    chars = np.frombuffer("".join(texts).encode("ascii"), dtype=np.uint8).reshape(-1, len(row))
    values = chars[:, columns] - ord("0")  # anything but a digit wraps to 10 or more
    codes = values @ (10 ** np.arange(fmt.digits - 1, -1, -1))
    fixed = np.delete(np.arange(len(row)), columns.ravel())
    bad = (chars[:, fixed] != row[fixed]).any(axis=1) | (values > 9).any(axis=(1, 2, 3))
    bad |= (codes >= fmt.levels).any(axis=(1, 2))
    return int(np.argmax(bad)) if bad.any() else codes


@lru_cache(maxsize=32)
def _pattern(digits: int, separator: str) -> re.Pattern[str]:
    """One pair or two joined ones (four groups), or else the beginning of something that was meant as one.

    Every open repetition is possessive, so that reading is linear in the length of the text.
    """
    pair = rf"\(([0-9]{{{digits}}}),([0-9]{{{digits}}})\)"
    begun = r"[(\uff08]\s*+[-+]?+\d[\d.]*+\s*+"
    rest = rf"(?:(?!{re.escape(separator)})[\d\s.+\-{_COMMAS}])*+[)\uff09]?+"
    broken = rf"{begun}(?:[{_COMMAS}]{rest}|\Z)|[(\uff08]\s*+\Z"
    return re.compile(rf"{pair}(?:{JOIN}{pair})?|{broken}")


def _label(gap: str, fmt: CoordinateFormat) -> str | None:
    """Return the label that ends the text between a region and what stands before it."""
    text = gap.rpartition(fmt.separator)[2].strip()
    opening, closing = fmt.label_open.strip(), fmt.label_close.strip()
    if not text.endswith(closing):
        return None
    text = text.removesuffix(closing)
    if opening:
        _, found, text = text.rpartition(opening)
        if not found:
            return None
    return text.strip() or None


def _runs(text: str, fmt: CoordinateFormat) -> Iterator[tuple[str, list[re.Match[str]]]]:
    """Yield what stands together, with nothing in between that parts regions, and the text before it."""
    run: list[re.Match[str]] = []
    before, end = "", 0
    for match in _pattern(fmt.digits, fmt.separator).finditer(text):
        gap = text[end : match.start()]
        end = match.end()
        if run and fmt.separator not in gap and _GAP.fullmatch(gap):
            run.append(match)
            continue
        if run:
            yield before, run
        before, run = gap, [match]
    if run:
        yield before, run


def _fault(text: str, run: Sequence[re.Match[str]], fmt: CoordinateFormat) -> str | None:
    """Return why a run is no region, or None where it is one."""
    first, end = run[0], run[-1].end()
    if len(run) == 1 and first[1] is not None:
        begun = None if first[3] else _BEGUN.match(text, end)  # a box takes no further pair
        reason = _bad_codes(first, fmt)
        if reason is None and (begun is None or fmt.separator in begun[0]):
            return None
    quoted = repr(text[first.start() : min(end, first.start() + _QUOTED)])
    if any(match[1] is None for match in run):
        closed = end < len(text) or text[-1] in ")\uff09"
        wanted = f"'({'d' * fmt.digits},{'d' * fmt.digits})' with ASCII digits and no spaces"
        return f"{'malformed' if closed else 'unfinished'} coordinates {quoted}: expected {wanted}"
    for before, after in pairwise(run):
        gap = text[before.end() : after.start()]
        if gap != JOIN:
            return f"{gap!r} between pairs in {quoted}: {JOIN!r} joins a box, {fmt.separator!r} parts regions"
    if len(run) > 1:
        return f"more than two pairs in a row in {quoted}: a point has one, a box has two"
    return reason or f"unfinished coordinates {quoted} at the end of the text: another pair was begun"


def _bad_codes(match: re.Match[str], fmt: CoordinateFormat) -> str | None:
    """Return what is wrong with the numbers of a pair or two, or None. Padded numbers compare as text."""
    x1, y1, x2, y2 = match.groups()
    if max(code for code in match.groups() if code) > str(fmt.levels - 1).zfill(fmt.digits):
        return f"{match[0]!r} holds a code above {fmt.levels - 1}"
    if x2 is not None and (x2 < x1 or y2 < y1):
        axis, low, high = ("x", x1, x2) if x2 < x1 else ("y", y1, y2)
        return f"{axis}2 ({high}) is less than {axis}1 ({low}) in {match[0]!r}"
    return None


def scan(text: str, fmt: CoordinateFormat) -> tuple[list[Found], list[DecodeError]]:
    """Find the regions of `text`, and what looks like coordinates but is not in the format."""
    found: list[Found] = []
    errors: list[DecodeError] = []
    for before, run in _runs(text, fmt):
        start, end = run[0].start(), run[-1].end()
        reason = _fault(text, run, fmt)
        if reason is None:
            codes = run[0].groups() if run[0][3] else run[0].groups()[:2]
            found.append(Found(start, end, codes, _label(before, fmt)))
        else:
            errors.append(DecodeError(start, reason))
    return found, errors
