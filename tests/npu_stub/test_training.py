"""Training and generation on the CANN stub: autocast, checkpointing, optimizer steps, greedy decoding."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from tests.npu_stub.models import (
    THRESHOLDS,
    Made,
    cast,
    excess_errors,
    make_moge_block,
    make_navit,
    make_vlm,
    make_vlm_moge,
    make_windowfree,
    move,
    step,
)
from tests.npu_stub.numerics import Numerics
from vlparts_npu.experts_layout import arrange_expert_weights
from vlparts_npu.self_check import CALL_LOG, check_all

TRAINED: dict[str, Callable[[], Made]] = {
    "MoGE block": make_moge_block,
    "NaViT": make_navit,
    "window-free encoder": make_windowfree,
    "NaViT with Qwen3": make_vlm,
    "NaViT with MoGE": make_vlm_moge,
}


@pytest.fixture(autouse=True)
def _kernels_ran_where_supported(numerics: Numerics) -> Iterator[None]:
    """Check all kernels before the test; fail if a call on the NPU ran a reference."""
    check_all("npu")
    CALL_LOG.clear()
    yield
    assert {use.reason for use in CALL_LOG if not use.reason.startswith("the tensors are on")} == {""}
    assert numerics.mismatches == []
    assert numerics.not_run == []


@pytest.mark.parametrize("name", TRAINED)
def test_errors_under_autocast_are_near_those_of_the_cpu(name: str) -> None:
    """Dtypes of outputs are not compared: layer normalization is float32 under autocast on the NPU."""
    made = TRAINED[name]()
    exact = step(cast(made, torch.float64), "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        plain = step(made, "cpu")
    with torch.autocast("npu", torch.bfloat16):
        found = step(made, "npu")
    assert {x.dtype for one, x in found.items() if one.startswith("gradient")} == {torch.float32}
    assert excess_errors(found, plain, exact, THRESHOLDS[torch.bfloat16]) == []


@pytest.mark.parametrize("name", ["NaViT", "window-free encoder", "NaViT with MoGE"])
def test_gradient_checkpointing_changes_nothing(name: str, numerics: Numerics) -> None:
    model, inputs = TRAINED[name]()
    expected = step((model, inputs), "npu")
    passes = numerics.log.count("aten::addmm")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = step((model, inputs), "npu")
    assert numerics.log.count("aten::addmm") > 2 * passes  # the layers are recomputed
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["MoGE block", "NaViT", "window-free encoder"])
@pytest.mark.parametrize("foreach", [True, False])
def test_steps_of_adamw_equal_the_cpu(name: str, foreach: bool) -> None:
    made = TRAINED[name]()
    trained = [train(made, device, foreach) for device in ("npu", "cpu")]
    for parameter, found, expected in zip(dict(made[0].named_parameters()), *trained, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=lambda m, p=parameter: f"{p}: {m}")


def train(made: Made, device: str, foreach: bool) -> list[Tensor]:
    """Train a copy of a model on a device for two steps, and return its weights on the CPU."""
    model, inputs = copy.deepcopy(made[0]).to(device).train(), {one: move(x, device) for one, x in made[1].items()}
    arrange_expert_weights(model)
    # With the default epsilon a weight whose gradient is only rounding error would take a full step.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4, foreach=foreach)
    for _ in range(2):
        optimizer.zero_grad()
        output = model(**inputs)
        result = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
        result.square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=foreach)
        optimizer.step()
    return [x.detach().cpu() for x in model.parameters()]


@pytest.mark.parametrize("name", ["NaViT with Qwen3", "NaViT with MoGE"])
def test_greedy_generation_equals_the_cpu(name: str) -> None:
    model, inputs = TRAINED[name]()
    del inputs["labels"]
    found = []
    for device in ("npu", "cpu"):
        moved = copy.deepcopy(model).to(device).eval()
        options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        output = moved.generate(**{one: move(x, device) for one, x in inputs.items()}, **options)
        assert output.sequences.device.type == device
        found.append([output.sequences.cpu(), *[x.cpu() for x in output.logits]])
    torch.testing.assert_close(*found, rtol=2e-4, atol=2e-5)
