"""Each kernel compared with its reference, with the operations of torch_npu computed on the CPU."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.npu import fake_ops
from vlparts.parts.ops_rms_norm import rms_norm_reference
from vlparts.parts.ops_rotary import axial_rotary, rotary_pair_reference, rotary_reference
from vlparts_npu import activations, attention, experts, rms_norm, rotary
from vlparts_npu.self_check import DISPATCH_KEYS, Kernel, check_kernel, with_fallback

KERNELS = [
    attention.KERNEL,
    rms_norm.KERNEL,
    activations.GELU,
    activations.SWIGLU,
    rotary.KERNEL,
    rotary.PAIR,
    experts.KERNEL,
]


def changed(output: Tensor | tuple[Tensor, ...], change: Callable[[Tensor], Tensor]) -> Tensor | tuple[Tensor, ...]:
    """Apply a function to a kernel's output, or to each of its outputs."""
    return change(output) if isinstance(output, Tensor) else tuple(change(one) for one in output)


@pytest.fixture(autouse=True)
def _empty_log() -> None:
    fake_ops.CALLS.clear()


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_it_passes_its_own_check(kernel: Kernel) -> None:
    assert check_kernel(kernel, "cpu") == ""


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_its_own_check_finds_wrong_outputs_and_wrong_gradients(kernel: Kernel) -> None:
    def wrong(*arguments: Any) -> Any:
        return changed(kernel.run(*arguments), lambda output: output * 1.1)

    def with_gradient_doubled(*arguments: Any) -> Any:
        return changed(kernel.run(*arguments), lambda output: 2 * output - output.detach())

    results = 2 if kernel is rotary.PAIR else 1
    assert "tensor 0: relative error" in check_kernel(replace(kernel, run=wrong), "cpu")
    assert f"tensor {results}: relative error" in check_kernel(replace(kernel, run=with_gradient_doubled), "cpu")


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_its_inputs_are_reproducible_and_do_not_change_the_random_state(kernel: Kernel) -> None:
    state = torch.get_rng_state()
    cases = zip(kernel.make_inputs(), kernel.make_inputs(), strict=True)
    pairs = itertools.chain.from_iterable(zip(*case, strict=True) for case in cases)
    assert all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_it_runs_without_gradients(kernel: Kernel) -> None:
    for arguments in kernel.make_inputs():
        expected = kernel.run(*arguments)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                output = kernel.run(*arguments)
            outputs = output if isinstance(output, tuple) else (output,)
            assert not any(one.requires_grad for one in outputs)
            torch.testing.assert_close(output, changed(expected, Tensor.detach), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("register", "kernels"),
    [
        (attention.register_attention, [attention.KERNEL]),
        (rms_norm.register_rms_norm, [rms_norm.KERNEL]),
        (activations.register_activations, [activations.GELU, activations.SWIGLU]),
        (rotary.register_rotary, [rotary.KERNEL, rotary.PAIR]),
    ],
)
def test_it_is_registered_once_at_both_keys(
    register: Callable[[], None], kernels: list[Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    register()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert all(has_kernel(kernel.name, key) for kernel in kernels for key in DISPATCH_KEYS)
    again: list[str] = []
    monkeypatch.setattr(torch.library, "impl", lambda name, *_: again.append(name))
    register()
    assert again == []


def test_the_check_of_gelu_rejects_the_tanh_approximation() -> None:
    """The NPU computes it for `torch.nn.functional.gelu`."""
    wrong = replace(activations.GELU, run=lambda x: F.gelu(x, approximate="tanh"))
    assert "relative error" in check_kernel(wrong, "cpu")


def test_the_reference_of_gelu_is_exact() -> None:
    x = torch.linspace(-8, 8, 101, dtype=torch.float64)
    torch.testing.assert_close(activations.gelu_reference(x), F.gelu(x), atol=1e-14, rtol=0)
    assert activations.gelu_reference(x.bfloat16()).dtype == torch.bfloat16


def test_kernels_in_float64_agree_to_rounding() -> None:
    """Forward and backward, since the fake operations compute in the dtype of their inputs."""
    x, weight = torch.randn(5, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    cos_sin = axial_rotary(torch.randint(0, 9, (5, 2)), 8)
    heads = torch.randn(5, 3, 8, dtype=torch.float64)
    cases = [
        (rms_norm.rms_norm_npu, rms_norm_reference, (x, weight, 1e-6), 1e-12),
        (activations.gelu_npu, activations.gelu_reference, (x,), 1e-12),
        (activations.swiglu_npu, activations.swiglu_reference, (x,), 1e-12),
        (rotary.rotary_npu, rotary_reference, (heads, *cos_sin), 1e-5),  # float32 on the device
    ]
    for run, reference, arguments, tolerance in cases:
        results = []
        for function in (run, reference):
            inputs = [
                a.clone().requires_grad_() if torch.is_tensor(a) and a.dtype == x.dtype else a for a in arguments
            ]
            output = function(*inputs)
            wanted = [a for a in inputs if torch.is_tensor(a) and a.requires_grad]
            results.append([output, *torch.autograd.grad(output, wanted, torch.ones_like(output))])
        torch.testing.assert_close(*results, atol=tolerance, rtol=tolerance)


def test_strided_queries() -> None:
    query, _ = torch.randn(6, 2, 3, 16).unbind(1)
    cos_sin = axial_rotary(torch.randint(0, 9, (6, 2)), 16)
    torch.testing.assert_close(rotary.rotary_npu(query, *cos_sin), rotary_reference(query, *cos_sin))


@pytest.mark.parametrize(
    ("dtype", "joint", "forward", "backward"),
    [
        (torch.bfloat16, True, 1, 1),
        (torch.float16, True, 1, 1),
        (torch.float32, True, 2, 0),  # torch_npu computes the gradients
        (torch.bfloat16, False, 2, 0),
    ],
)
def test_views_of_one_projection_are_rotated_together(
    dtype: torch.dtype, joint: bool, forward: int, backward: int
) -> None:
    cos_sin = axial_rotary(torch.randint(0, 9, (6, 2)), 16)
    projection = torch.randn(6, 3, 2, 16).to(dtype).requires_grad_()
    found = []
    for rotate in (rotary.rotary_pair_npu, rotary_pair_reference):
        query, key, _ = projection.unbind(1)
        outputs = rotate(query if joint else query.contiguous(), key, *cos_sin)
        assert all(x.is_contiguous() for x in outputs)
        weights = [1 + torch.arange(x.numel()).view(x.shape) % 5 for x in outputs]
        (gradient,) = torch.autograd.grad(outputs, projection, [x.to(dtype) for x in weights])
        found.append([*outputs, gradient])
    torch.testing.assert_close(*found)
    calls = ["npu_rotary_mul"] * forward + ["npu_rotary_mul_backward"] * backward
    assert calls == fake_ops.CALLS


def test_second_derivatives_of_the_rotation_of_both_are_refused() -> None:
    query, key, _ = torch.randn(6, 3, 2, 16).bfloat16().requires_grad_().unbind(1)
    outputs = rotary.rotary_pair_npu(query, key, *axial_rotary(torch.randint(0, 9, (6, 2)), 16))
    with pytest.raises(RuntimeError, match="The rotation by `npu_rotary_mul` is differentiable once; got `create_gr"):
        torch.autograd.grad(outputs[0].float().square().sum(), query, create_graph=True)


def test_rotation_where_only_keys_require_gradients() -> None:
    cos_sin = axial_rotary(torch.randint(0, 9, (6, 2)), 16)
    query, key, _ = torch.randn(6, 3, 2, 16).bfloat16().unbind(1)
    key.requires_grad_()
    found = [
        torch.autograd.grad(rotate(query, key, *cos_sin)[1].float().square().sum(), key)
        for rotate in (rotary.rotary_pair_npu, rotary_pair_reference)
    ]
    torch.testing.assert_close(*found)


def test_unsupported_arguments_run_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlparts_npu.self_check.DEVICE_TYPE", "cpu")
    x, weight = torch.randn(3, 8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    implementation = with_fallback(rms_norm.KERNEL)
    assert torch.equal(implementation(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6))
    assert fake_ops.CALLS == []
    implementation(x.float(), weight.float(), 1e-6)
    assert "npu_rms_norm" in fake_ops.CALLS
