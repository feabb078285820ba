"""Text that looks like coordinates of a format but is not a region of it."""

import ast
import dataclasses
import importlib.util
import random
import re
import warnings
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

import pytest

from tests.coordinates.grammars.regex_steps import count_steps
from tests.coordinates.grammars.tagged_examples import FORMATS as EXAMPLES
from tests.coordinates.test_golden import GOLDEN
from vlparts.coordinates.checking import check_text
from vlparts.coordinates.codec import decode, encode
from vlparts.coordinates.conversion import convert
from vlparts.coordinates.formats import published as table  # noqa: F401
from vlparts.coordinates.formats.registry import FORMATS, CoordinateFormat
from vlparts.coordinates.grammars.base import DecodeError, Found, Suspicion
from vlparts.coordinates.regions import Region
from vlparts.coordinates.resolving import CoordinateError
from vlparts.coordinates.streaming import StreamDecoder
from vlparts.coordinates.suspicion import CoordinateWarning, _signs, find_suspicions

SQUARE = (1000, 1000)
LABELS = ("<ref>", "</ref>", "<|ref|>", "<|/ref|>", "<|ref_start|>", "<|ref_end|>", "<phrase>", "</phrase>")
OTHERS = ("<|object_ref_start|>", "<|object_ref_end|>", "<|im_end|>", "<|rotate_up|>")  # labels, and no coordinates
PUBLISHED = [name for name, fmt in FORMATS.items() if fmt.source]
# Formats without marks that a tokenizer could have as tokens: brackets, JSON, or numbers that are tokens themselves.
UNMARKED = {
    *("openpangu", "cogvlm", "paligemma", "ferret", "shikra", "llava", "internlm_xcomposer", "florence2"),
    *("florence2_ocr", "ui_tars_1_5", "showui", "got_ocr2", "qwen2_5_vl", "qwen3_vl", "gemini", "claude", "moondream"),
    *("xywh", "xywh_relative", "qwen2_5_vl_ocr", "qwen3_vl_ocr", "dots_ocr"),
}
TEXTS = [(name, text, size) for name, text, size, *_ in GOLDEN] + [
    (
        "qwen2_vl",
        "<|object_ref_start|>dog<|object_ref_end|><|box_start|>(221,423),(569,886)<|box_end|>",
        SQUARE,
    ),
    ("molmo2", 'Counting the <points coords="1 1 990 800">label</points> shows a total of 1.', SQUARE),
]
TAG = re.compile(r"</?[^<>\s\"=\d]+>")
MARKED = [(name, text, size) for name, text, size in TEXTS if set(TAG.findall(text)) - {*LABELS, *OTHERS}]


def test_every_format_with_marks_has_a_text() -> None:
    assert {name for name, *_ in MARKED} | UNMARKED == set(PUBLISHED)


@pytest.mark.parametrize(("name", "text", "size"), MARKED)
def test_missing_marks_are_reported(name: str, text: str, size: tuple[int, int]) -> None:
    """All marks gone, as with `skip_special_tokens=True`, one kind of them gone, or one kind left."""
    marks = set(TAG.findall(text)) - {*LABELS, *OTHERS}
    texts = {TAG.sub("", text), *(text.replace(mark, "") for mark in marks)}
    texts |= {TAG.sub(lambda tag, kept=mark: tag[0] if tag[0] == kept else "", text) for mark in marks}
    for stripped in texts - {text}:
        assert decode(stripped, size, name, on_error="collect").errors, stripped
        assert check_text(stripped, size, name), stripped


@pytest.mark.parametrize(
    ("name", "text", "places"),
    [
        ("qwen2_vl", "<|object_ref_start|>dog<|object_ref_end|>(221,423),(569,886)", [41]),
        ("qwen2_vl", "dog<|box_end|>", [3]),
        ("deepseek_ocr", "title[[330, 198, 558, 230], [1, 20, 30, 40]]\nbox [10, 20, 30, 40]", [6, 49]),
        ("minicpm_v", "book100 200 300 400 and pen<box>1 2 3 4</box>", [4]),
        ("fuyu", "50, 25", [0]),
        ("rex_omni", "person<0><35><980><987>, <646><0><999><940>", [6]),
        ("qwen3_vl", '[{"bbox": [574, 301, 660, 468], "label": "sign"}]', [10]),
        ("qwen3_vl", "[{\u201cbbox_2d\u201d: [574, 301, 660, 468], \u201clabel\u201d: \u201csign\u201d}]", [3]),
        ("qwen3_vl", '{bbox_2d: [574, 301, 660, 468], label: "sign"}', [1]),
        ("qwen3_vl", "The sign is at [574, 301, 660, 468].", [15]),
        ("qwen3_vl", '{"points": [574, 301]}', [2]),
        ("qwen3_vl", r"{\"point_2d\": [574, 301]}", [3]),
        ("claude", "bbox=(1, 2, 3)", [0]),
        ("moondream", '{"objects": [{"xmin": 0.25, "ymin": 0.5, "xmax": 0.75, "ymax": 1.0}]}', [15]),
        ("xywh", "{x: 123, y: 234, width: 345, height: 456}", [1]),
        ("molmo", "&lt;point x=&quot;12.3&quot; y=&quot;4.5&quot;&gt;", [10]),
        ("molmo2", "points coords='1 1 523 044'", [7]),
    ],
)
def test_places(name: str, text: str, places: list[int]) -> None:
    result = decode(text, SQUARE, name, on_error="collect")
    assert [error.position for error in result.errors] == places
    assert all(isinstance(error, Suspicion) for error in result.errors)
    assert all(f"looks like coordinates of format '{name}'" in reason for _, reason in result.errors)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("qwen2_vl", "See (3, 4) and figure (2), from (2001) to (2,3)."),
        ("qwen2_vl", "<|box_start|>(1,2),(3,4)<|box_end|>"),
        ("qwen2_vl", "<|object_ref_start|>dog<|object_ref_end|>"),  # a question
        ("qwen_vl", "(1200,423),(569,886)"),  # no region with the marks either
        ("internvl", "The matrix [[1, 2], [3, 4]] and the shape [1, 3, 5, 7]."),
        ("minicpm_v", "Call 555 123 4567 8910, 1 2 3 4 times."),
        ("qwen3_vl", 'A {"padding": [0, 0, 1, 1], "kernel_size": [3, 3]} and [1, 2].'),
        ("molmo", 'An <img width="300" height="200">.'),
        ("openpangu", "[100, 200, 300, 400]"),
    ],
)
def test_other_text_is_not_reported(name: str, text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(text, SQUARE, name)
    assert decode(text, SQUARE, name, on_error="collect").errors == ()
    assert check_text(text, SQUARE, name) == []


def test_nothing_is_reported_beside_an_error() -> None:
    text = '{"bbox_2d": [1, 2, 3, NaN], "bbox": [574, 301, 660, 468]}'
    assert len(decode(text, SQUARE, "qwen3_vl", on_error="collect").errors) == 1
    text = "<|box_start|>(1,2),(3,x)<|box_end|>" + "." * 1000 + "(221,423),(569,886)"
    errors = decode(text, SQUARE, "qwen2_vl", on_error="collect").errors
    assert [isinstance(error, Suspicion) for error in errors] == [False, True]


STRIPPED = "<|object_ref_start|>dog<|object_ref_end|>(221,423),(569,886)"


def test_what_each_policy_does() -> None:
    with pytest.warns(CoordinateWarning, match=r"^Position 41: '\(221.* skip_special_tokens=True\.$") as caught:
        assert decode(STRIPPED, SQUARE, "qwen2_vl").regions == ()
    assert caught[0].filename == __file__
    with pytest.warns(CoordinateWarning, match=r"region of it \(1 further\); ") as caught:
        assert convert(STRIPPED * 2, "qwen2_vl", "openpangu", SQUARE) == STRIPPED * 2
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(STRIPPED, SQUARE, "qwen2_vl", on_error="skip").errors == ()
        assert convert(STRIPPED, "qwen2_vl", "openpangu", SQUARE, on_error="keep") == STRIPPED
    (problem,) = check_text(STRIPPED, SQUARE, "qwen2_vl")
    assert problem.name == "suspicious"
    assert problem.detail.startswith("position 41: '(221,423),(569,886)' looks like")


def test_a_stream_lists_suspicions_when_it_is_closed() -> None:
    text = (STRIPPED + "<|box_start|>(1,2),(3,4)<|box_end|>\n") * 100
    decoder = StreamDecoder(SQUARE, "qwen2_vl")
    for start in range(0, len(text), 7):
        decoder.feed(text[start : start + 7])
    assert decoder.errors == ()
    decoder.close()
    assert len(decoder.errors) == 100
    assert decoder.errors == decode(text, SQUARE, "qwen2_vl", on_error="collect").errors


def test_a_grammar_without_a_hash_is_accepted() -> None:
    class Grammar:
        kinds, separator = ("point",), "\n"
        __hash__ = None  # type: ignore[assignment]

        def write(self, regions: object) -> str:
            return "<p>123;234</p>"

        def scan(self, text: str) -> tuple[list[Found], list[DecodeError]]:
            marks = re.finditer(r"<p>(\d+);(\d+)</p>", text)
            spans = [(match.span(), [int(match[1]), int(match[2])]) for match in marks]
            return [Found(*span, span, "point", codes) for span, codes in spans], []

    fmt = CoordinateFormat(name="own", numbers=FORMATS["qwen2_vl"].numbers, grammar=Grammar())
    assert decode("<p>12;34</p>", SQUARE, fmt, on_error="collect").errors == ()
    assert [error.position for error in decode("12;34", SQUARE, fmt, on_error="collect").errors] == [0]


PIECES = ["1", "1 ", "1, ", "(1,1),", "[[1,1,1,1]", "<1>", 'x="1" y="', " ", "bbox_2d: ["]


@pytest.mark.parametrize("fmt", [*FORMATS.values(), *EXAMPLES.values()], ids=lambda fmt: fmt.name)
def test_steps_of_matching_grow_linearly(fmt: CoordinateFormat) -> None:
    signs = _signs(fmt.grammar)
    for pattern in [layout.pattern for layout in signs.layouts] + ([signs.marks] if signs.marks else []):
        for piece in PIECES:
            once, twice, thrice = count_steps(pattern, "", piece)
            assert thrice - twice == twice - once, piece


# False alarms: paragraphs with numbers in the docstrings and texts of installed packages.

PACKAGES = ("numpy", "PIL", "hypothesis", "email")


def _documents() -> Iterator[str]:
    """Yield docstrings and text files of installed packages, the same in each run."""
    files = []
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        assert spec
        assert spec.origin
        package = Path(spec.origin).parent
        found = sorted(path for path in package.rglob("*.py") if "tests" not in path.relative_to(package).parts)
        files += random.Random(0).sample(found, min(len(found), 40))
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                yield ast.get_docstring(node) or ""
    for name in ("numpy", "pytest", "hypothesis", "typer"):
        (distribution,) = distributions(name=name)
        yield from (path.read_text() for path in distribution.files or () if re.search("METADATA|LICENSE", path.name))


def test_prose_is_rarely_suspicious() -> None:
    """Fewer than one paragraph with numbers in a hundred, in every format."""
    pieces = {piece.strip() for text in _documents() for piece in re.split(r"\n\s*\n", text)}
    numbered = sorted(piece for piece in pieces if 20 <= len(piece) <= 4000 and re.search("[0-9]", piece))
    texts = random.Random(0).sample(numbered, 800)
    reported = {}
    for fmt in (FORMATS[name] for name in PUBLISHED):
        found = [find_suspicions(text, *fmt.grammar.scan(text), [(1280, 960)], fmt) for text in texts]
        reported[fmt.name] = sum(map(bool, found))
    assert max(reported.values()) < len(texts) / 100, reported
    assert sum(reported.values()) > 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_formats_that_lose_all_regions_without_their_marks_have_a_recipe(name: str) -> None:
    fmt, size = FORMATS[name], (999, 999)
    points = [(100.0, 200.0), (300.0, 200.0), (300.0, 400.0), (100.0, 400.0)]
    choices = {"box": Region.box(100, 200, 300, 400), "point": Region.point(100, 200), "quad": Region.quad(points)}
    region = next(choices[kind] for kind in ("box", "point", "quad") if kind in fmt.grammar.kinds)
    try:
        text = encode([region], size, fmt)
    except CoordinateError:  # a label is needed
        text = encode([dataclasses.replace(region, label="cat")], size, fmt)
    assert decode(text, size, fmt).regions
    if not decode(re.sub(r"</?[^<>\s\"=]+>", "", text), size, fmt, on_error="collect").regions:
        page = (Path(__file__).parents[2] / "docs" / "coordinate_recipes.md").read_text(encoding="utf-8")
        assert f"`{name}`" in page.partition("## The marks are missing")[2].partition("\n## ")[0]
