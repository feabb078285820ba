"""Datasets, samplers and collators of encoded samples, packed to a fixed capacity or padded."""

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from tqdm.auto import tqdm
from transformers import DataCollatorWithFlattening

from ..parts.utils import IGNORE_INDEX
from .bins import plan_packing
from .encoding import Sample, SampleEncoder, join_images
from .images.balance import split_packs
from .records import Line, RecordError, RecordFile


class SampleDataset(Dataset):
    """Samples of a record file, encoded on access.

    Every record is also encoded once at construction, so that broken records are found before training starts and
    lengths are known.

    Args:
        records: The record file.
        encoder: Encodes a record to a sample.
        on_error: "raise" on a record that cannot be encoded, or "skip" it and append the reason to `records.skipped`.
        cache: Keep the encoded samples in memory.
        progress: Show a progress bar.

    Attributes:
        lengths: Tokens of each sample.
        targets: Number of tokens with loss, over all samples.

    Raises:
        RecordError: If a record cannot be encoded and `on_error` is "raise", or if no record is usable.
    """

    def __init__(
        self,
        records: RecordFile,
        encoder: SampleEncoder,
        on_error: str = "raise",
        cache: bool = False,
        progress: bool = True,
    ) -> None:
        self.records = records
        self.encoder = encoder
        self.lines: list[Line] = []
        self.lengths: list[int] = []
        self.targets = 0
        self._cache: list[Sample] | None = [] if cache else None
        for line in tqdm(records.lines, desc=f"reading {records.path.name}", disable=not progress, leave=False):
            try:
                sample = self._encode(line)
            except RecordError as error:
                if on_error == "raise":
                    raise
                records.skipped.append(str(error))
                continue
            self.lines.append(line)
            self.lengths.append(len(sample))
            self.targets += int((sample.labels[1:] != IGNORE_INDEX).sum())
            if self._cache is not None:
                self._cache.append(sample)
        if not self.lines:
            raise records.empty_error()

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, pack: Sequence[int]) -> list[Sample]:
        """The samples of one pack."""
        if self._cache is not None:
            return [self._cache[index] for index in pack]
        return [self._encode(self.lines[index]) for index in pack]

    def _encode(self, line: Line) -> Sample:
        try:
            sample = self.encoder(line.record)
        except ValueError as error:
            raise self.records.error(line.number, error) from None
        return sample if line.weight is None else replace(sample, weight=line.weight)


class PackSampler(Sampler):
    """Yields packs of sample indices, reshuffled every epoch; every epoch has the same number of packs.

    Packing is planned once and fixes the lengths of the samples in each pack. Every epoch, samples of equal length are
    permuted among the slots of that length, and the packs are shuffled. So the number of steps is known in advance,
    every sample is used once per epoch, and the order depends on the seed and the epoch alone, which makes resuming
    exact.

    Args:
        lengths: Tokens of each sample.
        capacity: Tokens of a pack.
        max_items: Maximum number of samples in a pack; None for no limit.
        seed: Seed of the shuffles.
        shuffle: False keeps the planned order in every epoch.
        processes: Number of processes that share the packs. Packs are halved until their number is a multiple of it,
            so that no process has to repeat a pack. A pack of one sample cannot be halved.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        capacity: int,
        max_items: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        processes: int = 1,
    ) -> None:
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        order = list(range(len(lengths)))
        if shuffle:
            random.Random(seed).shuffle(order)
        plan = plan_packing([lengths[index] for index in order], capacity, max_items=max_items)
        self.plan = split_packs([[order[index] for index in pack] for pack in plan], processes)
        self._lengths = list(lengths)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[list[int]]:
        if not self.shuffle:
            return iter([list(pack) for pack in self.plan])
        generator = random.Random(f"{self.seed}-{self.epoch}")
        by_length: dict[int, list[int]] = defaultdict(list)
        for index, length in enumerate(self._lengths):
            by_length[length].append(index)
        for samples in by_length.values():
            generator.shuffle(samples)
        # Sorted by length: attention batches adjacent samples of equal length without copies.
        packs = [[by_length[length].pop() for length in sorted(self._lengths[i] for i in pack)] for pack in self.plan]
        generator.shuffle(packs)
        return iter(packs)


_flatten = DataCollatorWithFlattening(separator_id=IGNORE_INDEX, return_flash_attn_kwargs=True)


def collate_packed(batch: list[list[Sample]]) -> dict[str, Any]:
    """Concatenate the samples of all packs to one row, as transformers' `DataCollatorWithFlattening` does.

    Args:
        batch: Packs of samples; all become one row.

    Returns:
        `input_ids`, `labels`, `position_ids` `(1, N)`, `cu_seq_lens_q` and `cu_seq_lens_k` `(samples + 1,)` int32,
        `max_length_q` and `max_length_k` int, and the image tensors. The first label of each sample is -100, since no
        token of the same sample precedes it.
    """
    samples = [sample for pack in batch for sample in pack]
    row = _flatten([{"input_ids": s.input_ids.tolist(), "labels": s.labels.tolist()} for s in samples])
    # Attention takes one tensor for both as self-attention over equal segments, and skips a comparison.
    row["cu_seq_lens_k"] = row["cu_seq_lens_q"]
    return {**row, **join_images([sample.images for sample in samples if sample.images])}


class PaddedCollator:
    """Stacks samples to a batch padded on the right, for text models without packed attention.

    Args:
        pad_token_id: Id of padding tokens.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, batch: list[list[Sample]]) -> dict[str, Any]:
        """Return `input_ids`, `labels` and `attention_mask` `(B, longest)`, and the image tensors."""
        samples = [sample for pack in batch for sample in pack]
        ids = [sample.input_ids for sample in samples]
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(ids, batch_first=True, padding_value=self.pad_token_id),
            "labels": pad([s.labels for s in samples], batch_first=True, padding_value=IGNORE_INDEX),
            "attention_mask": pad([torch.ones_like(one) for one in ids], batch_first=True),
            **join_images([sample.images for sample in samples if sample.images]),
        }


class SampleWeights:
    """Wraps a collator and adds the loss weight of each sample to its batch.

    Args:
        collator: Collates packs of samples.
    """

    def __init__(self, collator: Callable[[list[list[Sample]]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, batch: list[list[Sample]]) -> dict[str, Any]:
        """Return the collator's batch, with `sample_weights` `(samples,)` float32."""
        weights = torch.tensor([sample.weight for pack in batch for sample in pack])
        return {**self.collator(batch), "sample_weights": weights}
