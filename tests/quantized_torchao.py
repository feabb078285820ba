"""Whole models with torchao's int8 weights; run by the nox session `torchao`, which installs it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from torchao.quantization.quantize_.workflows.int8.int8_tensor import Int8Tensor
from transformers import AutoModelForImageTextToText, TorchAoConfig

from tests.parts import test_vlm, test_vlm_views
from tests.parts.test_quantized import MODELS, output, relative_error, vlm_of_views
from vlparts.parts.modeling_moge import MoGEExperts

CONFIGS = {"weights": Int8WeightOnlyConfig, "weights and activations": Int8DynamicActivationInt8WeightConfig}


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
def test_every_linear_layer_is_quantized(name: str, kind: str) -> None:
    model, inputs = MODELS[name]()
    quantized = copy.deepcopy(model)
    quantize_(quantized, CONFIGS[kind]())
    assert all(type(layer.weight) is Int8Tensor for layer in linear_layers(quantized).values())
    error = relative_error(output(quantized, inputs), output(model, inputs))
    print(f"relative error {error:.4f}")
    assert 0 < error < 0.1


def folder_of(kind: str, folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    if kind == "moge":
        model, inputs = vlm_of_views(*test_vlm_views.composed("moge"))
    else:
        model, processor = test_vlm.composed()
        inputs = dict(test_vlm.batch(processor, test_vlm.GROUPS))
    model.save_pretrained(folder)
    return model, inputs


@pytest.mark.parametrize("kind", ["navit", "moge"])
def test_a_folder_is_quantized_while_it_is_loaded_and_saved_again(kind: str, tmp_path: Path) -> None:
    model, inputs = folder_of(kind, tmp_path / "model")
    config = TorchAoConfig(Int8WeightOnlyConfig())
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", quantization_config=config).eval()
    kinds = {name: type(layer.weight) for name, layer in linear_layers(loaded).items()}
    assert {name for name, weight in kinds.items() if weight is not Int8Tensor} <= {"lm_head"}  # left by transformers
    experts = [module for module in loaded.modules() if isinstance(module, MoGEExperts)]
    assert len(experts) == (0 if kind == "navit" else loaded.config.text_config.num_hidden_layers)
    assert all(type(parameter) is nn.Parameter for module in experts for parameter in module.parameters())
    assert 0 < relative_error(output(loaded, inputs), output(model, inputs)) < 0.1
    answer = loaded.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 4
    loaded.save_pretrained(tmp_path / "quantized")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "quantized").eval()
    assert {name: type(layer.weight) for name, layer in linear_layers(again).items()} == kinds
    assert torch.equal(output(again, inputs), output(loaded, inputs))


def test_an_adapter_trains_beside_quantized_weights() -> None:
    from peft import LoraConfig, get_peft_model

    model, inputs = MODELS["vlm"]()
    quantize_(model, Int8WeightOnlyConfig(), lambda module, name: isinstance(module, nn.Linear) and name != "lm_head")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "qkv"], init_lora_weights=False))
    adapted(**inputs).logits.square().mean().backward()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in trained)
