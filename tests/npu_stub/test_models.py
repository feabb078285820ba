"""Whole models on the CANN stub, through the kernels, compared with the CPU, forward and backward."""

from collections.abc import Callable

import pytest
import torch

from tests.npu_stub.launches import Launches, count, count_layer
from tests.npu_stub.models import (
    MODELS,
    THRESHOLDS,
    Made,
    cast,
    excess_errors,
    make_moge_block,
    make_navit,
    make_rms_norm,
    make_windowfree,
    move,
    step,
)
from tests.npu_stub.numerics import Numerics
from vlparts_npu.self_check import CALL_LOG, check_all

USED = {
    "RMSNorm": {"vlparts::rms_norm"},
    "MoGE block": {"npu_grouped", "vlparts::swiglu"},
    "NaViT": {"vlparts::varlen_attention", "vlparts::gelu"},
    "window-free encoder": {"vlparts::varlen_attention", "vlparts::rms_norm", "vlparts::rotary_pair", "vlparts::gelu"},
    "NaViT with Qwen3": {"vlparts::varlen_attention", "vlparts::gelu"},
    "NaViT with MoGE": {
        "vlparts::varlen_attention",
        "vlparts::gelu",
        "vlparts::rms_norm",
        "npu_grouped",
        "vlparts::swiglu",
    },
    "Qwen3-MoE of transformers": {"vlparts::varlen_attention", "npu_grouped", "vlparts::swiglu"},
}
each_model = pytest.mark.parametrize("name", MODELS)


@each_model
@pytest.mark.parametrize("backward", [True, False])
def test_it_equals_the_cpu(name: str, backward: bool, numerics: Numerics) -> None:
    made = MODELS[name]()
    expected = step(made, "cpu", backward)
    check_all("npu")
    CALL_LOG.clear()
    found = step(made, "npu", backward)
    assert {call.name for call in CALL_LOG if not call.reason} == USED[name]
    assert {call for call in CALL_LOG if call.reason} == set()
    # Sums run in another order, and some gradients (of biases that a softmax cancels) are only rounding error.
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-6)
    assert numerics.mismatches == []
    assert numerics.not_run == []


@each_model
@pytest.mark.parametrize("dtype", THRESHOLDS)
def test_its_errors_in_half_precision_are_near_those_of_the_cpu(
    name: str, dtype: torch.dtype, numerics: Numerics
) -> None:
    """Errors against float64 are compared, not values, since the NPU rounds at other places than the CPU."""
    made = cast(MODELS[name](), dtype)
    exact, plain = step(cast(made, torch.float64), "cpu"), step(made, "cpu")
    check_all("npu")
    CALL_LOG.clear()
    found = step(made, "npu")
    assert {call.name for call in CALL_LOG if not call.reason} == USED[name]
    assert {call for call in CALL_LOG if call.reason} == set()
    assert {name: x.dtype for name, x in found.items()} == {name: x.dtype for name, x in plain.items()}
    assert excess_errors(found, plain, exact, THRESHOLDS[dtype]) == []
    assert numerics.mismatches == []
    assert numerics.not_run == []


@pytest.mark.parametrize(
    ("count_it", "least"),
    [
        (lambda: count(make_rms_norm, torch.float32), 3),
        (lambda: count(lambda: make_moge_block(64), torch.float32), 3),
        (lambda: count_layer(make_windowfree, torch.float32), 3),
        (lambda: count_layer(make_windowfree, torch.bfloat16), 3),
        (lambda: count_layer(make_navit, torch.float32), 1.2),
    ],
    ids=["RMSNorm", "MoGE block", "layer of the window-free encoder", "the same in bfloat16", "layer of NaViT"],
)
def test_it_launches_fewer_device_kernels(count_it: Callable[[], Launches], least: float, numerics: Numerics) -> None:
    check_all("npu")
    found = count_it()
    assert found.forward_without >= least * found.forward
    assert found.backward_without >= least * found.backward


@pytest.mark.parametrize("make", [make_navit, make_windowfree])
def test_layers_do_not_synchronize_with_the_device(make: Callable[[int], Made], numerics: Numerics) -> None:
    check_all("npu")
    waits = []
    for layers in (2, 6):
        model, inputs = make(layers)
        model, inputs = model.to("npu"), {name: move(x, "npu") for name, x in inputs.items()}
        numerics.waits.clear()
        model(**inputs)
        waits.append(list(numerics.waits))
    assert waits[0] == waits[1]
    assert 0 < len(waits[0]) < 6  # for the sizes of the images


def test_the_moge_block_does_not_synchronize_with_the_device(numerics: Numerics) -> None:
    check_all("npu")
    block, inputs = make_moge_block(16)
    block, inputs = block.to("npu"), {name: move(x, "npu") for name, x in inputs.items()}
    numerics.waits.clear()
    output = block(**inputs)[0]
    output.backward(torch.ones_like(output))
    assert numerics.waits == []
