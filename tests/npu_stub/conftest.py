"""Fixtures for tests on the CANN stub.

The tests are collected only with VLPARTS_NPU_STUB=1, which the session `npu_stub` sets in its own environment: on a
machine with CANN the stub would replace it.
"""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.npu_stub.cann import Cann
    from tests.npu_stub.numerics import Numerics

collect_ignore_glob = ["test_*.py"]
if os.environ.get("VLPARTS_NPU_STUB") == "1":
    import tests.npu_stub.device  # noqa: F401

    collect_ignore_glob = []


@pytest.fixture
def cann() -> "Cann":
    """The stub, with an empty log of device kernels."""
    from tests.npu_stub.device import CANN

    CANN.clear()
    return CANN


@pytest.fixture
def numerics() -> Iterator["Numerics"]:
    """The mode that computes operations on `npu` tensors on the CPU."""
    from tests.npu_stub.numerics import Numerics

    with Numerics() as mode:
        yield mode
