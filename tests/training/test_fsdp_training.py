"""`train` under FSDP2 in two processes over gloo, against one process: losses, checkpoints, the saved folder."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import distributed
from transformers import Trainer

import vlparts.training
from tests.training.making import losses, settings, weights
from tests.training.test_weighted_loss_distributed import free_port
from vlparts import VisionLanguageForConditionalGeneration
from vlparts.training.config import TrainConfig
from vlparts.training.train import _check_sharding, train

SHARDED = {"fsdp": True, "fsdp_config": {"version": 2}}
PLAIN = {"max_grad_norm": 0.0, "gradient_checkpointing": True}
EXPERTS = {"router_aux_loss_coef": 0.3, "router_aux_loss_form": "sequence", "experts_implementation": "eager"}
RUNS: dict[str, dict[str, Any]] = {
    "dense": {"trainer": PLAIN},
    "experts": {
        "text": {"preset": "moge:tiny", **EXPERTS},
        "freeze": ["vision"],
        "loss": "openpangu_mix",
        "trainer": PLAIN,
    },
    "muon": {"optimizer": "muon", "learning_rates": {"vision": 1e-3}},  # with clipped gradients
}
STEPS, SAVED = 5, 3


def run_settings(folder: Path, name: str, output: str, processes: int = 1, **changes: Any) -> TrainConfig:
    """Settings of a run; one process accumulates the packs of two."""
    fields = {"capacity": 100, "max_steps": STEPS, "save_steps": SAVED, "learning_rate": 1e-3, **RUNS[name]}
    trainer = {**fields.pop("trainer", {}), **(SHARDED if processes == 2 else {})}
    accumulation = 2 // processes
    return settings(
        folder,
        **{**fields, "output": folder / output, "gradient_accumulation_steps": accumulation, **changes},
        trainer=trainer,
    )


def shard_on_cpu() -> None:
    """Let accelerate shard in processes on CPUs, as it does in those on accelerators."""
    create = Trainer.create_accelerator_and_postprocess

    def create_sharding(trainer: Trainer) -> None:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        create(trainer)

    Trainer.create_accelerator_and_postprocess = create_sharding


def work(rank: int, folder: Path, port: int) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", CUDA_VISIBLE_DEVICES="")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    shard_on_cpu()
    for path in sorted(folder.glob("*.json")):
        result = train(TrainConfig.model_validate_json(path.read_text(encoding="utf-8")))
        assert type(result.model).__name__.startswith("FSDP")
        save_file({"loss": torch.tensor(losses(result))}, folder / f"{path.stem} {rank}.safetensors")
    distributed.destroy_process_group()


def keep_first_checkpoint(source: Path, target: Path) -> None:
    """What an interrupted run leaves."""
    shutil.copytree(source / f"checkpoint-{SAVED}", target / f"checkpoint-{SAVED}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs left their results: alone, and in two processes, of which one resumes a run alone."""
    folder = tmp_path_factory.mktemp("sharded training")
    configs = {}
    for name in RUNS:
        alone = train(run_settings(folder, name, f"{name} alone"))
        save_file({"loss": torch.tensor(losses(alone))}, folder / f"{name} alone.safetensors")
        configs[name] = run_settings(folder, name, name, 2)
    for name in ("dense", "muon"):
        keep_first_checkpoint(folder / f"{name} alone", folder / f"{name} resumed")
        configs[f"{name} resumed"] = run_settings(folder, name, f"{name} resumed", 2, resume=True)
    for name, config in configs.items():
        (folder / f"{name}.json").write_text(config.model_dump_json(), encoding="utf-8")
    torch.multiprocessing.spawn(work, (folder, free_port()), 2)
    return folder


def loss_of(folder: Path, name: str) -> list[float]:
    return load_file(folder / f"{name}.safetensors")["loss"].tolist()


# Muon orthogonalizes in bfloat16.
TOLERANCES = {"dense": 1e-5, "experts": 1e-5, "muon": 2e-3}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_losses_and_weights_are_those_of_one_process(folder: Path, name: str) -> None:
    wanted = loss_of(folder, f"{name} alone")
    assert len(wanted) == STEPS
    for rank in range(2):
        torch.testing.assert_close(loss_of(folder, f"{name} {rank}"), wanted, atol=TOLERANCES[name], rtol=1e-5)
    found, alone = weights(folder / name), weights(folder / f"{name} alone")
    torch.testing.assert_close(found, alone, atol=10 * TOLERANCES[name], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "muon"])
def test_two_processes_resume_a_run_of_one(folder: Path, name: str) -> None:
    wanted = loss_of(folder, f"{name} alone")
    torch.testing.assert_close(loss_of(folder, f"{name} resumed 0"), wanted, atol=TOLERANCES[name], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "muon"])
def test_one_process_resumes_a_run_of_two(folder: Path, name: str, tmp_path: Path) -> None:
    keep_first_checkpoint(folder / name, tmp_path / "output")
    result = train(run_settings(folder, name, str(tmp_path / "output"), resume=True))
    wanted = loss_of(folder, f"{name} 0")
    torch.testing.assert_close(losses(result), wanted, atol=TOLERANCES[name], rtol=1e-5)


@pytest.mark.slow
def test_the_folder_is_that_of_one_process(folder: Path) -> None:
    """With the same code, names and files; it loads without sharding."""
    found, wanted = folder / "dense", folder / "dense alone"
    for place in (".", f"checkpoint-{SAVED}"):
        names = [{one.name for one in (side / place).iterdir() if "rng" not in one.name} for side in (found, wanted)]
        assert names[0] == names[1]
    assert weights(found).keys() == weights(wanted).keys()
    assert json.loads((found / "config.json").read_text()) == json.loads((wanted / "config.json").read_text())
    model = VisionLanguageForConditionalGeneration.from_pretrained(found)
    assert model(input_ids=torch.arange(5)[None]).logits.isfinite().all()


def test_the_shipped_configuration_is_one_of_accelerate() -> None:
    path = Path(vlparts.training.__path__[0]) / "fsdp2.yaml"
    config = ClusterConfig.from_yaml_file(str(path))  # raises for an unknown key
    assert config.distributed_type == DistributedType.FSDP
    known = vars(launch_command_parser().parse_args(["script.py"]))
    assert config.fsdp_config.keys() <= known.keys()
    assert config.fsdp_config["fsdp_version"] == 2


def test_sharding_that_accelerate_leaves_out_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def trainer(fsdp: bool, plugin: Any = None) -> Any:
        args = SimpleNamespace(fsdp=fsdp, world_size=2, device=torch.device("cpu"))
        return SimpleNamespace(args=args, accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))

    _check_sharding(trainer(False))
    _check_sharding(trainer(True, SimpleNamespace(fsdp_version=2)))
    with pytest.raises(ValueError, match="requires several processes on accelerators, got 2 on cpu"):
        _check_sharding(trainer(True))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="requires several processes on accelerators"):
        _check_sharding(trainer(False))
    with pytest.raises(ValueError, match="must have the version 2 .*got 1"):
        _check_sharding(trainer(True, SimpleNamespace(fsdp_version=1)))
