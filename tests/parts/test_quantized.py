"""Linear layers of all parts as quantizers see them: exact `torch.nn.Linear`, which may be replaced."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.kernels.cpu.test_linear import Int8Weight
from tests.parts.test_moge import moge
from tests.parts.test_navit_dual_encoder import dual_encoder, images, texts
from tests.parts.test_pangu_embedded import pangu
from tests.parts.test_vlm import GROUPS, batch, composed
from tests.tiny import WINDOWED, navit, navit_config, order_one, packed_images, windowfree
from vlparts import NaViTForImageClassification

IDS = {"input_ids": torch.arange(12).view(2, 6)}


def packed() -> dict[str, Tensor]:
    pixels, grids = packed_images([(4, 6), (2, 2)])
    return {"pixel_values": pixels, "image_grid_thw": grids}


def vlm(**changes: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    model, processor = composed(**changes)
    return model, dict(batch(processor, GROUPS))


MODELS: dict[str, Callable[[], tuple[PreTrainedModel, dict[str, Any]]]] = {
    "navit": lambda: (navit(), packed()),
    "navit without positions": lambda: (navit(position_kind="none", rotary_theta=100.0), packed()),
    "classifier": lambda: (order_one(NaViTForImageClassification(navit_config())).eval(), packed()),
    "windowfree": lambda: (windowfree(**WINDOWED, gated_mlp=True, spatial_merge_size=2, pooling="mean"), packed()),
    "dual encoder": lambda: (dual_encoder(), images() | texts()),
    "pangu": lambda: (pangu("tiny"), IDS),
    "moge": lambda: (moge(), IDS),
    "vlm": vlm,
    "vlm of clip": lambda: vlm(vision="clip", text="llama"),
    "vlm with patch merger": lambda: vlm(projector="patch_merger"),
}


def output(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """The tensor that all linear layers influence."""
    with torch.no_grad():
        outputs = model(**inputs)
    name = next(name for name in ("logits", "logits_per_image", "pooler_output") if outputs.get(name) is not None)
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
    model, inputs = MODELS[name]()
    expected = output(model, inputs)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(Int8Weight(module.weight.detach()), requires_grad=False)
    assert 0 < relative_error(output(model, inputs), expected) < 0.2
