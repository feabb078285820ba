"""JSON Lines: round trips, errors, and lazy reading."""

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlparts.coordinates.io.annotations import ImageRegions, write_annotations
from vlparts.coordinates.io.coco import write_coco
from vlparts.coordinates.io.json_lines import json_line, parse_object, read_json_lines, write_json_lines
from vlparts.coordinates.regions import Region

texts = st.text(st.characters(exclude_categories=["Cs"]))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
    max_leaves=5,
)


@given(st.lists(st.dictionaries(texts, values, max_size=3), max_size=4))
def test_objects_come_back(objects: list[dict[str, Any]]) -> None:
    file = io.StringIO()
    assert write_json_lines(objects, file) == len(objects)
    written = file.getvalue().encode()
    assert written.count(b"\n") == len(objects)
    assert [fields for _, fields in read_json_lines(io.BytesIO(written))] == objects


def test_numbers_of_lines_count_empty_ones() -> None:
    lines = ["\ufeff{}\n", "\n", '{"a": 1}']
    assert list(read_json_lines(lines)) == [(1, {}), (3, {"a": 1})]
    assert list(read_json_lines([line.encode() for line in lines])) == [(1, {}), (3, {"a": 1})]


def test_nothing_is_read_ahead() -> None:
    def lines() -> Iterator[str]:
        yield '{"a": 1}'
        raise RuntimeError("read ahead")

    assert next(read_json_lines(lines())) == (1, {"a": 1})


def test_characters_stay_as_they_are() -> None:
    assert json_line({"größe": "\u2028"}) == '{"größe": "\u2028"}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_line({"a": math.nan})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Not valid JSON"),
        (b"\xff", "Not valid UTF-8"),
        ("3", "Expected a JSON object, got int"),
        ('{"a": NaN}', "NaN is not a valid number"),
        ('{"a": -Infinity}', "-Infinity is not a valid number"),
        ('{"a": {"b": 1, "b": 2}}', "Key 'b' occurs twice in one object"),
        (r'{"a": "\uD83D"}', "half of a surrogate pair"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "A number has 5000 digits, more than 4300"),
        ('{"a": -1' + "0" * 4300 + "}", "A number has 4301 digits, more than 4300"),
        ('{"a": [1e999]}', "Number 1e999 is too large"),
        ('{"a": -' + "9" * 400 + ".5}", f"Number -{'9' * 39} is too large"),
    ],
)
def test_broken_lines(line: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_object(line)
    with pytest.raises(ValueError, match=f"rows, line 2: .*({message})"):
        list(read_json_lines(["{}", line], "rows"))


def test_a_whole_pair_of_surrogates_is_a_character() -> None:
    assert parse_object(json.dumps({"a": "\U0001f600"})) == {"a": "\U0001f600"}


@pytest.mark.parametrize("write", [write_coco, write_annotations])
def test_half_of_a_surrogate_pair_is_not_written(tmp_path: Path, write: Any) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(ValueError, match="^A string contains half of a surrogate pair"):
        write([ImageRegions("a.png", 5, 5, (Region.box(1, 2, 3, 4, "\ud800"),))], path)
    assert not path.exists() or path.read_text() == ""
