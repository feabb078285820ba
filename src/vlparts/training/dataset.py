"""Datasets, samplers and collators of encoded samples, packed to a fixed capacity or padded."""

import random
from array import array
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import DataCollatorWithFlattening

from ..parts.utils import IGNORE_INDEX
from .bins import plan_packing
from .encoding import Sample, join_images
from .images.balance import split_packs
from .measuring import Encoder, measure_samples
from .records import Line, RecordError
from .skipped import SkippedRecords
from .sources import Source

# The golden ratio as a fraction of a turn, in integers, which do not round.
_TURN, _GOLDEN = 2**32, 2654435769
# Batch inputs with a value per token that packing would have to change.
_PER_TOKEN = ("position_ids", "token_type_ids", "mm_token_type_ids", "token_weights", "sample_ids")


class SampleDataset(Dataset):
    """Samples of a source, encoded on access.

    Every record is measured at construction, so that invalid records are found before training starts and lengths are
    known; see [`measure_samples`]. Damaged pixels are found when a record is encoded, or with `check_pixels` now.

    Args:
        source: The source.
        encoder: Encodes a record and its line number to a sample, such as a [`SampleEncoder`].
        on_error: "raise" on a record that cannot be encoded, or "skip" it: an invalid one is no sample, and one with
            damaged pixels is left out of its pack. A pack that would be empty has the next sample that can be encoded.
        cache: Keep the encoded samples in memory.
        progress: Show a progress bar.
        check_pixels: Decode all images at construction.
        num_proc: Number of processes that measure; None for this one.
        left_out: Where samples that are left out of their packs are named; None where `on_error` is "raise".
        task: Index of the source among several, for losses by task.

    Attributes:
        lengths: Tokens of each sample, int32.
        targets: Number of tokens with loss, over all samples.
        weighted: Whether a record has a loss weight of its own.
        skipped: Error messages of the records that are no samples.

    Raises:
        RecordError: If a record is invalid and `on_error` is "raise", or if no record is usable.
    """

    mixture = None

    def __init__(
        self,
        source: Source,
        encoder: Encoder,
        on_error: str = "raise",
        cache: bool = False,
        progress: bool = True,
        check_pixels: bool = False,
        num_proc: int | None = None,
        left_out: SkippedRecords | None = None,
        task: int = 0,
    ) -> None:
        options: dict[str, Any] = {"check_pixels": check_pixels, "num_proc": num_proc, "progress": progress}
        found = measure_samples(source, encoder, on_error, **options)
        self.source = source
        self.encoder = encoder
        self.lengths = array("i", found.lengths.tobytes())
        self.targets = found.targets
        self.weighted = found.weighted
        self.skipped = found.skipped
        self._measured = found
        self._on_error = on_error
        self._left_out = left_out
        self._task = task
        self._cache: dict[int, Sample] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, pack: Sequence[int]) -> list[Sample]:
        """The samples of one pack."""
        rows = self.source.listed([int(self._measured.rows[index]) for index in pack]) if len(pack) else []
        found = [self._sample(index, row) for index, row in zip(pack, rows, strict=True)]
        samples = [one for one in found if one is not None]
        if samples or not found:
            return samples
        for index in ((pack[0] + offset) % len(self) for offset in range(1, len(self))):
            (row,) = self.source.listed([int(self._measured.rows[index])])
            sample = self._sample(index, row)
            if sample is not None:
                return [sample]
        raise RecordError(f"{self.source.records.name}: no record can be encoded.")

    def line(self, index: int) -> Line:
        """The record of a sample."""
        position = int(self._measured.rows[index])
        (row,) = self.source.listed([position])
        return self.source.records.line(row, position)

    def _sample(self, index: int, row: dict[str, Any]) -> Sample | None:
        """A sample; None if it is left out."""
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        try:
            sample = self._encode(index, row)
        except RecordError as error:
            if self._on_error == "raise":
                raise
            if self._left_out is not None:
                self._left_out.add(str(error))
            return None
        if self._cache is not None:
            self._cache[index] = sample
        return sample

    def _encode(self, index: int, row: dict[str, Any]) -> Sample:
        position = int(self._measured.rows[index])
        line = self.source.records.line(row, position)
        try:
            sample = self.encoder(line.record, line.number)
            if len(sample) != self.lengths[index]:
                raise ValueError(
                    f"The sample has {len(sample)} tokens, but {self.lengths[index]} when it was measured. An image "
                    f"has changed since; delete {self._measured.cache.with_suffix('')}* to measure again."
                )
        except ValueError as error:
            raise self.source.records.error(row, position, error) from None
        return replace(sample, weight=1.0 if line.weight is None else line.weight, task=self._task)


class Mixture:
    """The samples of each epoch over several files, in given shares.

    An epoch has as many samples as all files together, and of each file its share, rounded by largest remainders. A
    file with more samples than its share takes turns: every sample is used equally often over many epochs. A file with
    fewer is repeated. An epoch consists of places whose lengths do not change, so that packs can be planned once: a
    sample that takes turns shares a place with samples of similar length, and the place has the length of the longest.

    Args:
        lengths: Tokens of each sample of each file. Samples are numbered through all files.
        shares: A positive weight for each file; only ratios matter.
        seed: Seed of the turns.

    Attributes:
        lengths: Tokens of each place.

    Raises:
        ValueError: If the share of a file is less than one sample.
    """

    def __init__(self, lengths: Sequence[Sequence[int]], shares: Sequence[float], seed: int) -> None:
        self.lengths: list[int] = []
        self._fixed: list[int] = []
        self._turns: list[tuple[list[int], int]] = []
        generator = random.Random(seed)
        self._start = generator.randrange(_TURN)
        total = sum(map(len, lengths))
        first, by_turns = 0, []
        for number, (file, whole) in enumerate(zip(lengths, _whole_shares(total, shares), strict=True)):
            if whole == 0:
                raise ValueError(
                    f"`data` has a share of {shares[number]:g} of {sum(shares):g} for file {number + 1}; expected at "
                    f"least one of the {total} samples of an epoch."
                )
            passes, rest = divmod(whole, len(file))
            self._fixed += [*range(first, first + len(file))] * passes
            self.lengths += [*file] * passes
            order = list(range(len(file)))
            generator.shuffle(order)
            order.sort(key=file.__getitem__)
            if rest:
                self._turns.append(([first + index for index in order], rest))
                by_turns += [file[order[-(-(place + 1) * len(file) // rest) - 1]] for place in range(rest)]
            first += len(file)
        self.lengths += by_turns

    def samples(self, epoch: int) -> list[int]:
        """The sample at each place in an epoch.

        The samples that take turns are chosen by systematic sampling: equally spaced in the order of length, from a
        start that moves by the golden ratio from epoch to epoch.
        """
        start = (self._start + epoch * _GOLDEN) % _TURN
        chosen = list(self._fixed)
        for order, rest in self._turns:
            chosen += [order[(place * _TURN + start) * len(order) // (rest * _TURN)] for place in range(rest)]
        return chosen


def _whole_shares(total: int, shares: Sequence[float]) -> list[int]:
    """Divide a number into whole parts in given shares, by largest remainders."""
    exact = [total * share / sum(shares) for share in shares]
    counts = [int(one) for one in exact]
    by_remainder = sorted(range(len(shares)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


class MixedDataset(Dataset):
    """Samples of several record files in given shares, see [`Mixture`].

    Args:
        datasets: The samples of each file.
        shares: A positive weight for each file.
        seed: Seed of the turns of samples.
    """

    def __init__(self, datasets: Sequence[SampleDataset], shares: Sequence[float], seed: int) -> None:
        self.datasets = datasets
        self.lengths = array("i", chain.from_iterable(one.lengths for one in datasets))
        self.mixture = Mixture([one.lengths for one in datasets], shares, seed)
        self._ends = [sum(len(one) for one in datasets[: index + 1]) for index in range(len(datasets))]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, pack: Sequence[int]) -> list[Sample]:
        """The samples of one pack."""
        found = []
        for index in pack:
            file = bisect_right(self._ends, index)
            found += self.datasets[file][[index - self._ends[file] + len(self.datasets[file])]]
        return found


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
        mixture: Chooses the samples of each epoch; None to use every sample once.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        capacity: int,
        max_items: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        processes: int = 1,
        mixture: Mixture | None = None,
    ) -> None:
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self.mixture = mixture
        lengths = list(lengths) if mixture is None else mixture.lengths
        order = list(range(len(lengths)))
        if shuffle:
            random.Random(seed).shuffle(order)
        plan = plan_packing([lengths[index] for index in order], capacity, max_items=max_items)
        self.plan = split_packs([[order[index] for index in pack] for pack in plan], processes)
        self._lengths = lengths

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[list[int]]:
        if not self.shuffle:
            return iter([list(pack) for pack in self.plan])
        generator = random.Random(f"{self.seed}-{self.epoch}")
        chosen = range(len(self._lengths)) if self.mixture is None else self.mixture.samples(self.epoch)
        by_length: dict[int, list[int]] = defaultdict(list)
        for sample, length in zip(chosen, self._lengths, strict=True):
            by_length[length].append(sample)
        for samples in by_length.values():
            generator.shuffle(samples)
        # Sorted by length: attention batches adjacent samples of equal length without copies.
        packs = [[by_length[length].pop() for length in sorted(self._lengths[i] for i in pack)] for pack in self.plan]
        generator.shuffle(packs)
        return iter(packs)


def steps_for_tokens(sampler: PackSampler, lengths: Sequence[int], packs_per_step: int, tokens: int) -> int:
    """Number of steps, over as many epochs as needed, whose packs have a number of tokens or more.

    Args:
        sampler: Yields the packs; its epoch is changed.
        lengths: Tokens of each sample.
        packs_per_step: Packs of an optimizer step, on all processes; the last step of an epoch may have fewer.
        tokens: The number of tokens.
    """
    steps = epoch = 0
    if sampler.mixture is None:  # every epoch has the same tokens
        epoch = (tokens - 1) // sum(lengths)
        steps = epoch * -(-len(sampler) // packs_per_step)
        tokens -= epoch * sum(lengths)
    while tokens > 0:
        sampler.set_epoch(epoch)
        packs = [sum(lengths[sample] for sample in pack) for pack in sampler]
        for start in range(0, len(packs), packs_per_step):
            if tokens > 0:
                tokens -= sum(packs[start : start + packs_per_step])
                steps += 1
        epoch += 1
    return steps


_flatten = DataCollatorWithFlattening(separator_id=IGNORE_INDEX, return_flash_attn_kwargs=True)


def _one_row(ids: Sequence[Tensor], labels: Sequence[Tensor]) -> dict[str, Any]:
    """Concatenate samples, ids and labels `(S,)` of each; see [`collate_packed`]."""
    pairs = zip(ids, labels, strict=True)
    row: dict[str, Any] = _flatten([{"input_ids": one.tolist(), "labels": its.tolist()} for one, its in pairs])
    # Attention takes one tensor for both as self-attention over equal segments, and skips a comparison.
    row["cu_seq_lens_k"] = row["cu_seq_lens_q"]
    return row


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
    row = _one_row([sample.input_ids for sample in samples], [sample.labels for sample in samples])
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


class PaddingFreeCollator:
    """Wraps a collator of padded batches and puts their samples in one row, without padding.

    For composed models, which keep the samples of a row apart. Images are passed on as they are.

    Args:
        collator: Collates features to `input_ids`, `labels` and `attention_mask` `(B, S)`, padded on either side, and
            image tensors, such as TRL's `DataCollatorForVisionLanguageModeling`.
    """

    def __init__(self, collator: Callable[[list[Any]], Mapping[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        """Return the collator's batch with one row; see [`collate_packed`].

        Raises:
            ValueError: If the batch has another input with a value per token, such as `position_ids`.
        """
        batch = dict(self.collator(features))
        unpacked = [name for name in _PER_TOKEN if batch.get(name) is not None]
        if unpacked:
            raise ValueError(f"`collator` must return no {unpacked[0]!r}; pack samples before it is added.")
        ids, labels, kept = batch.pop("input_ids"), batch.pop("labels"), batch.pop("attention_mask").bool()
        rows = [[row[mask] for row, mask in zip(rows, kept, strict=True)] for rows in (ids, labels)]
        return {**_one_row(*rows), **batch}


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
