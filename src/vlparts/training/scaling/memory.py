"""Memory of a device in a training step, under several ways to divide a model over devices."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..optimizers import muon_with_adamw
from .activations import Kept, Precision
from .units import is_experts

Sharding = Literal["none", "ddp", "fsdp2"]


@dataclass(frozen=True)
class Strategy:
    """How a model is divided over devices.

    Args:
        sharding: "none" for one device, "ddp" for `DistributedDataParallel`, "fsdp2" for `fully_shard` of each layer,
            as accelerate does it with `fsdp_version: 2`.
        devices: Number of devices, each with packs of its own.
        checkpointing: Whether layers are checkpointed.
        expert_parallel: Devices that share the experts of a layer, transformers' `ep_size`.
    """

    sharding: Sharding
    devices: int = 1
    checkpointing: bool = False
    expert_parallel: int = 1

    def __str__(self) -> str:
        names = {"none": "one device", "ddp": "DDP", "fsdp2": "FSDP2"}
        further = ["checkpointing"] if self.checkpointing else []
        further += [f"expert parallelism over {self.expert_parallel}"] if self.expert_parallel > 1 else []
        return " + ".join([names[self.sharding], *further])


@dataclass(frozen=True)
class Memory:
    """Bytes of a device.

    Args:
        parameters: Parameters that it holds.
        optimizer: States of the optimizer.
        gradients: Gradients at the end of a backward pass; with DDP twice, in its buckets.
        gathered: With FSDP2, gathered layers and the head, and gradients of a layer before they are reduced.
        casts: Copies of weights by autocast.
        activations: What the forward pass keeps.
        loss: Logits and loss, beside the activations.
        peak: The largest sum that exists at one time; see [`count_memory`].
    """

    parameters: float
    optimizer: float
    gradients: float
    gathered: float
    casts: float
    activations: float
    loss: float
    peak: float


def count_memory(
    model: Any, kept: Kept, strategy: Strategy, precision: Precision, optimizer: str, accumulates: bool
) -> Memory:
    """Count the memory of a device.

    Parameters, gradients and states of a device are those of the model divided by the devices with FSDP2, and all of
    them otherwise. A parameter takes 4 bytes (2 with "bfloat16"), its gradient as many if it is trained, AdamW's two
    states twice as many, Muon's one state as many. Trainer with `bf16=True` is "mixed": it leaves the parameters as
    they are, float32 for new models, and computes under autocast, so that there is no second copy of them as master
    weights. A folder in bfloat16 is loaded as bfloat16, though, and trained so ("bfloat16") with `bf16=True` too,
    except with FSDP2, where accelerate converts trained parameters to float32.

    DDP has a buffer of the size of all gradients beside them. FSDP2 gathers a layer at a time while it prefetches the
    next, in bfloat16 unless the precision is "float32"; the head stays from the end of the forward pass on. Under
    expert parallelism a device gathers its share of the experts of a layer.

    The peak is parameters and states, and the largest of

    - the loss: what the forward pass keeps, logits and loss;
    - the head's gradient: what the forward pass keeps, the gradient of the logits, and that of the head;
    - with checkpointing, a layer: the inputs of all layers and what that layer keeps;
    - the end of the backward pass: all gradients;

    where the first three have the gradients of the steps before, if gradients are accumulated or buckets of DDP exist.
    A Trainer that does not accumulate frees gradients before each step. Left out: temporary tensors of a layer, what
    the allocator wastes, the context of a device, and buffers of communication; leave a margin for them.

    Args:
        model: The model.
        kept: What a pack keeps.
        strategy: The division.
        precision: See [`count_kept`][vlparts.training.scaling.activations.count_kept].
        optimizer: "adamw" or "muon".
        accumulates: Whether an optimizer step has several packs on each device.
    """
    size, shards = (2 if precision == "bfloat16" else 4), strategy.devices if strategy.sharding == "fsdp2" else 1
    trained = [one for one in model.parameters() if one.requires_grad]
    parameters = sum(one.numel() for one in model.parameters()) * size / shards
    gradients = sum(one.numel() for one in trained) * size / shards
    states = optimizer_states(model, optimizer) * size / shards
    gathered, casts, buckets = 0.0, kept.casts, 0.0
    head = model.lm_head.weight
    head_gradient = float(head.numel() * size * head.requires_grad)
    if strategy.sharding == "fsdp2":
        gathered, casts = gathered_bytes(model, strategy, precision), 0.0
        head_gradient /= shards  # `gathered` includes the full gradient before it is reduced
    elif strategy.sharding == "ddp":
        buckets = gradients
    before = gradients if accumulates or buckets else 0.0
    moments = (
        kept.units + kept.loss + casts + before,
        kept.units + kept.logits + (0.0 if strategy.checkpointing else casts) + max(before, head_gradient),
        kept.units + kept.largest + max(before, head_gradient),
        gradients,
    )
    return Memory(
        parameters=parameters,
        optimizer=states,
        gradients=gradients + buckets,
        gathered=gathered,
        casts=casts,
        activations=kept.units + kept.largest,
        loss=kept.loss,
        peak=parameters + states + buckets + gathered + max(moments),
    )


def optimizer_states(model: Any, optimizer: str) -> int:
    """Count the numbers that an optimizer keeps: two for each trained one by AdamW, one for the matrices of Muon."""
    if optimizer == "adamw":
        return 2 * sum(one.numel() for one in model.parameters() if one.requires_grad)
    parts = muon_with_adamw(model, lr=1.0, weight_decay=0.0).parts
    return sum(
        (1 if isinstance(part, torch.optim.Muon) else 2) * one.numel()
        for part in parts
        for group in part.param_groups
        for one in group["params"]
    )


def gathered_bytes(model: Any, strategy: Strategy, precision: Precision) -> float:
    """Bytes of the whole weights that exist beside the shards of FSDP2.

    Two of the largest layer (one is computed, one prefetched), the head, and the gradient of the largest trained layer
    or of the head before it is reduced.
    """
    size = 4 if precision == "float32" else 2
    layers = [one for one in model.modules() if isinstance(one, GradientCheckpointingLayer)]
    head = model.lm_head.weight.numel()
    whole = [_gathered_numbers(one, strategy.expert_parallel) for one in layers]
    trained = [_gathered_numbers(one, strategy.expert_parallel, only_trained=True) for one in layers]
    return size * (2 * max(whole) + head + max([*trained, head * model.lm_head.weight.requires_grad]))


def _gathered_numbers(layer: nn.Module, expert_parallel: int, only_trained: bool = False) -> float:
    total = 0.0
    for module in layer.modules():
        divisor = expert_parallel if is_experts(module) else 1
        own = [one for one in module.parameters(recurse=False) if one.requires_grad or not only_trained]
        total += sum(one.numel() for one in own) / divisor
    return total


def count_parameters(model: Any, share: float) -> dict[str, dict[str, float]]:
    """Count parameters by part, and of the whole model ("total").

    Each has "all", those that are "trained", and those that are "active" for a token, of experts the share K / E.

    Args:
        model: The model.
        share: K / E.
    """
    experts = {id(one) for module in model.modules() if is_experts(module) for one in module.parameters(recurse=False)}
    groups: dict[str, Sequence[nn.Parameter]] = {
        "vision": list(model.model.vision_tower.parameters()),
        "projector": [
            *model.model.projector.parameters(),
            *(() if model.model.token_reducer is None else model.model.token_reducer.parameters()),
        ],
        "total": list(model.parameters()),
    }
    others = {id(one) for name in ("vision", "projector") for one in groups[name]}
    groups["text"] = [one for one in groups["total"] if id(one) not in others]
    return {
        name: {
            "all": float(sum(one.numel() for one in ones)),
            "trained": float(sum(one.numel() for one in ones if one.requires_grad)),
            "active": sum(one.numel() * (share if id(one) in experts and one.ndim == 3 else 1.0) for one in ones),
        }
        for name, ones in ((name, groups[name]) for name in ("vision", "projector", "text", "total"))
    }
