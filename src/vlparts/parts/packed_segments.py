"""The attention segments of a packed sequence, and the passes in which a layer computes them.

Shapes: `L` tokens, `S` segments, `d` channels of a head.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .ops_library import define_operation


class Segments(NamedTuple):
    """Attention metadata: tokens that attend to one another, and their rotary positions.

    Attributes:
        cu_seqlens: `(S + 1,)` int32 cumulative lengths.
        max_seqlen: Longest segment, or a bound on it.
        cu_seqlens_cpu: `cu_seqlens` as host integers, if known.
        rotary: Cosines and sines, `(L, d)` float32 each, or None.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    cu_seqlens_cpu: Sequence[int] | None = None
    rotary: tuple[Tensor, Tensor] | None = None


class Pass(NamedTuple):
    """Consecutive segments that a layer computes at a time.

    Attributes:
        segments: The segments, with boundaries from 0.
        tokens: Their number of tokens; 0 where the sequence is one pass.
        mlp_chunk_size: Tokens per chunk of the MLP; 0 disables chunking.
    """

    segments: Segments
    tokens: int = 0
    mlp_chunk_size: int = 0


def _tokens_per_pass(hidden_states: Tensor, width: int) -> int:
    """Number of tokens of a pass; 0 for all. Kernels may return another number, see [`split_passes`]."""
    return 0


define_operation("tokens_per_pass(Tensor hidden_states, int width) -> int", _tokens_per_pass)


def split_passes(segments: Segments, hidden_states: Tensor, width: int) -> list[Pass]:
    """Divide a sequence between segments into passes, which a layer computes one after the other.

    Smaller activations are faster where they stay in cache. The operation `vlparts::tokens_per_pass` decides how many
    tokens a pass has; without a kernel for the device, all tokens are one pass.

    Args:
        segments: All segments.
        hidden_states: `(L, D)`, for its device and dtype.
        width: Channels of the widest activation of a layer.

    Returns:
        One or more passes. A segment is never divided; where one is longer than a pass should be, the MLP runs in
        chunks.
    """
    if torch.compiler.is_compiling():
        return [Pass(segments)]
    limit = torch.ops.vlparts.tokens_per_pass(hidden_states, width)
    if not limit or hidden_states.shape[0] <= limit:
        return [Pass(segments)]
    bounds = segments.cu_seqlens.tolist() if segments.cu_seqlens_cpu is None else segments.cu_seqlens_cpu
    cuts = [0]
    for index in range(1, len(bounds)):
        if bounds[index] - bounds[cuts[-1]] > limit and index - 1 > cuts[-1]:
            cuts.append(index - 1)
    cuts.append(len(bounds) - 1)
    passes = []
    for first, last in pairwise(cuts):
        start, end = bounds[first], bounds[last]
        own = [bound - start for bound in bounds[first : last + 1]]
        rotary = None if segments.rotary is None else tuple(table[start:end] for table in segments.rotary)
        longest = max(right - left for left, right in pairwise(own))
        cu_seqlens = segments.cu_seqlens[first : last + 1] - start
        passes.append(Pass(Segments(cu_seqlens, longest, own, rotary), end - start, limit))
    return passes
