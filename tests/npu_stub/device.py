"""To import this file makes a device `npu` of host memory, before torch_npu is first imported."""

import os
import tempfile
from pathlib import Path

from tests.npu_stub.cann import Cann

# Kernels are asked for in the thread that calls, and not in a queue's.
os.environ.update(TASK_QUEUE_ENABLE="0", TORCH_NPU_DISABLED_WARNING="1")
_folder = tempfile.TemporaryDirectory(prefix="vlparts-cann-")
CANN = Cann(Path(_folder.name))

import torch  # noqa: E402
import torch_npu  # noqa: E402, F401

torch.npu.set_compile_mode(jit_compile=False)
