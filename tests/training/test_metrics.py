"""Scalars of a run in Trainer's log: what they are, over processes, in trackers, and that they change nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.training.making import example, losses, settings, weights, write_records
from vlparts.run_log import LOG
from vlparts.training.config import TrainConfig
from vlparts.training.metrics import FACTS, LENGTHS, RunMetrics, task_names
from vlparts.training.preparation import prepare
from vlparts.training.train import train

ROOT = Path(__file__).parents[2]


def two_files(folder: Path, **changes: Any) -> TrainConfig:
    """Settings of a run over a file of records with images and one of texts of several lengths."""
    folder.mkdir(exist_ok=True)
    weights = [{"importance": index % 3} if "sample_weight_field" in changes else {} for index in range(5)]
    pictures = [{**example(index, folder), **weights[index]} for index in range(5)]
    texts = [example(index) for index in range(5)]
    for record, count in zip(texts, (1, 3, 30, 60, 100), strict=True):
        record["messages"][1]["content"] = " ".join(["cat"] * count)
    data = {write_records(folder / "pictures.jsonl", pictures): 1, write_records(folder / "texts.jsonl", texts): 1}
    return settings(folder, **{"data": data, "capacity": 2000, "max_steps": 1, **changes})


def sample_losses(config: TrainConfig) -> list[tuple[str, float, int, int, float]]:
    """The oracle: task, summed loss, tokens with loss, tokens and weight of every sample, each scored alone."""
    run = prepare(config.model_copy(update={"packing": False}))
    found = []
    assert run.metrics is not None
    for task, dataset in zip(run.metrics.tasks, run.data.datasets, strict=True):
        for sample in dataset[range(len(dataset))]:
            with torch.no_grad():
                logits = run.model.eval()(sample.input_ids[None], **sample.images).logits[0].double()
            wanted = sample.labels[1:] != -100
            picked = logits[:-1].log_softmax(-1)[wanted].gather(1, sample.labels[1:][wanted][:, None])
            found.append((task, -float(picked.sum()), int(wanted.sum()), len(sample), sample.weight))
    return found


CASES: dict[str, dict[str, Any]] = {
    "one pack": {},
    "padded": {"packing": False},
    "accumulated": {"capacity": 220, "gradient_accumulation_steps": 50},
    "weighted": {"loss": "sample", "sample_weight_field": "importance", "gradient_accumulation_steps": 2},
    "weighted and padded": {"loss": "token", "packing": False},
}


@pytest.mark.parametrize("name", CASES)
def test_losses_by_group_are_those_of_samples_alone(tmp_path: Path, name: str) -> None:
    """A step sees all samples; without metrics its loss and weights are the same to the bit."""
    config = two_files(tmp_path, **CASES[name])
    result = train(config)
    entry = next(line for line in result.log if "loss" in line)
    samples = sample_losses(config)
    groups: dict[str, list[tuple[float, int]]] = {}
    for task, total, targets, _, weight in samples:
        if weight:
            bucket = LENGTHS[sum(targets > bound for bound in (16, 64, 256))]
            for key in (f"loss_by_task/{task}", f"loss_by_length/{bucket}"):
                groups.setdefault(key, []).append((total, targets))
    assert len(groups) >= 5
    assert {key for key in entry if key.startswith("loss_by")} == set(groups)
    for key, pairs in groups.items():
        assert abs(entry[key] - sum(one for one, _ in pairs) / sum(count for _, count in pairs)) < 1e-4, key
    packs = len(samples) / entry["packing/samples"]
    assert (packs == 1) == ("capacity" not in CASES[name])
    assert 0 <= entry["speed/data_wait"] <= 1
    tokens = sum(one[3] for one in samples)
    assert entry["packing/fill"] == pytest.approx(tokens / (packs * config.capacity))
    assert entry["speed/images_per_second"] * tokens == pytest.approx(5 * entry["speed/tokens_per_second"])
    without = train(config.model_copy(update={"metrics": False, "output": tmp_path / "without"}))
    assert losses(without) == losses(result)
    assert not any("/" in key for line in without.log for key in line)
    ours, theirs = weights(tmp_path / "output"), weights(tmp_path / "without")
    assert all(torch.equal(ours[one], theirs[one]) for one in theirs)


def test_trackers_and_the_state_have_what_the_log_has(tmp_path: Path) -> None:
    """With TensorBoard, experts and evaluation."""
    write_records(tmp_path / "eval.jsonl", [example(index, tmp_path) for index in range(20, 22)])
    changes = {"max_steps": 4, "eval_steps": 2, "save_steps": 4, "logging_steps": 2, "text": "moge:tiny"}
    config = settings(tmp_path, eval_data=tmp_path / "eval.jsonl", trainer={"report_to": "tensorboard"}, **changes)
    result = train(config)
    logged = [line for line in result.log if "loss" in line]
    names = {"loss", "grad_norm", "learning_rate", "speed/tokens_per_second", "router/load_entropy", "packing/fill"}
    assert [line["step"] for line in logged] == [2, 4]
    assert all(names <= line.keys() for line in logged)
    assert not any(key.startswith("loss_by_task") for line in logged for key in line)  # one file: it is the loss
    state = json.loads((tmp_path / "output" / "checkpoint-4" / "trainer_state.json").read_text(encoding="utf-8"))
    assert [line for line in state["log_history"] if "loss" in line] == logged
    lines = (tmp_path / "output" / LOG).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == result.log
    (events,) = (tmp_path / "output" / "runs").glob("*/events*")
    reader = EventAccumulator(str(events)).Reload()
    for line in logged:
        for key in line.keys() - {"step"}:
            scalars = {scalar.step: scalar.value for scalar in reader.Scalars(f"train/{key}")}
            assert scalars[line["step"]] == pytest.approx(line[key], rel=1e-5), key
    assert [scalar.step for scalar in reader.Scalars("eval/loss")] == [2, 4]


def test_an_unknown_tracker_is_refused_before_records_are_read(tmp_path: Path) -> None:
    config = settings(tmp_path, trainer={"report_to": "tensorbord"})
    with pytest.raises(ValueError, match="`trainer` report_to='tensorbord': tensorbord is not supported"):
        train(config)


def test_a_dual_encoder_has_speed_and_packing(tmp_path: Path) -> None:
    captions = [example(index, tmp_path) for index in range(6)]
    for index, record in enumerate(captions):
        record["messages"][1]["content"] = f"picture {index}"
    data = write_records(tmp_path / "captions.jsonl", captions)
    fields = {"kind": "dual_encoder", "data": data, "output": tmp_path / "output", "max_steps": 1, "logging_steps": 1}
    towers = {"vision": "navit:tiny", "text": "qwen3:tiny", "trainer": {"use_cpu": True, "disable_tqdm": True}}
    entry = train(TrainConfig(**fields, **towers)).log[0]
    assert entry["packing/samples"] == 6
    assert entry["speed/images_per_second"] > 0
    assert not any(key.startswith("loss_by") for key in entry)


def test_batches_outside_of_a_step_are_not_counted() -> None:
    metrics = RunMetrics(["a"], 10)
    groups = torch.zeros(1, 4, dtype=torch.int64)
    facts = {"packs": 1, "samples": 1, "tokens": 4, "images": 0, "groups": groups}
    (batch,) = metrics.watch(iter([{"input_ids": groups, FACTS: facts}]))
    assert batch.keys() == {"input_ids"}
    logits, labels = torch.zeros(1, 4, 8), torch.tensor([[-100, 1, 2, -100]])
    for _ in range(3):
        metrics.add_losses(logits, labels)
    metrics.on_step_end(None, None, None)
    values = metrics.compute(torch.device("cpu"))
    assert values["loss_by_length/1-16"] == pytest.approx(torch.tensor(8.0).log().item())
    assert values["packing/fill"] == 0.4
    assert metrics.compute(torch.device("cpu"))["packing/fill"] == 0.0  # nothing since


def test_tasks_have_the_names_of_their_files() -> None:
    assert task_names([Path("x/a.jsonl"), Path("y/b.jsonl")]) == ["a", "b"]
    assert task_names([Path("x/a.jsonl"), Path("y/a.jsonl")]) == ["x/a", "y/a"]


SCRIPT = """
import json, os, sys, torch
torch.set_num_threads(1)
from vlparts.training.config import TrainConfig
from vlparts.training.train import train
result = train(TrainConfig.model_validate_json(open(sys.argv[1]).read()))
open(sys.argv[2] + os.environ["RANK"], "w").write(json.dumps(result.log))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one pack", "weighted"])
def test_two_processes_log_what_one_does(tmp_path: Path, name: str) -> None:
    """Both see all samples in one step, of several packs."""
    changes = {**CASES[name], "max_items": 1, "gradient_accumulation_steps": 50}
    config = two_files(tmp_path, **changes)
    alone = train(config).log[0]
    config = config.model_copy(update={"output": tmp_path / "two"})
    (tmp_path / "config.json").write_text(config.model_dump_json(), encoding="utf-8")
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
    logs = [json.loads((tmp_path / f"found{rank}").read_text(encoding="utf-8")) for rank in range(2)]
    assert {k: v for k, v in logs[0][0].items() if k != "loss"} == {k: v for k, v in logs[1][0].items() if k != "loss"}
    lines = (tmp_path / "two" / LOG).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == logs[0]  # of one process alone
    assert alone.keys() == logs[0][0].keys()
    for key in alone:
        if key.startswith(("loss", "packing")):
            assert abs(alone[key] - logs[0][0][key]) < 1e-4, key
