"""The training run itself."""

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from ..parts.modeling_vlm import VisionLanguageForConditionalGeneration
from ..parts.processing_vlm import VisionLanguageProcessor
from .building import build, conversation_texts
from .config import TrainConfig
from .dataset import PaddedCollator, SampleDataset, SampleWeights, collate_packed
from .encoding import SampleEncoder
from .optimizers import muon_with_adamw
from .packed_trainer import PackedTrainer, WeightedPackedTrainer
from .records import RecordFile, read_records

logger = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """What came of a run.

    Args:
        model: The trained model.
        processor: Its processor.
        steps: Optimiser steps done in all.
        log: The Trainer's log, one mapping for each line.
        skipped: Reasons of the records that were left out.
    """

    model: VisionLanguageForConditionalGeneration
    processor: VisionLanguageProcessor
    steps: int
    log: list[dict[str, Any]]
    skipped: list[str] = field(default_factory=list)


def train(config: TrainConfig, callbacks: list[TrainerCallback] | None = None) -> TrainResult:
    """Fine-tune a composed model and save it, with its processor and its code, in `config.output`.

    Runs on one process, or on several under `accelerate launch` or `torchrun`. An interrupted run goes on from its
    last checkpoint with `resume`, with the same losses as a run that was not interrupted.

    Args:
        config: The settings.
        callbacks: Further callbacks for the Trainer.

    Returns:
        The model, its processor, and the log.

    Raises:
        RecordError: If a record cannot be used and `on_error` is "raise", or if none is left.
        ValueError: If a setting makes no sense, if `output` holds checkpoints and `resume` is off, or if there is
            nothing to resume.
    """
    checkpoint = _checkpoint(config)
    set_seed(config.seed)
    records = read_records(config.data, config.on_error, sample_weight_field=config.sample_weight_field)
    if config.sample_weight_field is not None and all(line.weight is None for line in records.lines):
        raise ValueError(f"`sample_weight_field` {config.sample_weight_field!r} stands in no record of {config.data}.")
    model, processor = build(config, conversation_texts(records))
    if config.packing:
        _use_packed_attention(model)

    args = _arguments(config)
    data = _dataset(config, records, processor, args)
    eval_records = None
    if config.eval_data:
        eval_records = read_records(config.eval_data, config.on_error, "eval_data", config.sample_weight_field)
    eval_data = _dataset(config, eval_records, processor, args) if eval_records else None
    collator = collate_packed if config.packing else PaddedCollator(processor.tokenizer.pad_token_id or 0)
    trainer_class, loss_options = _loss(config)
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=eval_data,
        data_collator=SampleWeights(collator) if loss_options else collator,
        processing_class=processor,
        callbacks=callbacks,
        optimizer_cls_and_kwargs=_optimizer(config),
        capacity=config.capacity,
        max_items=config.max_items,
        **loss_options,
    )
    skipped = records.skipped + (eval_records.skipped if eval_records else [])
    if skipped and args.process_index == 0:
        logger.warning("%d records skipped; the first: %s", len(skipped), skipped[0])
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.is_world_process_zero():
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(config.output)
        processor.save_pretrained(config.output)
    trainer.accelerator.wait_for_everyone()
    evaluated = [line["step"] for line in trainer.state.log_history if "eval_loss" in line]
    if eval_data is not None and trainer.state.global_step not in evaluated:
        trainer.evaluate()
    return TrainResult(model, processor, trainer.state.global_step, trainer.state.log_history, skipped)


def _dataset(
    config: TrainConfig, records: RecordFile, processor: VisionLanguageProcessor, args: TrainingArguments
) -> SampleDataset:
    encoder = SampleEncoder(
        processor,
        records.path.parent,
        config.on_outside,
        config.coordinate_format,
        max_length=config.capacity,
    )
    show = not args.disable_tqdm and args.process_index == 0
    return SampleDataset(records, encoder, config.on_error, config.cache, progress=show)


def _checkpoint(config: TrainConfig) -> Path | None:
    """The last checkpoint, if the run is to go on from one."""
    names = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in config.output.glob("checkpoint-*"))
    found = {int(match[1]): path for match, path in names if match}
    if not config.resume:
        if found:
            raise ValueError(f"`output` {config.output} holds checkpoints; pass resume, or name another folder.")
        return None
    # Trainer writes its state last: a run that was killed while it saved has left none.
    whole = [step for step, path in found.items() if (path / TRAINER_STATE_NAME).is_file()]
    if not whole:
        raise ValueError(f"`output` {config.output} holds no checkpoint to resume from.")
    return found[max(whole)]


def _use_packed_attention(model: VisionLanguageForConditionalGeneration) -> None:
    text = model.model.language_model
    if not text._supports_attention_backend:
        raise ValueError(
            f"`text` {type(text).__name__} does not take other attention functions, so its samples cannot be packed; "
            "switch packing off."
        )
    model.set_attn_implementation({"text_config": "vlparts_packed"})


def _loss(config: TrainConfig) -> tuple[type[Any], dict[str, Any]]:
    """The Trainer for the loss that is asked for, and its options; none for the mean over tokens."""
    if config.loss is None and config.sample_weight_field is None:
        return PackedTrainer, {}
    return WeightedPackedTrainer, {"preset": config.loss or "token", "mix": config.mix}


def _optimizer(config: TrainConfig) -> tuple[Any, dict[str, Any]] | None:
    """What Trainer takes for an optimizer that it does not know: a factory of factories, and its arguments."""
    if config.optimizer == "adamw":
        return None
    return lambda: muon_with_adamw, {"lr": config.learning_rate, "weight_decay": config.weight_decay}


def _arguments(config: TrainConfig) -> TrainingArguments:
    evaluation = {"eval_strategy": "steps", "eval_steps": config.eval_steps} if config.eval_data else {}
    settings = {
        "output_dir": str(config.output),
        "per_device_train_batch_size": 1,  # pack
        "per_device_eval_batch_size": 1,
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps,
        "learning_rate": config.learning_rate,
        "weight_decay": config.weight_decay,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "seed": config.seed,
        "save_steps": config.save_steps,
        "logging_steps": config.logging_steps,
        **evaluation,
    }
    defaults = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": config.warmup_ratio,
        "save_total_limit": 2,
        "report_to": "none",
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "include_num_input_tokens_seen": "no",
    }
    for name in config.trainer:
        if name in settings:
            raise ValueError(f"`trainer` must not hold {name!r}, which has a setting of its own.")
    try:
        return TrainingArguments(**settings, **{**defaults, **config.trainer})
    except TypeError as error:
        raise ValueError(f"`trainer` has a field that TrainingArguments does not take: {error}") from None
