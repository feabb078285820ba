"""Collators of encoded samples: one packed row, or a padded batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening

from ..parts.utils import IGNORE_INDEX
from .encoding import Sample, join_images

__all__ = ["PaddedCollator", "PaddingFreeCollator", "SampleWeights", "collate_packed"]

# Batch inputs with a value per token that packing would have to change.
_PER_TOKEN = ("position_ids", "token_type_ids", "mm_token_type_ids", "token_weights", "sample_ids")

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
