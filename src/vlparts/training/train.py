"""Fine-tuning of composed models with transformers' Trainer."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import parse_flag_from_env
from torch import Tensor
from transformers import TrainerCallback

from ..parts.modeling_navit_dual_encoder import NaViTDualEncoder
from ..parts.modeling_vlm import VisionLanguageForConditionalGeneration
from ..run_log import append_entry, write_log
from .config import TrainConfig
from .dual_encoder import VISION, save_vision_tower
from .optimizers import muon_with_adamw
from .preparation import prepare, rates_of
from .run_folder import check_output, find_checkpoint
from .stream import PackStream
from .stream_loader import has_stream, load_stream

logger = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """Result of a training run.

    Args:
        model: The trained model, composed or a dual encoder.
        processor: Its processor.
        steps: Total number of optimizer steps.
        log: The Trainer's log history, one mapping per entry.
        skipped: Error messages of the skipped records.
    """

    model: VisionLanguageForConditionalGeneration | NaViTDualEncoder
    processor: Any
    steps: int
    log: list[dict[str, Any]]
    skipped: list[str] = field(default_factory=list)


def train(config: TrainConfig, callbacks: list[TrainerCallback] | None = None) -> TrainResult:
    """Train a composed model or a dual encoder and save it with its processor and code to `config.output`.

    Runs in one process, or in several under `accelerate launch` or `torchrun`. With `resume`, an interrupted run
    continues from its last complete checkpoint, with the same losses as an uninterrupted run, or starts anew if it has
    only unfinished ones.

    Args:
        config: The settings.
        callbacks: Further callbacks for the Trainer.

    Returns:
        The model, its processor, and the log.

    Raises:
        RecordError: If a record is invalid and `on_error` is "raise", or if no record is valid.
        ValueError: If a setting is invalid, if `output` cannot be a folder, if it contains checkpoints and `resume` is
            off, or if there is no checkpoint to resume from.
    """
    check_output(config.output)
    checkpoint = find_checkpoint(config)
    run = prepare(config)
    if checkpoint is None:
        if run.args.process_index == 0:
            run.left_out.clear()  # of a run before its first checkpoint
    elif isinstance(run.data, PackStream):
        load_stream(run.data, checkpoint, run.args.dataloader_num_workers)
    elif has_stream(checkpoint):
        raise ValueError(f"`output` {config.output} has checkpoints of a run with `streaming`; set it to resume.")
    trainer = run.trainer_class(
        model=run.model,
        args=run.args,
        train_dataset=run.data,
        eval_dataset=run.eval_data,
        data_collator=run.collator,
        processing_class=run.processor,
        callbacks=[*(callbacks or []), _RunLog()],
        optimizer_cls_and_kwargs=_optimizer_factory(config),
        capacity=config.capacity,
        max_items=config.max_items,
        learning_rate_steps=config.learning_rate_steps,
        rates=rates_of(config),
        metrics=run.metrics,
        **run.loss_options,
    )
    if run.skipped and run.args.process_index == 0:
        logger.warning("Skipped %d records. First: %s", len(run.skipped), run.skipped[0])
        for reason in run.skipped:
            run.left_out.add(reason)
    _check_sharding(trainer)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # all processes gather sharded weights
    if trainer.is_world_process_zero():
        save(trainer.accelerator.unwrap_model(trainer.model), run.processor, config.output, state)
    trainer.accelerator.wait_for_everyone()
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    if run.eval_data is not None and trainer.state.global_step not in evaluated:
        trainer.evaluate()
    skipped = [*dict.fromkeys([*run.skipped, *run.left_out.messages()])]
    return TrainResult(run.model, run.processor, trainer.state.global_step, trainer.state.log_history, skipped)


class _RunLog(TrainerCallback):
    """Writes the Trainer's log to the folder of the run, entry by entry; a resumed run keeps those before it."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_log(Path(args.output_dir), state.log_history)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            append_entry(Path(args.output_dir), state.log_history[-1])


def save(model: Any, processor: Any, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Save a trained model and its processor, and of a dual encoder its vision tower in a folder of its own.

    Args:
        model: The model.
        processor: Its processor.
        folder: The folder.
        state: The whole weights; needed for a model whose parameters are sharded.
    """
    # A copy, since `save_pretrained` takes the weights out of what it is given.
    model.save_pretrained(folder, state_dict=None if state is None else {**state})
    processor.save_pretrained(folder)
    if isinstance(model, NaViTDualEncoder):
        save_vision_tower(model, processor, folder / VISION, state=state)


def _check_sharding(trainer: Any) -> None:
    """Raise ValueError if FSDP or DeepSpeed was asked for and is not in use, or is another than what is tested."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    wanted = trainer.args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")
    if wanted and plugin is None:
        raise ValueError(
            "`trainer` fsdp, or FSDP in the configuration of accelerate, requires several processes on accelerators, "
            f"got {trainer.args.world_size} on {trainer.args.device.type}, for which accelerate does not shard."
        )
    if plugin is not None and plugin.fsdp_version != 2:
        raise ValueError(f"FSDP must have the version 2 (`fsdp_version: 2`), got {plugin.fsdp_version}.")


def _optimizer_factory(config: TrainConfig) -> tuple[Any, dict[str, Any]] | None:
    """Trainer's `optimizer_cls_and_kwargs` for Muon: a function that returns the factory, and its arguments."""
    if config.optimizer == "adamw":
        return None
    options = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "rates": rates_of(config)}
    return lambda: muon_with_adamw, options
