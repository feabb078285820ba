"""How much a sample counts: the `sample_weights` of [`weigh_tokens`].

Given for each record, by the name of its task, or by its length. Importances of several kinds are multiplied.

Shapes: n samples.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .weights import weigh_tokens

__all__ = [
    "importance_by_length",
    "importance_by_record",
    "importance_by_task",
    "root_length_importance",
    "root_subsegments_importance",
]


def importance_by_record(records: Sequence[Mapping[str, Any]], field: str, default: float | None = None) -> Tensor:
    """The importance that records state themselves.

    Args:
        records: The samples.
        field: Key of the importance, a finite number of at least 0.
        default: Importance of records without the field; without it they are refused.

    Returns:
        `(n,)` float32 on CPU.

    Raises:
        ValueError: If a record has no such field and there is no default, or a value is no importance.
    """
    found = []
    for index, record in enumerate(records):
        if field not in record and default is None:
            raise ValueError(f"`records[{index}]` must have the field {field!r}, got {', '.join(map(str, record))}.")
        where = f"records[{index}][{field!r}]" if field in record else "default"
        found.append(_number(record.get(field, default), where))
    return torch.tensor(found, dtype=torch.float32)


def importance_by_task(tasks: Sequence[str], weights: Mapping[str, float], default: float | None = None) -> Tensor:
    """The importance of samples by the names of their tasks.

    Molmo2, for one, trains with 0.1 for video captions and 0.2 for pointing (its `MessageWeight`).

    Args:
        tasks: The task of each sample.
        weights: The importance of each task.
        default: Importance of other tasks; without it they are refused.

    Returns:
        `(n,)` float32 on CPU.

    Raises:
        ValueError: If a task is unknown and there is no default, or a value is no importance.
    """
    table = {name: _number(value, f"weights[{name!r}]") for name, value in weights.items()}
    other = None if default is None else _number(default, "default")
    found = []
    for index, task in enumerate(tasks):
        value = table.get(task, other)
        if value is None:
            raise ValueError(f"`tasks[{index}]` must be one of {', '.join(table)}, got {task!r}.")
        found.append(value)
    return torch.tensor(found, dtype=torch.float32)


def importance_by_length(labels: Tensor, exponent: float, **weighting: Any) -> Tensor:
    """`B^-q` for samples of size B.

    It acts on both terms of the loss; the `length_exponent` of [`weigh_tokens`] leaves sample averaging as it is.

    Args:
        labels: As for [`weigh_tokens`].
        exponent: q, at least 0.
        **weighting: `token_weights`, `cu_seqlens`, `sample_ids`, `ignore_index` and `dtype` of [`weigh_tokens`].
            Without token weights the size is the number of labelled tokens.

    Returns:
        `(n,)` float32, or of `dtype`; 0 for a sample of size 0.

    Raises:
        ValueError: If the exponent is negative or not finite, and as for [`weigh_tokens`].
    """
    exponent = _number(exponent, "exponent")
    sizes = weigh_tokens(labels, **weighting).sizes
    return torch.where(sizes > 0, torch.where(sizes > 0, sizes, 1) ** -exponent, 0)


def root_length_importance(labels: Tensor, factor: float = 2.0, **weighting: Any) -> Tensor:
    """`factor / sqrt(B)` for samples of size B: Molmo2's `root_length`.

    Molmo2's code has the factor 2; a description of its paper has 4. The factor is felt only beside samples of another
    importance, such as those of a task with a fixed one.

    Args:
        labels: As for [`importance_by_length`].
        factor: The importance of a sample of size 1.
        **weighting: As for [`importance_by_length`].

    Returns:
        `(n,)`, as for [`importance_by_length`].

    Raises:
        ValueError: If the factor is negative or not finite, and as for [`importance_by_length`].
    """
    return _number(factor, "factor") * importance_by_length(labels, 0.5, **weighting)


def root_subsegments_importance(counts: Tensor) -> Tensor:
    """`1 / sqrt(count)`: Molmo2's `root_subsegments`.

    Args:
        counts: `(n,)` integers, annotations that share the image of each sample, itself among them; at least 1 (looked
            at on CPU only).

    Returns:
        `(n,)` float32.

    Raises:
        ValueError: If `counts` are no such integers.
    """
    if counts.ndim != 1 or counts.is_floating_point() or counts.dtype == torch.bool:
        raise ValueError(f"`counts` must be integers (n,), got {counts.dtype} {tuple(counts.shape)}.")
    if counts.device.type == "cpu" and not torch.compiler.is_compiling() and bool((counts < 1).any()):
        raise ValueError(f"`counts` must be at least 1, got {int(counts.min())}.")
    return counts.float().rsqrt()


def _number(value: Any, name: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise ValueError(f"`{name}` must be a finite number of at least 0, got {value!r}.")
    return float(value)
