"""The linear form in half precision over the range of its logits, against float64: values and all gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.losses.loss_oracle import drawn, gradients
from tests.losses.test_linear_cross_entropy import Inputs, expected_of, inputs, ours
from tests.losses.test_vocab_chunks import relative, set_chunks, wide_of
from vlparts.losses.linear_cross_entropy import linear_weighted_cross_entropy

HALF = [torch.bfloat16, torch.float16]
each_type = pytest.mark.parametrize("dtype", HALF)
MAGNITUDES = [1.0, 1e2, 1e3, 1e4, 1e5, 1e6]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": dict(),
    "smoothed": dict(label_smoothing=0.1, z_loss=1e-4),
    "sample": dict(preset="sample", z_loss=0.1),
    "softcap": dict(softcap=30.0),
    "all": dict(softcap=1e5, label_smoothing=0.2, z_loss=1e-3, mix=0.2, length_exponent=0.5),
}


def of_magnitude(magnitude: float, dtype: torch.dtype, bias: bool) -> Inputs:
    """Inputs whose logits are of this order, and a bias of the same order, within float16."""
    given = inputs(dtype=torch.float64)
    share = magnitude**0.5
    leaves = [given.hidden * share, given.weight * share]
    offsets = (drawn(len(given.weight), seed=3) * magnitude).clamp(-6e4, 6e4) if bias else None
    rounded = [one if one is None else one.detach().to(dtype).requires_grad_() for one in (*leaves, offsets)]
    return Inputs(*rounded, given.case)


def assert_near(given: Inputs, **options: Any) -> None:
    """Compare with float64, to the rounding of the type of the gradients, or of a saturated cap in float32."""
    wide = wide_of(given) if given.bias is not None else wide_without_bias(given)
    leaves = [one for one in given[:3] if one is not None]
    exact = [one for one in wide[:3] if one is not None]
    loss, expected = ours(given, **options), expected_of(wide, **options)
    assert loss.isfinite()
    assert relative(loss, expected) < 1e-2
    factors = [given.weight.abs().max().item(), given.hidden.abs().max().item(), 1.0][: len(leaves)]
    found = zip(gradients(loss, *leaves), gradients(expected, *exact), factors, strict=True)
    for got, wanted, factor in found:
        if wanted.abs().max() > torch.finfo(got.dtype).max:  # no number of this type
            continue
        assert got.isfinite().all()
        difference = (got.double() - wanted).abs().max().item()
        assert difference <= 3e-2 * wanted.abs().max().item() + 1e-6 * factor


def wide_without_bias(given: Inputs) -> Inputs:
    return Inputs(*(one.detach().double().requires_grad_() for one in given[:2]), None, given.case)


@each_type
@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("cache_bytes", [0, 2**30])
def test_logits_of_any_size(
    dtype: torch.dtype,
    magnitude: float,
    bias: bool,
    options: str,
    cache_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_chunks(monkeypatch, cache_bytes)
    assert_near(of_magnitude(magnitude, dtype, bias), **OPTIONS[options])


def loss_and_gradients(hidden: Tensor, head: Tensor, label: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden.requires_grad_()
    head.requires_grad_()
    loss = linear_weighted_cross_entropy(hidden, head, torch.tensor([label]), **options)
    return loss, *gradients(loss, hidden, head)


def test_a_remainder_of_the_largest_logit_does_not_overflow() -> None:
    # bfloat16 rounds the largest logit, 32868, to 32768; e^100 overflows float32.
    head = torch.tensor([[32768.0, 100.0], [0.0, 0.0]], dtype=torch.bfloat16)
    loss, *found = loss_and_gradients(torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16), head, 0)
    assert loss.item() == 0
    assert not any(one.any() for one in found)


def test_float16_gradients_are_not_rounded_to_infinity() -> None:
    head = torch.tensor([[100.0], [0.0]], dtype=torch.float16)
    loss, hidden, weight = loss_and_gradients(torch.tensor([[1.0]], dtype=torch.float16), head, 1)
    assert loss.item() == 100
    assert hidden.tolist() == [[100.0]]
    assert weight.tolist() == [[1.0], [-1.0]]
    wide = torch.tensor([[1000.0]], dtype=torch.float16)
    loss, hidden, weight = loss_and_gradients(wide, torch.tensor([[30.0], [-30.0]], dtype=torch.float16), 1)
    assert loss.item() == 60000
    assert hidden.tolist() == [[60.0]]
    assert weight.tolist() == [[1000.0], [-1000.0]]


def test_a_product_beyond_float16_is_taken_in_float32() -> None:
    # The gradient is half of 60000 - (-60000): in range, after a product that is not.
    head = torch.tensor([[6e4], [-6e4]], dtype=torch.float16)
    hidden = torch.full((2, 1), 2.0**-10, dtype=torch.float16, requires_grad=True)
    (found,) = gradients(linear_weighted_cross_entropy(hidden, head, torch.tensor([1, 1])), hidden)
    assert found.tolist() == [[6e4], [6e4]]


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("size", [4096.0, 2.0**15, 2.0**20])
def test_close_logits_of_any_size_are_told_apart(dtype: torch.dtype, size: float) -> None:
    # Both round to the same logit.
    factor = 64.0 if size > 2**15 else 1.0
    head = torch.tensor([[size / factor, 0.0], [size / factor, 0.5]], dtype=dtype)
    loss, hidden, weight = loss_and_gradients(torch.tensor([[factor, 1.0]], dtype=dtype), head, 0)
    share = torch.tensor(0.5).sigmoid().item()
    assert loss.item() == pytest.approx(-torch.tensor(-0.5).sigmoid().log().item(), abs=1e-3)
    assert weight[:, 1].tolist() == pytest.approx([-share, share], rel=1e-2)
    assert hidden[0, 1].item() == pytest.approx(0.5 * share, rel=1e-2)


@each_type
def test_a_bias_that_cancels_large_logits(dtype: torch.dtype) -> None:
    head = torch.tensor([[3e4], [0.0]], dtype=dtype)
    bias = -head[:, 0].clone()
    hidden = torch.full((1, 1), 1 + torch.finfo(dtype).eps, dtype=dtype)
    loss = linear_weighted_cross_entropy(hidden, head, torch.tensor([1]), bias=bias)
    exact = head.double() @ hidden.double().t() + bias.double()[:, None]
    wanted = exact.logsumexp(0) - exact[1]
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
