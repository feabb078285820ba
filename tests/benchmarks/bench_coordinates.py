"""Speed of reading and writing coordinates, on one core.

`python tests/benchmarks/bench_coordinates.py [--boxes N] [--repeats N] [--largest MB]` prints (1) millions of boxes
per second written and read as arrays, against a plain loop, and a regular expression with conversion; (2) free text
of about 54 characters for each box, against a bare regular expression with conversion, for some formats; (3) the time
for each character of texts from 10 kB to 10 MB: good ones, and hostile ones in every format, where anything but a
level row would show growth that is not linear.
"""

import argparse
import random
import re
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from timing import compare, machine_line, print_table

from vlparts.coordinates import FORMATS, Region, decode, decode_array, encode, encode_array

SIZE = (1920, 1080)
WORDS = ["the", "cat", "sat", "on", "a", "mat", "near", "an", "old", "tree", "and", "looked", "at", "two", "birds"]
BARE = re.compile(r"\(([0-9]{3}),([0-9]{3})\),\(([0-9]{3}),([0-9]{3})\)")
NUMBERS = re.compile(r"([0-9]{1,9})\D{1,3}([0-9]{1,9})\D{1,3}([0-9]{1,9})\D{1,3}([0-9]{1,9})")
IN_TEXT = ["openpangu", "qwen_vl", "internvl", "deepseek_vl2", "qwen3_vl"]
HOSTILE = [
    "(",
    "(1",
    "(001,002),",
    "[[",
    "[[[",
    "<box>",
    "<ref>a",
    '{"bbox_2d": [',
    '[{"a":',
    "<points ",
    '"',
    "\\",
    "1,",
    "<loc_",
]


def make_boxes(count: int) -> np.ndarray:
    """Boxes all over the image."""
    corners = np.sort(np.random.default_rng(0).random((count, 2, 2)), axis=1) * SIZE
    return corners.reshape(-1, 4)


def plain_encode(boxes: list[list[float]]) -> list[str]:
    """What one writes without a library."""
    width, height = SIZE
    return [
        f"({int(a * 999 / width + 0.5):03d},{int(b * 999 / height + 0.5):03d}),"
        f"({int(c * 999 / width + 0.5):03d},{int(d * 999 / height + 0.5):03d})"
        for a, b, c, d in boxes
    ]


def plain_decode(texts: list[str]) -> list[list[float]]:
    """The same for reading."""
    sides = [side / 999 for side in (*SIZE, *SIZE)]
    matches = map(BARE.fullmatch, texts)
    return [[int(code) * side for code, side in zip(match.groups(), sides, strict=True)] for match in matches if match]


def prose(boxes: np.ndarray, name: str) -> str:
    """Sentences, each with a box in the format's text."""
    random.seed(0)
    lines = []
    for box in boxes.tolist():
        lines.append(" ".join(random.choices(WORDS, k=8)) + " " + encode([Region.box(*box)], SIZE, name) + ".")
    return "\n".join(lines)


def bare(pattern: re.Pattern[str], text: str) -> list[tuple[int, ...]]:
    """A bare regular expression and `int`."""
    return [tuple(map(int, match.groups())) for match in pattern.finditer(text)]


def arrays(count: int, repeats: int) -> None:
    """Print how many boxes pass in a second."""
    boxes = make_boxes(count)
    listed, data = boxes.tolist(), encode_array(boxes, SIZE)
    texts = data.astype(str).tolist()
    calls: dict[str, Callable[[], object]] = {
        "write, plain loop": lambda: plain_encode(listed),
        "write, encode_array": lambda: encode_array(boxes, SIZE),
        "read, plain loop": lambda: plain_decode(texts),
        "read, decode_array of bytes": lambda: decode_array(data, SIZE),
        "read, decode_array of str": lambda: decode_array(texts, SIZE),
    }
    seconds = compare(calls, repeats)
    rows = []
    for name, value in seconds.items():
        loop = seconds["write, plain loop" if name.startswith("write") else "read, plain loop"]
        rows.append([name, count / value / 1e6, loop / value])
    print_table(["boxes as arrays", "million boxes a second", "times a plain loop"], rows)


def free_text(count: int, repeats: int) -> None:
    """Print the time for a box in prose."""
    rows = []
    for name in IN_TEXT:
        text = prose(make_boxes(count), name)
        pattern = BARE if name == "openpangu" else NUMBERS
        seconds = compare({"bare": partial(bare, pattern, text), "decode": partial(decode, text, SIZE, name)}, repeats)
        rows.append([name, *(value / count * 1e6 for value in seconds.values()), seconds["bare"] / seconds["decode"]])
    header = ["free text", "bare regular expression, us", "decode, us", "share of the bare one's speed"]
    print_table(header, rows)


def growth(largest: int) -> None:
    """Print the time for each character of texts of growing length."""
    lengths = [size for size in (10_000, 100_000, 1_000_000, 10_000_000) if size <= largest * 1_000_000]
    good = {f"good {name}": prose(make_boxes(1000), name) + "\n" for name in IN_TEXT}
    rows = []
    for title, piece in good.items():
        rows.append([title, *(per_character(piece, size, title.split()[1]) for size in lengths)])
    for name in FORMATS:
        cells = []
        for size in lengths[:-1]:
            slowest = max((per_character(piece, size, name), piece) for piece in HOSTILE)
            cells.append(f"{slowest[0]:.0f} `{slowest[1]}`")
        rows.append([f"hostile {name}", *cells, ""])
    print_table(["ns for each character", *(f"{size:,}" for size in lengths)], rows)


def per_character(piece: str, size: int, name: str) -> float:
    """Nanoseconds for each character of a text that repeats a piece; the best of two."""
    text = (piece * (size // len(piece) + 1))[:size]
    times = []
    for _ in range(2):
        begin = time.perf_counter()
        decode(text, SIZE, name, on_error="collect")
        times.append(time.perf_counter() - begin)
    return min(times) / size * 1e9


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boxes", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--largest", type=int, default=10, help="MB")
    options = parser.parse_args()
    print(machine_line())
    arrays(options.boxes, options.repeats)
    free_text(options.boxes // 4, options.repeats)
    growth(options.largest)


if __name__ == "__main__":
    main()
