"""Small models with inputs, and one training step of each, for tests and for the table of launches."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.parts.test_vlm import GROUPS, batch
from tests.tiny import navit, order_one, packed_images, text_config, tokenizer, vision_config, windowfree
from vlparts import MoGEConfig, compose, compose_processor
from vlparts.losses.cross_entropy import weighted_cross_entropy
from vlparts.losses.linear_cross_entropy import linear_weighted_cross_entropy
from vlparts.parts.modeling_moge import MoGEBlock
from vlparts.parts.ops_rms_norm import RMSNorm
from vlparts_npu import self_check

# A model and its inputs.
Made = tuple[nn.Module, dict[str, Any]]

# Ascend's error thresholds: twice the unit roundoff of the dtype.
THRESHOLDS = {torch.bfloat16: 2**-7, torch.float16: 2**-10}


def make_rms_norm() -> Made:
    """One RMS normalization."""
    return order_one(RMSNorm(32)), {"hidden_states": torch.randn(12, 32).requires_grad_()}


def make_navit(layers: int = 2) -> Made:
    """NaViT on three packed images."""
    pixels, grid = packed_images([(4, 4), (4, 6), (3, 5)])
    return navit(num_hidden_layers=layers), {"pixel_values": pixels.requires_grad_(), "image_grid_thw": grid}


def make_windowfree(layers: int = 4) -> Made:
    """The window-free encoder on two packed images."""
    pixels, grid = packed_images([(4, 4), (4, 8)])
    return windowfree(num_hidden_layers=layers), {
        "pixel_values": pixels.requires_grad_(),
        "image_grid_thw": grid,
    }


def make_moge_block(experts: int = 8) -> Made:
    """One MoGE block."""
    config = MoGEConfig.from_preset("tiny", num_experts=experts, experts_implementation="npu_grouped")
    block = order_one(MoGEBlock(config))
    return block, {"hidden_states": torch.randn(2, 7, block.gate.hidden_size).requires_grad_()}


def make_vlm() -> Made:
    """NaViT composed with Qwen3, on samples with two images, none and one."""
    return _composed(text_config("qwen3", tokenizer()))


def make_vlm_moge() -> Made:
    """NaViT composed with a MoGE text model."""
    words = tokenizer()
    special = {name: getattr(words, name) for name in ("eos_token_id", "pad_token_id", "bos_token_id")}
    return _composed(MoGEConfig.from_preset("tiny", vocab_size=len(words), **special))


def make_native() -> Made:
    """transformers' Qwen3-MoE on two packed sequences, through the attention and the experts interface."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = Qwen3MoeConfig(**sizes, **heads, vocab_size=40, num_experts=6, num_experts_per_tok=2)
    model = Qwen3MoeForCausalLM(config)
    model.set_attn_implementation("vlparts_packed")
    model.set_experts_implementation("npu_grouped")
    bounds, ids = torch.tensor([0, 5, 12], dtype=torch.int32), torch.randint(0, 40, (1, 12))
    inputs = {"input_ids": ids, "labels": ids, "position_ids": torch.tensor([[*range(5), *range(7)]])}
    inputs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 7, "max_length_k": 7}
    return order_one(model), {**inputs, "use_cache": False}


class Loss(nn.Module):
    """A loss as a module; the labels are its last argument."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, labels: Tensor, **inputs: Tensor) -> Tensor:
        """Compute the loss."""
        return self.function(*inputs.values(), labels)


def make_loss() -> Made:
    """The weighted cross-entropy of two samples with ignored tokens, in 40 classes."""
    return Loss(weighted_cross_entropy), {"logits": (3 * torch.randn(2, 7, 40)).requires_grad_(), "labels": _labels()}


def make_linear_loss() -> Made:
    """The weighted cross-entropy of a linear head."""
    hidden, weight = torch.randn(2, 7, 16).requires_grad_(), torch.randn(40, 16).requires_grad_()
    return Loss(linear_weighted_cross_entropy), {"hidden": hidden, "weight": weight, "labels": _labels()}


def _labels() -> Tensor:
    return torch.randint(0, 40, (2, 7)).masked_fill(torch.arange(14).view(2, 7) % 3 == 0, -100)


def _composed(text: Any) -> Made:
    model = compose(vision=vision_config("navit"), text=text)
    if isinstance(text, MoGEConfig):
        model.set_experts_implementation("npu_grouped")
    inputs = dict(batch(compose_processor(model, tokenizer()), GROUPS))
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return order_one(model), inputs


MODELS: dict[str, Callable[[], Made]] = {
    "RMSNorm": make_rms_norm,
    "MoGE block": make_moge_block,
    "NaViT": make_navit,
    "window-free encoder": make_windowfree,
    "NaViT with Qwen3": make_vlm,
    "NaViT with MoGE": make_vlm_moge,
    "Qwen3-MoE of transformers": make_native,
}


def move(value: Any, device: str) -> Any:
    """Copy a tensor to a device, as a leaf; other values are passed on."""
    return value.detach().to(device).requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def cast(made: Made, dtype: torch.dtype) -> Made:
    """Copy a model and its inputs to another dtype."""
    inputs = {
        name: x.detach().to(dtype).requires_grad_(x.requires_grad) if _is_float(x) else x
        for name, x in made[1].items()
    }
    return copy.deepcopy(made[0]).to(dtype), inputs


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def step(made: Made, device: str, backward: bool = True) -> dict[str, Tensor]:
    """Run a copy of a model on a device, and return its outputs and gradients by name, on the CPU."""
    model = copy.deepcopy(made[0]).to(device).train(backward)
    inputs = {name: move(x, device) for name, x in made[1].items()}
    with torch.set_grad_enabled(backward):
        output = model(**inputs)
    found = {name: x for name, x in _named(output) if x.is_floating_point()}
    if backward:
        (found["loss"] if "loss" in found else sum(x.square().mean() for x in found.values())).backward()
        leaves = {**inputs, **dict(model.named_parameters())}
        found |= {f"gradient of {name}": x.grad for name, x in leaves.items() if getattr(x, "grad", None) is not None}
    return {name: x.detach().cpu() for name, x in found.items()}


def _named(output: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        yield "output", output
    elif isinstance(output, tuple):
        yield from ((f"output {index}", x) for index, x in enumerate(output) if isinstance(x, Tensor))
    else:
        yield from ((name, x) for name, x in output.items() if isinstance(x, Tensor))


def excess_errors(
    found: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor], slack: float
) -> list[str]:
    """Describe the tensors whose error is more than twice the CPU's, plus a share of the tensor's norm.

    Args:
        found: Outputs and gradients on the NPU.
        plain: The same on the CPU in the same dtype.
        exact: The same on the CPU in float64.
        slack: Share of the norm.
    """
    assert found.keys() == plain.keys() == exact.keys()
    errors = []
    for name, theirs in exact.items():
        ours, usual = ((x[name].double() - theirs).norm() for x in (found, plain))
        if not ours <= 2 * usual + slack * theirs.norm():
            errors.append(f"{name}: error {ours:.1e}, on the CPU {usual:.1e}, norm {theirs.norm():.1e}")
    return errors


@contextmanager
def without_kernels() -> Iterator[None]:
    """Run the references instead of the kernels."""
    kept, self_check.DEVICE_TYPE = self_check.DEVICE_TYPE, "nothing"
    try:
        yield
    finally:
        self_check.DEVICE_TYPE = kept
