"""Expert parallelism together with FSDP2 in four processes, against one process with all samples.

Two processes share the experts; the experts of both pairs, and all other weights, are sharded by FSDP2.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from transformers.distributed import DistributedConfig

from tests.parts.test_moge import moge
from tests.tiny import navit_config, order_one, packed_images
from vlparts import MoGEForCausalLM, VisionLanguageForConditionalGeneration, compose
from vlparts.parts.modeling_moge import MoGEExperts

pytestmark = pytest.mark.slow  # four processes import everything

PROCESSES, TOGETHER = 4, 2
CLASSES = {"text": MoGEForCausalLM, "composed": VisionLanguageForConditionalGeneration}
SIZES = {"num_experts": 8, "num_expert_groups": 4, "num_experts_per_tok": 4}
IMAGE = 39


def sample(kind: str, rank: int) -> dict[str, Any]:
    """A sample; in the composed model, the first half of the processes has an image."""
    ids = torch.randint(3, 38, (1, 9), generator=torch.Generator().manual_seed(rank))
    if kind == "text" or rank >= PROCESSES // 2:
        return {"input_ids": ids, "labels": ids}
    pixels, grids = packed_images([(2, 2)], seed=rank)
    given = torch.cat((torch.full((1, 4), IMAGE), ids), 1)
    labels = given.masked_fill(given == IMAGE, -100)
    return {"input_ids": given, "labels": labels, "pixel_values": pixels, "image_grid_thw": grids}


def step(model: nn.Module, kind: str, rank: int) -> Tensor:
    loss = model.train()(**sample(kind, rank), use_cache=False, num_items_in_batch=8).loss
    return loss / PROCESSES


def gradients(model: nn.Module) -> dict[str, Tensor]:
    given = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    return {name: one.full_tensor() if hasattr(one, "full_tensor") else one for name, one in given.items()}


def work(rank: int, folder: Path) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(PROCESSES))
    meeting = (folder / "meeting").as_uri()
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=PROCESSES)
    for kind, model_class in CLASSES.items():
        mesh = DistributedConfig(fsdp_size=PROCESSES, ep_size=TOGETHER)
        model = model_class.from_pretrained(folder / kind, distributed_config=mesh)
        (experts,) = {one.num_experts for one in model.modules() if isinstance(one, MoGEExperts)}
        loss = step(model, kind, rank)
        (loss * PROCESSES).backward()  # gradients are averaged
        found = {"loss": loss.detach().clone(), "experts here": torch.tensor(experts), **gradients(model)}
        save_file({name: one.contiguous() for name, one in found.items()}, folder / f"{kind} {rank}.safetensors")
        model.save_pretrained(folder / f"{kind} saved")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, and what the processes made of them."""
    folder = tmp_path_factory.mktemp("meshes")
    text = moge(mlp_only_layers=[0], **SIZES)
    text.save_pretrained(folder / "text")
    composed = compose(vision=navit_config(), text=text, image_token_id=IMAGE)
    order_one(composed).save_pretrained(folder / "composed")
    torch.multiprocessing.spawn(work, (folder,), PROCESSES)
    return folder


@pytest.mark.parametrize("kind", CLASSES)
def test_loss_and_gradients_are_those_of_one_process(folder: Path, kind: str) -> None:
    model = CLASSES[kind].from_pretrained(folder / kind, experts_implementation="eager")
    losses = [step(model, kind, rank) for rank in range(PROCESSES)]
    sum(losses).backward()
    wanted = gradients(model)
    assert any("experts" in name for name in wanted)
    for rank in range(PROCESSES):
        found = load_file(folder / f"{kind} {rank}.safetensors")
        assert int(found.pop("experts here")) == SIZES["num_experts"] // TOGETHER
        torch.testing.assert_close(found.pop("loss"), losses[rank].detach(), atol=1e-6, rtol=1e-5)
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", CLASSES)
def test_the_model_is_saved_whole(folder: Path, kind: str) -> None:
    saved, given = folder / f"{kind} saved", folder / kind
    found, wanted = (load_file(one / "model.safetensors") for one in (saved, given))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert {one.name for one in saved.glob("*.py")} == {one.name for one in given.glob("*.py")}
