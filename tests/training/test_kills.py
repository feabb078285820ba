"""Runs of every trainer that are killed at random moments, again and again, go on to the bit."""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from tests.training.making import TEXT, example, settings, weights, write_records
from tests.training.recipe_making import small_recipe, turn
from vlparts.run_log import read_run
from vlparts.training.recipe import run_recipe
from vlparts.training.train import train

KILLS = int(os.environ.get("VLPARTS_KILLS", "2"))  # of each case and way
COMMON: dict[str, Any] = {"max_steps": 9, "save_steps": 2, "capacity": 100, "optimizer": "muon"}
STREAM = {"streaming": True, "shuffle_buffer": 5}
CONFIGS: dict[str, dict[str, Any]] = {
    "packs": {"gradient_accumulation_steps": 2, "trainer": {"save_total_limit": 2}},
    "weighted packs": {"data": "weighted.jsonl", "loss": "sample", "sample_weight_field": "importance"},
    "padded batches": {"packing": False, "text": {**TEXT, "attention_dropout": 0.3}},
    "images and captions": {
        "data": "captions.jsonl",
        "kind": "dual_encoder",
        "max_items": 4,
        "dual_encoder": {"projection_dim": 16},
    },
    "stream": STREAM,
    "stream with workers": {**STREAM, "trainer": {"dataloader_num_workers": 2}},
}


def run(case: str, folder: Path, output: str, event: int | None = None) -> None:
    """Train in this process, which kills itself before the event of this number; without one, write their number."""
    datasets.config.HF_DATASETS_CACHE = folder / output / "cache"
    sys.stdout = sys.stderr = (folder / f"{output}.log").open("a", encoding="utf-8", buffering=1)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of workers, as outside of this test
    process, count = os.getpid(), 0

    def audit(name: str, arguments: tuple[Any, ...]) -> None:
        """Count what changes the folder of the run: files that are opened to be written, made, renamed or deleted."""
        nonlocal count
        if name not in ("open", "os.mkdir", "os.rename", "os.remove") or str(folder / output) not in str(arguments[0]):
            return
        if name == "open" and not {*str(arguments[1])} & {*"wax+"}:
            return
        count += 1
        if count == event:
            os.kill(process, signal.SIGKILL)

    sys.addaudithook(audit)
    if case == "recipe":
        run_recipe(small_recipe(folder, output))
    else:
        resume = any((folder / output).glob("checkpoint-*"))
        fields = {"data": "train.jsonl", **COMMON, **CONFIGS[case]}
        fields["data"] = folder / fields["data"]
        train(settings(folder, **fields, output=folder / output, resume=resume))
    (folder / f"{output}.events").write_text(str(count))


@pytest.fixture(scope="module")
def context() -> Any:
    """Starts processes that have everything imported already."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload([__name__])
    first = made.Process(target=int)  # waits for the imports
    first.start()
    first.join()
    return made


def start(context: Any, *arguments: Any) -> BaseProcess:
    """Call [`run`] in a process of its own."""
    process: BaseProcess = context.Process(target=run, args=arguments)
    process.start()
    return process


def finish(process: BaseProcess, folder: Path, output: str) -> None:
    process.join()
    assert process.exitcode == 0, (folder / f"{output}.log").read_text(encoding="utf-8")[-5000:]


def write_data(folder: Path) -> None:
    rows = [example(index, None if index % 3 == 1 else folder) for index in range(12)]
    write_records(folder / "train.jsonl", rows)
    write_records(folder / "weighted.jsonl", [{**row, "importance": 1 + index % 3} for index, row in enumerate(rows)])
    names = [row["image"] for row in rows if "image" in row]
    captions = [{"image": name, "messages": [turn("user", ""), turn("assistant", f"It is {name}")]} for name in names]
    write_records(folder / "captions.jsonl", captions)


def log_of(output: Path) -> list[Any]:
    """The losses and metrics of each stage, without the clock."""
    return [
        [
            {name: value for name, value in entry.items() if not name.startswith("speed/")}
            for entry in stage.entries
            if "loss" in entry
        ]
        for stage in read_run(output)
    ]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", [*CONFIGS, "recipe"])
def test_a_run_that_is_killed_at_random_moments_goes_on_to_the_bit(tmp_path: Path, context: Any, case: str) -> None:
    """By the clock, and while files are written, in turn. `VLPARTS_KILLS` is the number of each, `-s` prints them."""
    write_data(tmp_path)
    began = time.monotonic()
    finish(start(context, case, tmp_path, "whole"), tmp_path, "whole")
    seconds = time.monotonic() - began
    events = int((tmp_path / "whole.events").read_text())
    moments = random.Random(case)
    killed: list[str] = []
    while len(killed) < 2 * KILLS:
        event = moments.randint(1, events) if len(killed) % 2 else None
        process = start(context, case, tmp_path, "killed", event)
        if event is None:
            process.join(delay := moments.uniform(0, seconds))
            process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            killed.append(f"{delay:.1f} s" if event is None else f"event {event}")
        else:  # it ended before the moment
            finish(process, tmp_path, "killed")
            shutil.rmtree(tmp_path / "killed")
    print(f"{case}: {seconds:.1f} s, {events} events, killed at {', '.join(killed)}")
    finish(start(context, case, tmp_path, "killed"), tmp_path, "killed")
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole") != []
    folders = ("encoder", "projector", "instruction") if case == "recipe" else ("",)
    for folder in folders:
        ours, theirs = (weights(tmp_path / output / folder) for output in ("killed", "whole"))
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
