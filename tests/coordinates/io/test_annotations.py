"""Annotation files and training records: exact round trips and errors."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlparts.coordinates.io.annotations import (
    ImageRegions,
    read_annotations,
    record_regions,
    region_from_dict,
    region_to_dict,
    training_record,
    write_annotations,
)
from vlparts.coordinates.regions import KINDS, Region
from vlparts.training.records import Record

numbers = st.floats(allow_nan=False, allow_infinity=False)
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=5,
)
attributes = st.dictionaries(words, values, max_size=3)


@st.composite
def regions(draw: st.DrawFn) -> Region:
    kind = draw(st.sampled_from(sorted(KINDS)))
    least, most = KINDS[kind]
    points = draw(st.lists(st.tuples(numbers, numbers), min_size=least, max_size=most or least + 3))
    if kind == "box":
        points = list(zip(*map(sorted, zip(*points, strict=True)), strict=True))  # type: ignore[arg-type]
    times = sorted(draw(st.lists(numbers, min_size=len(points), max_size=len(points)))) if kind == "track" else ()
    label = draw(st.none() | st.text(st.characters(exclude_categories=["Cs"])))
    identity = draw(st.none() | st.integers(0, 99))
    image = draw(st.integers(0, 3))
    score = draw(st.none() | numbers)
    return Region(kind, tuple(points), label, score, image, identity, tuple(times), draw(attributes))


@given(regions())
def test_a_region_comes_back_from_json(region: Region) -> None:
    assert region_from_dict(json.loads(json.dumps(region_to_dict(region)))) == region


def test_what_a_region_looks_like() -> None:
    assert region_to_dict(Region.box(1, 2, 3, 4, "cat")) == {"label": "cat", "box": [1, 2, 3, 4]}
    assert region_to_dict(Region.point(1, 2)) == {"point": [1, 2]}
    track = Region.track([(1, 2), (3, 4)], [0, 0.5], score=0.5, image=1, identity=7)
    fields = {"track": [[1, 2], [3, 4]], "times": [0, 0.5], "score": 0.5, "image": 1, "identity": 7}
    assert region_to_dict(track) == fields


names = st.text(st.characters(exclude_categories=["Cs"]))
images = st.builds(
    ImageRegions, names, st.integers(1, 99), st.integers(1, 99), st.lists(regions(), max_size=3), attributes
)


@settings(max_examples=30)
@given(st.lists(images, max_size=3))
def test_files_come_back_exactly(tmp_path_factory: pytest.TempPathFactory, listed: list[ImageRegions]) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    assert write_annotations(listed, path) == len(listed)
    assert list(read_annotations(path)) == listed


def test_files_are_read_and_written_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    image = ImageRegions("a.png", 5, 6, (Region.point(1, 2),))

    def endless() -> Any:
        yield image
        yield image
        raise RuntimeError("no further")

    with pytest.raises(RuntimeError, match="no further"):
        write_annotations(endless(), path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\n \nbroken")
    assert list(itertools.islice(read_annotations(path), 2)) == [image, image]
    with pytest.raises(ValueError, match=r"a\.jsonl, line 5: Not valid JSON"):
        list(read_annotations(path))
    assert image.size == (5, 6)


GOOD = {"image": "a.png", "width": 5, "height": 6}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "Expected a JSON object, got list"),
        ('{"image": "a.png", "height": 6}', "keys image, width and height are required, missing: width"),
        (json.dumps({**GOOD, "width": 0}), r"`\(width, height\)` must be \(width, height\), two positive integers"),
        (json.dumps({**GOOD, "image": 3}), "`image` must be a str, got 3"),
        (json.dumps({**GOOD, "regions": {}}), "`regions` must be a list, got {}"),
        (json.dumps({**GOOD, "regions": [3]}), r"`regions\[0\]`: A region must be an object, got 3"),
        (
            json.dumps({**GOOD, "regions": [{"label": "a"}]}),
            r"`regions\[0\]`: A region must have one of the keys",
        ),
        (
            json.dumps({**GOOD, "regions": [{"box": [1, 2, 3, 4], "point": [1, 2]}]}),
            "A region must have one of the keys",
        ),
        (json.dumps({**GOOD, "regions": [{"box": [1, 2, 3]}]}), "`box` must have 4 numbers, got 3"),
        (json.dumps({**GOOD, "regions": [{"box": "abcd"}]}), "`box` must be a list, got 'abcd'"),
        (json.dumps({**GOOD, "regions": [{"box": [5, 2, 3, 4]}]}), r"`x2` \(3\) is less than `x1` \(5\)"),
        (json.dumps({**GOOD, "regions": [{"point": [1, "2"]}]}), r"`points\[0\]\[1\]` must be a real number, got '2'"),
        (json.dumps({**GOOD, "regions": [{"point": [1, 2], "colour": 3}]}), r"besides its kind, got \['colour'\]"),
        (json.dumps({**GOOD, "regions": [{"point": [1, math.nan]}]}), "NaN is not a valid number"),
        ('{"image": "a", "image": "b"}', "Key 'image' occurs twice"),
        (r'{"image": "\ud800", "width": 5, "height": 6}', "half of a surrogate pair"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_broken_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: .*" + message):
        list(read_annotations(path))


def test_broken_bytes_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"image": "\xff"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: Not valid UTF-8"):
        list(read_annotations(tmp_path / "a.jsonl"))
    with pytest.raises(ValueError, match="which does not exist"):
        list(read_annotations(tmp_path / "b.jsonl"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 5, 5), "`image` must be a str"),
        (("a", 5.0, 5), "`width` must be an integer, got 5.0"),
        (("a", 5, True), "`height` must be an integer, got True"),
        (("a", 5, 5, [{"box": [1, 2, 3, 4]}]), r"`regions\[0\]` must be a Region, got dict"),
    ],
)
def test_bad_images_raise(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageRegions(*arguments)


def test_numbers_that_json_cannot_hold_never_reach_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="finite"):
        write_annotations([ImageRegions("a", 5, 5, (Region.point(math.nan, 0),))], tmp_path / "a")


BOXES = ImageRegions("a.png", 50, 60, (Region.box(1, 2, 3, 4, "cat"), Region.point(5, 6)))


def test_training_records_hold_boxes_and_points() -> None:
    record = training_record(BOXES, "Where?")
    Record.model_validate(record)
    assert record["messages"][1]["content"][0] == {"label": "cat", "box": [1, 2, 3, 4]}
    assert record_regions(json.loads(json.dumps(record))) == list(BOXES.regions)
    assert record_regions(record, "user") == []


def test_a_single_block_is_a_turn() -> None:
    record = {"messages": [{"role": "assistant", "content": {"point": [1, 2], "image": 1}}, "odd"]}
    assert record_regions(record) == [Region.point(1, 2, image=1)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: training_record(ImageRegions("a", 5, 5), "?"), "Image 'a' has no regions"),
        (
            lambda: training_record(ImageRegions("a", 5, 5, (Region.line([(0, 0), (1, 1)]),)), "?"),
            r"`regions\[0\]` must be a box or a point, got a line",
        ),
        (lambda: record_regions({}), "`messages` must be a list, got None"),
        (
            lambda: record_regions({"messages": [{"role": "assistant", "content": ["so: ", {"box": [4, 0, 3, 1]}]}]}),
            r"`messages\[0\]\.content\[1\]`: `x2` \(3\) is less than `x1` \(4\)",
        ),
    ],
)
def test_what_records_cannot_hold(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
