"""The DataLoader of a stream of packs, and its state in the checkpoints of a Trainer."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .encoding import Sample
from .skipped import SkippedRecords
from .stream import PackStream, StreamedPack

__all__ = ["EpochOfSteps", "StreamLoader", "has_stream", "load_stream", "stream_loader"]

_FILE = "stream_{}.json"  # one for each process


class StreamLoader(DataLoader[Any]):
    """Collates each pack of a stream to a batch, and keeps the state of the stream after the batches that were taken.

    The states travel with the packs, so those that workers have prepared ahead do not count. It is not passed to
    `accelerator.prepare`: the stream of each process has its own data.

    Args:
        stream: The stream. Its `states` and `first` are updated with each batch.
        collator: Collates a list of packs.
        skipped: Takes the broken records that were skipped.
        workers: Number of worker processes; 0 to load in this one.
        **options: Passed to DataLoader.
    """

    def __init__(
        self,
        stream: PackStream,
        collator: Callable[[list[list[Sample]]], dict[str, Any]],
        skipped: SkippedRecords,
        workers: int = 0,
        **options: Any,
    ) -> None:
        self.stream = stream
        self.skipped = skipped
        generator = torch.Generator()  # so that a new iterator does not draw from the global one
        collate: Any = _Collate(collator)  # takes one pack, as there is no batch size
        super().__init__(
            stream, batch_size=None, collate_fn=collate, num_workers=workers, generator=generator, **options
        )

    def __iter__(self) -> Any:
        for batch, pack in super().__iter__():
            if pack.error is not None:
                raise pack.error
            self.stream.states[pack.stream] = pack.state
            self.stream.first = (pack.stream + 1) % max(self.num_workers, 1)
            for message in pack.skipped:
                self.skipped.add(message)
            yield batch

    def save(self, checkpoint: Path) -> None:
        """Write the state of the stream of this process to the folder of a checkpoint, in JSON."""
        content = {"settings": _settings(self.stream, self.num_workers), "first": self.stream.first}
        content["streams"] = [self.stream.states.get(index) for index in range(max(self.num_workers, 1))]
        path = checkpoint / _FILE.format(self.stream.process)
        checkpoint.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".scratch")
        scratch.write_text(json.dumps(content), encoding="utf-8")
        scratch.replace(path)


class _Collate:
    """Replaces the samples of a pack by their batch."""

    def __init__(self, collator: Callable[[list[list[Sample]]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, pack: StreamedPack) -> tuple[dict[str, Any], StreamedPack]:
        batch = self.collator([pack.samples]) if pack.samples else {}
        return batch, replace(pack, samples=[])


def stream_loader(stream: PackStream, collator: Any, args: TrainingArguments) -> StreamLoader:
    """The loader of a stream for a Trainer.

    Args:
        stream: The stream of this process.
        collator: The Trainer's collator.
        args: Its arguments.

    Raises:
        ValueError: If arguments would lose, repeat or reorder data of a stream.
    """
    accelerator: Any = args.accelerator_config
    for name, value, expected in (
        ("ignore_data_skip", args.ignore_data_skip, True),  # the stream continues where it was
        ("dataloader_in_order", args.dataloader_in_order, True),
        ("dispatch_batches", accelerator.dispatch_batches or False, False),
        ("split_batches", accelerator.split_batches, False),
    ):
        if value is not expected:
            raise ValueError(f"`{name}` must be {expected} in the Trainer's arguments for a stream, got {value}.")
    return StreamLoader(
        stream,
        collator,
        SkippedRecords(Path(str(args.output_dir)) / "skipped.jsonl"),
        args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        prefetch_factor=args.dataloader_prefetch_factor,
    )


def has_stream(checkpoint: Path) -> bool:
    """Whether a checkpoint has the state of a stream."""
    return (checkpoint / _FILE.format(0)).exists()


def load_stream(stream: PackStream, checkpoint: Path, workers: int) -> None:
    """Let a stream continue from a checkpoint.

    Args:
        stream: The stream of this process.
        checkpoint: The folder of the checkpoint.
        workers: Number of DataLoader workers.

    Raises:
        ValueError: If the checkpoint has no state for it, or that of a stream with other settings; names these.
    """
    path = checkpoint / _FILE.format(stream.process)
    if not path.exists():
        raise ValueError(
            f"`output`: {checkpoint} has no {path.name}, the state of the stream of process {stream.process + 1}; "
            "expected the checkpoint of a run with `streaming` and as many processes."
        )
    content = json.loads(path.read_text(encoding="utf-8"))
    found, settings = content["settings"], json.loads(json.dumps(_settings(stream, workers)))
    names = [name for name in {**found, **settings} if found.get(name) != settings.get(name)]
    if names:
        changes = "; ".join(f"{name}: {found.get(name)!r:.80}, now {settings.get(name)!r:.80}" for name in names)
        raise ValueError(
            f"`output`: {checkpoint} is of a run with other settings of its stream ({changes}). Repeat that run, or "
            "choose another folder."
        )
    stream.states = {index: state for index, state in enumerate(content["streams"]) if state is not None}
    stream.first = content["first"]


def _settings(stream: PackStream, workers: int) -> dict[str, Any]:
    return {**stream.settings(), "dataloader_num_workers": max(workers, 1)}


class EpochOfSteps(TrainerCallback):
    """Sets the epoch in the log of a stream, which has one, to the fraction of the steps that are done."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the epoch."""
        state.epoch = state.global_step / state.max_steps
