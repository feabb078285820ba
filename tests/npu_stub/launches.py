"""Table of the device kernels launched with and without `vlparts_npu`.

    TORCH_DEVICE_BACKEND_AUTOLOAD=0 python -m tests.npu_stub.launches

Counts the kernels that torch_npu requests from CANN, copies and fills included, but not those of operations whose
output sizes depend on values, such as `nonzero` and `index`. The row of a layer is the difference between models of 8
and of 4 layers, per layer.
"""

import os
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch

from tests.npu_stub.device import CANN
from tests.npu_stub.models import (
    Made,
    cast,
    make_linear_loss,
    make_loss,
    make_moge_block,
    make_navit,
    make_rms_norm,
    make_windowfree,
    move,
    without_kernels,
)
from tests.npu_stub.numerics import Numerics
from vlparts_npu.self_check import check_all

FEW, MANY = 4, 8


class Launches(NamedTuple):
    """Numbers of device kernels in a forward and in a backward pass, without and with the kernels."""

    forward_without: float
    forward: float
    backward_without: float
    backward: float

    def row(self, name: str) -> str:
        """Return a row of the table."""
        cells = [name]
        for without, used in (self[:2], self[2:]):
            cells += [f"{without:.0f}", f"{used:.0f}", f"{without / used:.1f}"]
        return f"| {' | '.join(cells)} |"


def count(make: Callable[[], Made], dtype: torch.dtype) -> Launches:
    """Count the launches of a model."""
    with without_kernels():
        forward_without, backward_without = _count_once(make(), dtype)
    forward, backward = _count_once(make(), dtype)
    return Launches(forward_without, forward, backward_without, backward)


def count_layer(make: Callable[[int], Made], dtype: torch.dtype) -> Launches:
    """Count the launches of one layer of a model whose number of layers can be chosen."""
    few, many = (count(lambda layers=layers: make(layers), dtype) for layers in (FEW, MANY))  # type: ignore[misc]
    return Launches(*((more - less) / (MANY - FEW) for less, more in zip(few, many, strict=True)))


def _count_once(made: Made, dtype: torch.dtype) -> tuple[int, int]:
    model, inputs = cast(made, dtype)
    model, inputs = model.to("npu").eval(), {name: move(x, "npu") for name, x in inputs.items()}
    model(**inputs)  # what is done once: masks and the layout of weights
    CANN.clear()
    output = model(**inputs)
    forward = len(CANN.kernels())
    values = [output] if isinstance(output, torch.Tensor) else list(getattr(output, "values", output.__iter__)())
    result = next(x for x in values if isinstance(x, torch.Tensor) and x.requires_grad)
    grad = torch.ones_like(result)
    CANN.clear()
    result.backward(grad)
    return forward, len(CANN.kernels())


def main() -> None:
    """Print a table per dtype."""
    with Numerics():
        check_all("npu")
        for dtype in (torch.float32, torch.bfloat16):
            kind = str(dtype).removeprefix("torch.")
            print(f"\n| {kind} | forward without | with | ratio | backward without | with | ratio |")
            print("|---|---|---|---|---|---|---|")
            print(count(make_rms_norm, dtype).row("RMSNorm"))
            print(count(lambda: make_moge_block(64), dtype).row("MoGE block of 64 experts"))
            print(count_layer(make_navit, dtype).row("layer of NaViT, three images"))
            print(count_layer(make_windowfree, dtype).row("layer of the window-free encoder, two images"))
            print(count(make_navit, dtype).row("NaViT of 2 layers, three images"))
            print(count(make_windowfree, dtype).row("window-free encoder of 4 layers, two images"))
            print(count(make_loss, dtype).row("weighted cross-entropy"))
            print(count(make_linear_loss, dtype).row("the same of a linear head"))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # torch_npu's threads, which no device ends, can abort the interpreter's shutdown
