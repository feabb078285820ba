"""Fine-tuning of composed models with transformers' Trainer."""

import logging
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import TrainerCallback, TrainingArguments, set_seed

from ..parts.modeling_navit_dual_encoder import NaViTDualEncoder
from ..parts.modeling_vlm import VisionLanguageForConditionalGeneration
from .building import build, conversation_texts
from .config import TrainConfig
from .dataset import MixedDataset, PaddedCollator, SampleDataset, SampleWeights, collate_packed, steps_for_tokens
from .dual_encoder import (
    VISION,
    ContrastiveTrainer,
    PairCollator,
    PairEncoder,
    build_dual_encoder,
    save_vision_tower,
)
from .encoding import SampleEncoder
from .optimizers import Rates, muon_with_adamw
from .packed_trainer import PackedTrainer, WeightedPackedTrainer, pack_sampler
from .run_folder import check_output, find_checkpoint
from .skipped import SkippedRecords
from .sources import Source, open_source
from .stream import PackStream
from .stream_loader import has_stream, load_stream
from .stream_source import StreamSource

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
        callbacks=callbacks,
        optimizer_cls_and_kwargs=_optimizer_factory(config),
        capacity=config.capacity,
        max_items=config.max_items,
        learning_rate_steps=config.learning_rate_steps,
        rates=_rates(config),
        **run.loss_options,
    )
    if run.skipped and run.args.process_index == 0:
        logger.warning("Skipped %d records. First: %s", len(run.skipped), run.skipped[0])
        for reason in run.skipped:
            run.left_out.add(reason)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.is_world_process_zero():
        save(trainer.accelerator.unwrap_model(trainer.model), run.processor, config.output)
    trainer.accelerator.wait_for_everyone()
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    if run.eval_data is not None and trainer.state.global_step not in evaluated:
        trainer.evaluate()
    skipped = [*dict.fromkeys([*run.skipped, *run.left_out.messages()])]
    return TrainResult(run.model, run.processor, trainer.state.global_step, trainer.state.log_history, skipped)


@dataclass
class Prepared:
    """What a training run consists of, before its Trainer.

    Args:
        model: The model, with gradients for what is trained.
        processor: Its processor.
        args: The Trainer's arguments, with `max_steps` for a number of tokens.
        data: Training samples.
        eval_data: Evaluation samples, if any.
        collator: Makes a batch of packs of samples.
        trainer_class: Class of the Trainer.
        loss_options: Its options for the loss.
        skipped: Error messages of the skipped records.
        left_out: Names the records that are skipped while the model is trained.
    """

    model: VisionLanguageForConditionalGeneration | NaViTDualEncoder
    processor: Any
    args: TrainingArguments
    data: SampleDataset | MixedDataset | PackStream
    eval_data: SampleDataset | None
    collator: Any
    trainer_class: type[Any]
    loss_options: dict[str, Any]
    skipped: list[str]
    left_out: SkippedRecords


def prepare(config: TrainConfig, weights: bool = True) -> Prepared:
    """Build the model, and measure all records of a training run that is not streamed. Nothing is written but caches.

    Args:
        config: The settings.
        weights: False for a model on the meta device, to check a run: folders need no weights.

    Raises:
        RecordError: If a record is invalid and `on_error` is "raise", or if no record is valid.
        ValueError: If a setting is invalid.
    """
    set_seed(config.seed)
    args = _training_arguments(config)
    # A check is run by one process alone.
    first = partial(args.main_process_first, local=False) if weights else nullcontext
    with first():  # others find its caches
        sources = [open_data(config, data, streaming=config.streaming) for data in config.shares]
        eval_source = None if config.eval_data is None else open_data(config, config.eval_data, "eval_data")
    count = config.tokenizer_records if config.streaming else None
    heads = (islice(one.lines(config.on_error), count) for one in sources)
    texts = chain(config.prompts, *map(conversation_texts, heads))
    if config.kind == "dual_encoder":
        model, processor = build_dual_encoder(config, texts, weights)
    else:
        model, processor = build(config, texts, weights)
        if config.packing:
            _use_packed_attention(model)
    rates = _rates(config)
    if rates is not None:
        rates.groups(model, [])  # raises for names that match nothing
    left_out = SkippedRecords(config.output / "skipped.jsonl")
    datasets: list[SampleDataset] = []
    with first():
        if not config.streaming:
            datasets += [_build_dataset(config, one, model, processor, args, left_out) for one in sources]
        eval_data = None
        if eval_source is not None:
            eval_data = _build_dataset(config, eval_source, model, processor, args, left_out, evaluates=True)
    _check_weights(config, sources, datasets)
    data: SampleDataset | MixedDataset | PackStream = (
        datasets[0] if datasets else _build_stream(config, sources, model, processor, args)
    )
    if datasets and isinstance(config.data, dict):
        data = MixedDataset(datasets, [*config.shares.values()], config.seed)
    if config.max_tokens is not None and not isinstance(data, PackStream):
        sampler = pack_sampler(data, config.capacity, config.max_items, args)
        packs = config.gradient_accumulation_steps * args.world_size
        args.max_steps = steps_for_tokens(sampler, data.lengths, packs, config.max_tokens)
    trainer_class, collator, loss_options = _trainer_class(config, processor)
    every = datasets if eval_data is None else [*datasets, eval_data]
    skipped = [reason for one in every for reason in one.skipped]
    return Prepared(
        model=model,
        processor=processor,
        args=args,
        data=data,
        eval_data=eval_data,
        collator=collator,
        trainer_class=trainer_class,
        loss_options=loss_options,
        skipped=skipped,
        left_out=left_out,
    )


def _check_weights(config: TrainConfig, sources: list[Source], datasets: list[SampleDataset]) -> None:
    """Raise ValueError for a `sample_weight_field` in no record, or of a stream in none of the first."""
    count = config.tokenizer_records
    if config.sample_weight_field is None:
        return
    if config.streaming:
        firsts = chain.from_iterable(islice(one.lines("skip"), count) for one in sources)
        found = any(line.weight is not None for line in firsts)
    else:
        found = any(one.weighted for one in datasets)
    if not found:
        which = f"none of the first {count} records" if config.streaming else "no record"
        names = ", ".join(one.records.name for one in sources)
        raise ValueError(f"`sample_weight_field` {config.sample_weight_field!r} is in {which} of {names}.")


def save(model: Any, processor: Any, folder: Path) -> None:
    """Save a trained model and its processor, and of a dual encoder its vision tower in a folder of its own."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if isinstance(model, NaViTDualEncoder):
        save_vision_tower(model, processor, folder / VISION)


def open_data(
    config: TrainConfig, data: Path | Dataset | IterableDataset, argument: str = "data", streaming: bool = False
) -> Source:
    """Open training or evaluation data by the settings; see [`open_source`]."""
    return open_source(
        data,
        streaming=streaming,
        argument=argument,
        columns=config.columns,
        ignore_columns=config.ignore_columns,
        sample_weight_field=config.sample_weight_field,
    )


def _build_dataset(
    config: TrainConfig,
    source: Source,
    model: Any,
    processor: Any,
    args: TrainingArguments,
    left_out: SkippedRecords,
    evaluates: bool = False,
) -> SampleDataset:
    return SampleDataset(
        source,
        _build_encoder(config, source, model, processor),
        config.on_error,
        config.cache,
        progress=not args.disable_tqdm and args.process_index == 0,
        # The evaluation loss is a mean over all tokens, so none may be left out later.
        check_pixels=config.check_pixels or (evaluates and config.on_error == "skip"),
        num_proc=config.num_proc,
        left_out=left_out,
    )


def _build_stream(
    config: TrainConfig, sources: list[Source], model: Any, processor: Any, args: TrainingArguments
) -> PackStream:
    streams = [StreamSource(one, _build_encoder(config, one, model, processor), config.seed) for one in sources]
    return PackStream(
        streams,
        config.capacity,
        config.max_items,
        weights=[*config.shares.values()],
        shuffle_buffer=config.shuffle_buffer,
        seed=config.seed,
        process=args.process_index,
        processes=args.world_size,
        on_error=config.on_error,
    )


def _build_encoder(config: TrainConfig, source: Source, model: Any, processor: Any) -> Any:
    root = source.records.root
    if config.kind == "dual_encoder":
        longest = getattr(model.config.text_config, "max_position_embeddings", None)
        return PairEncoder(processor, root, config.capacity, longest, config.max_image_pixels)
    return SampleEncoder(
        processor,
        root,
        config.on_outside,
        config.coordinate_format,
        max_length=config.capacity,
        max_image_pixels=config.max_image_pixels,
        dpi=config.dpi,
        template=config.template,
        prompts=config.prompts,
        seed=config.seed,
    )


def _use_packed_attention(model: VisionLanguageForConditionalGeneration) -> None:
    text = model.model.language_model
    if not text._supports_attention_backend:
        raise ValueError(
            f"`text` {type(text).__name__} does not support custom attention functions, so its samples cannot be "
            "packed; set packing=False."
        )
    model.set_attn_implementation({"text_config": "vlparts_packed"})


def _trainer_class(config: TrainConfig, processor: Any) -> tuple[type[Any], Any, dict[str, Any]]:
    """The Trainer class, its collator, and its options for the loss in the settings."""
    pad = processor.tokenizer.pad_token_id or 0
    if config.kind == "dual_encoder":
        return ContrastiveTrainer, PairCollator(pad), {}
    collator = collate_packed if config.packing else PaddedCollator(pad)
    if config.loss is None and config.sample_weight_field is None:
        return PackedTrainer, collator, {}
    options = {"preset": config.loss or "token", "mix": config.mix}
    return WeightedPackedTrainer, SampleWeights(collator), options


def _rates(config: TrainConfig) -> Rates | None:
    if not config.learning_rates and not config.weight_decays:
        return None
    return Rates(config.learning_rate, config.weight_decay, config.learning_rates, config.weight_decays)


def _optimizer_factory(config: TrainConfig) -> tuple[Any, dict[str, Any]] | None:
    """Trainer's `optimizer_cls_and_kwargs` for Muon: a function that returns the factory, and its arguments."""
    if config.optimizer == "adamw":
        return None
    options = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "rates": _rates(config)}
    return lambda: muon_with_adamw, options


def _training_arguments(config: TrainConfig) -> TrainingArguments:
    evaluation = {"eval_strategy": "steps", "eval_steps": config.eval_steps} if config.eval_data else {}
    settings = {
        "output_dir": str(config.output),
        "per_device_train_batch_size": 1,  # one pack
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
        **({"ignore_data_skip": True} if config.streaming else {}),  # the stream itself continues where it was
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
            raise ValueError(f"`trainer` must not contain {name!r}, which has its own setting.")
    if config.learning_rate_steps and "lr_scheduler_type" in config.trainer:
        raise ValueError(
            "`learning_rate_steps` replaces 'lr_scheduler_type' in `trainer`; expected only one of the two."
        )
    try:
        return TrainingArguments(**settings, **{**defaults, **config.trainer})
    except TypeError as error:
        raise ValueError(f"`trainer` must contain fields of TrainingArguments only: {error}") from None
