"""Two processes under DistributedDataParallel over gloo, against one with all samples."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed

from tests.training.making import losses, settings, weights
from tests.training.test_step_balance import COEFFICIENT, balance_of, model_of
from tests.training.weighted_making import Rows, arguments, expected_loss, llama, one_row, padded
from vlparts.training.config import TrainConfig
from vlparts.training.train import train
from vlparts.training.weighted_inputs import WeightedCollator
from vlparts.training.weighted_loss import WeightedLossTrainer

pytestmark = pytest.mark.slow  # two processes import everything

SAMPLES, HELD_OUT = 8, 7  # the processes cannot share what is held out
RUNS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "token": ("token", padded, {"per_device_train_batch_size": 4}),
    "sample": ("sample", padded, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    "square": ("square", one_row, {"per_device_train_batch_size": 4}),
    "mix": ("openpangu_mix", one_row, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    "fewer": ("openpangu_mix", padded, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}),
    "local counts": (
        "openpangu_mix",
        padded,
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "average_tokens_across_devices": False},
    ),
}

EXPERTS = {"mixtral": "step", "sequences": "micro_batch"}


def trainer_for(folder: Path, name: str) -> WeightedLossTrainer:
    preset, collator, options = RUNS[name]
    return WeightedLossTrainer(
        model=llama(attn_implementation="vlparts_packed" if collator is one_row else "sdpa"),
        args=arguments(folder, ddp_find_unused_parameters=False, per_device_eval_batch_size=2, **options),
        train_dataset=Rows(SAMPLES),
        eval_dataset=Rows(HELD_OUT),
        data_collator=WeightedCollator(collator),
        preset=preset,
    )


def trained(folder: Path, name: str) -> dict[str, Tensor]:
    """Loss and gradients of a step, and the loss of an evaluation."""
    # Trainers of their own: one that has evaluated does not share gradients any more.
    evaluated = trainer_for(folder, name).evaluate()["eval_loss"]
    trainer = trainer_for(folder, name)
    before = {key: one.detach().clone() for key, one in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.global_step == 1
    rate = trainer.args.learning_rate
    found = {key: (before[key] - one.detach()) / rate for key, one in trainer.model.named_parameters()}
    loss = next(line["loss"] for line in trainer.state.log_history if "loss" in line)
    return {**found, "loss": torch.tensor(loss), "evaluated": torch.tensor(evaluated, dtype=torch.float64)}


def trained_experts(folder: Path, name: str) -> dict[str, Tensor]:
    """Loss and gradients of a step with the balance loss of the whole step, or of its sequences."""
    model = model_of(name)
    before = {key: one.detach().clone() for key, one in model.named_parameters()}
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.01}
    trainer = WeightedLossTrainer(
        model=model,
        args=arguments(folder, ddp_find_unused_parameters=True, **options),
        train_dataset=Rows(SAMPLES),
        data_collator=WeightedCollator(padded),
        preset="square",
        balance_over=EXPERTS[name],
    )
    loss = trainer.train().training_loss
    found = {key: (before[key] - one.detach()) / 0.01 for key, one in trainer.model.named_parameters()}
    return {**found, "loss": torch.tensor(loss, dtype=torch.float64)}


def work(rank: int, folder: Path, port: int) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for name in RUNS:
        found = trained(folder / f"{rank}", name)
        save_file({key: one.contiguous() for key, one in found.items()}, folder / f"{name} {rank}.safetensors")
    for name in EXPERTS:
        found = trained_experts(folder / f"{rank}", name)
        save_file({key: one.contiguous() for key, one in found.items()}, folder / f"{name} {rank}.safetensors")
    for path in sorted(folder.glob("*.json")):
        result = train(TrainConfig.model_validate_json(path.read_text(encoding="utf-8")))
        found = {"loss": torch.tensor(losses(result)), "evaluated": torch.tensor(losses(result, "eval_loss"))}
        save_file(found, folder / f"{path.stem} {rank}.safetensors")
    distributed.destroy_process_group()


BY_SEQUENCE = {"router_aux_loss_coef": 0.3, "router_aux_loss_form": "sequence", "experts_implementation": "eager"}
PACKED: dict[str, dict[str, Any]] = {
    "packs": {"capacity": 100},
    "batches": {"capacity": 100, "packing": False},
    "packs of experts": {
        "capacity": 100,
        "loss": None,
        "mix": None,
        "text": {"preset": "moge:tiny", **BY_SEQUENCE},
        "trainer": {"max_grad_norm": 0.0, "ddp_find_unused_parameters": True},
    },
}


def packed_settings(folder: Path, name: str, output: str, **changes: Any) -> TrainConfig:
    """A run of one epoch, with an evaluation at its end."""
    fields = {"loss": "openpangu_mix", "mix": 0.3, "learning_rate": 1e-3, "trainer": {"max_grad_norm": 0.0}}
    return settings(folder, **{**fields, "output": folder / output, "eval_data": folder / "train.jsonl", **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both processes left their results."""
    folder = tmp_path_factory.mktemp("processes")
    for name, changes in PACKED.items():
        config = packed_settings(folder, name, name, **changes)
        (folder / f"{name}.json").write_text(config.model_dump_json(), encoding="utf-8")
    torch.multiprocessing.spawn(work, (folder, free_port()), 2)
    return folder


def free_port() -> int:
    store = distributed.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    return store.port


@pytest.mark.parametrize("name", RUNS)
def test_a_step_does_not_depend_on_the_number_of_processes(folder: Path, name: str) -> None:
    preset = RUNS[name][0]
    model, samples = llama(), Rows(SAMPLES)
    loss = expected_loss(model, [samples[index] for index in range(SAMPLES)], preset)
    loss.backward()
    for rank in range(2):
        found = load_file(folder / f"{name} {rank}.safetensors")
        assert abs(float(found["loss"]) - loss.item()) < 1e-6
        for key, one in model.named_parameters():
            assert one.grad is not None
            torch.testing.assert_close(found[key], one.grad, atol=5e-7, rtol=1e-5)  # norms work in float32


@pytest.mark.parametrize("name", EXPERTS)
def test_the_balance_loss_of_a_step_is_that_of_one_process(folder: Path, name: str) -> None:
    model, samples = model_of(name), Rows(SAMPLES)
    loss = expected_loss(model, [samples[index] for index in range(SAMPLES)], "square")
    loss = loss + COEFFICIENT * balance_of(model, range(SAMPLES))
    loss.backward()
    for rank in range(2):
        found = load_file(folder / f"{name} {rank}.safetensors")
        assert abs(float(found["loss"]) - loss.item()) < 1e-6
        for key, one in model.named_parameters():
            assert one.grad is not None
            torch.testing.assert_close(found[key], one.grad, atol=5e-7, rtol=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_an_evaluation_counts_every_sample_once(folder: Path, name: str) -> None:
    samples = Rows(HELD_OUT)
    with torch.no_grad():
        wanted = float(expected_loss(llama(), [samples[index] for index in range(HELD_OUT)], RUNS[name][0]))
    for rank in range(2):
        assert abs(float(load_file(folder / f"{name} {rank}.safetensors")["evaluated"]) - wanted) < 1e-6


@pytest.mark.parametrize("name", PACKED)
def test_the_command_does_what_one_process_does(folder: Path, name: str) -> None:
    """With twice the accumulation, each step has the same packs."""
    alone = train(packed_settings(folder, name, f"{name} alone", gradient_accumulation_steps=2, **PACKED[name]))
    first, second = (load_file(folder / f"{name} {rank}.safetensors") for rank in range(2))
    assert len(losses(alone)) > 2
    torch.testing.assert_close(first["loss"].tolist(), losses(alone), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(first["evaluated"].tolist(), losses(alone, "eval_loss"), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(first["evaluated"], second["evaluated"], atol=0, rtol=0)
    torch.testing.assert_close(weights(folder / name), weights(folder / f"{name} alone"), atol=1e-4, rtol=1e-4)
