"""CUDA kernels for the operations of `vlparts.parts`.

Shapes: `Lq` queries and `Lk` keys of all segments; `H` query heads, `Hkv` key heads, `D` channels of a head.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ..parts import ops_attention  # noqa: F401 (defines the operation)
from ..parts.ops_attention_reference import packed_attention_reference


def register() -> None:
    """Register the kernels with PyTorch's dispatcher."""
    torch.library.impl("vlparts::varlen_attention", ("CUDA", "AutogradCUDA"), packed_attention_cuda)


def packed_attention_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None = None,
    causal: bool = False,
    cu_seqlens_q_cpu: Sequence[int] | None = None,
    cu_seqlens_k_cpu: Sequence[int] | None = None,
) -> Tensor:
    """PyTorch's variable-length flash attention where it applies, otherwise the reference.

    Arguments and result are those of [`packed_attention_reference`]. The values of the boundaries are not checked on
    the fast path, since that would synchronize with the device.
    """
    arguments = (query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if not varlen_applies(query, key, value) or torch.cuda.get_device_capability(query.device) < (8, 0):
        return packed_attention_reference(*arguments, scale, causal, cu_seqlens_q_cpu, cu_seqlens_k_cpu)
    from torch.nn.attention.varlen import varlen_attn

    output = varlen_attn(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        scale=scale,
        window_size=(-1, 0) if causal else (-1, -1),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return cast(Tensor, output)  # a tuple only where more is asked for


def varlen_applies(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether PyTorch's flash attention takes these inputs: half precision, equal head sizes."""
    try:
        import torch.nn.attention.varlen
    except ImportError:
        return False
    return (
        query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == value.shape[-1]
        and query.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and min(query.shape[0], key.shape[0]) > 0
        and all(x.stride(-1) == 1 for x in (query, key, value))
    )
