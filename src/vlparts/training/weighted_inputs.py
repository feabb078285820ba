"""Weights of samples and tokens as inputs of a batch: how they come into it, and how they are taken out again."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..losses.weights import IGNORE_INDEX, next_token_labels

WEIGHT_INPUTS = ("sample_weights", "token_weights", "sample_ids")
"""Inputs that no model gets."""


class WeightedLabels(NamedTuple):
    """What the weights of a batch follow from.

    Attributes:
        labels: `(B, S)` on the CPU, -100 at tokens without loss and at the first token of each sample.
        options: `sample_weights`, `token_weights`, `cu_seqlens` and `sample_ids` of [`weigh_tokens`], on the CPU.
    """

    labels: Tensor
    options: dict[str, Any]


def take_weights(batch: Mapping[str, Any]) -> tuple[dict[str, Any], WeightedLabels | None]:
    """Take the weights out of a batch.

    Samples are told apart by `sample_ids` `(B, S)` (-1 at padding), else `cu_seq_lens_q` `(samples + 1,)`, else, in
    a batch without `attention_mask`, by text positions `(B, S)` or `(4, B, S)` in `position_ids` that begin again at
    0; without any of them each row is a sample.

    Args:
        batch: Inputs of a model, with `labels` `(B, S)`, or `shift_labels` that are shifted already; beside the names
            above it may hold `sample_weights` `(samples,)` and `token_weights` `(B, S)`, which stand where labels
            stand.

    Returns:
        The inputs without `WEIGHT_INPUTS`, and the labels with their weights; None for a batch without labels.
    """
    inputs = {name: value for name, value in batch.items() if name not in WEIGHT_INPUTS}
    shifted = inputs.get("shift_labels") is not None
    labels = inputs["shift_labels"] if shifted else inputs.get("labels")
    if labels is None:
        return inputs, None
    # Not every accelerator has float64, and on the CPU weights are checked.
    labels = labels.cpu()
    given = {name: batch.get(name) for name in WEIGHT_INPUTS}
    given = {name: None if value is None else torch.as_tensor(value).cpu() for name, value in given.items()}
    ids, lengths = given.pop("sample_ids"), None
    if ids is None and inputs.get("cu_seq_lens_q") is not None:
        lengths = inputs["cu_seq_lens_q"].cpu()
    elif ids is None:
        ids = _from_positions(inputs, labels)
    samples: dict[str, Any] = {"cu_seqlens": lengths, "sample_ids": ids}
    if not shifted:
        labels = _after_padding(next_token_labels(labels, **samples), inputs.get("attention_mask"))
    return inputs, WeightedLabels(labels, {**given, **samples})


def _after_padding(labels: Tensor, mask: Any) -> Tensor:
    """Labels without those at padding and of the first token behind it, which nothing can predict."""
    if mask is None or mask.shape != labels.shape:
        return labels
    used = mask.cpu().bool()
    before = torch.nn.functional.pad(used, (1, 0))[:, :-1]
    return labels.masked_fill(~(used & before), IGNORE_INDEX)


def _from_positions(inputs: Mapping[str, Any], labels: Tensor) -> Tensor | None:
    """The sample of each token, from positions that begin again."""
    positions = inputs.get("position_ids")
    if positions is None or inputs.get("attention_mask") is not None:
        return None
    if positions.ndim == 3 and positions.shape[0] == 4:  # text, time, height, width
        positions = positions[0]
    if positions.shape != labels.shape:
        return None
    starts = positions.cpu() == 0
    starts[:, :1] = True
    return starts.flatten().cumsum(0).sub(1).view(labels.shape)


class WeightedCollator:
    """A collator that passes weights of its features on as inputs, for [`WeightedLossTrainer`].

    Args:
        collator: Makes a batch of the features without their weights: a padded batch, a row for each feature, or one
            row with the features after one another.
        sample_weight_field: Number in each feature, its importance. Where no feature has it, all count alike.
        token_weight_field: Numbers in each feature, one for each of its `input_ids`. Where no feature has them, all
            tokens count alike.
    """

    def __init__(
        self,
        collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]],
        sample_weight_field: str = "sample_weight",
        token_weight_field: str = "token_weights",
    ) -> None:
        self.collator = collator
        self.sample_weight_field, self.token_weight_field = sample_weight_field, token_weight_field

    @property
    def fields(self) -> tuple[str, str]:
        """Names of the features' fields that are weights."""
        return self.sample_weight_field, self.token_weight_field

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The collator's batch, with `sample_weights` `(n,)` and `token_weights` `(B, S)` where features have them.

        Raises:
            ValueError: If a weight is no finite number of at least 0, if only some features have one, or if there are
                not as many as tokens.
        """
        plain = [{name: value for name, value in one.items() if name not in self.fields} for one in features]
        batch = dict(self.collator(plain))
        if samples := self._column(features, self.sample_weight_field):
            weights = [checked_weight(value, self.sample_weight_field) for value in samples]
            batch["sample_weights"] = torch.tensor(weights)
        if tokens := self._column(features, self.token_weight_field):
            rows = [torch.as_tensor(value, dtype=torch.float32) for value in tokens]
            lengths = [len(one["input_ids"]) for one in features]
            if [tuple(row.shape) for row in rows] != [(length,) for length in lengths]:
                raise ValueError(
                    f"`{self.token_weight_field}` must have a number for each token, {lengths}, got "
                    f"{[tuple(row.shape) for row in rows]}."
                )
            batch["token_weights"] = self._placed(rows, batch)
        return batch

    def _column(self, features: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
        found = [one[name] for one in features if name in one]
        if found and len(found) < len(features):
            raise ValueError(f"`{name}` must stand in every feature of a batch, got {len(found)} of {len(features)}.")
        return found

    def _placed(self, rows: list[Tensor], batch: Mapping[str, Any]) -> Tensor:
        """Weights where their tokens are, wherever padding is."""
        shape = batch["labels"].shape
        mask = batch.get("attention_mask")
        mask = torch.ones(shape, dtype=torch.bool) if mask is None else mask.bool()
        values = torch.cat(rows)
        if mask.shape != shape or int(mask.sum()) != len(values):
            raise ValueError(
                f"`{self.token_weight_field}` has {len(values)} numbers for a batch of shape {tuple(shape)} with "
                f"{int(mask.sum())} tokens; expected one for each token."
            )
        return torch.zeros(shape).masked_scatter_(mask, values)


def checked_weight(value: Any, name: str) -> float:
    """A weight as it stands in data.

    Raises:
        ValueError: If it is no finite number of at least 0; names the field.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    try:
        if number and math.isfinite(weight := float(value)) and weight >= 0:
            return weight
    except OverflowError:  # an integer beyond all floats
        pass
    raise ValueError(f"`{name}` must be a finite number of at least 0, got {value!r:.40}")


def without_samples(found: WeightedLabels, kept: int, size: int) -> WeightedLabels:
    """Ignore what a batch repeats to be as large as others: all but its first `kept` of `size` features.

    Args:
        found: The batch.
        kept: Features that count.
        size: Features of the batch; each is a row, or each is a sample.

    Raises:
        ValueError: If features are neither rows nor samples.
    """
    labels, (lengths, ids) = found.labels, (found.options["cu_seqlens"], found.options["sample_ids"])
    rows = torch.arange(labels.shape[0])[:, None]
    if labels.shape[0] == size:
        repeated = rows >= kept
    elif lengths is not None and len(lengths) - 1 == size:
        repeated = torch.arange(labels.numel()).view(labels.shape) >= int(lengths[kept])
    elif ids is not None and int(ids.max()) + 1 == size:
        repeated = ids >= kept
    else:
        raise ValueError(
            f"A batch of shape {tuple(labels.shape)} from {size} features has neither a row nor a sample for each, so "
            "what several processes repeat of the evaluation data cannot be told; set per_device_eval_batch_size=1."
        )
    return found._replace(labels=labels.masked_fill(repeated, IGNORE_INDEX))
