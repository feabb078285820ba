"""Loss weights of samples and tokens as batch inputs: added by a collator, taken out by the Trainer."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..losses.weights import next_token_labels
from ..parts.utils import IGNORE_INDEX

WEIGHT_INPUTS = ("sample_weights", "token_weights", "sample_ids")
"""Batch inputs that are not passed to the model."""


class WeightedLabels(NamedTuple):
    """The labels of a batch, and what their loss weights are computed from.

    Attributes:
        labels: `(B, S)` on the CPU; -100 at tokens without loss and at the first token of each sample.
        options: `sample_weights`, `token_weights`, `cu_seqlens` and `sample_ids` of [`weigh_tokens`], on the CPU.
    """

    labels: Tensor
    options: dict[str, Any]


def take_weights(batch: Mapping[str, Any]) -> tuple[dict[str, Any], WeightedLabels | None]:
    """Split a batch into model inputs and weighted labels.

    The samples of a row are given by `sample_ids` `(B, S)` (-1 at padding), else by `cu_seq_lens_q` `(samples + 1,)`,
    else, in a batch without `attention_mask`, by `position_ids` `(B, S)` or `(4, B, S)` whose text positions restart
    at 0. Without any of these each row is a sample.

    Args:
        batch: Inputs of a model, with `labels` `(B, S)` or the already shifted `shift_labels`. It may also have
            `sample_weights` `(samples,)` and `token_weights` `(B, S)`, aligned with the labels.

    Returns:
        The inputs without `WEIGHT_INPUTS`, and the labels with their weights, or None for a batch without labels.

    Raises:
        ValueError: If `position_ids` have more or fewer samples than there are `sample_weights`.
    """
    inputs = {name: value for name, value in batch.items() if name not in WEIGHT_INPUTS}
    shifted = inputs.get("shift_labels") is not None
    labels = inputs["shift_labels"] if shifted else inputs.get("labels")
    if labels is None:
        return inputs, None
    # On the CPU, weights are checked and float64 is always supported.
    labels = labels.cpu()
    given = {name: batch.get(name) for name in WEIGHT_INPUTS}
    given = {name: None if value is None else torch.as_tensor(value).cpu() for name, value in given.items()}
    ids, lengths = given.pop("sample_ids"), None
    if ids is None and inputs.get("cu_seq_lens_q") is not None:
        lengths = inputs["cu_seq_lens_q"].cpu()
    elif ids is None:
        ids = _sample_ids_from_positions(inputs, labels)
        _check_counted(ids, given["sample_weights"])
    samples: dict[str, Any] = {"cu_seqlens": lengths, "sample_ids": ids}
    if not shifted:
        labels = _ignore_padding(next_token_labels(labels, **samples), inputs.get("attention_mask"))
    return inputs, WeightedLabels(labels, {**given, **samples})


def _ignore_padding(labels: Tensor, mask: Any) -> Tensor:
    """Ignore labels at padding and of the first token after it, which no token predicts."""
    if mask is None or mask.shape != labels.shape:
        return labels
    used = mask.cpu().bool()
    before = torch.nn.functional.pad(used, (1, 0))[:, :-1]
    return labels.masked_fill(~(used & before), IGNORE_INDEX)


def _sample_ids_from_positions(inputs: Mapping[str, Any], labels: Tensor) -> Tensor | None:
    """Sample id of each token, from positions that restart; None if the positions do not tell."""
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


def _check_counted(ids: Tensor | None, sample_weights: Tensor | None) -> None:
    """Check that positions tell of as many samples as there are weights; both are what the caller gave."""
    if ids is None or not ids.numel() or sample_weights is None or sample_weights.ndim != 1:
        return
    count = int(ids.max()) + 1
    if len(sample_weights) != count:
        raise ValueError(
            f"`sample_weights` must have one weight per sample of `position_ids`, in which {count} samples start at "
            f"position 0, got {len(sample_weights)}. If padding has position 0, or not every sample starts there, "
            "give `sample_ids`, with -1 at padding."
        )


class WeightedCollator:
    """Wraps a collator and adds the loss weights of its features to the batch, for [`WeightedLossTrainer`].

    Args:
        collator: Collates the features without their weights: to a padded batch with one row per feature, or to one
            row with the features concatenated.
        sample_weight_field: Field with the weight of a feature. If no feature has it, all features weigh the same.
        token_weight_field: Field with one weight per token of `input_ids`. If no feature has it, all tokens weigh the
            same.
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
        """Names of the weight fields."""
        return self.sample_weight_field, self.token_weight_field

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the collator's batch, with `sample_weights` `(n,)` and `token_weights` `(B, S)` if the fields exist.

        Raises:
            ValueError: If a weight is not a finite number of at least 0, only some features have one, or their number
                is not the number of tokens.
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
                    f"`{self.token_weight_field}` must have one number per token, {lengths}, got shapes "
                    f"{[tuple(row.shape) for row in rows]}."
                )
            batch["token_weights"] = self._align(rows, batch)
        return batch

    def _column(self, features: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
        found = [one[name] for one in features if name in one]
        if found and len(found) < len(features):
            raise ValueError(f"`{name}` must be in every feature of a batch, got {len(found)} of {len(features)}.")
        return found

    def _align(self, rows: list[Tensor], batch: Mapping[str, Any]) -> Tensor:
        """Token weights aligned with the tokens of the batch; 0 at padding."""
        shape = batch["labels"].shape
        mask = batch.get("attention_mask")
        mask = torch.ones(shape, dtype=torch.bool) if mask is None else mask.bool()
        values = torch.cat(rows)
        if mask.shape != shape or int(mask.sum()) != len(values):
            raise ValueError(
                f"`{self.token_weight_field}` has {len(values)} numbers for a batch of shape {tuple(shape)} with "
                f"{int(mask.sum())} tokens; expected one per token."
            )
        return torch.zeros(shape).masked_scatter_(mask, values)


def checked_weight(value: Any, name: str) -> float:
    """Return a weight read from data as a float.

    Raises:
        ValueError: If it is not a finite number of at least 0; names the field.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    try:
        if number and math.isfinite(weight := float(value)) and weight >= 0:
            return weight
    except OverflowError:  # an integer beyond the range of floats
        pass
    raise ValueError(f"`{name}` must be a finite number of at least 0, got {value!r:.40}.")


def ignore_repeated(targets: WeightedLabels, kept: int, size: int) -> WeightedLabels:
    """Ignore the labels of all but the first `kept` of `size` features, which a loader repeated to fill the batch.

    Args:
        targets: Labels of the batch.
        kept: Number of features that count.
        size: Number of features in the batch; each is one row, or each is one sample.

    Raises:
        ValueError: If the features are neither rows nor samples.
    """
    labels, (lengths, ids) = targets.labels, (targets.options["cu_seqlens"], targets.options["sample_ids"])
    rows = torch.arange(labels.shape[0])[:, None]
    if labels.shape[0] == size:
        repeated = rows >= kept
    elif lengths is not None and len(lengths) - 1 == size:
        repeated = torch.arange(labels.numel()).view(labels.shape) >= int(lengths[kept])
    elif ids is not None and int(ids.max()) + 1 == size:
        repeated = ids >= kept
    else:
        raise ValueError(
            f"A batch of shape {tuple(labels.shape)} from {size} features has neither one row nor one sample per "
            "feature, so evaluation samples that are repeated on several processes cannot be identified. Set "
            "per_device_eval_batch_size=1."
        )
    return targets._replace(labels=labels.masked_fill(repeated, IGNORE_INDEX))
