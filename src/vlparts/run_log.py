"""The log of a training run in its folder: one JSON object per line, written as the run goes on."""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["LOG", "RECIPE", "StageLog", "append_entry", "read_run", "write_log"]

LOG = "log.jsonl"
"""File in the folder of a run with the entries of the Trainer's log."""
RECIPE = "recipe.jsonl"
"""Journal in the folder of a recipe: its settings, then the name and the log of each finished stage."""
_STATE = "trainer_state.json"


@dataclass(frozen=True)
class StageLog:
    """The log of one stage of a recipe, or of a run without stages.

    Args:
        name: Name of the stage; empty without stages.
        entries: Entries of the Trainer's log, with their "step".
    """

    name: str
    entries: list[dict[str, Any]]


def write_log(folder: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Write the log of a run so far, in place of an earlier one."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f".{LOG}"
    scratch.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    os.replace(scratch, folder / LOG)


def append_entry(folder: Path, entry: dict[str, Any]) -> None:
    """Append an entry to the log of a run; it survives a kill of the process."""
    with (folder / LOG).open("a", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(entry) + "\n")


def read_run(folder: Path) -> list[StageLog]:
    """Read the log of a training run, or of the stages of a recipe, from its folder, also while it runs.

    A folder has its log in [`LOG`], or in the `trainer_state.json` of transformers' Trainer in it or in its last
    checkpoint.

    Args:
        folder: `output` of the run or the recipe.

    Raises:
        ValueError: If the folder has no log, or none with an entry.
    """
    if (folder / RECIPE).is_file():
        header, *rows = _lines(folder / RECIPE)
        finished = {row["stage"]: row["log"] for row in rows}
        names = header["settings"]["stages"]
        stages = [StageLog(name, _entries(folder / name) or finished.get(name, [])) for name in names]
    else:
        stages = [StageLog("", _entries(folder))]
    found = [stage for stage in stages if stage.entries]
    if not found:
        raise ValueError(
            f"`folder` must be the output of a training run that has logged a step, got {folder} without entries in "
            f"{LOG} or {_STATE}."
        )
    return found


def _entries(folder: Path) -> list[dict[str, Any]]:
    if (folder / LOG).is_file():
        return _lines(folder / LOG)
    checkpoints = [(int(path.name.partition("-")[2]), path) for path in folder.glob("checkpoint-*") if _number(path)]
    for path in [folder, *(path for _, path in sorted(checkpoints, reverse=True))]:
        if (path / _STATE).is_file():
            history: list[dict[str, Any]] = json.loads((path / _STATE).read_text(encoding="utf-8"))["log_history"]
            return history
    return []


def _number(checkpoint: Path) -> bool:
    return re.fullmatch(r"checkpoint-\d+", checkpoint.name) is not None


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file, without an incomplete last line, which is being written or was cut off."""
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"`folder`: {path} is no log of a run: {error}") from None
