"""transformers' Trainer over packs of samples, with the mean over tokens or with the weighted loss."""

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from .dataset import PackSampler
from .weighted_inputs import WeightedLabels, without_samples
from .weighted_loss import WeightedLossTrainer

__all__ = ["PackedTrainer", "WeightedPackedTrainer"]


class _PackTrainer(Trainer):
    """transformers' Trainer with packs of samples as batches.

    Args:
        model: The model.
        *args: As for Trainer.
        capacity: Tokens of a pack.
        max_items: Largest number of samples in a pack.
        **kwargs: As for Trainer.
    """

    def __init__(self, model: Any, *args: Any, capacity: int, max_items: int | None = None, **kwargs: Any) -> None:
        self._capacity = capacity
        self._max_items = max_items
        use_cache = vars(model.config).get("use_cache")
        super().__init__(model, *args, **kwargs)
        # Trainer switches the cache off in the configuration, and so in every checkpoint; see `compute_loss`.
        vars(model.config).pop("use_cache", None)
        if use_cache is not None:
            model.config.use_cache = use_cache

    def _get_train_sampler(self, train_dataset: Any = None) -> PackSampler:
        data, world = train_dataset if train_dataset is not None else self.train_dataset, self.args.world_size
        return PackSampler(data.lengths, self._capacity, self._max_items, self.args.seed, processes=world)

    def _get_eval_sampler(self, eval_dataset: Any) -> PackSampler:
        world = self.args.world_size
        return PackSampler(eval_dataset.lengths, self._capacity, self._max_items, shuffle=False, processes=world)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Trainer's, without a cache of keys and values that nobody reads."""
        return super().compute_loss(model, {**inputs, "use_cache": False}, *args, **kwargs)

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, which counts the packs that are left for this process."""
        self._packs_left = len(self._get_eval_sampler(dataloader.dataset)) - self.args.process_index
        self.gather_function = self.accelerator.gather  # the other one counts samples, not packs
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def _next_pack_counts(self) -> bool:
        """Whether the next pack of an evaluation is this process' own.

        Where the processes cannot share the packs evenly, the last ones get packs again that others had.
        """
        counts = self._packs_left > 0
        self._packs_left -= self.args.world_size
        return counts


class PackedTrainer(_PackTrainer):
    """transformers' Trainer over packs of samples, with the mean over the tokens of all answers.

    Args:
        model: The model.
        *args: As for Trainer.
        capacity: Tokens of a pack.
        max_items: Largest number of samples in a pack.
        **kwargs: As for Trainer.
    """

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, whose mean over packs becomes the mean over the tokens of all answers."""
        self._share = len(dataloader) * self.args.world_size / dataloader.dataset.targets
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """The sum of a pack's losses, scaled such that the mean over packs is the mean over all tokens."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = model(**self._prepare_inputs(inputs), use_cache=False, num_items_in_batch=1).loss
        return loss * (self._share if self._next_pack_counts() else 0.0), None, None


class WeightedPackedTrainer(WeightedLossTrainer, _PackTrainer):
    """transformers' Trainer over packs of samples, with the weighted loss.

    Args:
        model: The model.
        *args: As for Trainer.
        capacity: Tokens of a pack.
        max_items: Largest number of samples in a pack.
        **kwargs: As for [`WeightedLossTrainer`].
    """

    def _counted(self, found: WeightedLabels) -> WeightedLabels:
        return found if self._next_pack_counts() else without_samples(found, 0, found.labels.shape[0])
