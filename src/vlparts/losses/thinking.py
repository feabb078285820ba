"""Which tokens of training sequences are thought, and which are the answer: the segments of [`position_weights`]."""

import torch
from torch import Tensor

from ..parts.thinking import THINKING_END_ID, THINKING_START_ID
from .weights import find_samples

__all__ = ["ANSWER", "THINKING", "thinking_segments"]

THINKING, ANSWER = 0, 1


def thinking_segments(
    token_ids: Tensor,
    *,
    start_id: int = THINKING_START_ID,
    end_id: int = THINKING_END_ID,
    cu_seqlens: Tensor | None = None,
    sample_ids: Tensor | None = None,
) -> Tensor:
    """The segment of each token, by the rules of [`split_thinking`]; the markers belong to the thoughts.

    What stands between the markers is thought, all blocks of a sample alike; also a block that the sample's end cuts
    off. If the first marker of a sample is an `end_id`, all before it is thought. Any other `end_id` without a block
    is part of the answer. Prompts are in a segment too; they have no labels.

    Args:
        token_ids: `(S,)` or `(B, S)` integers; each row is a sample, unless `cu_seqlens` or `sample_ids` say
            otherwise.
        start_id: Id of the token that opens the thoughts, openPangu's where not given.
        end_id: Id of the token that closes them.
        cu_seqlens: As for [`weigh_tokens`].
        sample_ids: As for [`weigh_tokens`].

    Returns:
        int64 of the shape of `token_ids`: `THINKING` (0) or `ANSWER` (1).

    Raises:
        ValueError: If `token_ids` are no integers of one or two axes, the two ids are the same, and as for
            [`weigh_tokens`].
    """
    if token_ids.ndim not in (1, 2) or token_ids.is_floating_point() or token_ids.dtype == torch.bool:
        raise ValueError(
            f"`token_ids` must be integers (S,) or (B, S), got {token_ids.dtype} {tuple(token_ids.shape)}."
        )
    if start_id == end_id:
        raise ValueError(f"`start_id` and `end_id` must differ, got {start_id} for both.")
    samples, count = find_samples(token_ids, cu_seqlens, sample_ids)
    if not len(samples):
        return token_ids.long()
    order = samples.argsort(stable=True)
    thought = _thought(token_ids.reshape(-1)[order], samples[order], count, start_id, end_id)
    segments = torch.where(thought, THINKING, ANSWER)
    return torch.empty_like(samples).index_copy(0, order, segments).view(token_ids.shape)


def _thought(ids: Tensor, samples: Tensor, count: int, start_id: int, end_id: int) -> Tensor:
    """Whether each token is thought, `(N,)` bool; the tokens of a sample stand together."""
    place = torch.arange(len(ids), device=ids.device)
    starts, ends = ids == start_id, ids == end_id
    sizes = samples.new_zeros(count + 1).index_add(0, samples, torch.ones_like(samples))
    begin = (sizes.cumsum(0) - sizes)[samples]
    marked = torch.where(starts | ends, place, len(ids))
    first = samples.new_full((count + 1,), len(ids)).scatter_reduce(0, samples, marked, "amin")
    opened = (first < len(ids)) & ends[first.clamp(max=len(ids) - 1)]  # by something before the sample's first token
    last = torch.where(starts | ends, place, -1).cummax(0).values
    until = torch.cat([last.new_full((1,), -1), last[:-1]])  # the last marker before a token

    def is_open(marker: Tensor) -> Tensor:
        return torch.where(marker >= begin, starts[marker.clamp(min=0)], opened[samples])

    return is_open(last) | (ends & is_open(until))
