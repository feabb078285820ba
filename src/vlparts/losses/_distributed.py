"""Sums over the processes of torch.distributed that are float64 whatever the backend and its devices know."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["sum_over_processes"]


def sum_over_processes(values: Tensor, group: Any = None, device: torch.device | str | None = None) -> Tensor:
    """The sum of all processes' values; the values themselves where torch.distributed is not initialised.

    Args:
        values: float64 of one axis, as many in each process.
        group: The process group; the default one where None.
        device: Where the group's backend works (NCCL and HCCL: the accelerator); where the values are, if None.

    Returns:
        float64 on the device of `values`, the same in each process.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    # As integers, since not every accelerator knows float64.
    own = values.view(torch.int32).to(device or values.device)
    every = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(every, own, group=group)
    return torch.stack([one.to(values.device).view(torch.float64) for one in every]).sum(0)
