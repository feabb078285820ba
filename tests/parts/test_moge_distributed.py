"""Tensor and expert parallelism of a mixture of experts against a single process."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig
from transformers.distributed.expert_parallel import AutoEP, EPImplementationInterface

from tests.parts.test_moge import moge
from tests.tiny import navit_config
from vlparts import MoGEForCausalLM, VisionLanguageForConditionalGeneration, compose
from vlparts.parts.modeling_moge import MoGEExperts

pytestmark = pytest.mark.slow  # processes that import everything anew

IMPLEMENTATIONS = ("eager", "grouped_mm", "vlparts_sorted")
WORLDS = {2: ("tensor", "composed", *IMPLEMENTATIONS), 4: IMPLEMENTATIONS}
GROUPS, EXPERTS, CHOSEN = 4, 8, 4
INPUT_IDS = torch.arange(18).view(2, 9) + 3


class CountingEP(AutoEP):
    """transformers' default, which counts what this process' experts are given to do."""

    evaluated = 0

    def __init__(self, experts: nn.Module, *meshes: Any) -> None:
        super().__init__(experts, *meshes)
        for way in (self.all_to_all, self.all_reduce):
            way.experts_forward = self.counted

    def counted(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        CountingEP.evaluated += int((top_k_index < self.num_local_experts).sum())
        return self.experts_forward(hidden_states, top_k_index, top_k_weights)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().contiguous()


def results(model: nn.Module) -> dict[str, Tensor]:
    """Logits in inference, and logits, loss, balance loss and gradients in training."""
    with torch.no_grad():
        inferred = model.eval()(INPUT_IDS).logits
    outputs = model.train()(INPUT_IDS, labels=INPUT_IDS, output_router_logits=True)
    outputs.loss.backward()
    found = {"inferred": inferred, "logits": outputs.logits, "loss": outputs.loss, "balance": outputs.aux_loss}
    found |= {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    return {name: whole(tensor) for name, tensor in found.items()}


def load(folder: Path, mode: str, **options: Any) -> nn.Module:
    """The text model, or a composed one, with the implementation that the mode names or "grouped_mm"."""
    if mode == "composed":
        return VisionLanguageForConditionalGeneration.from_pretrained(folder / "composed", **options)
    implementation = "grouped_mm" if mode == "tensor" else mode
    return MoGEForCausalLM.from_pretrained(folder / "model", experts_implementation=implementation, **options)


def work(rank: int, folder: Path) -> None:
    """One of the processes, in worlds of several sizes one after another."""
    torch.set_num_threads(1)
    EPImplementationInterface.register("counting", CountingEP)
    for world in WORLDS:
        if rank < world:
            work_together(rank, world, folder)


def work_together(rank: int, world: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    meeting = (folder / f"meeting {world}").as_uri()
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    for mode in WORLDS[world]:
        sizes: dict[str, Any] = {"tp_size": world}
        if mode != "tensor":
            sizes |= {"ep_size": world, "ep_implementation": "counting"}
        model, CountingEP.evaluated = load(folder, mode, distributed_config=DistributedConfig(**sizes)), 0
        found = results(model)
        (experts,) = (module for module in model.modules() if isinstance(module, MoGEExperts))
        found |= {"experts here": torch.tensor(experts.num_experts), "evaluated": torch.tensor(CountingEP.evaluated)}
        save_file(found, folder / f"{mode} {world} {rank}.safetensors")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, and what the processes made of them."""
    folder = tmp_path_factory.mktemp("processes")
    sizes = {"num_experts": EXPERTS, "num_expert_groups": GROUPS, "num_experts_per_tok": CHOSEN}
    # Tensor parallelism divides key heads too.
    text = moge(router_aux_loss_coef=0.3, mlp_only_layers=[0], num_key_value_heads=4, **sizes)
    text.save_pretrained(folder / "model")
    compose(vision=navit_config(), text=text).save_pretrained(folder / "composed")
    torch.multiprocessing.spawn(work, (folder,), max(WORLDS))
    return folder


@pytest.mark.parametrize(("world", "mode"), [(world, mode) for world, modes in WORLDS.items() for mode in modes])
def test_equals_one_process(folder: Path, world: int, mode: str) -> None:
    expected = results(load(folder, "composed" if mode == "composed" else "eager"))
    for rank in range(world):
        found = load_file(folder / f"{mode} {world} {rank}.safetensors")
        here, evaluated = int(found.pop("experts here")), int(found.pop("evaluated"))
        if mode == "tensor":
            assert here == EXPERTS
        else:
            assert here == EXPERTS // world
            # Tokens, times whole groups here, times experts of each; of the one layer, in inference and in training.
            assert evaluated == 2 * INPUT_IDS.numel() * (GROUPS // world) * (CHOSEN // GROUPS)
        assert expected.keys() <= found.keys()
        for name in found.keys() - expected.keys():  # of the vision encoder, which runs beside other processes
            assert name.startswith(("model.vision_tower.", "model.projector."))
            assert torch.count_nonzero(found.pop(name)) == 0
        for name, tensor in found.items():
            torch.testing.assert_close(
                tensor, expected[name], atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )
