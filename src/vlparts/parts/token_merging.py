"""Merging of similar tokens by bipartite matching (ToMe, arXiv 2210.09461, section 3).

Shapes: T tokens of one image, K tokens that are left, D channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

__all__ = ["RemainingTokens", "average_merged", "match_tokens", "merge_tokens"]


class RemainingTokens(NamedTuple):
    """What is left of the tokens of one image.

    Attributes:
        tokens: `(K, D)`.
        kept_index: `(K,)` int64, the token whose place each keeps, increasing.
        assignment: `(T,)` int64, the token of K that holds each; -1 for one that was dropped.
        sizes: `(K,)` number of tokens that each holds, or the sum of the given sizes; float32.
    """

    tokens: Tensor
    kept_index: Tensor
    assignment: Tensor
    sizes: Tensor


@torch.no_grad()
def match_tokens(metric: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Choose the pairs of tokens of one round that become one.

    Even tokens are matched with the odd token of the largest cosine similarity; the `count` best pairs are merged.

    Args:
        metric: `(T, D)` vectors that are compared.
        count: Number of pairs, at most `T // 2`.

    Returns:
        `(count,)` int64 even tokens, and the odd tokens that they become part of. An odd one can occur several times.
    """
    unit = normalize(metric.float() if metric.dtype.itemsize < 4 else metric, dim=-1)
    similarity, partner = (unit[::2] @ unit[1::2].T).max(-1)
    even = similarity.argsort(descending=True, stable=True)[:count]
    return even * 2, partner[even] * 2 + 1


def average_merged(tokens: Tensor, sizes: Tensor, even: Tensor, odd: Tensor) -> tuple[Tensor, Tensor]:
    """Return `(T, D)` tokens and `(T,)` sizes in which the tokens `odd` are weighted means with those of `even`.

    Tokens without a partner are unchanged to the bit; those of `even` are left in place.
    """
    weighted = tokens.to(sizes.dtype) * sizes.unsqueeze(-1)
    total = sizes.index_add(0, odd, sizes[even])
    means = weighted.index_add(0, odd, weighted[even]) / total.unsqueeze(-1)
    changed = torch.zeros_like(sizes, dtype=torch.bool).index_fill(0, odd, True)
    return torch.where(changed.unsqueeze(-1), means.to(tokens.dtype), tokens), total


def merge_tokens(tokens: Tensor, count: int, sizes: Tensor | None = None) -> RemainingTokens:
    """Merge the tokens of one image until `count` are left, at most half of them in each round.

    Args:
        tokens: `(T, D)` in the order of the image.
        count: K, at least 1.
        sizes: `(T,)` number of tokens that each holds already; None for one.

    Returns:
        The tokens, in the order of the image. Means are computed in float32 or better.
    """
    precise = torch.promote_types(tokens.dtype, torch.float32)
    sizes = torch.ones(len(tokens), dtype=precise, device=tokens.device) if sizes is None else sizes.to(precise)
    index = assignment = torch.arange(len(tokens), device=tokens.device)
    while len(tokens) > count:
        even, odd = match_tokens(tokens, min(len(tokens) // 2, len(tokens) - count))
        tokens, sizes = average_merged(tokens, sizes, even, odd)
        left = torch.ones_like(index, dtype=torch.bool).index_fill(0, even, False)
        # Where the tokens of this round went: to their partners, which move up as others leave.
        place = left.cumsum(0) - 1
        place = place.index_copy(0, even, place[odd])
        tokens, sizes, index, assignment = tokens[left], sizes[left], index[left], place[assignment]
    return RemainingTokens(tokens, index, assignment, sizes)
