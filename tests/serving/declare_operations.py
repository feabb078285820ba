"""Lets a CUDA build of torchvision be imported beside a CPU build of torch; run in the environment of vLLM.

vLLM imports torchvision, whose transforms are plain PyTorch. The C extension of a CUDA build does not load there, and
two of its operations are registered without a check that they exist. They are declared at the end of the file that
loads the extension, without kernels.
"""

import importlib.util
from pathlib import Path

DECLARATION = """

# Declared without kernels where the C extension did not load.
if not _has_ops():
    for _name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def main() -> None:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise SystemExit("torchvision is not installed.")
    path = Path(spec.origin).with_name("extension.py")
    text = path.read_text(encoding="utf-8")
    if DECLARATION not in text:
        path.write_text(text + DECLARATION, encoding="utf-8")


if __name__ == "__main__":
    main()
