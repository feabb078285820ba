"""Train on the demo's images and write the log that `images/run.png` shows: `python docs/make_run.py`.

Three files of records: where a digit is and what it is, in images of the demo, and counting, in text alone.
"""

import json
import random
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlparts.demo.data import Task, write_dataset
from vlparts.run_log import LOG
from vlparts.training.config import TrainConfig
from vlparts.training.train import train

FOLDER = Path(__file__).parent / "images" / "run"
IMAGES = 1000
SETTINGS: dict[str, Any] = {
    "vision": {"preset": "navit:tiny", "max_grid_size": 8, "position_initializer_range": 0.3},
    "text": "moge:tiny",
    "optimizer": "muon",
    "learning_rate": 2e-3,
    "capacity": 512,
    "cache": True,
    "max_steps": 400,
    "save_steps": 400,
    "eval_steps": 50,
    "logging_steps": 5,
    "trainer": {"disable_tqdm": True, "log_level": "error"},
}


def _write(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _names(locate: Path) -> Iterable[dict[str, Any]]:
    """Ask what the digit is."""
    for line in locate.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        label = record["messages"][1]["content"][0]["label"]
        yield {"image": record["image"], "messages": _turns("Which digit is it?", label)}


def _counting(count: int) -> Iterable[dict[str, Any]]:
    """Ask for all numbers between two."""
    chance = random.Random(0)
    for _ in range(count):
        first, length = chance.randrange(100), chance.randrange(4, 40)
        numbers = " ".join(str(number) for number in range(first, first + length))
        yield {"messages": _turns(f"Count from {first} to {first + length - 1}.", numbers)}


def main() -> None:
    """Make the data, train, and keep the log."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        locate = write_dataset(folder, "locate", IMAGES, Task(), held_out=False, seed=0)
        held_out = write_dataset(folder, "held_out", 100, Task(), held_out=True, seed=0)
        name = _write(folder / "name.jsonl", _names(locate))
        counting = _write(folder / "count.jsonl", _counting(IMAGES // 2))
        shares = {locate: 2, name: 1, counting: 1}
        train(TrainConfig(data=shares, eval_data=held_out, output=folder / "model", **SETTINGS))
        FOLDER.mkdir(exist_ok=True)
        shutil.copy(folder / "model" / LOG, FOLDER / LOG)


if __name__ == "__main__":
    main()
