"""Whole models in half precision on the stand-in, forward and backward, against float64 on the CPU.

The NPU rounds at other places than the CPU does. So its errors, and not its numbers, are compared with the CPU's.
"""

import pytest
import torch
from torch import Tensor

from tests.npu_stub.models import MODELS, cast, step
from tests.npu_stub.numerics import Numerics
from tests.npu_stub.test_models import USED
from vlparts_npu.self_check import USES, check_all

# Ascend's thresholds for the types: twice the unit roundoff.
THRESHOLDS = {torch.bfloat16: 2**-7, torch.float16: 2**-10}


def worst(found: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor], slack: float) -> list[str]:
    """The tensors whose error is above twice that of the CPU in the same type, and the slack."""
    assert found.keys() == plain.keys() == exact.keys()
    faults = []
    for name, theirs in exact.items():
        ours, usual = ((x[name].double() - theirs).norm() for x in (found, plain))
        if not ours <= 2 * usual + slack * theirs.norm():
            faults.append(f"{name}: error {ours:.1e}, that of the CPU {usual:.1e}, norm {theirs.norm():.1e}")
    return faults


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", THRESHOLDS)
def test_its_errors_are_those_of_the_cpu(name: str, dtype: torch.dtype, numerics: Numerics) -> None:
    made = cast(MODELS[name](), dtype)
    exact, plain = step(cast(made, torch.float64), "cpu"), step(made, "cpu")
    check_all("npu")
    USES.clear()
    found = step(made, "npu")
    assert {use.name for use in USES if not use.reason} == USED[name]
    assert {use for use in USES if use.reason} == set()
    assert {name: x.dtype for name, x in found.items()} == {name: x.dtype for name, x in plain.items()}
    assert worst(found, plain, exact, THRESHOLDS[dtype]) == []
    assert numerics.mismatches == []
    assert numerics.not_run == []
