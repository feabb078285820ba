"""Attention over packed segments in plain PyTorch: the reference, on every device.

Shapes: `Lq` queries and `Lk` keys of all segments; `H` query heads, `Hkv` key heads; `D` channels of queries
and keys, `Dv` of values. `cu_seqlens_q` and `cu_seqlens_k` cut both into equally many segments.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .host_bounds import read_bounds


def segment_lengths(cu_seqlens: Tensor, total: int, name: str) -> list[int]:
    """Segment lengths as host integers.

    Args:
        cu_seqlens: `(segments + 1,)` cumulative lengths.
        total: number of tokens that the segments must cover.
        name: what to call `cu_seqlens` in an error.

    Returns:
        One length per segment.

    Raises:
        ValueError: the boundaries do not start at zero, decrease, or do not end at `total`.
    """
    bounds = read_bounds(cu_seqlens)
    lengths = [end - start for start, end in zip(bounds, bounds[1:], strict=False)]
    if bounds[0] != 0 or bounds[-1] != total or any(length < 0 for length in lengths):
        raise ValueError(f"{name} must rise from 0 to the number of tokens, {total}, got {list(bounds)}")
    return lengths


def packed_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """Attention inside each segment, one after the other. Runs on every device, with PyTorch's autograd.

    Args:
        query: `(Lq, H, D)`.
        key: `(Lk, Hkv, D)`.
        value: `(Lk, Hkv, Dv)`.
        cu_seqlens_q: `(segments + 1,)` int32.
        cu_seqlens_k: `(segments + 1,)` int32.
        max_seqlen_q: unused here; kernels for accelerators need it on the host.
        max_seqlen_k: unused here.
        scale: factor on the scores; `None` for `D ** -0.5`.
        causal: a query sees the keys up to its own place, counted from the end of both.

    Returns:
        `(Lq, H, Dv)`.
    """
    lengths_q = segment_lengths(cu_seqlens_q, query.shape[0], "cu_seqlens_q")
    lengths_k = segment_lengths(cu_seqlens_k, key.shape[0], "cu_seqlens_k")
    queries, keys, values = (
        split_heads_first(query, lengths_q),
        split_heads_first(key, lengths_k),
        split_heads_first(value, lengths_k),
    )
    segments = zip(queries, keys, values, strict=True)
    return join_segments([attend(q, k, v, scale, causal) for q, k, v in segments], query, value)


def split_heads_first(tokens: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
    """Views `(1, H, length, D)` of the segments of `(L, H, D)`, which is how SDPA wants them."""
    return tokens.transpose(0, 1).unsqueeze(0).split(lengths, dim=2)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None, causal: bool) -> Tensor:
    """Attention of `(B, H, Lq, D)` over `(B, Hkv, Lk, D)`; queries that see no key give zeros."""
    length_q, length_k = query.shape[2], key.shape[2]
    if length_q == 0 or length_k == 0:
        return zeros_like_output(query, value)
    if causal and length_q > length_k:
        blind, seeing = query.split((length_q - length_k, length_k), dim=2)
        return torch.cat((zeros_like_output(blind, value), attend(seeing, key, value, scale, causal)), dim=2)
    mask = None
    if causal and length_q < length_k:
        mask = torch.ones(length_q, length_k, dtype=torch.bool, device=query.device).tril(length_k - length_q)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=causal and mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def zeros_like_output(query: Tensor, value: Tensor) -> Tensor:
    """Zeros of the output's shape which stay part of the autograd graph of `query`."""
    return query[..., :0].sum(-1, keepdim=True).expand(*query.shape[:-1], value.shape[-1])


def join_segments(outputs: list[Tensor], query: Tensor, value: Tensor) -> Tensor:
    """Put outputs `(B, H, length, Dv)`, one after the other, into `(L, H, Dv)`."""
    if not outputs:
        return zeros_like_output(query, value)
    rows = [
        output.transpose(1, 2) if len(output) == 1 else output.transpose(1, 2).flatten(0, 1)[None]
        for output in outputs
    ]
    return rows[0][0].contiguous() if len(rows) == 1 else torch.cat(rows, dim=1)[0]
