"""The linear layer against float64, with either kernel; oneDNN is tested on every processor that has it."""

import copy
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.cpu.forms import prefer_forms
from vlparts.kernels.cpu import linear as linear_cpu
from vlparts.parts import ops_linear as linear
from vlparts.parts.ops_linear import apply_linear

has_onednn = torch.backends.mkldnn.is_available()


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Use oneDNN for all supported inputs; returns the shapes of its products."""
    shapes = []

    def noted(x: Tensor, weight: Tensor, bias: Tensor | None = None, multiply: Any = linear_cpu.product) -> Tensor:
        assert weight.is_contiguous() or weight.t().is_contiguous()
        shapes.append((*x.shape[:-1], *weight.shape))
        return multiply(x, weight, bias)

    prefer_forms(monkeypatch, "onednn")
    monkeypatch.setattr(linear_cpu, "product", noted)
    monkeypatch.setitem(linear_cpu.FORMS, "onednn", noted)
    return shapes


@pytest.fixture(params=["pytorch", "oneDNN", "weight_first"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "oneDNN":
        request.getfixturevalue("onednn")
    else:
        prefer_forms(monkeypatch, request.param)


class Layer(nn.Module):
    """A part of one linear layer."""

    def __init__(self, *sizes: int, bias: bool = True) -> None:
        super().__init__()
        self.inner = nn.Linear(*sizes, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return apply_linear(self.inner, x)


def layer(features: int = 24, outputs: int = 40, bias: bool = True) -> Layer:
    torch.manual_seed(0)
    return Layer(features, outputs, bias=bias)


def gradients(output: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 2, output.numel(), dtype=torch.float64).view(output.shape)
    return torch.autograd.grad((output.double() * weights).sum(), inputs)


@pytest.mark.usefixtures("kernel", "poisoned_empty")
@pytest.mark.parametrize("shape", [(24,), (1, 24), (7, 24), (150, 24), (2, 70, 24), (0, 24), (2, 0, 24)])
@pytest.mark.parametrize("outputs", [9, 24, 40])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_float64(shape: tuple[int, ...], outputs: int, bias: bool) -> None:
    module = layer(outputs=outputs, bias=bias)
    x = torch.randn(shape, requires_grad=True)
    found = module(x)
    exact, precise = copy.deepcopy(module).double(), x.detach().double().requires_grad_()
    expected = F.linear(precise, exact.inner.weight, exact.inner.bias)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    mine = gradients(found, [x, *module.parameters()])
    theirs = gradients(expected, [precise, *exact.parameters()])
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, atol=1e-5, rtol=1e-5)


def test_all_products_of_a_step_are_onednns(onednn: list[tuple[int, ...]]) -> None:
    module, x = layer(), torch.randn(1100, 24, requires_grad=True)
    module(x).sum().backward()
    assert sum(shape == (1100, 40, 24) for shape in onednn) == has_onednn
    assert sum(shape == (1100, 24, 40) for shape in onednn) == has_onednn
    # The weight's gradient: 1,024 rows, then the 64 that are left of whole steps; the last twelve are MKL's.
    assert onednn[2:] == [(24, 40, 1024), (24, 40, 64)][: 2 * has_onednn]
    expected = x.detach().double().sum(0).expand(40, 24)
    torch.testing.assert_close(module.inner.weight.grad.double(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    "wanted", ["x", "weight", "bias", "x bias", "x weight", "weight bias", ""], ids=lambda names: names or "none"
)
def test_gradients_are_made_for_what_asks_for_them(wanted: str) -> None:
    x, weight, bias = torch.randn(70, 24), torch.randn(40, 24), torch.randn(40)
    tensors = {"x": x, "weight": weight, "bias": bias}
    for name in wanted.split():
        tensors[name].requires_grad_()
    output = torch.ops.vlparts.linear(x, weight, bias)
    assert output.requires_grad == bool(wanted)
    if wanted:
        inputs = [tensors[name] for name in wanted.split()]
        expected = gradients(F.linear(x, weight, bias), inputs)
        torch.testing.assert_close(gradients(output, inputs), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("onednn")
def test_a_frozen_weight_does_not_keep_the_input() -> None:
    kept: list[Tensor] = []
    module = layer().requires_grad_(False)
    x = torch.randn(70, 24, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda x: x):
        module(x)
    assert all(tensor.shape == module.inner.weight.shape for tensor in kept)


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize(
    "change",
    [
        lambda x, w, b: (x.t().contiguous().t(), w, b),
        lambda x, w, b: (x[::2], w, b),
        lambda x, w, b: (x, w.t().contiguous().t(), b),
        lambda x, w, b: (x, w[::2], b[::2]),
        lambda x, w, b: (x, w[:, :24], b),
        lambda x, w, b: (x[:, :12], w[:, :12], b),
        lambda x, w, b: (x[:1].expand(70, 24), w[:1].expand(40, 24), b[:1].expand(40)),
    ],
    ids=["x turned", "x in steps", "weight turned", "weight in steps", "plain", "cut", "expanded"],
)
def test_any_strides(change: Callable[..., tuple[Tensor, ...]]) -> None:
    """The fixture checks that oneDNN gets only weights with supported strides."""
    x, weight, bias = change(torch.randn(70, 24), torch.randn(40, 24), torch.randn(40))
    expected = F.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(torch.ops.vlparts.linear(x, weight, bias).double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("kernel")
def test_without_gradients() -> None:
    module, x = layer(), torch.randn(70, 24)
    expected = F.linear(x, module.inner.weight, module.inner.bias).detach()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            output = module(x)
            torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
            assert not output.requires_grad


@pytest.mark.usefixtures("kernel")
def test_second_derivatives() -> None:
    x, weight = torch.randn(9, 24, requires_grad=True), torch.randn(40, 24, requires_grad=True)

    def penalty(product: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(product(x, weight).pow(3).sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(sum(gradient.pow(2).sum() for gradient in first), (x, weight))

    torch.testing.assert_close(penalty(torch.ops.vlparts.linear), penalty(F.linear), atol=1e-2, rtol=1e-4)


@pytest.mark.usefixtures("kernel")
def test_function_transforms_and_tangents() -> None:
    x, weight, examples = torch.randn(9, 24), torch.randn(40, 24), torch.randn(3, 9, 24)

    def results(product: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        def loss(weight: Tensor, x: Tensor) -> Tensor:
            return product(x, weight).square().sum()

        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.clone(), torch.ones_like(x))
            tangent = forward_ad.unpack_dual(product(dual, weight)).tangent
        return (
            tangent,
            torch.func.grad(loss)(weight, x),
            torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, examples),
            torch.func.jvp(lambda x: product(x, weight), (x,), (x,))[1],
        )

    torch.testing.assert_close(results(torch.ops.vlparts.linear), results(F.linear), atol=1e-3, rtol=1e-4)


def test_counted_operations_are_pytorchs(onednn: list[tuple[int, ...]]) -> None:
    module, x = layer(), torch.randn(70, 24)
    with FlopCounterMode(display=False) as counter:
        module(x)
    assert counter.get_total_flops() == 2 * 70 * 24 * 40
    assert onednn == []


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_onednn_is_for_float32_alone(dtype: torch.dtype) -> None:
    module = layer().to(dtype)
    x = torch.randn(70, 24, dtype=dtype)
    assert torch.equal(module(x), F.linear(x, module.inner.weight, module.inner.bias))


@pytest.mark.parametrize("form", ["float32", "weight_first", "pytorch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 24), (16, 24), (33, 24), (2, 35, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_16_bits_are_rounded_once(
    monkeypatch: pytest.MonkeyPatch, form: str, dtype: torch.dtype, shape: tuple[int, ...], bias: bool
) -> None:
    prefer_forms(monkeypatch, form)
    module, x = layer(bias=bias).to(dtype), torch.randn(shape).to(dtype).requires_grad_()
    exact, precise = copy.deepcopy(module).double(), x.detach().double().requires_grad_()
    found, expected = module(x), exact(precise)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1.01 * torch.finfo(dtype).eps / 2)
    mine = gradients(found, [x, *module.parameters()])
    theirs = gradients(expected, [precise, *exact.parameters()])
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, atol=0.02 * float(other.abs().max()), rtol=0)
    with torch.no_grad():
        assert torch.equal(module(x), found)


@pytest.mark.parametrize("out", [True, False])
def test_weight_gradients_in_bfloat16(monkeypatch: pytest.MonkeyPatch, out: bool) -> None:
    prefer_forms(monkeypatch, "float32")
    x, grad = torch.randn(70, 24).bfloat16(), torch.randn(70, 40).bfloat16()
    target = torch.empty(40, 24, dtype=torch.bfloat16) if out else None
    with torch.no_grad():
        found = linear_cpu.weight_gradient(x, grad, target)
    assert not out or found is target
    torch.testing.assert_close(found.double(), grad.double().t() @ x.double(), atol=1e-5, rtol=2**-8)


@pytest.mark.parametrize("form", ["weight_first", "onednn"])
@pytest.mark.parametrize("shape", [(1, 24), (2, 24), (32, 24), (33, 24), (2, 3, 24), (1, 1, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_few_rows_in_float32(monkeypatch: pytest.MonkeyPatch, form: str, shape: tuple[int, ...], bias: bool) -> None:
    prefer_forms(monkeypatch, form)
    module, x = layer(bias=bias), torch.randn(shape, requires_grad=True)
    exact, precise = copy.deepcopy(module).double(), x.detach().double().requires_grad_()
    found, expected = module(x), exact(precise)
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    mine = gradients(found, [x, *module.parameters()])
    theirs = gradients(expected, [precise, *exact.parameters()])
    torch.testing.assert_close([one.double() for one in mine], list(theirs), atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert torch.equal(module(x), found)
        assert module(x).is_contiguous()


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("rows", [1, 70])
def test_written_to_or_added(rows: int, add: bool) -> None:
    x, weight, start = torch.randn(rows, 24), torch.randn(40, 24), torch.randn(rows, 40)
    bias = None if add else torch.randn(40)
    out = start.clone()
    torch.ops.vlparts.linear_out(out, x, weight, bias, add)
    expected = F.linear(x, weight, bias) + add * start
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("kernel")
def test_autocast() -> None:
    module, x = layer(), torch.randn(70, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output, expected = module(x), F.linear(x, module.inner.weight, module.inner.bias)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected)
    inputs = [x, *module.parameters()]
    for mine, theirs in zip(gradients(output, inputs), gradients(expected, inputs), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.usefixtures("kernel")
def test_compiled_and_exported_programs_hold_pytorchs_layer() -> None:
    module, x = layer(), torch.randn(70, 24)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))
    program = torch.export.export(module, (x,))
    assert [str(node.target) for node in program.graph.nodes if node.op == "call_function"] == ["aten.linear.default"]
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    module, x = layer(), torch.randn(70, 24, requires_grad=True)
    inputs = [x, *module.parameters()]
    checkpoint(lambda x: module(x).sin(), x, use_reentrant=reentrant).square().sum().backward()
    expected = torch.autograd.grad(module(x).sin().square().sum(), inputs)
    torch.testing.assert_close([y.grad for y in inputs], list(expected))


@pytest.mark.usefixtures("kernel")
def test_shapes_that_do_not_fit_are_refused_as_by_pytorch() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer()(torch.randn(70, 23))
    with pytest.raises(RuntimeError, match=r"expanded size|size of tensor|must match"):
        torch.ops.vlparts.linear(torch.randn(70, 24), torch.randn(40, 24), torch.randn(39))
    with pytest.raises(RuntimeError, match="dtype"):
        layer()(torch.randn(70, 24, dtype=torch.float64))


@pytest.mark.usefixtures("onednn")
def test_pytorchs_switches_are_respected() -> None:
    def uses_onednn() -> bool:
        return linear_cpu.form_of(torch.float32, 70, 24, 40) == "onednn"

    assert uses_onednn() == has_onednn
    with torch.backends.mkldnn.flags(enabled=False):
        assert not uses_onednn()
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    try:
        settings.fp32_precision = "bf16"
        assert not uses_onednn()
    finally:
        settings.fp32_precision = before
    assert uses_onednn() == has_onednn


def test_only_where_it_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(linear_cpu, "fastest_form", lambda name, forms, make_trials: asked.append((name, forms)))
    half, single = torch.bfloat16, torch.float32
    linear_cpu.form_of(single, 1024, 64, 64)
    linear_cpu.form_of(half, 3, 1024, 512)
    linear_cpu.form_of(single, 32, 1024, 512, transposed=True)
    onednn = ("onednn",) * has_onednn
    assert asked == [
        ("float32 layer, 512 rows", ("pytorch", *onednn)),
        ("bfloat16 layer, 4 rows", ("pytorch", "float32", "weight_first")),
        ("float32 layer, 32 rows, transposed", ("pytorch", *onednn)),
    ]
    for small in [(0, 2048, 2048), (64, 64, 64), (4096, 4096, 7), (1, 1024, 511)]:
        assert linear_cpu.form_of(single, *small) == "pytorch"
    assert linear_cpu.form_of(torch.float64, 1024, 1024, 1024) == "pytorch"
    assert len(asked) == 3


def test_meta_tensors() -> None:
    assert layer().to("meta")(torch.zeros(7, 24, device="meta")).shape == (7, 40)


@pytest.mark.usefixtures("kernel")
def test_hooks_and_changed_forward_passes_of_the_layer_run() -> None:
    module, x, seen = layer(), torch.randn(70, 24), []
    expected = F.linear(x, module.inner.weight, module.inner.bias)
    handle = module.inner.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    torch.testing.assert_close(module(x), expected)
    assert type(seen[0][0]) is Tensor
    torch.testing.assert_close(seen[0][1], expected)
    handle.remove()
    module.inner.forward = lambda x: x + 1  # as accelerate does
    assert torch.equal(module(x), x + 1)


class Int8Weight(Tensor):
    """A weight of eight bits, which handles `linear` like those of torchao and has no other operations."""

    @staticmethod
    def __new__(cls: type, weight: Tensor) -> "Int8Weight":
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)

    def __init__(self, weight: Tensor) -> None:
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.codes = (weight / self.scale).round().to(torch.int8)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, bias = args
            return F.linear(x, weight.codes * weight.scale, bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(func)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("grad", [True, False])
def test_tensor_subclasses_compute_their_own_product(grad: bool) -> None:
    module, x = layer(), torch.randn(70, 24)
    expected = module(x)
    weight = Int8Weight(module.inner.weight.detach())
    module.inner.weight = nn.Parameter(weight, requires_grad=False)
    with torch.set_grad_enabled(grad):
        output = module(x)
    assert torch.equal(output, F.linear(x, weight.codes * weight.scale, module.inner.bias))
    torch.testing.assert_close(output, expected, atol=0.05, rtol=0)


@pytest.mark.usefixtures("kernel")
def test_adapters_take_it() -> None:
    from peft import LoraConfig, get_peft_model

    model = nn.Sequential(layer(), nn.GELU(), layer(40, 8))
    base = [parameter.clone() for parameter in model.parameters()]
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    x = torch.randn(70, 24)
    adapted(x).square().sum().backward()
    trained = {name: parameter.grad for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(trained) == 4
    assert all(gradient is not None and gradient.count_nonzero() > 0 for gradient in trained.values())
    before = adapted(x)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(x), before, atol=1e-4, rtol=1e-4)
    assert not torch.equal(next(merged.parameters()), base[0])


@pytest.mark.filterwarnings("error")
def test_a_second_copy_of_the_file_works_beside_the_first() -> None:
    spec = importlib.util.spec_from_file_location("vlparts.parts.linear_copy", linear.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.apply_linear is not apply_linear
    assert "vlparts.parts.linear_copy" not in sys.modules
    x, part = torch.randn(70, 24), layer()
    assert torch.equal(part(x), module.apply_linear(part.inner, x))


def test_the_kernels_are_registered() -> None:
    for key in ("CPU", "AutogradCPU", "AutocastCPU", "CompositeImplicitAutograd"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key("vlparts::linear", key), key
