"""The log of a run in its folder: written as it goes on, and read from whatever a run has left."""

import json
from pathlib import Path
from typing import Any

import pytest

from vlparts.run_log import LOG, RECIPE, StageLog, append_entry, read_run, write_log

ENTRIES: list[dict[str, Any]] = [{"loss": 2.0, "step": 5}, {"loss": 1.0, "step": 10}, {"eval_loss": 1.5, "step": 10}]


def write_state(folder: Path, entries: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": entries}), encoding="utf-8")


def test_a_log_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_log(tmp_path / "run", ENTRIES[:1])
    for entry in ENTRIES[1:]:
        append_entry(tmp_path / "run", entry)
    assert read_run(tmp_path / "run") == [StageLog("", ENTRIES)]
    write_log(tmp_path / "run", ENTRIES[:2])  # a resumed run
    assert read_run(tmp_path / "run") == [StageLog("", ENTRIES[:2])]
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOG]


def test_an_incomplete_last_line_is_left_out(tmp_path: Path) -> None:
    write_log(tmp_path, ENTRIES)
    with (tmp_path / LOG).open("a", encoding="utf-8") as file:
        file.write('{"loss": 0.')
    assert read_run(tmp_path) == [StageLog("", ENTRIES)]


def test_a_run_of_another_trainer_has_its_state(tmp_path: Path) -> None:
    write_state(tmp_path / "checkpoint-5", ENTRIES[:1])
    write_state(tmp_path / "checkpoint-10", ENTRIES)
    write_state(tmp_path / "checkpoint-x", [])
    assert read_run(tmp_path) == [StageLog("", ENTRIES)]
    assert read_run(tmp_path / "checkpoint-5") == [StageLog("", ENTRIES[:1])]


def test_a_recipe_has_its_stages_in_order(tmp_path: Path) -> None:
    """One finished whose folder is gone, one that runs, and one that has not begun."""
    lines = [{"settings": {"stages": ["one", "two", "three"]}}, {"stage": "one", "log": ENTRIES, "steps": 10}]
    (tmp_path / RECIPE).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    write_log(tmp_path / "two", ENTRIES[:1])
    assert read_run(tmp_path) == [StageLog("one", ENTRIES), StageLog("two", ENTRIES[:1])]


def test_a_folder_without_a_log_is_refused(tmp_path: Path) -> None:
    for prepare in (lambda: None, lambda: write_log(tmp_path, [])):
        prepare()
        with pytest.raises(ValueError, match=r"`folder` must be the output of a training run that has logged a step"):
            read_run(tmp_path)
    (tmp_path / LOG).write_text("loss 2.0\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"log\.jsonl is no log of a run"):
        read_run(tmp_path)
