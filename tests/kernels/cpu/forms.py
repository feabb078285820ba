"""A choice among the forms of the CPU kernels that does not depend on the machine."""

from collections.abc import Sequence
from typing import Any

import pytest

from vlparts.kernels.cpu import attention as attention_cpu
from vlparts.kernels.cpu import linear as linear_cpu


def prefer_forms(patch: pytest.MonkeyPatch, *preferred: str) -> None:
    """Use the first of these forms that supports an input, and PyTorch's own otherwise, for inputs of every size."""

    def choose(name: str, forms: Sequence[str], make_trials: Any) -> str:
        return next((form for form in preferred if form in forms), forms[0])

    patch.setattr(linear_cpu, "fastest_form", choose)
    patch.setattr(attention_cpu, "fastest_form", choose)
    patch.setattr(linear_cpu, "MULTIPLICATIONS_FROM", 1)
    patch.setattr(linear_cpu, "FEW_ROWS_ELEMENTS", 1)
