"""Fuzz `decode`: any text must give regions and errors, and no other exception.

`python tests/properties/fuzz_coordinates.py [--inputs N] [--seed N]` decodes N texts (a million by default) in all
formats in turn. The texts are random concatenations of pieces of valid answers, marks, numbers and Unicode characters,
cut, repeated and changed at random positions. The script prints the counts, and stops at the first other exception, at
a span or position outside the text, or if "raise" and "collect" disagree.
"""

import argparse
import random
import sys
import time
import warnings

from rich.progress import track

from vlparts.coordinates import (
    FORMATS,
    CoordinateError,
    CoordinateWarning,
    Region,
    Suspicion,
    decode,
    encode,
    guess_format,
)

SIZES = [(1, 1), (7, 6), (640, 427), (1920, 1080), (99_999, 600)]
SIGNS = [
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    "<",
    ">",
    ",",
    ";",
    ":",
    ".",
    "-",
    "+",
    "e",
    " ",
    "\n",
    "\t",
    '"',
    "'",
    "\\",
    "/",
    "`",
]
ODD = [
    "nan",
    "NaN",
    "inf",
    "1e999",
    "9" * 5000,
    "00",
    "-1",
    "0x1",
    "\u0663",
    "\uff08",
    "\uff0c",
    "\uff11",
    "\u00b2",
    "\0",
    "\ud800",
]
NUMBERS = ["0", "7", "012", "345", "999", "1000", "0.5", "0.123", "100.0", "1023", "123456789", "1234567890"]


def valid_pieces() -> tuple[list[str], list[str]]:
    """Return texts of regions in every format, and pieces of them."""
    whole = []
    for name, fmt in FORMATS.items():
        for label in (None, "cat"):
            regions = [Region.box(1, 2, 5, 4, label), Region.point(3, 3, label)]
            for region in regions:
                try:
                    whole.append(encode([region], (640, 427), name))
                except CoordinateError:
                    continue
        whole.append(fmt.separator)
    parts = [text[start : start + 9] for text in whole for start in range(0, len(text), 5)]
    return whole, parts


def make_text(draw: random.Random, pieces: tuple[list[str], list[str]]) -> str:
    """Return a random text."""
    parts = []
    for _ in range(draw.randrange(1, 9)):
        kind = draw.random()
        if kind < 0.45:
            parts.append(draw.choice(pieces[draw.randrange(2)]))
        elif kind < 0.65:
            parts.append(draw.choice(SIGNS))
        elif kind < 0.85:
            parts.append(draw.choice(NUMBERS))
        elif kind < 0.9:
            parts.append(draw.choice(ODD))
        else:
            parts.append(chr(draw.randrange(0x110000)))
    text = "".join(parts)
    if draw.random() < 0.4:
        start = draw.randrange(len(text) + 1)
        text = text[start : start + draw.randrange(len(text) + 1)]
    if text and draw.random() < 0.3:
        place = draw.randrange(len(text))
        text = text[:place] + draw.choice(SIGNS) + text[place + draw.randrange(2) :]
    return text * draw.choice((1, 1, 1, 2, 5)) if len(text) < 500 else text


def try_one(text: str, name: str, size: tuple[int, int]) -> tuple[int, int]:
    """Decode a text and return the numbers of regions and errors."""
    result = decode(text, size, name, on_error="collect")
    last = 0
    for start, end in result.spans:
        if not last <= start < end <= len(text):
            raise AssertionError(f"spans {result.spans}")
        last = start
    if any(not 0 <= error.position <= len(text) for error in result.errors):
        raise AssertionError(f"errors {result.errors}")
    try:
        decode(text, size, name)
        if not all(isinstance(error, Suspicion) for error in result.errors):
            raise AssertionError("an error was collected but not raised")
    except CoordinateError:
        if not result.errors:
            raise
    return len(result.regions), len(result.errors)


def main() -> None:
    """Decode many texts and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore", CoordinateWarning)
    draw, pieces, names = random.Random(options.seed), valid_pieces(), list(FORMATS)
    regions = errors = characters = 0
    begin = time.perf_counter()
    for index in track(range(options.inputs), "reading", disable=not sys.stderr.isatty()):
        text, name, size = make_text(draw, pieces), names[index % len(names)], draw.choice(SIZES)
        try:
            found, wrong = try_one(text, name, size)
            if index % 100 == 0:
                guess_format(text)
        except Exception:
            print(f"input {index}, format {name}, size {size}: {text!r}")
            raise
        regions, errors, characters = regions + found, errors + wrong, characters + len(text)
    seconds = time.perf_counter() - begin
    print(f"{options.inputs:,} texts, {characters:,} characters, {len(names)} formats, seed {options.seed}: ", end="")
    print(f"{regions:,} regions, {errors:,} errors, nothing else; {seconds:.0f} s")


if __name__ == "__main__":
    main()
