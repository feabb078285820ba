"""Attention metadata of a packed sequence, and the passes in which a layer computes it.

Shapes: `L` tokens, `S` segments, `d` channels of a head.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor

from .ops_library import define_operation
from .packed_index import get_cu_seqlens, get_kept_cu_seqlens, get_max_seqlen, get_patch_layout, validate_grid


class Segments(NamedTuple):
    """Attention metadata: which tokens attend to each other, and their rotary positions.

    Attributes:
        cu_seqlens: `(S + 1,)` int32 cumulative lengths.
        max_seqlen: Longest segment, or an upper bound.
        cu_seqlens_cpu: `cu_seqlens` as host integers, if known.
        rotary: Cosines and sines, `(L, d)` float32 each, or None.
        log_sizes: `(L,)` float32 logarithm of the number of patches that each token holds, which is added to the
            scores of its key; None if each holds one.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    cu_seqlens_cpu: Sequence[int] | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    log_sizes: Tensor | None = None


def precompute_inputs(
    image_grid_thw: Tensor,
    spatial_merge_size: int = 1,
    merge_temporal: bool = False,
    keep_index: Tensor | None = None,
) -> dict[str, Any]:
    """Check grids, and compute from them what packed encoders otherwise compute in each forward pass.

    Args:
        image_grid_thw: `(n, 3)` int64 frames, rows and columns of each image in patches.
        spatial_merge_size: Side of a merge block, which sets the order of patches.
        merge_temporal: One segment per image or video instead of one per frame.
        keep_index: `(L,)` int64, if patches were dropped or padding rows added.

    Returns:
        `cu_seqlens`, `max_seqlen` and `position_ids`.

    Raises:
        ValueError: If grids are malformed or `keep_index` does not match them.
    """
    patches = int(image_grid_thw.prod(-1).sum()) if keep_index is None else keep_index.shape[0]
    validate_grid(image_grid_thw, patches, spatial_merge_size, keep_index)
    layout = get_patch_layout(image_grid_thw, patches, spatial_merge_size, keep_index)
    if keep_index is None:
        cu_seqlens = get_cu_seqlens(image_grid_thw, merge_temporal)
    else:
        cu_seqlens = get_kept_cu_seqlens(image_grid_thw, layout, patches, merge_temporal)
    return {
        "cu_seqlens": cu_seqlens,
        "max_seqlen": get_max_seqlen(cu_seqlens),
        "position_ids": layout.position_ids,
    }


class Pass(NamedTuple):
    """Consecutive segments that a layer computes together.

    Attributes:
        segments: The segments; boundaries start at 0.
        tokens: Number of tokens; 0 if the sequence is one pass.
        mlp_chunk_size: Tokens per chunk of the MLP; 0 disables chunking.
    """

    segments: Segments
    tokens: int = 0
    mlp_chunk_size: int = 0


def _tokens_per_pass_reference(hidden_states: Tensor, width: int) -> int:
    """Number of tokens per pass; 0 for all. Kernels may return another number, see [`split_passes`]."""
    return 0


tokens_per_pass = define_operation(
    "tokens_per_pass(Tensor hidden_states, int width) -> int", _tokens_per_pass_reference
)
"""Number of tokens whose activations of `width` channels are best computed together; 0 for all."""


def split_passes(segments: Segments, hidden_states: Tensor, width: int) -> list[Pass]:
    """Divide a sequence into passes of whole segments.

    Smaller activations are faster where they fit in the cache. The operation `vlparts::tokens_per_pass` returns the
    number of tokens per pass; without a kernel for the device, and in compiled programs, all tokens are one pass.

    Args:
        segments: All segments.
        hidden_states: `(L, D)`, for its device and dtype.
        width: Channels of the widest activation of a layer.

    Returns:
        One or more passes. A segment is never divided; in a pass that is longer than the limit, the MLP runs in
        chunks.
    """
    limit = tokens_per_pass(hidden_states, width)
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
        rotary = None
        if segments.rotary is not None:
            cos, sin = segments.rotary
            rotary = cos[start:end], sin[start:end]
        log_sizes = None if segments.log_sizes is None else segments.log_sizes[start:end]
        longest = max(right - left for left, right in pairwise(own))
        cu_seqlens = segments.cu_seqlens[first : last + 1] - start
        passes.append(Pass(Segments(cu_seqlens, longest, own, rotary, log_sizes), end - start, limit))
    return passes
