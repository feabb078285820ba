"""Importance of samples by record, by task, or by length: the `sample_weights` of [`weigh_tokens`].

Importances of several kinds are multiplied.

Shapes: n samples.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import check_number, is_integer, is_readable
from .weights import weigh_tokens

__all__ = [
    "importance_by_length",
    "importance_by_record",
    "importance_by_task",
    "root_length_importance",
    "root_subsegments_importance",
]


def importance_by_record(records: Sequence[Mapping[str, Any]], field: str, default: float | None = None) -> Tensor:
    """Read the importance of samples from a field of their records.

    Args:
        records: The samples.
        field: Key of the importance, a finite number of at least 0.
        default: Importance of records without the field. Default: such records are an error.

    Returns:
        `(n,)` float32 on CPU.

    Raises:
        ValueError: If a record has no such field and there is no default, or a value is not a valid importance.
    """
    values = []
    for index, record in enumerate(records):
        if field not in record and default is None:
            raise ValueError(f"`records[{index}]` must have the field {field!r}, got {', '.join(map(str, record))}.")
        value = record.get(field, default)
        check_number(value, f"records[{index}][{field!r}]" if field in record else "default")
        values.append(float(value))
    return torch.tensor(values, dtype=torch.float32)


def importance_by_task(tasks: Sequence[str], weights: Mapping[str, float], default: float | None = None) -> Tensor:
    """Look up the importance of samples by the names of their tasks.

    Molmo2, for example, trains with 0.1 for video captions and 0.2 for pointing (its `MessageWeight`).

    Args:
        tasks: The task of each sample.
        weights: The importance of each task.
        default: Importance of other tasks. Default: other tasks are an error.

    Returns:
        `(n,)` float32 on CPU.

    Raises:
        ValueError: If a task is unknown and there is no default, or a value is not a valid importance.
    """
    importance: dict[str, float | None] = dict(weights)
    for name, value in importance.items():
        check_number(value, f"weights[{name!r}]")
    if default is not None:
        check_number(default, "default")
    values = []
    for index, task in enumerate(tasks):
        value = importance.get(task, default)
        if value is None:
            raise ValueError(f"`tasks[{index}]` must be one of {', '.join(weights)}, got {task!r}.")
        values.append(float(value))
    return torch.tensor(values, dtype=torch.float32)


def importance_by_length(labels: Tensor, exponent: float, **weighting: Any) -> Tensor:
    """Compute `B^-q` for samples of size B.

    It affects both terms of the loss; the `length_exponent` of [`weigh_tokens`] does not affect sample averaging.

    Args:
        labels: `(S,)` or `(B, S)` integers, one sample per row unless `cu_seqlens` or `sample_ids` is given.
        exponent: q, at least 0.
        **weighting: `token_weights`, `cu_seqlens`, `sample_ids`, `ignore_index` and `dtype` of [`weigh_tokens`].
            Without token weights the size is the number of labelled tokens.

    Returns:
        `(n,)` float32, or of `dtype`; 0 for a sample of size 0.

    Raises:
        ValueError: If the exponent is negative or not finite, and as [`weigh_tokens`].
    """
    check_number(exponent, "exponent")
    sizes = weigh_tokens(labels, **weighting).sizes
    return torch.where(sizes > 0, torch.where(sizes > 0, sizes, 1) ** -exponent, 0)


def root_length_importance(labels: Tensor, factor: float = 2.0, **weighting: Any) -> Tensor:
    """Compute `factor / sqrt(B)` for samples of size B: Molmo2's `root_length`.

    Molmo2's code has the factor 2; a description of its paper has 4. The factor matters only in batches that also have
    samples of another importance, such as those of a task with a fixed one.

    Args:
        labels: `(S,)` or `(B, S)` integers, one sample per row unless `cu_seqlens` or `sample_ids` is given.
        factor: Importance of a sample of size 1, at least 0.
        **weighting: Keyword arguments of [`importance_by_length`].

    Returns:
        `(n,)` float32, or of `dtype`; 0 for a sample of size 0.

    Raises:
        ValueError: If the factor is negative or not finite, and as [`weigh_tokens`].
    """
    check_number(factor, "factor")
    return factor * importance_by_length(labels, 0.5, **weighting)


def root_subsegments_importance(counts: Tensor) -> Tensor:
    """Compute `1 / sqrt(count)`: Molmo2's `root_subsegments`.

    Args:
        counts: `(n,)` integers, number of annotations of each sample's image, its own included; at least 1 (checked on
            CPU only).

    Returns:
        `(n,)` float32.

    Raises:
        ValueError: If `counts` are not integers of at least 1.
    """
    if counts.ndim != 1 or not is_integer(counts):
        raise ValueError(f"`counts` must be integers (n,), got {counts.dtype} {tuple(counts.shape)}.")
    if is_readable(counts) and bool((counts < 1).any()):
        raise ValueError(f"`counts` must be at least 1, got {int(counts.min())}.")
    return counts.float().rsqrt()
