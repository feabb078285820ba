"""What a training run consists of: its model, data, collator and Trainer class, made from its settings."""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import TrainingArguments, set_seed
from transformers.integrations import get_reporting_integration_callbacks

from ..parts.modeling_navit_dual_encoder import NaViTDualEncoder
from ..parts.modeling_vlm import VisionLanguageForConditionalGeneration
from .building import build, conversation_texts
from .config import TrainConfig
from .dataset import MixedDataset, PaddedCollator, SampleDataset, SampleWeights, collate_packed, steps_for_tokens
from .dual_encoder import ContrastiveTrainer, PairCollator, PairEncoder, build_dual_encoder
from .encoding import SampleEncoder
from .metrics import MetricsCollator, RunMetrics, task_names
from .optimizers import Rates
from .packed_trainer import PackedTrainer, WeightedPackedTrainer, pack_sampler
from .skipped import SkippedRecords
from .sources import Source, open_source
from .stream import PackStream
from .stream_source import StreamSource


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
        metrics: Scalars of the run for the log, if any.
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
    metrics: RunMetrics | None
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
    model, processor = _build_model(config, sources, weights)
    left_out = SkippedRecords(config.output / "skipped.jsonl")
    datasets: list[SampleDataset] = []
    with first():
        if not config.streaming:
            datasets += [
                _build_dataset(config, one, model, processor, args, left_out, task=task)
                for task, one in enumerate(sources)
            ]
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
    metrics = None
    if config.metrics:
        names = task_names([Path(one.records.name) for one in sources])
        collator, metrics = MetricsCollator(collator), RunMetrics(names, config.capacity)
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
        metrics=metrics,
        left_out=left_out,
    )


def _build_model(config: TrainConfig, sources: list[Source], weights: bool) -> tuple[Any, Any]:
    """The model and its processor; a new tokenizer learns the texts of the sources, of streams those of the first."""
    count = config.tokenizer_records if config.streaming else None
    heads = (islice(one.lines(config.on_error), count) for one in sources)
    texts = chain(config.prompts, *map(conversation_texts, heads))
    if config.kind == "dual_encoder":
        model, processor = build_dual_encoder(config, texts, weights)
    else:
        model, processor = build(config, texts, weights)
        if config.packing:
            _use_packed_attention(model)
    rates = rates_of(config)
    if rates is not None:
        rates.groups(model, [])  # raises for names that match nothing
    return model, processor


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
    task: int = 0,
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
        task=task,
    )


def _build_stream(
    config: TrainConfig, sources: list[Source], model: Any, processor: Any, args: TrainingArguments
) -> PackStream:
    streams = [
        StreamSource(one, _build_encoder(config, one, model, processor), config.seed, task)
        for task, one in enumerate(sources)
    ]
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


def rates_of(config: TrainConfig) -> Rates | None:
    """Learning rates and weight decays of parts; None if all parameters have the same."""
    if not config.learning_rates and not config.weight_decays:
        return None
    return Rates(config.learning_rate, config.weight_decay, config.learning_rates, config.weight_decays)


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
        args = TrainingArguments(**settings, **{**defaults, **config.trainer})
    except TypeError as error:
        raise ValueError(f"`trainer` must contain fields of TrainingArguments only: {error}") from None
    try:
        get_reporting_integration_callbacks(args.report_to)
    except ValueError as error:
        raise ValueError(f"`trainer` report_to={config.trainer['report_to']!r}: {error}") from None
    return args
