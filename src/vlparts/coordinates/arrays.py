"""Arrays of boxes as text and back, and quantization of arrays.

If a format writes every box with the same number of characters, boxes are rows of a byte array.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .formats.registry import CoordinateFormat, get_format
from .grammars.base import QUOTE_LENGTH, Coded
from .quantization import NumberRule
from .resolving import CoordinateError, check_sizes, frame_of, resolve, swapped
from .validation import as_boxes, check_boxes, shown

__all__ = ["decode_array", "dequantize", "encode_array", "quantize"]

Codes = NDArray[np.int64]
_ZERO = ord("0")


class FixedRows:
    """Writes and reads boxes as rows of bytes.

    Args:
        blank: `(width,)` uint8, the text of a box of zeros.
        starts: Positions of the first digits of the four numbers, in the order x1, y1, x2, y2.
        digits: Digits of a number.
        most: Largest code.
    """

    def __init__(self, blank: NDArray[np.uint8], starts: list[int], digits: int, most: int) -> None:
        self.blank, self.starts, self.digits, self.most = blank, starts, digits, most
        self.width = len(blank)
        number = f"V{digits}"
        names = [f"number{index}" for index in range(4)]
        self._fields = np.dtype({"names": names, "formats": [number] * 4, "offsets": starts, "itemsize": self.width})
        self._names = names
        self._texts = np.array([b"%0*d" % (digits, code) for code in range(most + 1)]).view(number)
        columns = {start + digit for start in starts for digit in range(digits)}
        self._fixed = np.array(sorted(set(range(self.width)) - columns))

    def write(self, codes: Codes, out: NDArray[np.uint8]) -> None:
        """Write `codes` `(n, 4)`, from 0 to `most`, to the contiguous array `out` `(n, width)`."""
        out[:] = self.blank
        fields = out.view(self._fields)[:, 0]
        for index, name in enumerate(self._names):
            fields[name] = self._texts.take(codes[:, index])

    def read(self, rows: NDArray[np.uint8]) -> Codes | int:
        """Return the codes `(n, 4)` of `rows` `(n, width)`, or the index of the first row that is not a box."""
        codes = np.zeros((len(rows), 4), dtype=np.int64)
        wrong = (rows[:, self._fixed] != self.blank[self._fixed]).any(axis=1)
        for index, start in enumerate(self.starts):
            for digit in range(start, start + self.digits):
                value = rows[:, digit] - np.uint8(_ZERO)  # other bytes wrap around to 10 or more
                wrong |= value > 9
                codes[:, index] *= 10
                codes[:, index] += value
        wrong |= (codes > self.most).any(axis=1)
        return int(np.argmax(wrong)) if wrong.any() else codes


@lru_cache(maxsize=32)
def fixed_rows(format: CoordinateFormat) -> FixedRows | None:
    """Return the rows of a format, or None if its boxes differ in length or its codes depend on the image."""
    numbers = format.numbers
    if not isinstance(numbers, NumberRule) or numbers.levels is None or "box" not in format.grammar.kinds:
        return None
    if numbers.most is not None:  # codes that are only read may have another length
        return None
    most = numbers.levels - 1
    digits = len(str(most))
    texts = [format.grammar.write([Coded("box", [code] * 4)]) for code in (0, most)]
    lows, highs = (text.encode() for text in texts)
    if len(lows) != len(highs) or not all(text.isascii() for text in texts):
        return None
    low, high = (np.frombuffer(text, np.uint8) for text in (lows, highs))
    starts = [lows.find(b"0" * digits)]
    while len(starts) < 4:
        starts.append(lows.find(b"0" * digits, starts[-1] + digits))
    if min(starts) < 0 or any(lows[start + digits : start + digits + 1].isdigit() for start in starts):
        return None
    if len(np.flatnonzero(low != high)) != sum(digit != "0" for digit in str(most)) * 4:
        return None
    if "box" in format.y_first:
        starts = [starts[1], starts[0], starts[3], starts[2]]
    return FixedRows(low, starts, digits, most)


# Boxes per chunk: the arrays of a chunk stay in the processor cache between the steps.
CHUNK_SIZE = 8192


def _rule(format: CoordinateFormat | str | None) -> NumberRule:
    """Return the number rule of a format, or raise ValueError if its codes are not those of single values."""
    fmt = get_format(format)
    if not isinstance(fmt.numbers, NumberRule):
        raise ValueError(f"`format` must have one code per value, got {fmt.name!r}.")
    return fmt.numbers


def _sides(size: ArrayLike) -> NDArray[np.float64]:
    """Return `size` as float64, after checking that it contains positive integers."""
    sides = np.asarray(size)
    if sides.dtype.kind not in "iu" or (sides < 1).any():
        raise ValueError(f"`size` must contain positive integers (pixels), got {shown(size)}.")
    return sides.astype(np.float64)


def quantize(values: ArrayLike, size: ArrayLike, format: CoordinateFormat | str | None = None) -> NDArray[np.int64]:
    """Convert pixel coordinates to codes by the format's rule (see [`NumberRule`]).

    Args:
        values: Real numbers in [0, size], any shape, in pixels of the format's frame. Never modified.
        size: Side of the frame in pixels, a positive integer, or an array of them that broadcasts against
            `values`: for `(..., 2)` points pass `(width, height)`.
        format: A format or its name; None for openPangu's.

    Returns:
        int64 codes, of the broadcast shape. A larger value never has a smaller code.

    Raises:
        ValueError: If a value is not a finite real number in [0, size], or a size is not a positive integer.
    """
    rule, sides = _rule(format), _sides(size)
    given = np.asarray(values)
    if given.size and given.dtype.kind not in "iuf":
        raise ValueError(f"`values` must be real numbers, got dtype {given.dtype}.")
    pixels = given.astype(np.float64)
    inside = (pixels >= 0) & (pixels <= sides)  # false for NaN
    if not inside.all():
        bad = np.broadcast_to(pixels, inside.shape)[~inside][0]
        raise ValueError(f"`values` must be in [0, size], got {bad} for size {size!r}.")
    return rule.quantize(pixels, sides)


def dequantize(codes: ArrayLike, size: ArrayLike, format: CoordinateFormat | str | None = None) -> NDArray[np.float64]:
    """Convert codes to pixel coordinates by the format's rule (see [`NumberRule`]).

    Args:
        codes: Integers from 0 to the format's largest code, any shape. Never modified.
        size: Side of the frame in pixels, see `quantize`.
        format: A format or its name; None for openPangu's.

    Returns:
        float64 pixels in [0, size], of the broadcast shape. `quantize` converts them to the same codes.

    Raises:
        ValueError: If a code is not an integer in its range, or a size is not a positive integer.
    """
    rule, sides = _rule(format), _sides(size)
    given = np.asarray(codes)
    if given.size and given.dtype.kind not in "iu":
        raise ValueError(f"`codes` must be integers, got dtype {given.dtype}.")
    most = np.vectorize(rule.largest, otypes=[np.int64])(sides) if rule.denominator is None else rule.largest(1)
    if ((given < 0) | (given > most)).any():
        raise ValueError(f"`codes` must be in [0, {np.max(most)}], got {given.min()}..{given.max()}.")
    return rule.dequantize(given, sides)


def encode_array(
    boxes: ArrayLike, image_size: tuple[int, int], format: CoordinateFormat | str | None = None
) -> NDArray[np.bytes_]:
    """Write boxes without labels, one text per box; the fast form of `encode`.

    Args:
        boxes: `(n, 4)` x1, y1, x2, y2 in pixels of the original image. Never modified.
        image_size: (width, height) of the original image in pixels.
        format: A format or its name; None for openPangu's. Formats whose boxes all have the same length, such
            as padded ones, are written about a hundred times as fast as others.

    Returns:
        `(n,)` bytes, each `encode([Region.box(*box)], image_size, format)` in UTF-8; `.astype(str)` converts
            them to str.

    Raises:
        ValueError: If `boxes` is not `(n, 4)`, or a box is not finite, not in order, or leaves the image (to
            clamp, use `numpy.clip` first).
    """
    fmt, size = get_format(format), _one_size(image_size)
    rows, frame = fixed_rows(fmt), frame_of(fmt, size)
    if rows is None or not isinstance(fmt.numbers, NumberRule) or not frame.is_original:
        return _encode_each(boxes, size, fmt)
    array, sides = as_boxes(boxes, "boxes"), np.array([*size, *size], dtype=np.float64)
    out = np.empty((len(array), rows.width), np.uint8)
    for start in range(0, len(array), CHUNK_SIZE):
        piece = array[start : start + CHUNK_SIZE]
        _check_inside(piece, size, start)
        rows.write(fmt.numbers.quantize(piece, sides), out[start : start + CHUNK_SIZE])
    return out.view(f"S{rows.width}")[:, 0]


def decode_array(
    texts: Sequence[str] | NDArray[np.bytes_],
    image_size: tuple[int, int],
    format: CoordinateFormat | str | None = None,
) -> NDArray[np.float64]:
    """Read texts that each contain exactly one box; the inverse of `encode_array`.

    Args:
        texts: n texts such as "(012,345),(678,901)", as str or as an array of bytes.
        image_size: (width, height) of the original image in pixels.
        format: A format or its name; None for openPangu's.

    Returns:
        float64 `(n, 4)` x1, y1, x2, y2 in pixels of the original image.

    Raises:
        CoordinateError: At the first text that is not exactly one box with its corners in order.
        ValueError: If the format is unknown.
    """
    fmt, size = get_format(format), _one_size(image_size)
    given = isinstance(texts, np.ndarray) and texts.dtype.kind == "S" and texts.ndim == 1
    if not given and (isinstance(texts, str) or not all(isinstance(text, str) for text in texts)):
        raise CoordinateError("`texts` must be a sequence of str or an array of bytes.")
    rows, frame = fixed_rows(fmt), frame_of(fmt, size)
    if rows is None or not isinstance(fmt.numbers, NumberRule) or not frame.is_original:
        return _decode_each([_as_str(text) for text in texts], size, fmt)
    array, sides = _as_rows(texts, rows), np.array([*size, *size], dtype=np.float64)
    boxes = np.empty((len(array), 4))
    for start in range(0, len(array), CHUNK_SIZE):
        codes = rows.read(array[start : start + CHUNK_SIZE])
        if isinstance(codes, int):
            raise _not_a_box(texts, start + codes)
        ordered = (codes[:, 2:] >= codes[:, :2]).all(axis=1)
        if not ordered.all():
            index = start + int(np.argmin(ordered))
            raise CoordinateError(f"`texts[{index}]` must have x1 <= x2 and y1 <= y2, got {_as_str(texts[index])!r}.")
        boxes[start : start + CHUNK_SIZE] = fmt.numbers.dequantize(codes, sides)
    return boxes


def _check_inside(boxes: NDArray[np.float64], size: tuple[int, int], first: int) -> None:
    """Raise ValueError at the first box that is not finite, not in order, or leaves the image."""
    x1, y1, x2, y2 = boxes.T
    good = (x1 >= 0) & (y1 >= 0) & (x1 <= x2) & (y1 <= y2) & (x2 <= size[0]) & (y2 <= size[1])  # false for NaN
    if good.all():
        return
    index = int(np.argmin(good))
    check_boxes(boxes[index : index + 1], "boxes", first + index)
    bad = next(value for value, side in zip(boxes[index], (*size, *size), strict=True) if not 0 <= value <= side)
    raise ValueError(f"`boxes[{first + index}]` must be within the image of size {size!r}, got {bad}.")


def _encode_each(boxes: ArrayLike, size: tuple[int, int], fmt: CoordinateFormat) -> NDArray[np.bytes_]:
    """Write each box with the format's grammar."""
    array = as_boxes(boxes, "boxes")
    _check_inside(array, size, 0)
    frame = frame_of(fmt, size)
    points = np.clip(frame.to_frame(array.reshape(-1, 2)), 0.0, frame.size)
    rows = fmt.numbers.to_codes(points, [2] * len(array), frame.size)
    ordered = swapped if "box" in fmt.y_first else list
    return np.array([fmt.grammar.write([Coded("box", ordered(row))]).encode() for row in rows], dtype=np.bytes_)


def _as_rows(texts: Sequence[str] | NDArray[np.bytes_], rows: FixedRows) -> NDArray[np.uint8]:
    """Return texts of one length as `(n, width)` bytes, or raise CoordinateError at the first of another length."""
    if isinstance(texts, np.ndarray) and texts.dtype.kind == "S" and texts.dtype.itemsize == rows.width:
        return np.ascontiguousarray(texts).view(np.uint8).reshape(-1, rows.width)
    for index, text in enumerate(texts):
        if len(text) != rows.width or not text.isascii():
            raise _not_a_box(texts, index)
    joined = "".join(map(_as_str, texts)).encode("ascii")
    return np.frombuffer(joined, dtype=np.uint8).reshape(-1, rows.width)


def _as_str(text: object) -> str:
    return text.decode(errors="replace") if isinstance(text, bytes) else str(text)


def _not_a_box(texts: Sequence[object] | NDArray[np.bytes_], index: int) -> CoordinateError:
    return CoordinateError(f"`texts[{index}]` must be exactly one box, got {_as_str(texts[index])[:QUOTE_LENGTH]!r}.")


def _one_size(image_size: object) -> tuple[int, int]:
    """Return the size of a single image."""
    sizes = check_sizes(image_size)
    if len(sizes) != 1:
        raise CoordinateError(f"`image_size` must be one (width, height) for arrays, got {image_size!r}.")
    return sizes[0]


def _decode_each(texts: Sequence[str], size: tuple[int, int], fmt: CoordinateFormat) -> NDArray[np.float64]:
    """Read one box from each text with the format's grammar."""
    boxes = []
    for index, text in enumerate(texts):
        found, errors = fmt.grammar.scan(text)
        _, regions, errors = resolve(text, found, errors, [size], fmt)
        region = regions[0] if len(regions) == 1 and not errors else None
        if region is None or (region.kind, region.label) != ("box", None) or found[0].outer != (0, len(text)):
            reason = f": {errors[0].reason}" if errors else ""
            raise CoordinateError(f"`texts[{index}]` must be exactly one box, got {text[:QUOTE_LENGTH]!r}{reason}.")
        boxes.append(region.xyxy)
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)
