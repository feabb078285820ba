"""The scanner of JSON objects inside text, compared with the json module."""

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlparts.coordinates.grammars import json_scanner
from vlparts.coordinates.grammars.json_scanner import JsonList, JsonNumber, JsonObject, JsonString, objects

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=3),
    max_leaves=8,
)


def plain(value: Any) -> Any:
    """The value that the json module returns for a value of the scanner."""
    if isinstance(value, JsonObject):
        return {key: plain(entry) for key, entry in value.members}
    if isinstance(value, JsonList):
        return [plain(entry) for entry in value.items]
    if isinstance(value, JsonString):
        return value.value()
    return json.loads(value.token if isinstance(value, JsonNumber) else value)


@given(st.dictionaries(st.text("abc", max_size=3), VALUES, max_size=4), st.text("ab ,.:[]\n", max_size=8))
def test_objects_are_read_as_the_json_module_reads_them(value: dict[str, Any], around: str) -> None:
    written = json.dumps(value)
    whole = list(objects(around + written + around))[-1]
    assert (whole.start, whole.end, whole.fault) == (len(around), len(around) + len(written), "")
    assert plain(whole) == value


@given(st.text('{}[]",:\\ 1a.\n', max_size=60))
def test_any_text_gives_spans_within_it(text: str) -> None:
    for item in objects(text):
        assert 0 <= item.start < item.end <= len(text)
        assert text[item.start] == "{"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"a": 1', "unfinished"),
        ('{"a": "b', "unfinished"),
        ('{"a": "b\nc"}', "line break in a string"),
        ('{"a": 1,}', "'}' out of place"),
        ('{"a": 1]', "']' out of place"),
        ('{"a" 1}', "a value out of place"),
        ('{"a": {"b": 1} {', "'{' out of place"),
        ('{"a":: 1}', "':' out of place"),
        ('{"a": NaN}', "'NaN'"),
        ('{"a": [1, 2 // two\n]}', "'/'"),
        ("{'a': 1}", "single quotes"),
        ('{"a": ' + "[" * 40, "nested deeper than 32"),
    ],
)
def test_what_breaks_an_object_off_is_named(text: str, fault: str) -> None:
    faults = [item.fault for item in objects(text) if item.fault and item.start == 0]
    assert faults
    assert faults[0].startswith(fault)


def test_half_a_surrogate_pair_is_no_string() -> None:
    (item,) = objects(r'{"a": "\ud800", "b": "\ud83d\ude00"}')
    assert [value.value() for _, value in item.members if isinstance(value, JsonString)] == [None, "\U0001f600"]


@pytest.mark.parametrize(
    "piece", ['{"a":', "{", "[{", '{"a": [', '{"a": 1, {', '{"a": 1},', '"', '{"', "{'a'", "{ ", "[["]
)
def test_tokens_that_are_read_grow_linearly(piece: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every further repetition of a piece takes the same number of tokens, and a token does not backtrack."""
    counts = []
    for repeats in (100, 200, 300):
        counting = CountingPattern(json_scanner._TOKEN)
        with monkeypatch.context() as patch:
            patch.setattr(json_scanner, "_TOKEN", counting)
            list(objects(piece * repeats))
        counts.append(counting.characters)
    assert counts[2] - counts[1] == counts[1] - counts[0]


class CountingPattern:
    """A pattern that counts the characters of its matches."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        self.pattern, self.characters = pattern, 0

    def match(self, text: str, start: int) -> re.Match[str] | None:
        match = self.pattern.match(text, start)
        self.characters += 1 + (len(match[0]) if match else 0)
        return match
