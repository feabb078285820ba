"""Routed experts by grouped matmuls, and the memory layout of their weights."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import ExpertsInterface

from tests.moe.test_experts import experts, oracle, routing
from tests.npu import fake_ops
from vlparts.parts.configuration_moge import MoGEConfig
from vlparts.parts.modeling_moge import MoGEForCausalLM
from vlparts.parts.moe_experts import RoutedExperts
from vlparts_npu.experts import NPU_EXPERTS_NAME, grouped_experts_npu, npu_experts_forward, register_experts
from vlparts_npu.experts_layout import arrange_expert_weights
from vlparts_npu.self_check import CALL_LOG, reset_checks


@pytest.fixture(autouse=True)
def _fresh() -> None:
    fake_ops.CALLS.clear()
    reset_checks()


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat the CPU as the device."""
    monkeypatch.setattr("vlparts_npu.self_check.DEVICE_TYPE", "cpu")


def test_outputs_and_gradients_in_float64_equal_the_oracle() -> None:
    """Experts without tokens get zero gradients."""
    module = experts("plain")
    arguments = routing(13, unused=(0, 4))
    inputs = [arguments[0], arguments[2], *module.parameters()]
    results = []
    for run in (grouped_experts_npu, oracle):
        output = run(module, *arguments)
        gradients = torch.autograd.grad(output, inputs, torch.linspace(-1, 1, output.numel()).view_as(output).double())
        results.append([output, *gradients])
    torch.testing.assert_close(*results, atol=1e-11, rtol=1e-11)
    assert not results[0][3][[0, 4]].any()


def test_second_derivatives_are_refused() -> None:
    output = grouped_experts_npu(experts("plain"), *(arguments := routing(5)))
    with pytest.raises(RuntimeError, match="experts_implementation='npu_grouped' is differentiable once; got `create"):
        torch.autograd.grad(output.square().sum(), arguments[0], create_graph=True)


def test_experts_of_other_processes_add_nothing() -> None:
    module = experts("plain")
    module._is_expert_parallel = True
    hidden, index, weights = routing(9)
    index[2, 1] = index[5] = 6
    found, expected = (run(module, hidden, index, weights) for run in (grouped_experts_npu, oracle))
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-11)
    assert not found[5].any()
    (grad,) = torch.autograd.grad(found.square().sum(), weights)
    assert not grad[index == 6].any()


@pytest.mark.parametrize("activation", ["silu", "swish"])
def test_the_default_gate_is_one_operation(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(
        "vlparts_npu.experts.swiglu", lambda x: called.append(1) or nn.functional.silu(x[:, :7]) * x[:, 7:]
    )
    module = experts("plain")
    module.act_fn = nn.SiLU() if activation == "swish" else module.act_fn
    grouped_experts_npu(module, *routing(5))
    assert called
    module.act_fn = nn.GELU()
    called.clear()
    grouped_experts_npu(module, *routing(5))
    assert not called


@pytest.mark.usefixtures("on_cpu")
def test_a_call_runs_four_operations_and_the_first_copies_the_weights(caplog: pytest.LogCaptureFixture) -> None:
    module = experts("plain").float()
    hidden, index, weights = (x.float() if x.is_floating_point() else x for x in routing(9))
    before = [parameter.detach().clone() for parameter in module.parameters()]
    with caplog.at_level(logging.WARNING, "vlparts_npu"):
        for _ in range(2):
            fake_ops.CALLS.clear()
            output = npu_experts_forward(module, hidden, index, weights)
    assert [record.message for record in caplog.records] == [
        "The weights of Qwen3MoeExperts were copied to the memory layout of `npu_grouped`, 0.00 GB. To copy them in "
        "advance, call `vlparts_npu.experts_layout.arrange_expert_weights(model)` after loading."
    ]
    assert fake_ops.CALLS == [
        "npu_moe_token_permute",
        "npu_grouped_matmul",
        "npu_grouped_matmul",
        "npu_moe_token_unpermute",
    ]
    assert CALL_LOG[-1] == (NPU_EXPERTS_NAME, "")
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    torch.testing.assert_close(output, oracle(module, hidden, index, weights), atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("on_cpu")
def test_experts_with_biases_run_the_reference() -> None:
    module, (hidden, index, weights) = experts("transposed with biases"), routing(5)
    output = npu_experts_forward(module, hidden, index, weights)
    torch.testing.assert_close(output, oracle(module, hidden, index, weights))
    assert CALL_LOG[-1] == (NPU_EXPERTS_NAME, "the experts have biases")


@pytest.mark.usefixtures("on_cpu")
def test_weights_that_are_views_stay_and_run_the_reference() -> None:
    module, (hidden, index, weights) = experts("plain"), routing(5)
    module.down_proj = nn.Parameter(torch.cat((module.down_proj.data, module.down_proj.data))[:6])
    output = npu_experts_forward(module, hidden, index, weights)
    torch.testing.assert_close(output, oracle(module, hidden, index, weights))
    assert "call `arrange_expert_weights`" in CALL_LOG[-1].reason
    with pytest.raises(ValueError, match=r"`down_proj` of Qwen3MoeExperts is sharded or a view of a larger tensor"):
        arrange_expert_weights(module)


def test_on_other_devices_nothing_changes() -> None:
    module, arguments = experts("plain"), routing(5)
    torch.testing.assert_close(npu_experts_forward(module, *arguments), oracle(module, *arguments))
    assert module.down_proj.is_contiguous()
    assert CALL_LOG[-1].reason == "the tensors are on cpu"
    with pytest.raises(ValueError, match=r"`top_k_index` must have a row for each of 5 tokens, got 4"):
        npu_experts_forward(module, arguments[0], arguments[1][:4], arguments[2][:4])


def small_moge() -> MoGEForCausalLM:
    config = MoGEConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=8,
        num_experts_per_tok=2,
        num_expert_groups=2,
    )
    return MoGEForCausalLM(config)


def test_arranging_changes_only_strides(tmp_path: Path) -> None:
    """Values, shapes, saved files and outputs stay; only the first call copies."""
    model = small_moge()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.randint(0, 40, (2, 7))
    expected = model(ids).logits
    assert arrange_expert_weights(model) == 2 * 8 * 3 * 8 * 16 * 4
    assert arrange_expert_weights(model) == 0
    module = model.model.layers[0].mlp.experts
    assert module.down_proj.transpose(1, 2).is_contiguous()
    assert not module.down_proj.is_contiguous()
    torch.testing.assert_close(model(ids).logits, expected)
    model.save_pretrained(tmp_path)
    loaded = MoGEForCausalLM.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == before.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in before.items())


def test_gradients_have_the_strides_of_arranged_weights() -> None:
    """Otherwise the gradients would be copied when they are accumulated."""
    config: Any = SimpleNamespace(num_experts=6, hidden_size=10, moe_intermediate_size=7, hidden_act="silu")
    module = RoutedExperts(config).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    arrange_expert_weights(module)
    grouped_experts_npu(module, *routing(5)).sum().backward()
    for parameter in module.parameters():
        assert parameter.grad is not None
        assert parameter.grad.stride() == parameter.stride()


@pytest.mark.usefixtures("on_cpu")
def test_models_select_it_by_name() -> None:
    register_experts()
    register_experts()
    assert ExpertsInterface()[NPU_EXPERTS_NAME] is npu_experts_forward
    sizes: dict[str, Any] = dict(vocab_size=40, hidden_size=16, intermediate_size=24, moe_intermediate_size=8)
    sizes |= dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4)
    native = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, num_experts_per_tok=2))
    for model in (native, small_moge()):
        ids = torch.randint(0, 40, (2, 7))
        results: list[Tensor] = []
        for name in ("eager", NPU_EXPERTS_NAME):
            model.set_experts_implementation(name)
            model.zero_grad()
            model(ids, labels=ids).loss.backward()
            results.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)
        assert CALL_LOG[-1] == (NPU_EXPERTS_NAME, "")
        CALL_LOG.clear()
