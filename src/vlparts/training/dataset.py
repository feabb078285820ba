"""Encoded samples in packs of a fixed capacity, reshuffled at every epoch."""

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from tqdm.auto import tqdm

from .bins import plan_packing
from .encoding import IGNORE, Sample, SampleEncoder, join_images
from .images.balance import divided
from .records import Line, RecordError, RecordFile


class SampleDataset(Dataset):
    """Samples of a file of records, encoded when asked for.

    Every record is encoded once at the start: so that a broken one is found before training and not after hours of it,
    and so that the lengths are known.

    Args:
        records: The file.
        encoder: Turns a record into a sample.
        on_error: "raise" on a record that cannot be encoded, or "skip" it and keep the reason in `records.skipped`.
        cache: Keep the encoded samples in memory.
        progress: Show a progress bar.

    Attributes:
        lengths: Tokens of each sample.
        targets: Tokens of all samples that the loss is taken over.

    Raises:
        RecordError: If a record cannot be encoded and `on_error` is "raise", or if none is left.
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
            self.targets += int((sample.labels[1:] != IGNORE).sum())
            if self._cache is not None:
                self._cache.append(sample)
        if not self.lines:
            raise records.nothing_left()

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
    """Packs of samples; each epoch another shuffle, the same number of packs.

    The plan fixes how many tokens each place of each pack takes. Every epoch the samples of equal length are dealt out
    anew to the places of that length, and the packs are shuffled. So the number of steps is known in advance, nothing
    is lost, and an epoch's order depends on the seed and the epoch alone, which makes resuming exact.

    Args:
        lengths: Tokens of each sample.
        capacity: Tokens of a pack.
        max_items: Largest number of samples in a pack.
        seed: Seed of the shuffles.
        shuffle: False keeps the order of the plan in every epoch.
        processes: Number of processes that share the packs. Packs are divided until each process gets as many as the
            others, so that none has to repeat one. A pack of one sample cannot be divided.
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
        self.plan = divided([[order[place] for place in pack] for pack in plan], processes)
        self._lengths = list(lengths)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration is for."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[list[int]]:
        if not self.shuffle:
            return iter([list(pack) for pack in self.plan])
        chance = random.Random(f"{self.seed}-{self.epoch}")
        of_length: dict[int, list[int]] = defaultdict(list)
        for index, length in enumerate(self._lengths):
            of_length[length].append(index)
        for samples in of_length.values():
            chance.shuffle(samples)
        # Neighbours of equal length are attended together without copies, hence the order inside a pack.
        packs = [[of_length[length].pop() for length in sorted(self._lengths[i] for i in pack)] for pack in self.plan]
        chance.shuffle(packs)
        return iter(packs)


def collate_packed(batch: list[list[Sample]]) -> dict[str, Any]:
    """Join the samples of packs to one row, in the names that transformers uses for packed rows.

    Args:
        batch: Packs of samples; all end up in one row.

    Returns:
        `input_ids`, `labels`, `position_ids` `(1, N)`, `cu_seq_lens_q` and `cu_seq_lens_k` `(samples + 1,)` int32,
        `max_length_q` and `max_length_k` int, and the images' tensors. The first label of each sample is -100, since
        no token of the same sample stands before it.
    """
    samples = [sample for pack in batch for sample in pack]
    lengths = torch.tensor([len(sample) for sample in samples])
    labels = torch.cat([sample.labels for sample in samples])
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    labels[starts[:-1]] = IGNORE
    longest = int(lengths.max())
    seqlens = starts.to(torch.int32)
    return {
        "input_ids": torch.cat([sample.input_ids for sample in samples])[None],
        "labels": labels[None],
        "position_ids": torch.cat([torch.arange(int(length)) for length in lengths])[None],
        "cu_seq_lens_q": seqlens,
        "cu_seq_lens_k": seqlens,
        "max_length_q": longest,
        "max_length_k": longest,
        **join_images([sample.images for sample in samples if sample.images]),
    }


class PaddedCollator:
    """Join samples to a batch padded on the right, for text models without packed attention.

    Args:
        pad_token_id: Id at the padding.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, batch: list[list[Sample]]) -> dict[str, Any]:
        """Returns `input_ids`, `labels` and `attention_mask` `(B, longest)`, and the images' tensors."""
        samples = [sample for pack in batch for sample in pack]
        ids = [sample.input_ids for sample in samples]
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(ids, batch_first=True, padding_value=self.pad_token_id),
            "labels": pad([s.labels for s in samples], batch_first=True, padding_value=IGNORE),
            "attention_mask": pad([torch.ones_like(one) for one in ids], batch_first=True),
            **join_images([sample.images for sample in samples if sample.images]),
        }


class SampleWeights:
    """A collator that passes on how much each sample weighs in the loss.

    Args:
        collator: Joins packs of samples.
    """

    def __init__(self, collator: Callable[[list[list[Sample]]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, batch: list[list[Sample]]) -> dict[str, Any]:
        """The collator's batch, with `sample_weights` `(samples,)` float32."""
        weights = torch.tensor([sample.weight for pack in batch for sample in pack])
        return {**self.collator(batch), "sample_weights": weights}
