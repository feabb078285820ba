"""Journals: rows survive a kill, and other settings are refused."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlparts.journal import Journal, _cut, folder_state

SETTINGS = {"name": "a", "size": (1, 2)}
ROWS = [{"value": 0.1 + 0.2}, {"text": "ü\n\u2028"}, {}]


def test_rows_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with Journal(path, SETTINGS) as journal:
        assert list(journal.rows()) == []
        for row in ROWS:
            journal.add(row)
        assert list(journal.rows()) == ROWS
    with Journal(path, SETTINGS) as journal:
        journal.add({"last": 1})
        assert list(journal.rows()) == [*ROWS, {"last": 1}]
    with Journal(path, {"name": "b"}, restart=True) as journal:
        assert list(journal.rows()) == []


@pytest.mark.parametrize("lost", range(0, 60, 7))
def test_whole_rows_remain_after_a_cut(tmp_path: Path, lost: int) -> None:
    path = tmp_path / "journal"
    with Journal(path, SETTINGS) as journal:
        for row in ROWS:
            journal.add(row)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - lost])
    with Journal(path, SETTINGS) as journal:
        found = list(journal.rows())
        assert found == ROWS[: len(found)]
        assert len(found) == max(whole[: len(whole) - lost].count(b"\n") - 1, 0)
        journal.add({"last": 1})
    with Journal(path, SETTINGS) as journal:
        assert list(journal.rows()) == [*found, {"last": 1}]


@given(st.binary(max_size=40), st.integers(1, 9))
def test_an_incomplete_line_is_found_whatever_the_block(content: bytes, block: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(content)
        expected = content[: content.rfind(b"\n") + 1]
        assert _cut(path, block) == len(expected)
        assert path.read_bytes() == expected


def test_other_settings_are_named(tmp_path: Path) -> None:
    Journal(tmp_path / "journal", {"a": 1, "b": 2, "c": 3}).close()
    with pytest.raises(ValueError, match=r"`output`: .*journal has results .* \(b: 2, now 5; c: 3, now None\)"):
        Journal(tmp_path / "journal", {"a": 1, "b": 5})


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`data` must be in an existing folder, got"):
        Journal(tmp_path / "none" / "journal", {}, argument="data")


def test_the_state_of_a_folder_changes_with_its_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1", encoding="utf-8")
    before = folder_state(tmp_path)
    assert folder_state(tmp_path) == before
    (tmp_path / "a").write_text("12", encoding="utf-8")
    assert folder_state(tmp_path) != before
