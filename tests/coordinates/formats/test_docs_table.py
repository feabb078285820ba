"""The generated page of formats agrees with the code."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from vlparts.coordinates import ABSENT, FORMATS
from vlparts.coordinates.formats.published import PUBLISHED

DOCS = Path(__file__).parents[3] / "docs"
REGISTERED = {fmt.name for fmt in PUBLISHED}


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_tables", DOCS / "make_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_format_has_a_row(tables: ModuleType) -> None:
    assert set(tables.MODELS) == REGISTERED
    assert set(FORMATS) >= REGISTERED


def test_the_page_is_as_generated(tables: ModuleType) -> None:
    text = (DOCS / "coordinate_formats.md").read_text(encoding="utf-8")
    assert tables.updated(text) == text, "update the page with `python docs/make_tables.py`"


def test_a_row_says_what_the_format_is(tables: ModuleType) -> None:
    rows = {row.split("`")[1]: [cell.strip() for cell in row.split(" | ")] for row in tables.table().splitlines()[2:]}
    _, models, regions, numbers, full, rounding, order, frame, error = rows["gemini"]
    assert (models, regions, numbers, full) == ("Gemini", "point, box", "0 to 1000", "1000")
    assert (rounding, order, frame, error) == ("nearest", "**y, x**", "original", "0.5 |")
    assert rows["openpangu"][3:5] == ["000 to 999", "999"]
    assert rows["showui"][3:5] == ["0.00 to 1.00", "1"]
    assert rows["fuyu"][3:7] == ["pixels / 2 of the frame", "W' / 2", "nearest", "**y, x** in boxes"]


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/coordinates.md"])
def test_the_pages_name_the_number_of_formats(page: str) -> None:
    assert f"{len(REGISTERED)} published formats" in (DOCS.parent / page).read_text(encoding="utf-8")


def test_the_absent_are_listed(tables: ModuleType) -> None:
    assert [line.split("`")[1] for line in tables.absent().splitlines()] == list(ABSENT)
