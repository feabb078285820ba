"""FSDP2 over two processes: generation, and the balance loss over the tokens of all processes."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from tests.parts.test_moge import config_of
from tests.tiny import order_one, picture, text_config, tokenizer, vision_config
from tests.training.test_weighted_loss_distributed import free_port
from tests.training.weighted_making import llama
from vlparts import MoGEForCausalLM, compose, compose_processor

pytestmark = pytest.mark.slow  # two processes import everything

FORMS = ("batch", "global")


def generating(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model ready to generate, and its inputs."""
    if name == "native":
        return llama().float().eval(), {"input_ids": torch.arange(2, 8)[None]}
    words = tokenizer()
    model = order_one(compose(vision=vision_config("navit"), text=text_config("qwen3", words))).eval()
    processor = compose_processor(model, words)
    prompt = f"{processor.image_token}Where is the cat?"
    return model, dict(processor(images=[picture(12, 8)], text=prompt, return_tensors="pt"))


def generated(model: Any, inputs: dict[str, Any]) -> Tensor:
    return model.generate(**inputs, max_new_tokens=4, do_sample=False)


def experts(form: str = "batch") -> MoGEForCausalLM:
    """A model whose balance loss is a large part of its loss."""
    model = order_one(MoGEForCausalLM(config_of(router_aux_loss_coef=3.0, router_aux_loss_form=form))).train()
    model.set_experts_implementation("eager")
    return model


def token_ids() -> Tensor:
    return torch.randint(3, 40, (4, 9), generator=torch.Generator().manual_seed(0))


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    given = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    return {name: one.full_tensor() if hasattr(one, "full_tensor") else one for name, one in given.items()}


def shard(model: nn.Module) -> nn.Module:
    """Shard the layers and the rest, as accelerate does."""
    for layer in [one for one in model.modules() if type(one).__name__.endswith(("DecoderLayer", "NaViTLayer"))]:
        fully_shard(layer)
    return fully_shard(model)


def work(rank: int, folder: Path, port: int) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo")
    for name in ("native", "composed"):
        model, inputs = generating(name)
        shard(model)
        register_fsdp_forward_method(model, "generate")
        save_file({"ids": generated(model, inputs).contiguous()}, folder / f"{name} {rank}.safetensors")
    for form in FORMS:
        found = gradients(shard(experts(form)), token_ids()[2 * rank : 2 * rank + 2])
        save_file({name: one.contiguous() for name, one in found.items()}, folder / f"{form} {rank}.safetensors")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both processes left their results."""
    folder = tmp_path_factory.mktemp("sharded")
    torch.multiprocessing.spawn(work, (folder, free_port()), 2)
    return folder


@pytest.mark.parametrize("name", ["native", "composed"])
def test_a_sharded_model_generates_what_a_whole_one_does(folder: Path, name: str) -> None:
    wanted = generated(*generating(name))
    for rank in range(2):
        assert load_file(folder / f"{name} {rank}.safetensors")["ids"].equal(wanted)


def test_the_balance_loss_of_all_processes_is_that_of_one_process(folder: Path) -> None:
    wanted = gradients(experts(), token_ids())
    gates = [name for name in wanted if name.endswith("gate.weight")]
    assert len(gates) == 2
    for rank in range(2):
        own, joint = (load_file(folder / f"{form} {rank}.safetensors") for form in FORMS)
        for name, gradient in wanted.items():
            torch.testing.assert_close(joint[name], gradient, atol=1e-5, rtol=1e-5)
        # Each process with its own tokens: another loss.
        for name in gates:
            assert (own[name] - wanted[name]).norm() > 0.02 * wanted[name].norm()
