"""Decoding a text in chunks."""

import random
from typing import Any

import pytest

from tests.coordinates.grammars.tagged_examples import FORMATS
from tests.coordinates.grammars.test_tagged import DOGS, ERRORS, NONE, TEXTS
from vlparts.coordinates.codec import CoordinateError, decode
from vlparts.coordinates.formats.openpangu import PADDED
from vlparts.coordinates.formats.registry import CoordinateFormat
from vlparts.coordinates.grammars.tagged import TaggedGrammar
from vlparts.coordinates.regions import Region
from vlparts.coordinates.streaming import GROWTH, SHORT_TEXT, StreamDecoder

SIZE = (999, 999)


def chunks(text: str, seed: int, longest: int) -> list[str]:
    """Cut a text into pieces of random lengths."""
    rng, pieces, start = random.Random(seed), [], 0
    while start < len(text):
        end = start + rng.randint(0, longest)
        pieces.append(text[start:end])
        start = end
    return pieces


def stream(text: str, fmt: CoordinateFormat, seed: int, longest: int = 7) -> tuple[tuple[Region, ...], Any]:
    """Feed a text piece by piece."""
    decoder, regions = StreamDecoder(SIZE, fmt), []
    for piece in chunks(text, seed, longest):
        regions += decoder.feed(piece)
    regions += decoder.close()
    return tuple(regions), decoder.errors


PADDED_TEXTS = [
    "Two: a cat (001,002),(003,004)\n(005,006) (007,008)\ndog (009,010), and (500,100),(400,200); (1,2)\nx (003,",
    "(001,002)\n(001,002),(003,004),(005,006)\n(001,002),",
]


@pytest.mark.parametrize("seed", range(5))
def test_pieces_give_what_the_whole_gives(seed: int) -> None:
    cases = [(PADDED, text) for text in PADDED_TEXTS]
    cases += [(FORMATS[name], text) for name, _, text in TEXTS]
    cases += [(FORMATS[name], text) for name, text, *_ in ERRORS]
    cases += [(FORMATS[name], f"{text} so\n{text}\n{bad}") for name, _, text in TEXTS for _, bad, *_ in ERRORS[::7]]
    cases += [(FORMATS["growing"], text) for text in (NONE, f"{NONE}, {DOGS}, {NONE}", f"{NONE[:-9]} {DOGS}")]
    cases += [(FORMATS["either"], "<|a|>[1,2,3,4], [5,6]<|/a|> or <|a|>[[1,2,3,4]]<|/a|>, <|a|>[1,2,3,4]]")]
    for fmt, text in cases:
        whole = decode(text, SIZE, fmt, on_error="collect")
        assert stream(text, fmt, seed) == (whole.regions, whole.errors), (fmt.name, text)


def test_a_region_comes_as_soon_as_it_is_certain() -> None:
    decoder = StreamDecoder(SIZE)
    assert decoder.feed("cat (001,002)") == []
    assert decoder.feed(",(003,004)") == []
    assert decoder.feed(" ") == []
    assert decoder.feed("\n") == [Region.box(1, 2, 3, 4, "cat")]
    assert decoder.feed("(005,006)") == []
    assert decoder.feed(" a") == [Region.point(5, 6)]
    assert decoder.feed("nd (1,2) or (007,008)") == []
    where = "cat (001,002),(003,004) \n(005,006) and (1,2)".index("(1,2)")
    assert [error.position for error in decoder.errors] == [where]
    assert decoder.close() == [Region.point(7, 8, "or")]
    assert decoder.close() == []


def test_a_label_after_a_region_is_awaited() -> None:
    decoder = StreamDecoder(SIZE, FORMATS["behind"])
    assert decoder.feed("<box>1 2 3 4</box><ref>a") == []
    assert decoder.feed(" cat</ref>") == []
    assert decoder.feed("\n<box>") == [Region.box(1, 2, 3, 4, "a cat")]


@pytest.mark.parametrize("name", ["marks", "behind", "tokens", "list"])
def test_scanned_characters_grow_linearly(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk scans at most `SHORT_TEXT` characters, or the scans of longer texts are those of a geometric series."""
    text = next(text for own, _, text in TEXTS if own == name)
    text = (text + "\n") * (30_000 // len(text)) + "x" * 60_000 + text
    whole = decode(text, SIZE, FORMATS[name], on_error="collect")
    scanned, scan = [], TaggedGrammar.scan

    def counting_scan(self: TaggedGrammar, text: str) -> Any:
        scanned.append(len(text))
        return scan(self, text)

    monkeypatch.setattr(TaggedGrammar, "scan", counting_scan)
    decoder, regions = StreamDecoder(SIZE, FORMATS[name]), []
    for start in range(0, len(text), 5):
        regions += decoder.feed(text[start : start + 5])
    assert len(regions) > 0.8 * len(whole.regions)
    regions += decoder.close()
    assert (tuple(regions), decoder.errors) == (whole.regions, whole.errors)
    assert len(scanned) <= len(text) / 5 + 2
    assert 0 < sum(size for size in scanned if size > SHORT_TEXT) <= (GROWTH + 2) * len(text)


def test_positions_count_from_the_beginning() -> None:
    text = "cat (001,002),(003,004)\n" * 500 + "(1,2)\n" + "dog (001,002)\n" * 500 + "(3,"
    assert stream(text, PADDED, 0, 50)[1] == decode(text, SIZE, on_error="collect").errors


def test_clamping_is_as_in_decode() -> None:
    decoder = StreamDecoder(SIZE, FORMATS["marks"], on_outside="clamp")
    assert decoder.feed("<box>(1,2),(3,5000)</box>") + decoder.close() == [Region.box(1, 2, 3, 999)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StreamDecoder(5), "`image_size` must be"),  # type: ignore[arg-type]
        (lambda: StreamDecoder(SIZE, "unknown"), "`format` must be"),
        (lambda: StreamDecoder(SIZE, on_outside="skip"), "`on_outside` must be one of 'error', 'clamp'"),
        (lambda: StreamDecoder(SIZE).feed(b"x"), "`chunk` must be a str, got bytes"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments_raise(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_closed_stream_takes_no_more() -> None:
    decoder = StreamDecoder(SIZE)
    decoder.close()
    with pytest.raises(CoordinateError, match="The stream is closed"):
        decoder.feed("x")
