"""DistributedDataParallel with gradient checkpointing in two processes over gloo."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn

from tests.tiny import picture
from tests.vision_towers import composed_tower

pytestmark = pytest.mark.slow  # processes that import everything anew

PROCESSES = 2
KINDS = ("siglip_vision_model", "vit", "qwen3_vl_vision")


def batch(processor: object, rank: int) -> dict:
    return dict(processor(images=[picture(16, 16, seed=rank)], text="<image> is a cat", return_tensors="pt"))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): value.grad for name, value in model.named_parameters()}


def work(rank: int, folder: Path) -> None:
    """One of the processes: two steps, since DDP reports parameters without a gradient in the second."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=PROCESSES)
    found = {}
    for kind in KINDS:
        model, processor = composed_tower(kind)
        model.gradient_checkpointing_enable()
        parallel = nn.parallel.DistributedDataParallel(model.train())
        inputs = batch(processor, rank)
        for _ in range(2):
            model.zero_grad()
            parallel(**inputs, labels=inputs["input_ids"]).loss.backward()
        found |= {f"{kind} {name}": value for name, value in gradients(parallel).items()}
    save_file({name: value.contiguous() for name, value in found.items()}, folder / f"{rank}.safetensors")
    distributed.destroy_process_group()


def test_every_parameter_takes_part(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (tmp_path,), PROCESSES)
    found = load_file(tmp_path / "0.safetensors")
    for kind in KINDS:
        model, processor = composed_tower(kind)
        expected: dict[str, Tensor] = {}
        for rank in range(PROCESSES):
            inputs = batch(processor, rank)
            model.zero_grad()
            model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
            for name, value in gradients(model).items():
                expected[name] = expected.get(name, 0) + value / PROCESSES
        for name, value in expected.items():
            torch.testing.assert_close(found[f"{kind} {name}"], value, rtol=1e-3, atol=1e-4)
