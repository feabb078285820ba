"""Runs that are cut off go on as if they had not been, and runs of two processes do what one would."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.training.making import TEXT, example, losses, settings, weights, write_records
from vlparts.run_log import read_run
from vlparts.training.config import TrainConfig
from vlparts.training.train import TrainResult, train

PACKS = 8  # of an epoch, with the capacity below
ROOT = Path(__file__).parents[2]


class Cut(TrainerCallback):
    """Ends a run after a step, without cleanup."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.end()

    def end(self) -> None:
        raise InterruptedError


class Kill(Cut):
    """Ends the whole process at once."""

    def end(self) -> None:
        os._exit(77)


class After(Cut):
    """Ends a run after the checkpoint of a step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        pass

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control)


def config_for(folder: Path, output: str, **changes: Any) -> TrainConfig:
    return settings(folder, **{"epochs": 3, "capacity": 100, "save_steps": 3, "output": folder / output, **changes})


def log_of(result: TrainResult) -> list[dict[str, Any]]:
    """The log without the clock, and without the mean over the steps of the last process."""
    kept = [line for line in result.log if "train_runtime" not in line and "eval_runtime" not in line]
    return [{name: value for name, value in line.items() if not name.startswith("speed/")} for line in kept]


def assert_same(folder: Path, resumed: TrainResult, whole: TrainResult) -> None:
    assert log_of(resumed) == log_of(whole)
    assert read_run(folder / "cut")[0].entries == resumed.log
    assert resumed.steps == whole.steps
    ours, theirs = weights(folder / "cut"), weights(folder / "whole")
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "across the end of an epoch": (7, {}),
    "in the second epoch": (11, {}),
    "at a checkpoint at the end of an epoch": (PACKS + 1, {"save_steps": PACKS}),
    "with accumulated gradients": (5, {"gradient_accumulation_steps": 2, "save_steps": 2}),
    "with accumulated gradients that do not divide an epoch": (5, {"gradient_accumulation_steps": 3, "save_steps": 2}),
    "with steps instead of epochs": (7, {"max_steps": 11}),
    "with Muon": (7, {"optimizer": "muon"}),
    "with dropout": (7, {"packing": False, "text": {**TEXT, "attention_dropout": 0.3}}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_was_cut_off_goes_on_to_the_bit(tmp_path: Path, name: str) -> None:
    step, changes = CASES[name]
    whole = train(config_for(tmp_path, "whole", **changes))
    accumulated = changes.get("gradient_accumulation_steps", 1)
    assert whole.steps == changes.get("max_steps", 3 * -(-PACKS // accumulated)) > step
    with pytest.raises(InterruptedError):
        train(config_for(tmp_path, "cut", **changes), callbacks=[Cut(step)])
    resumed = train(config_for(tmp_path, "cut", resume=True, **changes))
    assert_same(tmp_path, resumed, whole)


@pytest.mark.parametrize("changes", [{"max_steps": PACKS + 3}, {"epochs": 1}, {"max_steps": 3, "loss": "sample"}])
def test_a_run_that_was_cut_off_after_its_last_step_takes_none(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Also where that step is not the last of an epoch."""
    last = changes.get("max_steps", PACKS)
    changes = {**changes, "save_steps": last}
    whole = train(config_for(tmp_path, "whole", **changes))
    with pytest.raises(InterruptedError):
        train(config_for(tmp_path, "cut", **changes), callbacks=[After(last)])
    resumed = train(config_for(tmp_path, "cut", resume=True, **changes))
    assert_same(tmp_path, resumed, whole)


def test_a_process_that_was_killed_goes_on_to_the_bit(tmp_path: Path) -> None:
    """The second process builds the model, its tokenizer and the data anew."""
    whole = train(config_for(tmp_path, "whole"))
    (tmp_path / "config.json").write_text(config_for(tmp_path, "cut").model_dump_json(), encoding="utf-8")
    script = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from tests.training.test_resuming import Kill\n"
        "from vlparts.training.config import TrainConfig\n"
        "from vlparts.training.train import train\n"
        "train(TrainConfig.model_validate_json(open(sys.argv[1]).read()), callbacks=[Kill(7)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "config.json"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 77, done.stderr
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    assert_same(tmp_path, train(config_for(tmp_path, "cut", resume=True)), whole)


SCRIPT = """
import json, os, sys, torch
torch.set_num_threads(1)
from vlparts.training.config import TrainConfig
from vlparts.training.train import train
import transformers
saves = []
keep = transformers.PreTrainedModel.save_pretrained
def counted(self, folder, *args, **kwargs):
    saves.append(str(folder))
    return keep(self, folder, *args, **kwargs)
transformers.PreTrainedModel.save_pretrained = counted
seen = []
class Seen(transformers.TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(
            [module.training, kwargs["input_ids"][0].tolist(), kwargs["cu_seq_lens_q"].tolist()]), with_kwargs=True)
result = train(TrainConfig.model_validate_json(open(sys.argv[1]).read()), callbacks=[Seen()])
found = {"steps": result.steps, "log": result.log, "saves": saves, "seen": seen}
open(sys.argv[2] + os.environ["RANK"], "w").write(json.dumps(found))
"""


def samples_of(seen: list[Any], training: bool) -> list[tuple[int, ...]]:
    """The ids of all samples in the rows that a model was given."""
    rows = [(ids, bounds) for mode, ids, bounds in seen if mode is training]
    return [tuple(ids[a:b]) for ids, bounds in rows for a, b in zip(bounds, bounds[1:], strict=False)]


# In a step without images, gradients of the encoder are zero beside other processes and None alone: the same for SGD.
SGD = {"weight_decay": 0.0, "learning_rate": 0.1, "trainer": {"optim": "sgd"}}
SHARED: dict[str, tuple[int, dict[str, Any]]] = {
    "an even number of packs": (PACKS, {}),
    "an odd number of packs": (3, {"capacity": 2000, "max_items": 4}),
    "rows of text alone beside rows with images": (12, {"max_items": 1, **SGD}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED)
def test_two_processes_do_what_one_does_with_twice_the_accumulation(tmp_path: Path, name: str) -> None:
    packs, changes = SHARED[name]
    write_records(tmp_path / "eval.jsonl", [example(index, tmp_path) for index in range(20, 25)])
    options = {"epochs": 2, "eval_data": tmp_path / "eval.jsonl", **changes}
    alone = train(config_for(tmp_path, "alone", gradient_accumulation_steps=2, **options))
    assert alone.steps == 2 * -(-packs // 2)
    (tmp_path / "config.json").write_text(config_for(tmp_path, "two", **options).model_dump_json(), encoding="utf-8")
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, tmp_path / "script.py", tmp_path / "config.json", tmp_path / "found"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"found{rank}").read_text(encoding="utf-8")) for rank in range(2))
    assert first["steps"] == second["steps"] == alone.steps
    assert [Path(folder).name for folder in first["saves"]][-1] == "two"
    assert second["saves"] == []
    trained = samples_of(first["seen"], True) + samples_of(second["seen"], True)
    assert sorted(trained) == sorted(2 * [*dict.fromkeys(trained)])  # every sample once in each of two epochs
    assert len(trained) == 2 * 12
    log = [line["loss"] for line in first["log"] if "loss" in line]
    evaluated = [line["eval_loss"] for line in first["log"] if "eval_loss" in line]
    assert len(log) == len(losses(alone))
    if packs % 2 == 0:  # otherwise other samples share a step
        torch.testing.assert_close(log, losses(alone), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(evaluated, losses(alone, "eval_loss"), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "alone"), atol=1e-3, rtol=1e-3)
    else:
        again = config_for(tmp_path, "again", model=tmp_path / "two", max_steps=1, learning_rate=1e-9, **options)
        again.model_fields_set.difference_update({"vision", "text"})
        torch.testing.assert_close(evaluated, losses(train(again), "eval_loss"), atol=1e-4, rtol=1e-4)
