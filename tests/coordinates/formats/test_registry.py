"""Formats as data, and finding them by name."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from vlparts.coordinates.formats import registry as formats
from vlparts.coordinates.formats.openpangu import PADDED, padded_format
from vlparts.coordinates.formats.registry import FORMATS, CoordinateFormat, get_format, register_format
from vlparts.coordinates.frames.rules import Original
from vlparts.coordinates.grammars.openpangu import PairGrammar
from vlparts.coordinates.quantization import NumberRule


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test registers is gone afterwards."""
    before = dict(FORMATS)
    yield
    formats._formats.clear()
    formats._formats.update(before)


def test_formats_are_found_by_name() -> None:
    own = padded_format("own")
    assert get_format(None) is PADDED
    assert get_format("openpangu") is PADDED
    assert get_format(own) is own
    assert [fmt.name for fmt in FORMATS.values()] == list(FORMATS)


@pytest.mark.parametrize("bad", ["unknown", 3, ["openpangu"]])
def test_unknown_formats_raise(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"`format` must be a CoordinateFormat or one of \[.*'openpangu'.*\], got"):
        get_format(bad)


def test_registered_formats_are_found() -> None:
    own = padded_format("my_own", digits=4)
    assert register_format(own) is own
    assert get_format("my_own") is own
    assert FORMATS["my_own"] is own
    register_format(padded_format("my_own", digits=4))  # the same once more
    other = padded_format("my_own", digits=5)
    with pytest.raises(ValueError, match="Another format has the name 'my_own'; `overwrite=True` replaces it"):
        register_format(other)
    register_format(other, overwrite=True)
    assert get_format("my_own") is other


def test_the_view_cannot_be_written_to() -> None:
    with pytest.raises(TypeError):
        FORMATS["x"] = PADDED  # type: ignore[index]


def test_only_formats_are_registered() -> None:
    with pytest.raises(ValueError, match="`format` must be a CoordinateFormat, got 'x'"):
        register_format("x")  # type: ignore[arg-type]


def test_a_format_knows_its_kinds_and_separator() -> None:
    assert PADDED.kinds == ("point", "box")
    assert PADDED.separator == "\n"
    assert PADDED.frame == Original()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Qwen VL"}, "`name` must be a str of lower case letters, digits and underscores, got 'Qwen VL'"),
        ({"name": ""}, "`name` must be a str of lower case"),
        ({"name": 3}, "`name` must be a str of lower case"),
        ({"numbers": 999}, r"`numbers` must have the method to_codes\(\), got 999"),
        ({"grammar": NumberRule()}, r"`grammar` must have the method write\(\)"),
        ({"frame": (640, 480)}, r"`frame` must be a rule such as Original\(\), got \(640, 480\)"),
        ({"y_first": "box"}, "`y_first` must be a tuple of str, got 'box'"),
        ({"y_first": ("polygon",)}, r"`y_first` must contain kinds of the grammar, \('point', 'box'\), got 'polygon'"),
        ({"assumed": "rounding"}, "`assumed` must be a tuple of str"),
        ({"date": "2026-8-1"}, "`date` must be a date as YYYY-MM-DD, got '2026-8-1'"),
        ({"date": "20260801"}, "`date` must be a date as YYYY-MM-DD"),
        ({"date": 2026}, "`date` must be a date as YYYY-MM-DD, got 2026"),
    ],
)
def test_bad_formats_raise(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CoordinateFormat(**{"name": "x", "numbers": NumberRule(), "grammar": PairGrammar(), **changes})


def test_formats_are_changed_by_replacing() -> None:
    changed = dataclasses.replace(PADDED, numbers=NumberRule(denominator=1000, rounding="bins"), name="bins")
    assert changed == dataclasses.replace(
        padded_format("bins", denominator=1000, rounding="bins"),
        **{field: getattr(PADDED, field) for field in ("source", "date", "assumed")},
    )
