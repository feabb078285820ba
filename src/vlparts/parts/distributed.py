"""A batch whose rows are distributed over processes, and the process groups of losses.

Shapes: n rows of this process, N rows of all processes, D columns.
"""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

__all__ = ["SharedBatch"]


class SharedBatch:
    """A batch whose rows are distributed over processes, which may hold different numbers of rows.

    In a single process, all collectives are the identity.

    Args:
        group: A process group; None for the default group if there is one, "local" for this process alone.
        features: `(n, D)`, the rows of this process.

    Attributes:
        sizes: Number of rows of each process.
        own: Slice of this process' rows among all N.
        divisor: N, but at least 1.

    Raises:
        ValueError: If `group` does not hold this process, or the rows of another process have another width.
    """

    def __init__(self, group: Any, features: Tensor) -> None:
        self.group = resolve_group(group)
        self.sizes = [len(features)]
        rank = 0
        if self.group is not None:
            shape = torch.tensor(features.shape, device=features.device)
            shapes = shape.new_empty(dist.get_world_size(self.group), 2)
            dist.all_gather(list(shapes.unbind()), shape, group=self.group)
            widths = shapes[:, 1].tolist()
            if len(set(widths)) > 1:
                raise ValueError(f"`image_features` must have the same width in all processes, got {widths}.")
            self.sizes, rank = shapes[:, 0].tolist(), dist.get_rank(self.group)
        first = sum(self.sizes[:rank])
        self.own = slice(first, first + self.sizes[rank])
        self.divisor = max(sum(self.sizes), 1)

    def gather(self, features: Tensor) -> Tensor:
        """Concatenate the `(n, D)` of all processes to `(N, D)`."""
        if self.group is None:
            return features
        longest = max(self.sizes)
        padded = features.new_zeros(longest, features.shape[1])
        padded[: len(features)] = features
        gathered = features.new_empty(len(self.sizes), *padded.shape)
        dist.all_gather(list(gathered.unbind()), padded, group=self.group)
        return torch.cat([part[:size] for part, size in zip(gathered, self.sizes, strict=True)])

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the processes, in place."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def logsumexp(self, partial: Tensor) -> Tensor:
        """Combine the log-sum-exps `(N,)` of all processes, each over the rows of its process."""
        if self.group is None:
            return partial
        largest = partial.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return largest + self.sum((partial - largest).exp()).log()


def resolve_group(group: Any) -> Any:
    """Return the process group for collectives, or None if this process is alone.

    Args:
        group: A process group; None for the default group if there is one, "local" for this process alone.

    Raises:
        ValueError: If `group` is another string, or does not hold this process.
    """
    if isinstance(group, str):
        if group != "local":
            raise ValueError(f"`group` must be a process group, None or 'local', got {group!r}.")
        return None
    if not dist.is_available() or not dist.is_initialized():
        return None
    group = dist.group.WORLD if group is None else group
    size = dist.get_world_size(group)
    if size < 1:
        raise ValueError("`group` must hold this process, got a group that does not.")
    return group if size > 1 else None
