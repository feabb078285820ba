"""Which sample each token of a loss belongs to: by rows, by cumulative lengths, or by ids.

Shapes: N tokens, n samples.
"""

import torch
from torch import Tensor

__all__ = ["find_samples"]


def find_samples(
    labels: Tensor, cu_seqlens: Tensor | None, sample_ids: Tensor | None, sample_weights: Tensor | None = None
) -> tuple[Tensor, int]:
    """The sample of each token, `(N,)` int64, and the number of samples n; tokens of no sample have n.

    Raises:
        ValueError: As for [`weigh_tokens`].
    """
    if labels.ndim not in (1, 2) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"`labels` must be integers (S,) or (B, S), got {labels.dtype} {tuple(labels.shape)}.")
    total, device = labels.numel(), labels.device
    if cu_seqlens is not None and sample_ids is not None:
        raise ValueError("`cu_seqlens` and `sample_ids` both say where samples are; pass one of the two.")
    if cu_seqlens is not None:
        return _from_lengths(cu_seqlens, total, device)
    if sample_ids is None:
        rows = 1 if labels.ndim == 1 else labels.shape[0]
        return torch.arange(rows, device=device).repeat_interleave(labels.shape[-1]), rows
    if sample_ids.shape != labels.shape or sample_ids.is_floating_point() or sample_ids.dtype == torch.bool:
        raise ValueError(
            f"`sample_ids` must be integers of the shape of `labels`, {tuple(labels.shape)}, got {sample_ids.dtype} "
            f"{tuple(sample_ids.shape)}."
        )
    ids = sample_ids.reshape(-1).long()
    highest = int(ids.max()) if total else -1
    count = max(highest + 1, 0) if sample_weights is None or sample_weights.ndim == 0 else len(sample_weights)
    if highest >= count or (total and int(ids.min()) < -1):
        raise ValueError(
            f"`sample_ids` must lie from -1 to {count - 1}, got {int(ids.min())} to {highest}; `sample_weights` has a "
            "weight for each sample."
        )
    return torch.where(ids < 0, count, ids), count


def _from_lengths(cu_seqlens: Tensor, total: int, device: torch.device) -> tuple[Tensor, int]:
    integers = not cu_seqlens.is_floating_point() and cu_seqlens.dtype != torch.bool
    if cu_seqlens.ndim != 1 or len(cu_seqlens) == 0 or not integers:
        raise ValueError(
            f"`cu_seqlens` must be integers (samples + 1,), got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}."
        )
    lengths = cu_seqlens.long().diff().to(device)
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != total or bool((lengths < 0).any()):
        raise ValueError(
            f"`cu_seqlens` must rise from 0 to the number of tokens, {total}, got {cu_seqlens[:4].tolist()} ... "
            f"{int(cu_seqlens[-1])}."
        )
    count = len(lengths)
    return torch.arange(count, device=device).repeat_interleave(lengths, output_size=total), count
