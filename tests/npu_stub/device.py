"""Creates the device `npu` on the CANN stub; import this before torch_npu."""

import os
import tempfile
from pathlib import Path

from tests.npu_stub.cann import Cann

# Request kernels in the calling thread, not in the thread of a queue.
os.environ.update(TASK_QUEUE_ENABLE="0", TORCH_NPU_DISABLED_WARNING="1")
_folder = tempfile.TemporaryDirectory(prefix="vlparts-cann-")
CANN = Cann(Path(_folder.name))

import torch  # noqa: E402
import torch_npu  # noqa: E402, F401

torch.npu.set_compile_mode(jit_compile=False)
