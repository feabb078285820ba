"""Runs over streams: they go on exactly after a cut, name broken records, and refuse what would not be exact."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from datasets import IterableDataset
from transformers import TrainingArguments

from tests.training.making import TEXT, example, losses, settings, weights, write_records
from tests.training.recipe_making import small_recipe
from tests.training.test_resuming import ROOT, After, Cut, assert_same
from vlparts.training.config import TrainConfig
from vlparts.training.recipe import check_recipe, run_recipe
from vlparts.training.records import RecordError
from vlparts.training.stream_loader import has_stream, stream_loader
from vlparts.training.train import train


def config_for(folder: Path, output: str = "output", **changes: Any) -> TrainConfig:
    """Settings of a run over about three epochs of 12 records."""
    fields = {"streaming": True, "max_steps": 12, "capacity": 100, "save_steps": 3, "shuffle_buffer": 5}
    return settings(folder, **{**fields, "output": folder / output, **changes})


WORKERS = {"trainer": {"dataloader_num_workers": 2}}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "between checkpoints": (7, {}),
    "at a checkpoint": (6, {}),
    "with accumulated gradients": (5, {"gradient_accumulation_steps": 3, "max_steps": 8, "save_steps": 2}),
    "with workers": (8, WORKERS),
    "with dropout": (7, {"packing": False, "text": {**TEXT, "attention_dropout": 0.3}}),
    "after the last step": (12, {"save_steps": 12}),
    "with weights of samples": (7, {"loss": "sample"}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_was_cut_off_goes_on_to_the_bit(tmp_path: Path, name: str) -> None:
    step, changes = CASES[name]
    whole = train(config_for(tmp_path, "whole", **changes))
    assert whole.steps == changes.get("max_steps", 12)
    with pytest.raises(InterruptedError):
        train(config_for(tmp_path, "cut", **changes), callbacks=[After(step) if step == 12 else Cut(step)])
    resumed = train(config_for(tmp_path, "cut", resume=True, **changes))
    assert_same(tmp_path, resumed, whole)


def test_the_state_has_positions_only(tmp_path: Path) -> None:
    train(config_for(tmp_path, max_steps=3))
    [path] = (tmp_path / "output" / "checkpoint-3").glob("stream*")
    assert path.name == "stream_0.json"
    assert path.stat().st_size < 2000


def test_sources_are_mixed_and_epochs_are_logged_as_a_fraction_of_steps(tmp_path: Path) -> None:
    write_records(tmp_path / "more.jsonl", [example(index) for index in range(20, 40)])
    settings(tmp_path)
    data = {tmp_path / "train.jsonl": 1, tmp_path / "more.jsonl": 3}
    result = train(config_for(tmp_path, data=data, max_steps=4))
    assert [line["epoch"] for line in result.log if "loss" in line] == [0.25, 0.5, 0.75, 1.0]
    state = json.loads((tmp_path / "output" / "checkpoint-4" / "stream_0.json").read_text(encoding="utf-8"))
    [stream] = state["streams"]
    first, second = stream["counts"]
    assert abs(second - 3 * first) <= 3


def test_a_dataset_of_the_library_is_trained_on(tmp_path: Path) -> None:
    rows = IterableDataset.from_generator(texts, gen_kwargs={"numbers": list(range(6))})
    assert len(losses(train(config_for(tmp_path, data=rows, max_steps=3)))) == 3
    with pytest.raises(ValueError, match="`data` must be a Dataset unless it is streamed, got an IterableDataset"):
        train(config_for(tmp_path, "plain", data=rows, streaming=False, shuffle_buffer=1000))


def texts(numbers: list[int]) -> Iterator[dict[str, Any]]:
    yield from map(example, numbers)


def test_evaluation_data_are_read_before(tmp_path: Path) -> None:
    write_records(tmp_path / "eval.jsonl", [example(index, tmp_path) for index in range(20, 25)])
    result = train(config_for(tmp_path, eval_data=tmp_path / "eval.jsonl", eval_steps=3, max_steps=6))
    assert len(losses(result, "eval_loss")) == 2


def test_a_dual_encoder_is_trained(tmp_path: Path) -> None:
    rows = [example(index, tmp_path) for index in range(8)]
    captions = [
        {"image": row["image"], "messages": [{"role": "assistant", "content": f"picture {row['image']}"}]}
        for row in rows
    ]
    captions = [{**row, "messages": [{"role": "user", "content": ""}, *row["messages"]]} for row in captions]
    write_records(tmp_path / "captions.jsonl", captions)
    given = {"kind": "dual_encoder", "data": tmp_path / "captions.jsonl", "dual_encoder": {"projection_dim": 16}}
    result = train(config_for(tmp_path, max_items=4, max_steps=3, **given))
    assert len(losses(result)) == 3


def test_a_stage_of_a_recipe_is_streamed(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, **{"instruction.streaming": True, "instruction.shuffle_buffer": 3})
    plan = check_recipe(recipe)[-1]
    assert (plan.steps, plan.samples, plan.longest, plan.tokens) == (4, None, None, None)
    result = run_recipe(recipe).stages[-1]
    assert result.steps == 4
    assert has_stream(result.folder / "checkpoint-4")


def test_broken_records_are_named_once(tmp_path: Path) -> None:
    rows: list[Any] = [example(index, None if index % 3 else tmp_path) for index in range(12)]
    rows[0]["image"] = "missing.png"
    rows[7] = {"messages": "none"}
    write_records(tmp_path / "train.jsonl", rows)
    with pytest.raises(RecordError, match=r"train\.jsonl, line (1|8): "):
        train(config_for(tmp_path, "raised"))
    result = train(config_for(tmp_path, "skipped", on_error="skip"))
    lines = (tmp_path / "skipped" / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    first, second = sorted(json.loads(line)["skipped"] for line in lines)
    assert first.startswith(f"{tmp_path}/train.jsonl, line 1: ")
    assert "missing.png" in first
    assert second.startswith(f"{tmp_path}/train.jsonl, line 8: messages: ")
    assert sorted(result.skipped) == [first, second]


def test_a_broken_record_in_a_worker_is_named_alone(tmp_path: Path) -> None:
    write_records(tmp_path / "train.jsonl", [{"messages": "none"}] * 4)
    with pytest.raises(RecordError) as raised:
        train(config_for(tmp_path, tokenizer=None, **WORKERS))
    assert str(raised.value).startswith(f"{tmp_path}/train.jsonl, line ")
    assert "Traceback" not in str(raised.value)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "without steps": ({"max_steps": -1}, "`streaming` requires `max_steps`"),
    "with tokens": ({"max_steps": -1, "max_tokens": 5}, "`streaming` takes no `max_tokens`"),
    "with a cache": ({"cache": True}, "`streaming` takes `cache` for `eval_data` only"),
    "a buffer alone": ({"streaming": False}, "`shuffle_buffer` requires `streaming`"),
    "weights that are nowhere": (
        {"sample_weight_field": "importance"},
        r"`sample_weight_field` 'importance' is in none of the first 10000 records of .*train\.jsonl",
    ),
    "its own setting": ({"trainer": {"ignore_data_skip": False}}, "`trainer` must not contain 'ignore_data_skip'"),
    "more readers than records": (
        {"data": "one.jsonl", "trainer": {"dataloader_num_workers": 2}},
        r"one\.jsonl: expected at least one row for each of 2 readers",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_exact_is_refused(tmp_path: Path, name: str) -> None:
    changes, message = REFUSED[name]
    write_records(tmp_path / "one.jsonl", [example(1)])
    if "data" in changes:
        changes = {**changes, "data": tmp_path / changes["data"]}
    with pytest.raises(ValueError, match=message):
        train(config_for(tmp_path, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"ignore_data_skip": False},
        {"dataloader_in_order": False, "dataloader_num_workers": 1},
        {"accelerator_config": {"dispatch_batches": True}},
        {"accelerator_config": {"split_batches": True}},
    ],
)
def test_a_trainer_that_would_divide_the_data_again_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    args = TrainingArguments(str(tmp_path), **{"use_cpu": True, "ignore_data_skip": True, **changes})
    name = [*changes.get("accelerator_config", changes)][0]
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        stream_loader(None, None, args)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shuffle_buffer": 6}, "other settings of its stream .shuffle_buffer: 5, now 6."),
        ({"capacity": 120, "seed": 1}, "capacity: 100, now 120; seed: 0, now 1"),
        (WORKERS, "dataloader_num_workers: 1, now 2"),
        ({"streaming": False, "shuffle_buffer": 1000}, "has checkpoints of a run with `streaming`; set it to resume"),
    ],
)
def test_a_stream_of_other_settings_is_not_resumed(cut: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(config_for(cut, resume=True, **changes))


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with a checkpoint."""
    folder = tmp_path_factory.mktemp("cut")
    with pytest.raises(InterruptedError):
        train(config_for(folder), callbacks=[Cut(4)])
    return folder


def test_a_checkpoint_without_a_stream_is_not_resumed(tmp_path: Path) -> None:
    plain = {"streaming": False, "shuffle_buffer": 1000}
    with pytest.raises(InterruptedError):
        train(config_for(tmp_path, **plain), callbacks=[Cut(4)])
    with pytest.raises(ValueError, match=r"checkpoint-3 has no stream_0\.json"):
        train(config_for(tmp_path, resume=True))


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from vlparts.training.config import TrainConfig
from vlparts.training.train import train
result = train(TrainConfig.model_validate_json(open(sys.argv[1]).read()))
"""


def start(folder: Path, config: TrainConfig, processes: int = 1) -> "subprocess.Popen[bytes]":
    """Train in a process of its own."""
    (folder / "config.json").write_text(config.model_dump_json(), encoding="utf-8")
    (folder / "script.py").write_text(SCRIPT, encoding="utf-8")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.Popen(
        [sys.executable, *(launch if processes > 1 else []), folder / "script.py", folder / "config.json"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=(folder / "errors").open("wb"),
    )


def kill_when(process: "subprocess.Popen[bytes]", reached: Any, delay: float = 0.0) -> None:
    """Kill a process and all that it started, which a launcher puts into sessions of their own."""
    while process.poll() is None and not reached():
        time.sleep(0.002)
    time.sleep(delay)
    found = [psutil.Process(process.pid)] if process.poll() is None else []
    found += [child for one in found for child in one.children(recursive=True)]
    for one in found:
        one.kill()
    psutil.wait_procs(found[1:])
    process.wait()


def log_of(folder: Path) -> list[dict[str, Any]]:
    """What the last checkpoint of a run has logged, without the clock."""
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    lines = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [{name: value for name, value in line.items() if not name.startswith("speed/")} for line in lines]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_killed_again_and_again_goes_on_to_the_bit(tmp_path: Path, processes: int) -> None:
    """Also while a checkpoint is written: after its first file, and before the state that completes it."""
    rows: list[Any] = [example(index, None if index % 3 == 1 else tmp_path) for index in range(12)]
    rows[4]["messages"] = []
    write_records(tmp_path / "train.jsonl", rows)
    changes: dict[str, Any] = {"max_steps": 24, "on_error": "skip", **WORKERS}
    whole = start(tmp_path, config_for(tmp_path, "whole", **changes), processes)
    assert whole.wait() == 0, (tmp_path / "errors").read_text()
    output = tmp_path / "cut"
    moments = [
        ("checkpoint-3/stream_0.json", 0.0),
        ("checkpoint-6/trainer_state.json", 0.01),
        ("checkpoint-9/model.safetensors", 0.0),
        ("checkpoint-15/optimizer.pt", 0.0),
        ("checkpoint-18/trainer_state.json", 0.05),
    ]
    for name, delay in moments[::processes]:  # starts of two processes take long
        config = config_for(tmp_path, "cut", resume=any(output.glob("checkpoint-*")), **changes)
        kill_when(start(tmp_path, config, processes), (output / name).exists, delay)
        assert not (output / "model.safetensors").exists(), "it ended before it was killed"
    last = start(tmp_path, config_for(tmp_path, "cut", resume=True, **changes), processes)
    assert last.wait() == 0, (tmp_path / "errors").read_text()
    assert log_of(output) == log_of(tmp_path / "whole")
    assert len(log_of(output)) == 24
    ours, theirs = weights(output), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (output / "skipped.jsonl").read_text() == (tmp_path / "whole" / "skipped.jsonl").read_text() != ""
