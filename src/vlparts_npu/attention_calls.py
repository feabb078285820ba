"""Division of packed segments into calls of as many as the attention operations of torch_npu take."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from .support import MOST_SEGMENTS, MOST_TOKENS


class Call(NamedTuple):
    """Neighbouring segments that one call computes.

    Attributes:
        queries: Their queries among all.
        keys: Their keys among all.
        ends_q: Where each segment's queries end, from the first of them.
        ends_k: The same for keys.
    """

    queries: slice
    keys: slice
    ends_q: list[int]
    ends_k: list[int]


def split_calls(bounds_q: Sequence[int], bounds_k: Sequence[int]) -> list[Call]:
    """Divide segments into calls of as many as the operations take; segments without queries are left out.

    Args:
        bounds_q: Cumulative query counts from 0.
        bounds_k: Cumulative key counts from 0.
    """
    groups: list[list[tuple[int, int, int, int]]] = []
    for (start_q, end_q), (start_k, end_k) in zip(pairwise(bounds_q), pairwise(bounds_k), strict=True):
        if start_q == end_q:
            continue
        first = groups[-1][0] if groups else None
        # Keys of a segment without queries would stand between those of its neighbours.
        follows = first is not None and groups[-1][-1][3] == start_k and len(groups[-1]) < MOST_SEGMENTS
        if first is None or not follows or max(end_q - first[0], end_k - first[2]) > MOST_TOKENS:
            groups.append([])
        groups[-1].append((start_q, end_q, start_k, end_k))
    return [
        Call(
            slice(group[0][0], group[-1][1]),
            slice(group[0][2], group[-1][3]),
            [segment[1] - group[0][0] for segment in group],
            [segment[3] - group[0][2] for segment in group],
        )
        for group in groups
    ]
