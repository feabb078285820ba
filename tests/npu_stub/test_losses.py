"""The weighted cross-entropies on the CANN stub equal those on the CPU, with gradients."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.npu_stub.models import THRESHOLDS, Loss, Made, cast, excess_errors, make_linear_loss, make_loss, step
from tests.npu_stub.numerics import Numerics
from vlparts.losses.cross_entropy import weighted_cross_entropy
from vlparts.losses.linear_cross_entropy import linear_weighted_cross_entropy

SMOOTHED = {"label_smoothing": 0.1, "z_loss": 1e-3, "preset": "openpangu_mix"}
CASES: list[tuple[Callable[[], Made], Callable[..., Any], dict[str, Any]]] = [
    (make_loss, weighted_cross_entropy, {}),
    (make_loss, weighted_cross_entropy, SMOOTHED),
    (make_linear_loss, linear_weighted_cross_entropy, {}),
    (make_linear_loss, linear_weighted_cross_entropy, SMOOTHED),
    (make_linear_loss, linear_weighted_cross_entropy, {"softcap": 5.0}),
]
each_loss = pytest.mark.parametrize(
    ("make", "function", "options"), CASES, ids=["plain", "smoothed", "linear", "linear, smoothed", "linear, capped"]
)


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divide the 40 classes of the linear head into three chunks."""
    monkeypatch.setattr("vlparts.losses._linear_chunks.CLASSES_AT_A_TIME", 16)


@each_loss
def test_it_equals_the_cpu(
    make: Callable[[], Made], function: Callable[..., Any], options: dict[str, Any], numerics: Numerics
) -> None:
    made = (Loss(functools.partial(function, **options)), make()[1])
    found, expected = step(made, "npu"), step(made, "cpu")
    assert len(found) == len(made[1])  # the loss, and gradients of all but the labels
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert numerics.mismatches == []
    assert numerics.not_run == []


@each_loss
def test_its_errors_in_bfloat16_are_near_those_of_the_cpu(
    make: Callable[[], Made], function: Callable[..., Any], options: dict[str, Any], numerics: Numerics
) -> None:
    made = cast((Loss(functools.partial(function, **options)), make()[1]), torch.bfloat16)
    exact, plain, found = step(cast(made, torch.float64), "cpu"), step(made, "cpu"), step(made, "npu")
    assert found["output"].dtype == torch.float32
    assert excess_errors(found, plain, exact, THRESHOLDS[torch.bfloat16]) == []
    assert numerics.mismatches == []
    assert numerics.not_run == []
