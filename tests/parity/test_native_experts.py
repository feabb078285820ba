"""Our experts implementations on transformers' own models: logits, gradients, generation, and clear refusals."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from tests.tiny import order_one
from vlparts import MoGEConfig, MoGEForCausalLM
from vlparts.moe import set_experts_implementation

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "eos_token_id": None,
}
LATENT = {"q_lora_rank": None, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK = {**LATENT, "moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2}
MODELS: dict[str, PreTrainedConfig] = {
    "qwen3_moe": Qwen3MoeConfig(**SIZES, head_dim=16, moe_intermediate_size=24, num_experts=8, num_experts_per_tok=2),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "deepseek_v2": DeepseekV2Config(**SIZES, **DEEPSEEK, topk_group=1, first_k_dense_replace=1),
    "deepseek_v3": DeepseekV3Config(**SIZES, **DEEPSEEK, topk_group=1, first_k_dense_replace=1),
    "gpt_oss": GptOssConfig(**SIZES, head_dim=16, num_local_experts=4, num_experts_per_tok=2),
}
every_model = pytest.mark.parametrize("name", MODELS)
every_implementation = pytest.mark.parametrize("implementation", ["vlparts_auto", "vlparts_sorted", "vlparts_merged"])


@every_model
@every_implementation
def test_a_native_model_loads_with_it(tmp_path: Path, name: str, implementation: str) -> None:
    torch.manual_seed(0)
    order_one(AutoModelForCausalLM.from_config(MODELS[name])).save_pretrained(tmp_path)
    ids = torch.randint(0, 64, (2, 9))
    results = []
    for kind in ("eager", implementation):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=kind).eval()
        outputs = model(input_ids=ids, labels=ids)
        outputs.loss.backward()
        tokens = model.generate(ids, max_new_tokens=4, do_sample=False)
        gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
        results.append((outputs.logits, gradients, tokens))
        assert len([one for one in gradients if "experts" in one]) >= 2
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(results[1][1], results[0][1], atol=1e-4, rtol=1e-3)
    assert torch.equal(results[1][2], results[0][2])


@every_implementation
def test_remote_code_and_the_decoder_of_deepseek_ocr(tmp_path: Path, implementation: str) -> None:
    """The code in a saved folder takes an implementation of the installed library; in float64 it equals "eager"."""
    small = {"num_key_value_heads": 2, "head_dim": 16, "mlp_only_layers": [0], "num_experts": 8, "eos_token_id": None}
    sizes = {**SIZES, **small, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 48}
    order_one(MoGEForCausalLM(MoGEConfig.from_preset("deepseek_ocr", **sizes))).save_pretrained(tmp_path / "model")
    remote = get_class_from_dynamic_module("modeling_moge.MoGEForCausalLM", tmp_path / "model")
    assert remote.__module__.startswith("transformers_modules.")
    ids, results = torch.randint(0, 64, (2, 9)), []
    for kind in ("eager", implementation):
        model = remote.from_pretrained(tmp_path / "model", dtype=torch.float64, experts_implementation=kind).eval()
        assert model.config._experts_implementation == kind
        outputs = model(input_ids=ids, labels=ids)
        outputs.loss.backward()
        tokens = model.generate(ids, max_new_tokens=4, do_sample=False)
        results.append((outputs.logits, {name: one.grad for name, one in model.named_parameters()}, tokens))
    torch.testing.assert_close(results[1], results[0])


@every_model
def test_switching_reaches_every_layer(name: str) -> None:
    model = AutoModelForCausalLM.from_config(MODELS[name]).eval()
    layers = 1 if name.startswith("deepseek") else 2
    assert set_experts_implementation(model, "vlparts_sorted") == layers
    assert model.get_experts_implementation() == {"": "vlparts_sorted"}
    assert set_experts_implementation(model, "eager") == layers


def test_models_without_experts_are_refused() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    with pytest.raises(ValueError, match="`model` must have an experts module .*, got LlamaForCausalLM without one"):
        set_experts_implementation(model, "vlparts_sorted")


def test_unknown_names_are_refused() -> None:
    model = AutoModelForCausalLM.from_config(MODELS["mixtral"])
    with pytest.raises(ValueError, match="`implementation` must be one of eager, .*vlparts_sorted.*, got 'fast'"):
        set_experts_implementation(model, "fast")
