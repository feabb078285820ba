"""RMS normalization: the reference against float64, its gradients, and the layer."""

import pytest
import torch

from vlparts.parts.ops_rms_norm import RMSNorm, rms_norm_reference

SHAPES = [(7, 8), (1, 1), (0, 8), (3, 5, 16), (600, 24)]
TOLERANCES = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]


def norm_of(width: int, dtype: torch.dtype) -> RMSNorm:
    norm = RMSNorm(width, eps=1e-3).to(dtype)
    torch.nn.init.normal_(norm.weight)
    return norm


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=str)
def test_the_reference_is_the_formula(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    norm, x = norm_of(shape[-1], dtype), torch.randn(shape, dtype=dtype)
    output = rms_norm_reference(x, norm.weight, norm.eps)
    precise = x.double()
    expected = precise / (precise.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight.double()
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=str)
@pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
def test_the_layer_is_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, trains: bool
) -> None:
    norm, x = norm_of(shape[-1], dtype), torch.randn(shape, dtype=dtype)
    with torch.set_grad_enabled(trains):
        output = norm(x)
    torch.testing.assert_close(output, rms_norm_reference(x, norm.weight, norm.eps), atol=tolerance, rtol=tolerance)


def test_gradients() -> None:
    norm, x = norm_of(6, torch.float64), torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y, w: torch.ops.vlparts.rms_norm(y, w, 1e-3), (x, norm.weight))


def test_a_weight_of_another_dtype() -> None:
    """A float32 weight makes the result float32."""
    norm, x = norm_of(8, torch.float32), torch.randn(3, 8, dtype=torch.bfloat16)
    assert rms_norm_reference(x, norm.weight, norm.eps).dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(norm(x), rms_norm_reference(x, norm.weight, norm.eps))


def test_compiled_and_exported_programs_hold_operations_of_pytorch_only() -> None:
    norm, x = norm_of(8, torch.float32), torch.randn(3, 8)
    expected = norm(x)
    torch.testing.assert_close(torch.compile(norm, backend="aot_eager", fullgraph=True)(x), expected)
    assert "vlparts" not in str(torch.export.export(norm, (x,)).graph)
