"""A batch whose rows are distributed over processes, the process groups of losses, and models that are sharded.

Shapes: n rows of this process, N rows of all processes, D columns.
"""

import os
import re
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from transformers.modeling_layers import GradientCheckpointingLayer

__all__ = ["ShardableMixin", "SharedBatch"]


class ShardableMixin:
    """Names the layers of a model of several models, by which it is sharded, and saves it as an ordinary folder.

    `fully_shard` replaces the class of a model by one of PyTorch's, whose code transformers would save as the model's.
    """

    def post_init(self) -> None:
        """Finish the construction: name the layers of the model, and nothing that it does not have.

        Classes of transformers also name layers of models of their family that are not part of them, such as the text
        embeddings of CLIP, and accelerate refuses such names. `_no_split_modules` keeps those that exist and gets
        every layer that supports gradient checkpointing. `_fsdp_plan` shards these.
        """
        super().post_init()  # type: ignore[misc]
        model: Any = self
        # The layers of one list may differ in class, so "layers.*" can match modules of several classes.
        modules = [(re.sub(r"\.\d+(?=\.|$)", ".*", name), one) for name, one in model.named_modules()]
        layers = {type(one).__name__ for _, one in modules if isinstance(one, GradientCheckpointingLayer)}
        named = {type(one).__name__ for _, one in modules} & set(model._no_split_modules)
        model._no_split_modules = named | layers
        units = [path for path, one in modules if type(one).__name__ in model._no_split_modules]
        paths = {path for path, _ in modules}
        known = {path: style for path, style in (model._fsdp_plan or {}).items() if path in paths}
        model._fsdp_plan = {**dict.fromkeys(units, "free_full_weight"), **known}

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save the model with whole weights. All processes call it with a sharded model, and the first one writes.

        Args:
            save_directory: The folder.
            **kwargs: As for transformers' models. With `state_dict`, whole weights, only the first process needs to
                call it.
        """
        model: Any = self
        own = next(one for one in type(model).__mro__ if not one.__module__.startswith("torch."))
        if own is type(model):
            super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
            return
        state_dict = kwargs.pop("state_dict", None)
        if state_dict is None:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

            state_dict = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
            if dist.get_rank() != 0:
                return
        config = copy(model.config)
        vars(config).pop("distributed_config", None)
        with torch.device("meta"):
            whole = own(config).to(model.dtype)
        if model.can_generate():
            whole.generation_config = model.generation_config
        whole.save_pretrained(save_directory, state_dict=state_dict, **kwargs)


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
