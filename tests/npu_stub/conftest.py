"""A device `npu` made of host memory, for the session `npu_stub`.

The session switches this folder on by VLPARTS_NPU_STUB=1, in an environment of its own: on a machine with CANN the
stand-in would take its place.
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
    """The stand-in, with an empty list of device kernels."""
    from tests.npu_stub.device import CANN

    CANN.clear()
    return CANN


@pytest.fixture
def numerics() -> Iterator["Numerics"]:
    """The mode that gives operations on `npu` tensors the numbers of the CPU."""
    from tests.npu_stub.numerics import Numerics

    with Numerics() as mode:
        yield mode
