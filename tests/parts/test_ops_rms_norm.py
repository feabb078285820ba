"""RMS normalisation: its CPU kernel against the reference and float64, and its gradients."""

import pytest
import torch

from vlparts.parts import ops_rms_norm as rms_norm
from vlparts.parts.ops_rms_norm import RMSNorm, rms_norm_reference

SHAPES = [(7, 8), (1, 1), (0, 8), (3, 5, 16), (600, 24)]


def norm_of(width: int, dtype: torch.dtype) -> RMSNorm:
    norm = RMSNorm(width, eps=1e-3).to(dtype)
    torch.nn.init.normal_(norm.weight)
    return norm


@pytest.fixture(autouse=True, params=[0, 2**18], ids=["in rows", "as it comes"])
def numbers_for_the_reference(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small inputs go through the kernel as well."""
    monkeypatch.setattr(rms_norm, "NUMBERS_FOR_THE_REFERENCE", request.param)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
def test_output_is_that_of_the_formula(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rms_norm, "ROWS_AT_A_TIME", 4)
    norm, x = norm_of(shape[-1], dtype), torch.randn(shape, dtype=dtype)
    with torch.set_grad_enabled(trains):
        output = norm(x)
    precise = x.double()
    expected = precise / (precise.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight.double()
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=tolerance)


def test_inference_equals_training_in_bfloat16_to_one_rounding() -> None:
    norm, x = norm_of(64, torch.bfloat16), torch.randn(300, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(norm(x), rms_norm_reference(x, norm.weight, norm.eps), atol=0, rtol=2**-7)


def test_gradients() -> None:
    norm, x = norm_of(6, torch.float64), torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y, w: torch.ops.vlparts.rms_norm(y, w, 1e-3), (x, norm.weight))


@pytest.mark.usefixtures("poisoned_empty")
def test_no_unwritten_memory_is_read() -> None:
    norm, x = norm_of(8, torch.float32), torch.randn(9, 8)
    with torch.no_grad():
        torch.testing.assert_close(norm(x), rms_norm_reference(x, norm.weight, norm.eps))


def test_rows_that_are_not_contiguous() -> None:
    norm, x = norm_of(8, torch.float32), torch.randn(8, 9).t()
    with torch.no_grad():
        torch.testing.assert_close(norm(x), norm(x.contiguous()))


def test_other_types_of_weights() -> None:
    """A float32 weight makes the result float32, as in the reference."""
    norm, x = norm_of(8, torch.float32), torch.randn(3, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(norm(x), rms_norm_reference(x, norm.weight, norm.eps))
