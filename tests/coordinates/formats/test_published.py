"""The table of formats: sources, dates and round trips."""

import dataclasses
import datetime
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlparts.coordinates.codec import CoordinateError, decode, encode
from vlparts.coordinates.conversion import convert
from vlparts.coordinates.formats import published as table
from vlparts.coordinates.formats.published import ABSENT
from vlparts.coordinates.formats.registry import FORMATS
from vlparts.coordinates.regions import KINDS, Region

NAMES = sorted(FORMATS)
SHAPES = {
    "point": [(10, 20)],
    "box": [(10, 20), (300, 200)],
    "quad": [(10, 20), (300, 25), (290, 200), (5, 190)],
    "polygon": [(10, 20), (300, 25), (290, 200), (5, 190), (7, 33)],
    "line": [(10, 20), (300, 25), (290, 200)],
    "track": [(10, 20), (300, 25)],
}


def test_every_format_says_where_it_is_from() -> None:
    assert len(NAMES) >= 30
    for fmt in FORMATS.values():
        assert fmt.source
        assert datetime.date.fromisoformat(fmt.date).year == 2026
        assert all(": " in entry for entry in fmt.assumed), fmt.name
        assert set(fmt.kinds) <= set(KINDS)


def test_absent_formats_say_why() -> None:
    assert not set(ABSENT) & set(FORMATS)
    assert all(len(reason) > 20 for reason in ABSENT.values())


def test_importing_the_table_again_changes_nothing() -> None:
    for fmt in (*table.TAGGED, *table.TASKS):
        assert FORMATS[fmt.name] is fmt


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_is_written_and_read(name: str) -> None:
    fmt, size = FORMATS[name], (640, 428)
    for kind in fmt.kinds:
        points = tuple((float(x), float(y)) for x, y in SHAPES[kind])
        region = Region(kind, points, times=(0.5, 2.0) if kind == "track" else ())
        text = encode([region], size, name)
        (read,) = decode(text, size, name).regions
        assert read.kind == kind
        frame = fmt.frame(size)
        bound = [
            side / float(scale) for side, scale in zip(fmt.numbers.error_bound(frame.size), frame.scale, strict=True)
        ]
        assert (np.abs(np.subtract(read.points, points)) <= np.array(bound) + 1e-6).all()
        assert encode([read], size, name) == text


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_read_back_or_refused(name: str) -> None:
    kind = FORMATS[name].kinds[-1]
    region = Region(kind, tuple(SHAPES[kind]), "red cat", times=(0.5, 2.0) if kind == "track" else ())
    try:
        text = encode([region, region], (640, 428), name)
    except CoordinateError:
        assert getattr(FORMATS[name].grammar, "label_place", "none") == "none"
        return
    assert [item.label for item in decode(text, (640, 428), name).regions] == ["red cat", "red cat"]


@pytest.mark.parametrize("name", NAMES)
@given(text=st.text("<>[]{}()/|_.,;:'\" \n0123456789abcdefloxpntsrkh=\uff11\uff0c", max_size=80))
def test_any_text_is_read_or_refused_with_a_position(name: str, text: str) -> None:
    result = decode(text, (640, 428), name, on_error="collect")
    assert all(0 <= error.position <= len(text) for error in result.errors)
    again = dataclasses.replace(FORMATS[name], name="again")
    assert decode(text, (640, 428), again, on_error="collect") == result


@pytest.mark.parametrize(
    ("name", "text", "kinds"),
    [
        ("ui_tars", "click(start_box='<bbox>1 2 3 4</bbox>')", ["box"]),
        ("ui_tars", "drag(start_box='[1, 2, 3, 4]', end_box='[5,6,7,8]')", ["box", "box"]),
        (
            "ui_tars",
            "click(start_box='[1,2]') or click(start_box='<|box_start|>(1,2)<|box_end|>')",
            ["point", "point"],
        ),
        ("ui_tars", "click(point='<point>5 6</point>')", ["point"]),
        ("ui_tars_1_5", "drag(start_box='(1,2)', end_box='[5, 6, 7, 8]')", ["point", "box"]),
        ("ui_tars_1_5_tags", "drag(start_box='<bbox>1 2 3 4</bbox>', end_box='<point>5 6</point>')", ["box", "point"]),
    ],
)
def test_forms_of_ui_tars(name: str, text: str, kinds: list[str]) -> None:
    """A list or tag is read like the form that is written, and its span is that of its numbers."""
    result = decode(text, (1000, 1000), name)
    assert [region.kind for region in result.regions] == kinds
    for region, (start, end) in zip(result.regions, result.spans, strict=True):
        numbers = [int(number) for number in re.findall("[0-9]+", text[start:end])]
        scale = 1 if name == "ui_tars" else 1000 / 1008  # the frame of 1000 pixels
        assert np.ravel(region.points) == pytest.approx(np.multiply(numbers, scale))
    back = convert(text, name, name, (1000, 1000))
    assert [region.kind for region in decode(back, (1000, 1000), name).regions] == kinds


def test_what_is_malformed_in_ui_tars() -> None:
    for text in ("<bbox>1 2 3</bbox>", "<bbox>1 2", "[1, 2, 3]", "[1,"):
        result = decode(text, (1000, 1000), "ui_tars", on_error="collect")
        assert (result.regions, len(result.errors)) == ((), 1)


def test_layout_and_lines_of_text() -> None:
    size = (1000, 980)  # 1008 x 980 to dots.ocr
    text = '[{"bbox": [504, 0, 1008, 490], "category": "Table", "text": "<table>\\u00e9</table>"}]'
    (region,) = decode(text, size, "dots_ocr").regions
    assert (region.label, region.xyxy) == ("Table", (500.0, 0.0, 1000.0, 490.0))
    assert region.attributes == {"text": "<table>\u00e9</table>"}
    assert encode([region], size, "dots_ocr") == text
    lines = '```json\n[\n\t{"bbox_2d": [0, 500, 1000, 1000], "text_content": "EXIT 5"}\n]\n```'
    (line,) = decode(lines, (1000, 1000), "qwen3_vl_ocr").regions
    assert (line.label, line.xyxy, line.attributes) == ("EXIT 5", (0.0, 500.0, 1000.0, 1000.0), {})
    assert encode([line], (1000, 1000), "qwen3_vl_ocr") == lines
    assert convert(lines, "qwen3_vl_ocr", "deepseek_ocr", (999, 999)) == (
        "<|ref|>EXIT 5<|/ref|><|det|>[[0, 500, 999, 999]]<|/det|>"
    )
