"""The linear layer against float64, whichever kernel it takes; both kernels are tried where both exist."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from vlparts.parts import linear
from vlparts.parts.linear import Linear


@pytest.fixture(params=["as the processor wants", "oneDNN for all"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "oneDNN for all" and torch.backends.mkldnn.is_available():
        monkeypatch.setattr(linear, "onednn_is_faster", lambda: True)
        monkeypatch.setattr(linear, "LEAST_MULTIPLICATIONS", 1)


def layer(features: int = 24, outputs: int = 40, bias: bool = True) -> Linear:
    torch.manual_seed(0)
    return Linear(features, outputs, bias)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("shape", [(24,), (1, 24), (7, 24), (2, 3, 24), (0, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_float64(shape: tuple[int, ...], bias: bool) -> None:
    module = layer(bias=bias)
    x = torch.randn(shape, requires_grad=True)
    outputs = module(x)
    weights = torch.randn(outputs.shape)
    found = torch.autograd.grad((outputs * weights).sum(), [x, *module.parameters()])
    exact, precise = copy.deepcopy(module).double(), x.detach().double().requires_grad_()
    expected = F.linear(precise, exact.weight, exact.bias)
    torch.testing.assert_close(outputs.double(), expected, atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad((expected * weights).sum(), [precise, *exact.parameters()])
    for mine, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=1e-5, rtol=1e-5)


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 70), st.booleans())
def test_any_size(rows: int, features: int, outputs: int, transposed: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "onednn_is_faster", torch.backends.mkldnn.is_available)
        patch.setattr(linear, "LEAST_MULTIPLICATIONS", 1)
        x = torch.randn(features, rows).t() if transposed else torch.randn(rows, features)
        weight, bias = torch.randn(outputs, features), torch.randn(outputs)
        found = torch.ops.vlparts.linear(x, weight, bias)
    torch.testing.assert_close(
        found.double(), F.linear(x.double(), weight.double(), bias.double()), atol=1e-4, rtol=1e-5
    )


@pytest.mark.usefixtures("kernel")
def test_only_the_gradients_that_are_asked_for() -> None:
    module = layer()
    module.weight.requires_grad_(False)
    x = torch.randn(7, 24)
    module(x).sum().backward()
    assert module.weight.grad is None
    torch.testing.assert_close(module.bias.grad, torch.full((40,), 7.0))
    with torch.inference_mode():
        torch.testing.assert_close(module(x), F.linear(x, module.weight, module.bias))


@pytest.mark.usefixtures("kernel")
def test_second_derivatives() -> None:
    x, weight = torch.randn(5, 24, requires_grad=True), torch.randn(40, 24, requires_grad=True)

    def penalty(product: object) -> tuple[Tensor, ...]:
        gradient = torch.autograd.grad(product(x, weight).pow(3).sum(), x, create_graph=True)[0]
        return torch.autograd.grad(gradient.pow(2).sum(), (x, weight))

    for mine, theirs in zip(penalty(torch.ops.vlparts.linear), penalty(F.linear), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-2, rtol=1e-4)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types_are_left_to_pytorch(dtype: torch.dtype) -> None:
    module = layer().to(dtype)
    x = torch.randn(7, 24, dtype=dtype)
    assert torch.equal(module(x), F.linear(x, module.weight, module.bias))


@pytest.mark.usefixtures("kernel")
def test_autocast() -> None:
    module, x = layer(), torch.randn(7, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x), F.linear(x, module.weight, module.bias))
        assert module(x).dtype == torch.bfloat16


@pytest.mark.usefixtures("kernel")
def test_compiled() -> None:
    module, x = layer(), torch.randn(7, 24)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.usefixtures("kernel")
def test_shapes_that_do_not_fit_are_refused_as_by_pytorch() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer()(torch.randn(7, 23))


def test_switching_onednn_off_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(linear, "LEAST_MULTIPLICATIONS", 1)
    module, x = layer(), torch.randn(7, 24)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not linear.onednn_applies(x, module.weight, module.bias)
    assert linear.onednn_applies(x, module.weight, module.bias) == torch.backends.mkldnn.is_available()


def test_no_change_where_the_maker_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_processor_maker", lambda: "GenuineIntel")
    assert not linear.onednn_is_faster.__wrapped__()


def test_meta_tensors() -> None:
    assert layer().to("meta")(torch.zeros(7, 24, device="meta")).shape == (7, 40)


def test_adapters_take_it() -> None:
    from peft import LoraConfig, get_peft_model

    model = nn.Sequential(layer(), nn.GELU(), layer(40, 8))
    adapted = get_peft_model(model, LoraConfig(target_modules=["0", "2"], init_lora_weights=False))
    x = torch.randn(7, 24)
    before = adapted(x)
    torch.testing.assert_close(adapted.merge_and_unload()(x), before, atol=1e-4, rtol=1e-4)
