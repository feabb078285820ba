"""The attention segments of a packed sequence, and how many tokens a layer takes at a time.

Shapes: `L` tokens, `S` segments, `d` channels of a head.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .packed_index import read_bounds

# Largest activation, in bytes, that a layer makes at a time on CPU. Beyond about 32 MiB the C library returns memory
# to the system after every use, and fetching it again costs more than the arithmetic: a ViT-S takes 0.8 of the time
# with 2,000 to 8,000 tokens at a time that it takes with 14,000 (2 cores of a Zen 5, float32 and bfloat16, inference).
CPU_ACTIVATION_BYTES = 24 * 2**20


class Segments(NamedTuple):
    """Tokens that attend to one another, and their rotary positions.

    Attributes:
        cu_seqlens: `(S + 1,)` int32 cumulative lengths.
        max_seqlen: Longest segment, or a bound on it.
        rotary: Cosines and sines, `(L, d)` float32 each, or None.
        tokens: L as a host integer, where a sequence was split.
        rows: Tokens that what works token by token takes at a time; 0 for all.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    rotary: tuple[Tensor, Tensor] | None = None
    tokens: int = 0
    rows: int = 0


def split_passes(segments: Segments, hidden_states: Tensor, width: int) -> list[Segments]:
    """Divide a sequence between segments into passes that a layer computes one after the other.

    On CPU smaller activations are faster, since they stay in reused memory; other devices take all tokens at once. The
    dispatcher decides by the operation `vlparts::tokens_per_pass`, which a backend may override.

    Args:
        segments: All segments.
        hidden_states: `(L, D)`, for its device and type.
        width: Channels of the widest activation of a layer.

    Returns:
        One or more groups of neighbouring segments. A segment is never divided; where one is longer than a pass
        should be, `rows` says how many tokens the MLP takes at a time.
    """
    if torch.compiler.is_compiling():
        return [segments]
    limit = torch.ops.vlparts.tokens_per_pass(hidden_states, width)
    if not limit or hidden_states.shape[0] <= limit:
        return [segments]
    bounds = read_bounds(segments.cu_seqlens)
    cuts = [0]
    for index in range(1, len(bounds)):
        if bounds[index] - bounds[cuts[-1]] > limit and index - 1 > cuts[-1]:
            cuts.append(index - 1)
    cuts.append(len(bounds) - 1)
    passes = []
    for first, last in zip(cuts, cuts[1:], strict=False):
        start, end = bounds[first], bounds[last]
        rotary = segments.rotary
        passes.append(
            Segments(
                segments.cu_seqlens[first : last + 1] - start,
                max(bounds[i + 1] - bounds[i] for i in range(first, last)),
                None if rotary is None else (rotary[0][start:end], rotary[1][start:end]),
                end - start,
                limit,
            )
        )
    return passes


def _all_at_once(hidden_states: Tensor, width: int) -> int:
    return 0


def _tokens_on_cpu(hidden_states: Tensor, width: int) -> int:
    return max(1, CPU_ACTIVATION_BYTES // (width * hidden_states.element_size()))


def _define_operation() -> None:
    """Define the operation once per process, also where several copies of this file are imported."""
    if hasattr(torch.ops.vlparts, "tokens_per_pass"):
        return
    name = "vlparts::tokens_per_pass"
    torch.library.define(name, "(Tensor hidden_states, int width) -> int")
    torch.library.impl(name, "CompositeImplicitAutograd", _all_at_once)
    torch.library.impl(name, ("CPU", "AutogradCPU"), _tokens_on_cpu)


_define_operation()
