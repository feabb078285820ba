"""Linear layers of all parts as quantizers see them: exact `torch.nn.Linear`, which may be replaced."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.kernels.cpu.test_linear import Int8Weight
from tests.parts import test_fused_vision, test_vlm_views
from tests.parts.exported import PACKED, deepencoder, fused_inputs, fused_vision
from tests.parts.test_moge import moge
from tests.parts.test_navit_dual_encoder import dual_encoder, images, texts
from tests.parts.test_pangu_embedded import pangu
from tests.parts.test_vlm import GROUPS, batch, composed
from tests.tiny import WINDOWED, navit, packed_images, picture, windowfree
from vlparts.moe import set_experts_implementation
from vlparts.parts.modeling_moge import MoGEExperts

IDS = {"input_ids": torch.arange(12).view(2, 6)}


def packed() -> dict[str, Tensor]:
    pixels, grids = packed_images([(4, 6), (2, 2)])
    return {"pixel_values": pixels, "image_grid_thw": grids}


def part(name: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    return PACKED[name].build(), PACKED[name].inputs(1)


def views() -> tuple[PreTrainedModel, dict[str, Any]]:
    bare, tensors, _ = deepencoder("tiles")
    return bare.model, dict(zip(bare.names, tensors, strict=True))


def vlm(**changes: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    model, processor = composed(**changes)
    return model, dict(batch(processor, GROUPS))


def vlm_of_views(model: PreTrainedModel, processor: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    return model, dict(processor(images=[picture(150, 90)], text="what is <image>", return_tensors="pt"))


MODELS: dict[str, Callable[[], tuple[PreTrainedModel, dict[str, Any]]]] = {
    "navit": lambda: (navit(), packed()),
    "navit without positions": lambda: (navit(position_kind="none", rotary_theta=100.0), packed()),
    "classifier": lambda: part("classifier"),
    "windowfree": lambda: (windowfree(attention_pattern=WINDOWED, gated_mlp=True, pooling="mean"), packed()),
    "windowfree of raw pixels": lambda: part("windowfree of raw pixels"),
    "qwen2_5_vl": lambda: part("qwen2_5_vl"),
    "qwen3_vl": lambda: part("qwen3_vl"),
    "fused vision": lambda: (fused_vision().model, {"pixel_values": fused_inputs(0)[0]}),
    "deepencoder": views,
    "dual encoder": lambda: (dual_encoder(), images() | texts()),
    "pangu": lambda: (pangu("tiny"), IDS),
    "moge": lambda: (moge(), IDS),
    "vlm": vlm,
    "vlm of clip": lambda: vlm(vision="clip", text="llama"),
    "vlm with patch merger": lambda: vlm(projector="patch_merger"),
    "vlm of deepencoder and moge": lambda: vlm_of_views(*test_vlm_views.composed("moge")),
    "vlm of fused vision": lambda: vlm_of_views(*test_fused_vision.composed()),
}


def output(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """The tensor that all linear layers influence."""
    with torch.no_grad():
        outputs = model(**inputs)
    names = ("logits", "logits_per_image", "pooler_output", "last_hidden_state")
    name = next(name for name in names if outputs.get(name) is not None)
    return outputs[name]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).pow(2).mean().sqrt() / expected.std())


@pytest.mark.filterwarnings("ignore:torch.ao.quantization", "ignore:torch.quantize_per")
@pytest.mark.parametrize("name", MODELS)
def test_quantize_dynamic_replaces_every_linear_layer(name: str) -> None:
    model, inputs = MODELS[name]()
    layers = [one for one, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert all(type(model.get_submodule(layer)) is nn.Linear for layer in layers)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    for layer in layers:
        assert type(quantized.get_submodule(layer)) is torch.ao.nn.quantized.dynamic.Linear, layer
    assert 0 < relative_error(output(quantized, inputs), output(model, inputs)) < 0.2


@pytest.mark.parametrize("name", MODELS)
def test_weights_may_be_tensor_subclasses(name: str) -> None:
    """Each weight handles `linear` and raises for other operations, such as a transpose of it."""
    model, inputs = MODELS[name]()
    expected = output(model, inputs)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(Int8Weight(module.weight.detach()), requires_grad=False)
    assert 0 < relative_error(output(model, inputs), expected) < 0.2


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "vlparts_sorted", "vlparts_merged"])
def test_experts_are_no_linear_layers_and_keep_their_weights(implementation: str) -> None:
    model, inputs = vlm_of_views(*test_vlm_views.composed("moge"))
    experts = [module for module in model.modules() if isinstance(module, MoGEExperts)]
    before = [parameter.clone() for module in experts for parameter in module.parameters()]
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(Int8Weight(module.weight.detach()), requires_grad=False)
    assert set_experts_implementation(model, implementation) == len(experts) > 0
    assert output(model, inputs).isfinite().all()
    after = [parameter for module in experts for parameter in module.parameters()]
    assert all(type(new) is nn.Parameter and torch.equal(new, old) for new, old in zip(after, before, strict=True))
