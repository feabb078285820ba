"""Activations that are torch operations."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from vlparts.parts.ops_activations import ExactGELU, get_activation, swiglu, swiglu_reference


def test_gelu_is_the_exact_one() -> None:
    x = torch.linspace(-6, 6, 97, dtype=torch.float64)
    expected = x * torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0).cdf(x)
    torch.testing.assert_close(ExactGELU()(x), expected, atol=1e-14, rtol=0)


@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 6), (0, 4)], ids=str)
def test_swiglu_is_silu_of_the_first_half_times_the_second(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    half = shape[-1] // 2
    gate, up = x[..., :half], x[..., half:]
    torch.testing.assert_close(swiglu(x), gate / (1 + (-gate).exp()) * up, atol=1e-14, rtol=1e-14)


def test_gradients() -> None:
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ExactGELU(), (x,))
    assert torch.autograd.gradcheck(swiglu, (x,))


@pytest.mark.parametrize("name", ["silu", "relu", "gelu_pytorch_tanh", "quick_gelu"])
def test_other_activations_are_those_of_transformers(name: str) -> None:
    assert type(get_activation(name)) is type(ACT2FN[name])


def test_gelu_by_name_is_the_operation() -> None:
    assert type(get_activation("gelu")) is ExactGELU


def test_compiled_without_a_break() -> None:
    def both(x: torch.Tensor) -> torch.Tensor:
        return swiglu(ExactGELU()(x))

    x = torch.randn(3, 8)
    expected = swiglu_reference(nn.functional.gelu(x))
    torch.testing.assert_close(torch.compile(both, backend="aot_eager", fullgraph=True)(x), expected)


def test_exported_programs_hold_operations_of_pytorch_only() -> None:
    program = torch.export.export(nn.Sequential(ExactGELU()), (torch.randn(3, 8),))
    assert "vlparts" not in str(program.graph)
