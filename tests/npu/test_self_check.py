"""A kernel is compared with its reference once, before its first use, and switched off if it is wrong."""

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vlparts_npu import check_kernels, self_check
from vlparts_npu.comparison import copy_arguments
from vlparts_npu.self_check import (
    CALL_LOG,
    KERNELS,
    Kernel,
    check_all,
    check_kernel,
    reset_checks,
    with_fallback,
)

calls: list[str] = []


def double(x: Tensor) -> Tensor:
    calls.append("kernel")
    return x + x


def reference(x: Tensor) -> Tensor:
    calls.append("reference")
    return 2 * x


def inputs() -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(3, 2, dtype=kind, generator=generator).requires_grad_(),)
        for kind in (torch.float32, torch.bfloat16)
    ]


def kernel(run: Callable[..., Any] = double, **changes: Any) -> Kernel:
    settings: dict[str, Any] = {
        "name": "test::double",
        "run": run,
        "reference": reference,
        "make_inputs": inputs,
        "supports": lambda x: "too long" if x.shape[0] > 100 else None,
        "tolerance": {torch.float32: 1e-6, torch.bfloat16: 1e-2},
    }
    return Kernel(**{**settings, **changes})


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Treat the CPU as the device, and register only the kernels of the test."""
    monkeypatch.setattr(self_check, "DEVICE_TYPE", "cpu")
    kept = dict(KERNELS)
    KERNELS.clear()
    reset_checks()
    calls.clear()
    yield
    KERNELS.clear()
    KERNELS.update(kept)
    reset_checks()


def test_a_kernel_is_checked_at_its_first_use_only() -> None:
    double_it = with_fallback(kernel())
    double_it(torch.ones(2))
    assert calls == ["kernel", "reference", "kernel", "reference", "kernel"]
    calls.clear()
    torch.testing.assert_close(double_it(torch.ones(2)), torch.full((2,), 2.0))
    assert calls == ["kernel"]
    assert list(CALL_LOG) == [("test::double", ""), ("test::double", "")]


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (lambda x: 2.001 * x, "case 0: tensor 0: relative error 5.0e-04, allowed 1.0e-06"),
        (lambda x: x + x.detach(), "case 0: tensor 1: relative error 5.0e-01, allowed 1.0e-06"),
        (lambda x: (2 * x).detach(), "case 0: 1 tensors and gradients instead of 2"),
        (lambda x: 2 * x * torch.tensor(float("nan")), "case 0: tensor 0: relative error nan"),
        (lambda x: 2 * x[:1], "case 0: tensor 0: shape (1, 2) instead of (3, 2)"),
        (lambda x: (2 * x).int(), "case 0: 1 tensors and gradients instead of 2"),
        (lambda x: x.no_such_attribute, "case 0: AttributeError: "),
        (lambda x: 2 * x if x.dtype == torch.float32 else 3 * x, "case 1: tensor 0: relative error 5.0e-01"),
    ],
)
def test_a_wrong_kernel_is_switched_off_with_one_warning(
    wrong: Callable[[Tensor], Tensor], error: str, caplog: pytest.LogCaptureFixture
) -> None:
    implementation = with_fallback(kernel(wrong))
    with caplog.at_level(logging.WARNING):
        outputs = [implementation(torch.ones(2)) for _ in range(3)]
    assert all(torch.equal(output, torch.full((2,), 2.0)) for output in outputs)
    (record,) = caplog.records
    assert record.message.startswith(f"The kernel of test::double failed its check and is switched off ({error}")
    assert {use.reason.startswith(f"switched off: {error}") for use in CALL_LOG} == {True}


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_copies_of_views_of_one_tensor_are_views_of_one(dtype: torch.dtype | None) -> None:
    whole = torch.randn(4, 3, 2)
    first, last = whole[:, 0].requires_grad_(), whole[:, 2]
    copies = copy_arguments((first, last, torch.arange(3), 5), dtype=dtype)
    assert [x.requires_grad for x in copies[:3]] == [True, False, False]
    for copied, tensor in zip(copies[:2], (first, last), strict=True):
        assert copied.is_leaf
        assert copied.dtype == (dtype or torch.float32)
        assert (copied.stride(), copied.storage_offset()) == (tensor.stride(), tensor.storage_offset())
        assert torch.equal(copied, tensor.to(copied.dtype))
    assert copies[0].untyped_storage().data_ptr() == copies[1].untyped_storage().data_ptr() != whole.data_ptr()
    assert copies[2].dtype == torch.int64
    assert copies[3] == 5


def test_unsupported_arguments_run_the_reference_unchecked() -> None:
    with_fallback(kernel())(torch.ones(101))
    assert calls == ["reference"]
    assert list(CALL_LOG) == [("test::double", "too long")]


def test_tensors_on_other_devices_run_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "DEVICE_TYPE", "npu")
    with_fallback(kernel())(torch.ones(2))
    assert calls == ["reference"]
    assert list(CALL_LOG) == [("test::double", "the tensors are on cpu")]


def test_inputs_that_the_kernel_does_not_support_are_an_error() -> None:
    error = check_kernel(kernel(make_inputs=lambda: [(torch.ones(101),)]), "cpu")
    assert error == "case 0: the kernel does not support its own inputs: too long"


def test_integers_must_be_equal() -> None:
    arguments = {"make_inputs": lambda: [(torch.arange(4),)], "reference": lambda x: x + 1}
    assert check_kernel(kernel(lambda x: (x + 1).int(), **arguments), "cpu") == ""
    assert check_kernel(kernel(lambda x: x + 2, **arguments), "cpu") == "case 0: tensor 0: integers differ"


def test_the_parameters_of_modules_are_compared() -> None:
    layer = nn.Linear(2, 3)
    arguments = {
        "make_inputs": lambda: [(layer, torch.ones(1, 2))],
        "supports": lambda layer, x: None,
        "tolerance": 1e-5,
    }
    whole = kernel(lambda layer, x: x @ layer.weight.T + layer.bias, reference=lambda layer, x: layer(x), **arguments)
    assert check_kernel(whole, "cpu") == ""
    frozen = kernel(lambda layer, x: x @ layer.weight.T + layer.bias.detach(), reference=whole.reference, **arguments)
    assert check_kernel(frozen, "cpu") == "case 0: tensor 2: a gradient is missing"


def test_the_check_ignores_modes_and_keeps_the_random_state() -> None:
    implementation = with_fallback(kernel())
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        implementation(torch.ones(2, device="cpu"))
    assert list(CALL_LOG) == [("test::double", "")]
    assert torch.equal(torch.get_rng_state(), state)


def test_fake_tensors_start_no_check() -> None:
    implementation = with_fallback(kernel())
    with FakeTensorMode():
        implementation(torch.ones(2))
    assert calls == ["reference"]
    implementation(torch.ones(2))
    with FakeTensorMode():
        implementation(torch.ones(2))
    assert calls[-1] == "kernel"


def test_a_kernel_that_calls_its_own_operation_is_checked_with_the_reference_inside() -> None:
    def by_row(x: Tensor) -> Tensor:
        return torch.cat([implementation(row) for row in x.split(1)]) if len(x) > 1 else x + x

    implementation = with_fallback(kernel(by_row))
    torch.testing.assert_close(implementation(torch.ones(2)), torch.full((2,), 2.0))
    assert [use.reason for use in CALL_LOG] == ["being checked"] * 6 + [""] * 3


def test_another_thread_runs_the_reference_during_the_check() -> None:
    started, finish = threading.Event(), threading.Event()

    def slow(x: Tensor) -> Tensor:
        started.set()
        assert finish.wait(60)
        return x + x

    implementation = with_fallback(kernel(slow))
    thread = threading.Thread(target=implementation, args=(torch.ones(2),))
    thread.start()
    assert started.wait(60)
    torch.testing.assert_close(implementation(torch.ones(2)), torch.full((2,), 2.0))
    assert list(CALL_LOG) == [("test::double", "being checked")]
    finish.set()
    thread.join()
    assert CALL_LOG[-1] == ("test::double", "")


def test_check_all_checks_every_kernel(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    good, bad = with_fallback(kernel()), with_fallback(kernel(lambda x: 3 * x, name="test::triple"))
    error = "case 0: tensor 0: relative error 5.0e-01, allowed 1.0e-06"
    assert check_all("cpu") == check_all("cpu") == {"test::double": "", "test::triple": error}
    assert len(caplog.records) == 1
    good(torch.ones(2))
    bad(torch.ones(2))
    assert [use.reason for use in CALL_LOG] == ["", f"switched off: {error}"]
    monkeypatch.setattr(self_check, "check_all", lambda device: {"checked on": device})
    assert check_kernels() == {"checked on": "npu"}
