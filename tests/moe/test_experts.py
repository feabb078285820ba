"""Experts implementations against loops over tokens in float64, for every layout, size and routing."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GptOssConfig, Qwen3MoeConfig
from transformers.integrations.moe import ExpertsInterface
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from tests.kernels.cpu.forms import prefer_forms
from vlparts.moe import expert_costs, experts_dense, experts_sorted, forget_expert_costs, register

OURS = ("vlparts_sorted", "vlparts_merged", "vlparts_auto")
every = pytest.mark.parametrize("implementation", OURS)
layouts = pytest.mark.parametrize("layout", ["plain", "transposed with biases"])


def experts(layout: str, experts: int = 6, width: int = 10, inner: int = 7) -> nn.Module:
    """Experts of odd sizes, with weights of order one in float64."""
    if layout == "plain":
        config = Qwen3MoeConfig(hidden_size=width, moe_intermediate_size=inner, num_experts=experts)
        module: nn.Module = Qwen3MoeExperts(config)
    else:
        config = GptOssConfig(hidden_size=width, intermediate_size=inner, num_local_experts=experts)
        module = GptOssExperts(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=width**-0.5)
    return module.double()


def routing(
    tokens: int, k: int = 3, num_experts: int = 6, unused: tuple[int, ...] = (), width: int = 10
) -> tuple[Tensor, ...]:
    """Random tokens, indices of experts and weights; `unused` experts get no token."""
    scores = torch.rand(tokens, num_experts)
    scores[:, list(unused)] = -1
    hidden = torch.randn(tokens, width, dtype=torch.float64, requires_grad=True)
    return hidden, scores.topk(k).indices, torch.randn(tokens, k, dtype=torch.float64, requires_grad=True)


def oracle(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Loop over tokens and their experts."""
    rows = []
    for token in range(len(hidden)):
        total = torch.zeros_like(hidden[token])
        for place in range(index.shape[1]):
            expert = int(index[token, place])
            if expert == module.num_experts:
                continue
            up, down = module.gate_up_proj[expert], module.down_proj[expert]
            if isinstance(module, GptOssExperts):
                inner = hidden[token] @ up + module.gate_up_proj_bias[expert]
                gate, value = inner[::2].clamp(max=module.limit), inner[1::2].clamp(-module.limit, module.limit)
                result = ((value + 1) * gate * torch.sigmoid(gate * module.alpha)) @ down
                result = result + module.down_proj_bias[expert]
            else:
                gate, value = (up @ hidden[token]).chunk(2)
                result = down @ (gate / (1 + torch.exp(-gate)) * value)
            total = total + weights[token, place] * result
        rows.append(total)
    return torch.stack(rows) if rows else hidden * 1.0


def run(module: Any, implementation: str, *arguments: Tensor) -> Tensor:
    module.config._experts_implementation = implementation
    return module(*arguments)


@pytest.fixture(params=[4, 1000], ids=["small chunks", "one chunk"], autouse=True)
def chunk_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small chunks of pairs, or one chunk."""
    monkeypatch.setattr(experts_sorted, "CHUNK_PAIRS", request.param)
    monkeypatch.setattr(experts_dense, "MAX_ACTIVATIONS", 600)
    forget_expert_costs()


def test_a_second_registration_changes_nothing() -> None:
    before = {name: ExpertsInterface()[name] for name in OURS}
    register()
    assert {name: ExpertsInterface()[name] for name in OURS} == before


@every
@layouts
@pytest.mark.parametrize(("tokens", "unused"), [(0, ()), (1, ()), (5, (0, 5)), (33, ()), (33, (1, 2, 3))])
def test_output_and_gradients(implementation: str, layout: str, tokens: int, unused: tuple[int, ...]) -> None:
    module, arguments = experts(layout), routing(tokens, unused=unused)
    wanted = [arguments[0], arguments[2], *module.parameters()]
    found, expected = run(module, implementation, *arguments), oracle(module, *arguments)
    torch.testing.assert_close(found, expected)
    ours, theirs = (
        torch.autograd.grad(output.pow(2).sum(), wanted, allow_unused=True, materialize_grads=True)
        for output in (found, expected)
    )
    torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(run(module, implementation, *arguments), expected)


@every
@layouts
def test_gradcheck(implementation: str, layout: str) -> None:
    module, (hidden, index, weights) = experts(layout), routing(4)
    names = [name for name, _ in module.named_parameters()]

    def function(hidden: Tensor, weights: Tensor, *parameters: Tensor) -> Tensor:
        changed = dict(zip(names, parameters, strict=True))
        module.config._experts_implementation = implementation
        return torch.func.functional_call(module, changed, (hidden, index, weights))

    assert torch.autograd.gradcheck(function, (hidden, weights, *module.parameters()))


def test_second_derivatives_are_refused_or_right() -> None:
    """`vlparts_sorted` refuses them; `vlparts_merged` and transformers' implementations have them."""
    module, arguments = experts("plain", width=16, inner=8), routing(5, width=16)
    wanted = [arguments[0], arguments[2], *module.parameters()]

    def second(output: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(output.square().sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), wanted)

    expected = second(oracle(module, *arguments))
    for implementation in ("vlparts_merged", "batched_mm", "eager"):
        torch.testing.assert_close(second(run(module, implementation, *arguments)), expected)
    with pytest.raises(RuntimeError, match="'vlparts_sorted' is differentiable once; got `create_graph=True`"):
        second(run(module, "vlparts_sorted", *arguments))


@pytest.mark.parametrize("implementation", ["vlparts_sorted", "vlparts_auto"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(implementation: str, reentrant: bool) -> None:
    module, (hidden, index, weights) = experts("plain"), routing(7)
    wanted = [hidden, weights, *module.parameters()]
    expected = torch.autograd.grad(oracle(module, hidden, index, weights).square().sum(), wanted)
    output = checkpoint(
        lambda *x: run(module, implementation, x[0], index, x[1]), hidden, weights, use_reentrant=reentrant
    )
    output.square().sum().backward()
    torch.testing.assert_close([x.grad for x in wanted], list(expected))


@every
@layouts
def test_experts_of_other_processes_are_skipped(implementation: str, layout: str) -> None:
    module, (hidden, index, weights) = experts(layout), routing(9)
    index = index.masked_fill(index < 2, 6)
    module._is_expert_parallel = True
    weights = weights.detach().masked_fill(index == 6, 0.0).requires_grad_()
    found, expected = run(module, implementation, hidden, index, weights), oracle(module, hidden, index, weights)
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(x.pow(2).sum(), (hidden, weights)) for x in (found, expected))
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1].masked_fill(index == 6, 0), theirs[1])


@every
@pytest.mark.parametrize("frozen", ["gate_up_proj", "down_proj", "all"])
def test_frozen_weights(implementation: str, frozen: str) -> None:
    module, arguments = experts("plain"), routing(7)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(frozen not in (name, "all"))
    wanted = [arguments[0], arguments[2], *(one for one in module.parameters() if one.requires_grad)]
    found, expected = run(module, implementation, *arguments), oracle(module, *arguments)
    torch.testing.assert_close(
        torch.autograd.grad(found.pow(2).sum(), wanted), torch.autograd.grad(expected.pow(2).sum(), wanted)
    )


@every
def test_bfloat16_is_near_float64(implementation: str) -> None:
    module, (hidden, index, weights) = experts("plain", width=10, inner=8), routing(40)
    expected = oracle(module, hidden, index, weights)
    found = run(module.bfloat16(), implementation, hidden.bfloat16(), index, weights.float())
    assert found.dtype == torch.bfloat16
    assert (found.double() - expected).pow(2).mean().sqrt() < 0.03 * expected.pow(2).mean().sqrt()


@every
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float32, 1e-5)], ids=str)
def test_many_experts(implementation: str, dtype: torch.dtype, tolerance: float) -> None:
    """Rows of a multiple of 16 bytes, and experts without tokens between others."""
    module = experts("plain", experts=14, width=16, inner=8)
    hidden, index, weights = routing(60, num_experts=14, unused=(0, 3, 4, 13), width=16)
    expected = oracle(module, hidden, index, weights)
    expected = [expected, *torch.autograd.grad(expected.pow(2).sum(), [hidden, weights, *module.parameters()])]
    module = module.to(dtype)
    inputs = [hidden.detach().to(dtype).requires_grad_(), weights.detach().to(dtype).requires_grad_()]
    output = run(module, implementation, inputs[0], index, inputs[1])
    found = [output, *torch.autograd.grad(output.pow(2).sum(), [*inputs, *module.parameters()])]
    for mine, exact in zip(found, expected, strict=True):
        assert (mine.double() - exact).pow(2).mean().sqrt() < tolerance * exact.pow(2).mean().sqrt()


@pytest.mark.parametrize("form", ["onednn", "weight_first"])
def test_other_products_in_float32(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """The products of `linear_cpu` are used wherever they are faster."""
    prefer_forms(monkeypatch, form)
    module, (hidden, index, weights) = experts("plain", experts=14, width=16, inner=8), routing(20, width=16)
    expected = oracle(module, hidden, index, weights)
    expected = [expected, *torch.autograd.grad(expected.pow(2).sum(), [hidden, *module.parameters()])]
    module, hidden = module.float(), hidden.detach().float().requires_grad_()
    found = run(module, "vlparts_sorted", hidden, index, weights.float())
    found = [found, *torch.autograd.grad(found.pow(2).sum(), [hidden, *module.parameters()])]
    torch.testing.assert_close([one.double() for one in found], expected, atol=1e-4, rtol=1e-4)


@every
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, i, w: (h, i + 5, w), r"`top_k_index` must lie from 0 to 5 .*, got \d+"),
        (lambda h, i, w: (h, i.clamp(min=5) + 1, w), "`top_k_index` must lie from 0 to 5 .*, got 6"),
        (lambda h, i, w: (h, i - 7, w), r"`top_k_index` must lie from 0 to 5 .*, got -\d"),
        (lambda h, i, w: (h, i[:, :2], w), "`hidden_states`, `top_k_index` and `top_k_weights` must have shapes"),
        (lambda h, i, w: (h[:3], i, w), "`top_k_index` must have a row for each of 3 tokens, got 4"),
        (lambda h, i, w: (h[None], i, w), "`hidden_states`, `top_k_index` and `top_k_weights` must have shapes"),
    ],
    ids=["too large", "of another process", "negative", "k", "tokens", "axes"],
)
def test_bad_input(implementation: str, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(experts("plain"), implementation, *change(*routing(4)))


@every
def test_experts_with_a_norm_after_each_are_refused(implementation: str) -> None:
    module = experts("plain")
    module.has_post_expert_norm = True
    with pytest.raises(ValueError, match=f"experts_implementation='{implementation}' has no norm after each expert"):
        run(module, implementation, *routing(4))


def test_infinite_results_of_experts_that_were_not_chosen() -> None:
    """Sorted experts skip them; merged experts compute them, as documented."""
    module, arguments = experts("plain"), routing(5, unused=(2,))
    with torch.no_grad():
        module.down_proj[2] = float("inf")
        assert run(module, "vlparts_sorted", *arguments).isfinite().all()
        assert run(module, "vlparts_merged", *arguments).isnan().any()


def test_the_automatic_choice_is_measured_once_for_each_kind() -> None:
    module = experts("plain")
    with torch.no_grad():
        for tokens in (0, 1, 7, 7, 62, 64, 500):
            run(module, "vlparts_auto", *routing(tokens))
    kinds = expert_costs()
    assert len(kinds) == 5
    for kind, tokens in zip(kinds, (0, 1, 7, 62, 500), strict=True):
        assert kind["tokens"] <= tokens <= 1.25 * kind["tokens"]
        assert kind["chosen"] == min(kind["seconds"], key=kind["seconds"].get)
        assert "vlparts_sorted" in kind["seconds"]
        assert kind["seconds"].keys().isdisjoint(kind["refused"])
        assert kind["trains"] is False
    assert "vlparts_merged" not in kinds[-1]["seconds"]
    run(module, "vlparts_auto", *routing(7)).sum().backward()
    assert [kind["trains"] for kind in expert_costs()] == [False] * 5 + [True]
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_implementations_that_refuse_a_call_are_listed_with_the_reason() -> None:
    """grouped_mm does not support float64 on CPU."""
    run(experts("plain"), "vlparts_auto", *routing(7))
    (kind,) = expert_costs()
    assert set(kind["refused"]) == {"grouped_mm"}
    assert kind["refused"]["grouped_mm"].startswith("RuntimeError: ")


def test_measuring_leaves_no_gradient() -> None:
    module, (hidden, index, weights) = experts("plain"), routing(7)
    run(module, "vlparts_auto", hidden, index, weights)
    assert hidden.grad is None
    assert all(parameter.grad is None for parameter in module.parameters())
