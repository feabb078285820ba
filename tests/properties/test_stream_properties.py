"""A text decoded in pieces of any size gives the regions and errors of the whole."""

import random
from typing import Any

import pytest
from tests.coordinates.grammars.tagged_examples import FORMATS as EXAMPLES

from vlparts.coordinates.codec import decode
from vlparts.coordinates.formats import published as table  # noqa: F401
from vlparts.coordinates.formats.openpangu import padded_format
from vlparts.coordinates.formats.registry import FORMATS, CoordinateFormat
from vlparts.coordinates.grammars.base import Coded
from vlparts.coordinates.grammars.kosmos2 import KosmosGrammar
from vlparts.coordinates.regions import KINDS
from vlparts.coordinates.streaming import DROPPED, StreamDecoder

SIZE = (1000, 430)
PAIRS = [
    padded_format("tagged_pairs", label_open="<ref>", label_close="</ref>", separator=";"),
    padded_format("four_digits", levels=1024, digits=4, denominator=1023, separator=", "),
]
BY_NAME: dict[str, CoordinateFormat] = {
    fmt.name: fmt for fmt in [*(fmt for fmt in FORMATS.values() if fmt.source), *EXAMPLES.values(), *PAIRS]
}
DAMAGE = ["", "\ud800", "\u0663", "\uff08", "\0", *"x<|>1[](),; \na{}\"'/", "9" * 12, "9" * 5000, "</", "box", "]]<"]


def damaged_text(rng: random.Random, fmt: CoordinateFormat) -> str:
    """Return the text of some regions with characters deleted, doubled or inserted."""
    parts = []
    for _ in range(rng.randrange(1, 6)):
        kind = rng.choice(fmt.kinds)
        points = KINDS[kind][0]
        pairs = zip(sorted(rng.choices(range(1000), k=points)), sorted(rng.choices(range(430), k=points)), strict=True)
        codes = [code for pair in pairs for code in pair]
        if isinstance(fmt.grammar, KosmosGrammar):
            codes = sorted(rng.choices(range(1024), k=2))
        label = rng.choice([None, None, "cat", "a b"])
        times = tuple(0.5 * index for index in range(points)) if kind == "track" else ()
        try:
            parts.append(fmt.grammar.write([Coded(kind, codes, label, times=times)] * rng.choice((1, 1, 2))))
        except ValueError:
            parts.append(fmt.grammar.write([Coded(kind, codes, times=times)]))
    text = rng.choice([fmt.separator, "", " ", "and "]).join(parts)
    for _ in range(rng.randrange(4)):
        start = rng.randrange(len(text) + 1)
        end = start + rng.choice((0, 0, 1, 1, 2, 5, 20))
        text = text[:start] + rng.choice((rng.choice(DAMAGE), text[start:end] * 2)) + text[end:]
    return text


def check_stream(text: str, fmt: CoordinateFormat, rng: random.Random, longest: int) -> None:
    """Feed a text in pieces of random lengths and compare with the whole."""
    whole = decode(text, SIZE, fmt, on_error="collect")
    decoder, regions, start = StreamDecoder(SIZE, fmt), [], 0
    while start < len(text):
        end = start + rng.randint(1, longest)
        regions += decoder.feed(text[start:end])
        assert tuple(regions) == whole.regions[: len(regions)], text
        assert set(decoder.errors) <= set(whole.errors), text
        start = end
    regions += decoder.close()
    assert (tuple(regions), decoder.errors) == (whole.regions, whole.errors), text


@pytest.mark.parametrize("name", BY_NAME)
def test_damaged_texts(name: str) -> None:
    rng = random.Random(name)
    for _ in range(30):
        check_stream(damaged_text(rng, BY_NAME[name]), BY_NAME[name], rng, rng.choice((1, 3, 12, 40)))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        # A mark that is cut off says nothing about the region before it.
        ("deepseek_ocr", "<|det|>[[166, 44, \n276, 70], [167, 294, 443, 410]]<|/det|>\n<|det|>[[1, 2, 3, 4]]<|/det|>"),
        ("deepseek_ocr", "<|det|>[[1, 2, 3, 4]]<|/det|>\n<|dt|>[[5, 6, 7, 8]]<|/det|>\n<|det|>[[1, 2, 3, 4]]<|/det|>"),
        ("behind", "<box>\n825 259 960 411</box><ref>a b</ref>"),
        ("marks", "<ref>a b</ref><box>(194,121),(971,\n130)</box>"),
        (
            "mineru2",
            "<|box_start|>100 50 \ud800 80<|box_end|><|ref_start|>a<|ref_end|>\n<|box_start|>1 2\n3 4<|box_end|>",
        ),
        # A label can be on a further line, and end on another one.
        ("mineru2", "<|box_start|>1 2 3 4<|box_end|>\n<|ref_start|>a<|ref_e[nd|>\n<|b> 5 6<|box_end|><|ref_end|>\nb"),
        ("mineru2", "<|box_start|>1 2 3 4<|box_end|>\n <|ref_sta"),
        ("paligemma", "<loc0000><loc0000><loc1022><loc1022> ; cat\n<loc0000><loc0000><loc1022><loc1022>\n \n cat"),
        # A bracket makes a region before it a nested one.
        ("llava", "a [0.17, 0.22, 0.91, 0.41]\nb [0.23, 0.14, 0.26, 0.15]\n]\n[0.39, 0.19, 0.62, 0.21]"),
        # Objects are complete within one that never ends.
        (
            "claude",
            '[{"bbox": [401,  [\n {"bbox": [1, 2, 3, 4]},\n {"bbox": [5, 6, 7, 8]}\n]and [\n {"point": [9, 10]}]',
        ),
    ],
)
def test_texts_that_are_read_late(name: str, text: str) -> None:
    for longest in (1, 3, 12):
        check_stream(text, BY_NAME[name], random.Random(0), longest)


@pytest.mark.parametrize(
    ("name", "piece"),
    [
        ("ui_tars_1_5", "(9197,525)"),
        ("shikra", '"[0.008,0.173]a'),
        ("openpangu", "(001,002),(003,004)\n"),
        ("ferret", "a [1, 2, 3, 4]"),
        ("deepseek_ocr", "<|det|>[[1, 2, 3, 4]]<|/det|>\n"),
        ("mineru2", "<|box_start|>100 50 900 80<|box_end|><|ref_start|>a<|ref_end|>"),
    ],
)
def test_short_streams_scan_linearly(name: str, piece: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four times the text takes four times the scanned characters: returned regions are not scanned again."""
    grammar = type(BY_NAME[name].grammar)
    scanned: list[int] = []
    scan = grammar.scan

    def counting_scan(self: Any, text: str) -> Any:
        scanned.append(len(text))
        return scan(self, text)

    monkeypatch.setattr(grammar, "scan", counting_scan)
    counts = []
    for characters in (1000, 4000):
        scanned.clear()
        text = piece * (characters // len(piece))
        decoder = StreamDecoder(SIZE, name)
        for start in range(0, len(text), 3):
            decoder.feed(text[start : start + 3])
        counts.append(sum(scanned))
    assert counts[1] < 4.5 * counts[0]
    assert counts[1] < 4000 * (2 * DROPPED)
