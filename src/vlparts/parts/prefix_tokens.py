"""Learned tokens in front of the patches of every attention segment: class tokens and registers.

Shapes: `L` patches, `S` segments, `K` prefix tokens of a segment, `D` width, `d` channels of a head.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .host_bounds import known_bounds, remember_bounds
from .packing import segment_ids


class PrefixPlaces(NamedTuple):
    """Where patches and prefix tokens stand in the longer sequence of `L + S * K` tokens.

    Attributes:
        patches: `(L,)` int64 places of the patches.
        prefix: `(S, K)` int64 places of the prefix tokens.
        cu_seqlens: `(S + 1,)` int32 cumulative lengths of the longer segments.
    """

    patches: Tensor
    prefix: Tensor
    cu_seqlens: Tensor


def get_prefix_places(cu_seqlens: Tensor, num_patches: int, count: int) -> PrefixPlaces:
    """Work out the places.

    Args:
        cu_seqlens: `(S + 1,)` int32 cumulative patch counts.
        num_patches: L.
        count: K.
    """
    numbers = torch.arange(cu_seqlens.shape[0], device=cu_seqlens.device, dtype=torch.int32)
    longer = cu_seqlens + count * numbers
    bounds = known_bounds(cu_seqlens)
    if bounds is not None:
        remember_bounds(longer, [bound + count * number for number, bound in enumerate(bounds)])
    patches = torch.arange(num_patches, device=cu_seqlens.device)
    patches = patches + count * (segment_ids(cu_seqlens, num_patches) + 1)
    prefix = longer[:-1, None].long() + torch.arange(count, device=cu_seqlens.device)
    return PrefixPlaces(patches, prefix, longer)


class PrefixTokens(nn.Module):
    """Learned tokens that every segment gets a copy of.

    A class token gathers what the whole segment holds (ViT, arXiv 2010.11929); registers give attention a place to
    put what belongs to no patch (arXiv 2309.16588).

    Args:
        count: K.
        hidden_size: D.
    """

    def __init__(self, count: int, hidden_size: int) -> None:
        super().__init__()
        self.count = count
        self.tokens = nn.Parameter(torch.zeros(count, hidden_size))

    def forward(self, hidden_states: Tensor, places: PrefixPlaces) -> Tensor:
        """Put the tokens in front of each segment of `(L, D)`; returns `(L + S * K, D)`."""
        segments = places.prefix.shape[0]
        longer = hidden_states.new_empty(hidden_states.shape[0] + segments * self.count, hidden_states.shape[1])
        longer = longer.index_copy(0, places.patches, hidden_states)
        tokens = self.tokens.to(hidden_states.dtype).repeat(segments, 1)
        return longer.index_copy(0, places.prefix.flatten(), tokens)


def insert_unrotated(rotary: tuple[Tensor, Tensor], places: PrefixPlaces) -> tuple[Tensor, Tensor]:
    """Cosines and sines `(L, d)` with rows for prefix tokens, which have no place and so are not rotated."""
    cos, sin = rotary
    length = cos.shape[0] + places.prefix.numel()
    ones, zeros = cos.new_ones(length, cos.shape[1]), sin.new_zeros(length, sin.shape[1])
    return ones.index_copy(0, places.patches, cos), zeros.index_copy(0, places.patches, sin)
