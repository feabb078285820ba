"""Trainer callback that logs the load balance of MoE routers."""

from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..moe.statistics import RouterLoad, RouterStatistics
from ..parts.moe_losses import normalized_scores
from ..parts.moe_router import GroupedTopKRouter

__all__ = ["RouterLoadCallback", "RouterLoads"]


class RouterLoads:
    """The load of every `GroupedTopKRouter` of a model, counted by forward hooks in training mode.

    Args:
        model: The model.
        num_devices: Number of devices over which the experts of a layer are split, see [`RouterLoadCallback`].
        scores: Also accumulate the scores of experts, for `importance_cv2` and `score_entropy` of [`RouterLoad`].

    Attributes:
        statistics: Of each router, by the name of its module; empty for a model without one.
    """

    def __init__(self, model: nn.Module, num_devices: int | None = None, scores: bool = True) -> None:
        routers = {name: module for name, module in model.named_modules() if isinstance(module, GroupedTopKRouter)}
        self._scores = scores
        self.statistics: dict[str, RouterStatistics] = {}
        for name, router in routers.items():
            options = router.options
            groups = options.num_expert_groups or options.num_experts
            groups = groups if num_devices is None else num_devices
            self.statistics[name] = RouterStatistics(options.num_experts, groups)
        self._handles = [
            router.register_forward_hook(self._hook(name), with_kwargs=True) for name, router in routers.items()
        ]

    def compute(self, per_layer: bool = False) -> dict[str, float]:
        """Compute the entries of the log over all processes, and reset the statistics."""
        loads = {}
        for name, statistics in self.statistics.items():
            statistics.all_reduce()
            loads[name] = statistics.compute()
            statistics.reset()
        return _log_values(loads, per_layer)

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, name: str) -> Any:
        """Return a forward hook that counts the expert choices of one router."""

        def count(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Tensor, Tensor, Tensor]
        ) -> None:
            if not module.training:
                return
            assert isinstance(module, GroupedTopKRouter)
            logits, _, indices = output
            mask = kwargs.get("token_mask", args[1] if len(args) > 1 else None)
            mask = None if mask is None else mask.reshape(-1)
            scores = normalized_scores(logits.detach(), module.options.scoring, mask) if self._scores else None
            self.statistics[name].update(indices, scores, mask)

        return count


class RouterLoadCallback(TrainerCallback):
    """Log the load of every `GroupedTopKRouter` of a model, over the steps and processes since the last log.

    The following are added to each log entry with a training loss and to the Trainer's history, as defined by
    `RouterLoad`: "router/tokens", "router/imbalance_score", "router/max_violation" and "router/load_entropy", each the
    mean over layers (the second and third also over forward passes), and "router/dead_experts", the sum over layers.
    Only forward passes in training mode count. With gradient checkpointing, "router/tokens" also counts recomputed
    tokens; the other values do not change.

    Trainer's own reporters, such as TensorBoard, run before the callbacks passed to it. For them to see these values,
    add them again after this callback: `trainer.remove_callback(X)`, `trainer.add_callback(X)`.

    Args:
        num_devices: Number of devices over which the experts of a layer are split, in blocks, for the imbalance score.
            None for the router's groups, or for single experts if it has none.
        per_layer: Also log "imbalance_score" and "max_violation" of each layer, as "router/<module>/<name>".

    Raises:
        ValueError: When training begins, if the model has no such router, or `num_devices` does not divide the number
            of experts of a router.
    """

    def __init__(self, num_devices: int | None = None, per_layer: bool = False) -> None:
        self.num_devices, self.per_layer = num_devices, per_layer
        self._loads: RouterLoads | None = None

    @property
    def statistics(self) -> dict[str, RouterStatistics]:
        """Statistics since the last log, by the name of the router's module."""
        return {} if self._loads is None else self._loads.statistics

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Register a forward hook on every router."""
        self._remove_hooks()
        loads = RouterLoads(model, self.num_devices)
        if not loads.statistics:
            raise ValueError(f"`model` must contain a GroupedTopKRouter, got {type(model).__name__} without one.")
        self._loads = loads

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the values to the log entry and reset the statistics."""
        if logs is None or "loss" not in logs or self._loads is None:
            return
        values = self._loads.compute(self.per_layer)
        logs.update(values)
        state.log_history[-1].update(values)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the hooks."""
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        if self._loads is not None:
            self._loads.remove()


def _log_values(loads: dict[str, RouterLoad], per_layer: bool) -> dict[str, float]:
    """The entries added to the log."""
    layers = list(loads.values())
    values = {
        "router/tokens": sum(load.tokens for load in layers) / len(layers),
        "router/imbalance_score": sum(load.batch_imbalance_score for load in layers) / len(layers),
        "router/max_violation": sum(load.batch_max_violation for load in layers) / len(layers),
        "router/load_entropy": sum(load.load_entropy for load in layers) / len(layers),
        "router/dead_experts": float(sum(len(load.dead_experts) for load in layers)),
    }
    if per_layer:
        for name, load in loads.items():
            values[f"router/{name}/imbalance_score"] = load.batch_imbalance_score
            values[f"router/{name}/max_violation"] = load.batch_max_violation
    return values
