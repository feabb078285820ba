"""Boxes in formats that write every box with equally many characters: rows of bytes, filled and read as arrays."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .formats import CoordinateFormat
from .grammar import Coded
from .numbers import NumberRule

__all__ = ["FixedRows", "fixed_rows"]

Codes = NDArray[np.int64]
_ZERO = ord("0")


class FixedRows:
    """Writes and reads boxes as rows of bytes.

    Args:
        blank: `(width,)` uint8, a box of zeros.
        places: Where the digits of the four numbers begin, in the order x1, y1, x2, y2.
        digits: Digits of a number.
        most: Largest code.
    """

    def __init__(self, blank: NDArray[np.uint8], places: list[int], digits: int, most: int) -> None:
        self.blank, self.places, self.digits, self.most = blank, places, digits, most
        self.width = len(blank)
        number = f"V{digits}"
        names = [f"number{index}" for index in range(4)]
        self._fields = np.dtype({"names": names, "formats": [number] * 4, "offsets": places, "itemsize": self.width})
        self._names = names
        self._texts = np.array([b"%0*d" % (digits, code) for code in range(most + 1)]).view(number)
        columns = {place + digit for place in places for digit in range(digits)}
        self._fixed = np.array(sorted(set(range(self.width)) - columns))

    def write(self, codes: Codes, out: NDArray[np.uint8]) -> None:
        """Write `codes` `(n, 4)` from 0 to `most` to `out` `(n, width)`, contiguous."""
        out[:] = self.blank
        fields = out.view(self._fields)[:, 0]
        for index, name in enumerate(self._names):
            fields[name] = self._texts.take(codes[:, index])

    def read(self, rows: NDArray[np.uint8]) -> Codes | int:
        """Codes `(n, 4)` of `rows` `(n, width)`, or the index of the first that is no box with codes up to `most`."""
        codes = np.zeros((len(rows), 4), dtype=np.int64)
        wrong = (rows[:, self._fixed] != self.blank[self._fixed]).any(axis=1)
        for index, place in enumerate(self.places):
            for digit in range(place, place + self.digits):
                value = rows[:, digit] - np.uint8(_ZERO)  # anything but a digit wraps to 10 or more
                wrong |= value > 9
                codes[:, index] *= 10
                codes[:, index] += value
        wrong |= (codes > self.most).any(axis=1)
        return int(np.argmax(wrong)) if wrong.any() else codes


@lru_cache(maxsize=32)
def fixed_rows(format: CoordinateFormat) -> FixedRows | None:
    """The rows of a format, or None where its boxes are of different lengths or its codes depend on the image."""
    numbers = format.numbers
    if not isinstance(numbers, NumberRule) or numbers.levels is None or "box" not in format.grammar.kinds:
        return None
    if numbers.most is not None:  # codes that are read but not written may have another length
        return None
    most = numbers.levels - 1
    digits = len(str(most))
    texts = [format.grammar.write([Coded("box", [code] * 4)]) for code in (0, most)]
    lows, highs = (text.encode() for text in texts)
    if len(lows) != len(highs) or not all(text.isascii() for text in texts):
        return None
    low, high = (np.frombuffer(text, np.uint8) for text in (lows, highs))
    places = [lows.find(b"0" * digits)]
    while len(places) < 4:
        places.append(lows.find(b"0" * digits, places[-1] + digits))
    if min(places) < 0 or any(lows[place + digits : place + digits + 1].isdigit() for place in places):
        return None
    if len(np.flatnonzero(low != high)) != sum(digit != "0" for digit in str(most)) * 4:
        return None
    if "box" in format.y_first:
        places = [places[1], places[0], places[3], places[2]]
    return FixedRows(low, places, digits, most)
