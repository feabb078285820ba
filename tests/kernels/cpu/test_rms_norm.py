"""The CPU kernel of RMS normalization against the reference."""

import pytest
import torch
from torch import Tensor

from vlparts.kernels import cpu
from vlparts.kernels.cpu import rms_norm_cpu
from vlparts.parts.ops_rms_norm import rms_norm_reference

SHAPES = [(7, 8), (1, 1), (0, 8), (3, 5, 16), (600, 24)]


@pytest.fixture(autouse=True)
def small_inputs_use_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "RMS_NORM_REFERENCE_UP_TO", 0)
    monkeypatch.setattr(cpu, "RMS_NORM_CHUNK_SIZE", 4)


@pytest.fixture
def fallbacks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the inputs that the kernel leaves to the reference."""
    shapes = []

    def noted(hidden_states: Tensor, *arguments: object) -> Tensor:
        shapes.append(tuple(hidden_states.shape))
        return rms_norm_reference(hidden_states, *arguments)

    monkeypatch.setattr(cpu, "rms_norm_reference", noted)
    return shapes


@pytest.mark.parametrize("key", ["CPU", "AutogradCPU"])
def test_the_kernel_is_registered(key: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("vlparts::rms_norm", key)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)], ids=str)
def test_it_is_the_reference_to_rounding(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, fallbacks: list[tuple[int, ...]]
) -> None:
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(shape[-1], dtype=dtype)
    expected = rms_norm_reference(x, weight, 1e-3)
    torch.testing.assert_close(rms_norm_cpu(x, weight, 1e-3), expected, atol=0, rtol=tolerance)
    assert fallbacks == ([shape] if 0 in shape else [])


@pytest.mark.parametrize("kind", ["small", "float64", "other weight", "not contiguous", "training"])
def test_other_inputs_are_left_to_the_reference(
    kind: str, fallbacks: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = torch.randn(8, 9), torch.randn(9)
    if kind == "small":
        monkeypatch.setattr(cpu, "RMS_NORM_REFERENCE_UP_TO", 72)
    elif kind == "float64":
        x, weight = x.double(), weight.double()
    elif kind == "other weight":
        x = x.bfloat16()
    elif kind == "not contiguous":
        x = torch.randn(9, 8).t()
    else:
        x.requires_grad_()
    output = torch.ops.vlparts.rms_norm(x, weight, 1e-3)
    assert fallbacks == [(8, 9)]
    assert torch.equal(output, rms_norm_reference(x, weight, 1e-3))
    assert output.requires_grad == (kind == "training")
