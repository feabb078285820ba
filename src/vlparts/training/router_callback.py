"""Logging of how evenly a model's routers use their experts while it is trained."""

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..moe.statistics import RouterLoad, RouterStatistics
from ..parts.moe_losses import normalized_scores
from ..parts.moe_router import GroupedTopKRouter

__all__ = ["RouterLoadCallback"]


class RouterLoadCallback(TrainerCallback):
    """Log the load of every `GroupedTopKRouter` of the model, over the steps and processes since the last log.

    Where a line with a training loss is logged, these are added to it and to the Trainer's history: "router/tokens",
    the means over layers "router/imbalance_score" and "router/max_violation" (both means over forward passes) and
    "router/load_entropy", and the number "router/dead_experts" of all layers. Only passes in training mode count. The
    figures are those of `RouterLoad`. With gradient checkpointing a token is counted each time it is computed, which
    changes "router/tokens" and nothing else.

    Trainer's own reporters, such as TensorBoard, come before the callbacks that it is given. For them to see the
    figures, add them again after this one: `trainer.remove_callback(X)`, `trainer.add_callback(X)`.

    Args:
        num_devices: Devices among which the experts of a layer are divided, in blocks, for the imbalance score; None
            for the router's own groups, or for single experts where it has none.
        per_layer: Log "imbalance_score" and "max_violation" of each layer too, as "router/<module>/<name>".

    Raises:
        ValueError: When training begins, if the model has no such router, or `num_devices` does not divide a router's
            experts.
    """

    def __init__(self, num_devices: int | None = None, per_layer: bool = False) -> None:
        self.num_devices, self.per_layer = num_devices, per_layer
        self.statistics: dict[str, RouterStatistics] = {}
        self._handles: list[RemovableHandle] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Watch the routers."""
        self._stop()
        routers = {name: module for name, module in model.named_modules() if isinstance(module, GroupedTopKRouter)}
        if not routers:
            raise ValueError("RouterLoadCallback needs a model with a GroupedTopKRouter, got one without.")
        self.statistics = {}
        for name, router in routers.items():
            options = router.options
            groups = options.num_expert_groups or options.num_experts
            groups = groups if self.num_devices is None else self.num_devices
            self.statistics[name] = RouterStatistics(options.num_experts, groups)
        for name, router in routers.items():
            self._handles.append(router.register_forward_hook(self._hook(name), with_kwargs=True))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the figures to the line, and begin anew."""
        if logs is None or "loss" not in logs or not self._handles:
            return
        loads = {}
        for name, statistics in self.statistics.items():
            statistics.all_reduce()
            loads[name] = statistics.compute()
            statistics.reset()
        figures = _figures(loads, self.per_layer)
        logs.update(figures)
        state.log_history[-1].update(figures)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as it was."""
        self._stop()

    def _hook(self, name: str) -> Any:
        """A forward hook that counts one router's choices."""

        def count(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Tensor, Tensor, Tensor]
        ) -> None:
            if not module.training:
                return
            assert isinstance(module, GroupedTopKRouter)
            logits, _, indices = output
            mask = kwargs.get("token_mask", args[1] if len(args) > 1 else None)
            mask = None if mask is None else mask.reshape(-1)
            scores = normalized_scores(logits.detach(), module.options.scoring, mask)
            self.statistics[name].update(indices, scores, mask)

        return count

    def _stop(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _figures(loads: dict[str, RouterLoad], per_layer: bool) -> dict[str, float]:
    """What is logged."""
    layers = list(loads.values())
    figures = {
        "router/tokens": sum(load.tokens for load in layers) / len(layers),
        "router/imbalance_score": sum(load.batch_imbalance_score for load in layers) / len(layers),
        "router/max_violation": sum(load.batch_max_violation for load in layers) / len(layers),
        "router/load_entropy": sum(load.load_entropy for load in layers) / len(layers),
        "router/dead_experts": float(sum(len(load.dead_experts) for load in layers)),
    }
    if per_layer:
        for name, load in loads.items():
            figures[f"router/{name}/imbalance_score"] = load.batch_imbalance_score
            figures[f"router/{name}/max_violation"] = load.batch_max_violation
    return figures
