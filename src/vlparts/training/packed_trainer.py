"""Trainers over packs of samples, with the mean over tokens or the weighted loss."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, unwrap_peft_model

from . import sharded_checkpoints
from .dataset import PackSampler
from .metrics import RunMetrics, without_facts
from .optimizers import Rates
from .step_balance import StepBalance, balances_sequences
from .stream import PackStream
from .stream_loader import EpochOfSteps, StreamLoader, stream_loader
from .weighted_inputs import WeightedLabels, ignore_repeated
from .weighted_loss import WeightedLossTrainer

__all__ = ["PackTrainer", "PackedTrainer", "WeightedPackedTrainer", "pack_sampler"]


def pack_sampler(data: Any, capacity: int, max_items: int | None, args: TrainingArguments) -> PackSampler:
    """The sampler of training packs.

    Args:
        data: A [`SampleDataset`][vlparts.training.dataset.SampleDataset] or a
            [`MixedDataset`][vlparts.training.dataset.MixedDataset].
        capacity: Tokens of a pack.
        max_items: Maximum number of samples in a pack; None for no limit.
        args: The Trainer's arguments, with the seed and the number of processes.
    """
    return PackSampler(data.lengths, capacity, max_items, args.seed, processes=args.world_size, mixture=data.mixture)


class PackTrainer(Trainer):
    """transformers' Trainer with packs of samples as batches; see [`PackedTrainer`].

    The training data may be a [`PackStream`][vlparts.training.stream.PackStream], whose state is in each checkpoint:
    [`load_stream`][vlparts.training.stream_loader.load_stream] lets it continue from one, before `train` does.

    Args:
        model: The model.
        *args: Passed to Trainer.
        capacity: Tokens of a pack.
        max_items: Maximum number of samples in a pack; None for no limit.
        learning_rate_steps: Fractions of all steps, and the factors of the learning rate from there on, in place of
            Trainer's schedule.
        rates: Learning rates and weight decays of parts; None for those of Trainer's arguments.
        metrics: Adds scalars of the run to every log entry with a training loss, before trackers see it; its batches
            are those of a [`MetricsCollator`][vlparts.training.metrics.MetricsCollator].
        **kwargs: Passed to Trainer.
    """

    optimizer: Any
    lr_scheduler: Any
    _stream_loader: StreamLoader | None = None

    def __init__(
        self,
        model: Any,
        *args: Any,
        capacity: int,
        max_items: int | None = None,
        learning_rate_steps: Sequence[tuple[float, float]] = (),
        rates: Rates | None = None,
        metrics: RunMetrics | None = None,
        **kwargs: Any,
    ) -> None:
        self._rates = rates
        self._metrics = metrics
        self._capacity = capacity
        self._max_items = max_items
        self._learning_rate_steps = learning_rate_steps
        use_cache = vars(model.config).get("use_cache")
        super().__init__(model, *args, **kwargs)
        # Trainer sets use_cache=False in the configuration and every checkpoint; `compute_loss` passes it instead.
        vars(model.config).pop("use_cache", None)
        if use_cache is not None:
            model.config.use_cache = use_cache
        if metrics is not None:
            self.add_callback(metrics)
        if isinstance(self.train_dataset, PackStream):
            self.add_callback(EpochOfSteps)

    def get_train_dataloader(self) -> Any:
        """Return Trainer's loader, or that of a stream, in which each process has its own data."""
        if not isinstance(self.train_dataset, PackStream):
            return super().get_train_dataloader()
        if self.get_tp_size() * self.get_cp_size() * self.get_sp_size() > 1:
            raise ValueError(
                "A stream must not be used with tensor, context or sequence parallelism: each process reads its own "
                "data."
            )
        self._stream_loader = stream_loader(self.train_dataset, self.data_collator, self.args)
        return self._stream_loader

    def _init_training_state(self, max_steps: int, updates: int, epochs: int, *others: Any) -> tuple[int, int]:
        """Return the epochs and batches that are done: all, if a run that is resumed has taken its last step."""
        done: tuple[int, int] = super()._init_training_state(max_steps, updates, epochs, *others)
        # Trainer takes one more step unless that was the last of an epoch.
        return (epochs, 0) if self.state.global_step >= max_steps else done

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint, which Trainer's own state completes; that of the streams of all processes comes first."""
        if self._stream_loader is not None:
            run = Path(self._get_output_dir(trial=trial))
            self._stream_loader.save(run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)

    def _get_train_sampler(self, train_dataset: Any = None) -> PackSampler:
        data = train_dataset if train_dataset is not None else self.train_dataset
        return pack_sampler(data, self._capacity, self._max_items, self.args)

    def _get_eval_sampler(self, eval_dataset: Any) -> PackSampler:
        world = self.args.world_size
        return PackSampler(eval_dataset.lengths, self._capacity, self._max_items, shuffle=False, processes=world)

    def create_optimizer(self, model: Any = None) -> Any:
        """Create Trainer's optimizer, with the rates of parts if there are any."""
        if self.optimizer is None and self._rates is not None and self.optimizer_cls_and_kwargs is None:
            trained = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(trained))
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            if {"params", "model", "optimizer_dict"} & set(options):
                raise ValueError(
                    f"`trainer` optim={self.args.optim!r} takes no groups of parameters; expected one that does, such "
                    "as 'adamw_torch', for `learning_rates` and `weight_decays`."
                )
            groups = self._rates.groups(trained, [(one, name in decayed) for name, one in trained.named_parameters()])
            self.optimizer = optimizer_class(groups, **options)
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create Trainer's scheduler, or with `learning_rate_steps` one by steps, with Trainer's warmup."""
        if self.lr_scheduler is None and self._learning_rate_steps:
            steps = [(fraction * num_training_steps, factor) for fraction, factor in self._learning_rate_steps]
            warmup = self.args.get_warmup_steps(num_training_steps)

            def factor_at(step: int) -> float:
                reached = [factor for start, factor in steps if step >= start]
                return min(1.0, step / max(warmup, 1)) * (reached[-1] if reached else 1.0)

            chosen = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(chosen, factor_at)
        return super().create_scheduler(num_training_steps, optimizer)

    @property
    def saves_whole(self) -> bool:
        """Whether FSDP2 shards the model, and checkpoints hold it whole, as those of one process."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        return plugin is not None and plugin.fsdp_version == 2 and "FULL" in str(plugin.state_dict_type)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.saves_whole:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        sharded_checkpoints.save_optimizer(self.model, self.optimizer, Path(output_dir))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.saves_whole:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif model is not None:  # sharded; Trainer calls this before, too
            sharded_checkpoints.load_model(model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.saves_whole:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        sharded_checkpoints.load_optimizer(self.model, self.optimizer, Path(checkpoint))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute Trainer's loss with use_cache=False."""
        loss, outputs = super().compute_loss(model, {**inputs, "use_cache": False}, True, num_items_in_batch)
        if self._metrics is not None:
            self._metrics.add_losses(outputs.get("logits"), inputs.get("labels"), inputs.get("loss_weights"))
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Return the packs of a step, which the metrics count."""
        batches = epoch_iterator if self._metrics is None else self._metrics.watch(epoch_iterator)
        return super().get_batch_samples(batches, num_batches, device)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Prepare the inputs as Trainer does, without what is for the metrics, which evaluation does not count."""
        return super()._prepare_inputs(without_facts(inputs))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as Trainer does, with the metrics in entries with a training loss."""
        if self._metrics is not None and "loss" in logs:
            logs.update(self._metrics.compute(self.args.device))
        super().log(logs, start_time)

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """Run Trainer's evaluation loop; counts the packs of this process, see `_next_pack_counts`."""
        self._packs_left = len(self._get_eval_sampler(dataloader.dataset)) - self.args.process_index
        self.gather_function = self.accelerator.gather  # `gather_for_metrics` assumes samples, not packs
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def _next_pack_counts(self) -> bool:
        """Whether the next evaluation pack counts for this process.

        If the packs cannot be divided evenly, the last processes get packs repeated that others evaluate.
        """
        counts = self._packs_left > 0
        self._packs_left -= self.args.world_size
        return counts


class PackedTrainer(PackTrainer):
    """transformers' Trainer over packs of samples; the loss is the mean over all tokens with loss.

    The balance loss of experts is averaged over the packs of a step, or over its sequences with
    `router_aux_loss_form="sequence"`, and is not part of the evaluation loss.

    Args:
        model: The model.
        *args: Passed to Trainer.
        capacity: Tokens of a pack.
        max_items: Maximum number of samples in a pack; None for no limit.
        **kwargs: Further arguments of [`PackTrainer`], and of Trainer.
    """

    _balance: StepBalance | None = None

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Return the packs of a step, after counting their sequences if the balance loss is a mean over them."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        model, self._balance = self._plain_model(), None
        if balances_sequences(model):
            self._balance = StepBalance(model)
            for batch in batches:
                self._balance.count(batch)
            self._balance.all_reduce(device)
        return batches, count

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute Trainer's loss, with the share of the pack in the balance loss instead of all of it per pack."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if num_items_in_batch is not None:
            processes = self.accelerator.num_processes
            factor = processes if self.args.average_tokens_across_devices else 1
            # Gradients are averaged over processes.
            share = 1 / self.current_gradient_accumulation_steps
            if self._balance is not None:
                share = self._balance.share(inputs) * processes
            loss = loss - self._balance_loss(outputs) * (factor - share)
        return (loss, outputs) if return_outputs else loss

    def _plain_model(self) -> Any:
        """The model without wrappers."""
        return unwrap_peft_model(self.accelerator.unwrap_model(self.model))

    def _balance_loss(self, outputs: Any) -> Tensor | float:
        """The balance loss in the model's loss, with its coefficient; 0 without experts."""
        aux_loss = outputs.get("aux_loss")
        config = self._plain_model().config.get_text_config()
        return 0.0 if aux_loss is None else aux_loss * config.router_aux_loss_coef

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """Run Trainer's evaluation loop, with the loss as the mean over all tokens instead of over packs."""
        self._scale = len(dataloader) * self.args.world_size / dataloader.dataset.targets
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """Sum the losses of a pack, scaled so that the mean over packs is the mean over all tokens."""
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**self._prepare_inputs(inputs), use_cache=False, num_items_in_batch=1)
        loss = outputs.loss - self._balance_loss(outputs)
        return loss * (self._scale if self._next_pack_counts() else 0.0), None, None


class WeightedPackedTrainer(WeightedLossTrainer, PackTrainer):
    """transformers' Trainer over packs of samples, with the weighted loss.

    Args:
        model: The model.
        *args: Passed to Trainer.
        capacity: Tokens of a pack.
        max_items: Maximum number of samples in a pack; None for no limit.
        **kwargs: Further arguments of [`PackTrainer`] and of [`WeightedLossTrainer`].
    """

    def _without_repeated(self, targets: WeightedLabels) -> WeightedLabels:
        return targets if self._next_pack_counts() else ignore_repeated(targets, 0, targets.labels.shape[0])
