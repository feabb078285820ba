"""Two processes, of which one has no image, under DistributedDataParallel and FSDP2, against one with all samples."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.parts.test_vlm_distributed import composition
from tests.tiny import order_one
from tests.training.test_weighted_loss_distributed import free_port
from vlparts.parts.vlm_distributed import blank_image

pytestmark = pytest.mark.slow  # two processes import everything

# The encoder, and whether it is trained.
KINDS = {
    "navit": True,
    "windowfree": True,
    "deepencoder": True,
    "qwen2_5_vl_vision": True,
    "siglip_vision_model": True,
    "frozen navit": False,
}
WRAPPERS = ("ddp", "fsdp")


def model_for(kind: str) -> Any:
    model = order_one(composition(kind.removeprefix("frozen "))).train()
    model.gradient_checkpointing_enable()
    model.model.vision_tower.requires_grad_(KINDS[kind])
    return model


def sample(model: Any, rank: int) -> dict[str, Any]:
    """A sample with an image for the first process, of text alone for the second."""
    ids = torch.arange(10, 22)[None] + rank
    if rank == 1:
        return {"input_ids": ids, "labels": ids}
    images = blank_image(model.model.vision_tower, model.config.merge_size, ids.device)
    images["pixel_values"] = torch.randn(images["pixel_values"].shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = len(torch.cat(tuple(model.get_image_features(**images).pooler_output)))
    ids = torch.cat((torch.full((1, tokens), model.config.image_token_id), ids), 1)
    return {**images, "input_ids": ids, "labels": ids.masked_fill(ids == model.config.image_token_id, -100)}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    given = {name.removeprefix("module."): one.grad for name, one in model.named_parameters() if one.grad is not None}
    return {name: one.full_tensor() if hasattr(one, "full_tensor") else one for name, one in given.items()}


def wrapped(model: Any, wrapper: str) -> Any:
    if wrapper == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=False)
    for layer in [one for one in model.modules() if type(one).__name__ in model._no_split_modules]:
        fully_shard(layer)
    fully_shard(model.get_input_embeddings())  # as accelerate and transformers do
    return fully_shard(model)


def work(rank: int, folder: Path, port: int) -> None:
    """One of the processes: two steps, since DDP reports parameters without a gradient in the second."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    inputs = {kind: sample(model_for(kind), rank) for kind in KINDS}  # before there are processes
    distributed.init_process_group("gloo")
    for kind in KINDS:
        for wrapper in WRAPPERS:
            model = wrapped(model_for(kind), wrapper)
            for _ in range(2):
                model.zero_grad()
                model(**inputs[kind], use_cache=False).loss.backward()
            found = gradients(model)
            if wrapper == "fsdp":  # an evaluation gathers the encoder, too
                with torch.no_grad():
                    model.eval()(**inputs[kind], use_cache=False)
            save_file({name: one.contiguous() for name, one in found.items()}, folder / f"{kind} {wrapper} {rank}")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both processes left their gradients."""
    folder = tmp_path_factory.mktemp("without images")
    torch.multiprocessing.spawn(work, (folder, free_port()), 2)
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_gradients_are_those_of_one_process(folder: Path, kind: str, wrapper: str) -> None:
    model = model_for(kind)
    for rank in range(2):
        (model(**sample(model, rank), use_cache=False).loss / 2).backward()
    wanted = gradients(model)
    assert any(name.startswith("model.vision_tower.") for name in wanted) == KINDS[kind]
    for rank in range(2):
        found = load_file(folder / f"{kind} {wrapper} {rank}")
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)
