"""Pooling of packed images: one vector per image.

Shapes: `L` patches of all images, `n` images, `D` width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .ops_activations import get_activation
from .ops_attention import dense_attention_forward, packed_attention
from .ops_linear import apply_linear


class MaskedAttentionPooling(nn.Module):
    """Attention pooling with one learned query per image, which attends to that image's patches.

    The MAP head of arXiv 2106.04560 as NaViT uses it (arXiv 2307.06304, section 2.1): a learned probe attends to the
    patches of one image; a pre-norm residual MLP follows.

    Args:
        config: Fields `hidden_size`, `intermediate_size`, `num_attention_heads`, `layer_norm_eps`, `hidden_act`, and
            the attention implementation: "eager" is dense, others are packed.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, self.config = config.hidden_size, config
        self.num_heads = config.num_attention_heads
        self.probe = nn.Parameter(torch.zeros(width))
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.act_fn = get_activation(config.hidden_act)
        self.fc2 = nn.Linear(config.intermediate_size, width)

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        cu_seqlens_cpu: Sequence[int] | None = None,
    ) -> Tensor:
        """Pool each image.

        Args:
            hidden_states: `(L, D)` patches of all images.
            cu_seqlens: `(n + 1,)` int32 cumulative patch counts of the images.
            max_seqlen: Longest image, or an upper bound.
            cu_seqlens_cpu: `cu_seqlens` as host integers, if known.

        Returns:
            `(n, D)`.
        """
        images = cu_seqlens.shape[0] - 1
        query = (
            apply_linear(self.q_proj, self.probe.unsqueeze(0)).expand(images, -1).unflatten(-1, (self.num_heads, -1))
        )
        key = apply_linear(self.k_proj, hidden_states).unflatten(-1, (self.num_heads, -1))
        value = apply_linear(self.v_proj, hidden_states).unflatten(-1, (self.num_heads, -1))
        cu_probes = torch.arange(images + 1, dtype=torch.int32, device=cu_seqlens.device)
        # While compiling, the number of images is symbolic, and host lengths are ignored.
        cu_probes_cpu = None if torch.compiler.is_compiling() else range(images + 1)
        if self.config._attn_implementation == "eager":
            query, key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
            pooled, _ = dense_attention_forward(
                self, query, key, value, None, cu_seq_lens_q=cu_probes, cu_seq_lens_k=cu_seqlens
            )
            pooled = pooled.squeeze(0)
        else:
            pooled = packed_attention(
                query,
                key,
                value,
                cu_probes,
                cu_seqlens,
                max_seqlen_q=1,
                max_seqlen_k=max_seqlen,
                cu_seqlens_q_cpu=cu_probes_cpu,
                cu_seqlens_k_cpu=cu_seqlens_cpu,
            )
        pooled = apply_linear(self.o_proj, pooled.flatten(-2))
        return pooled + apply_linear(self.fc2, self.act_fn(apply_linear(self.fc1, self.norm(pooled))))


def mean_pooling(hidden_states: Tensor, image_ids: Tensor, num_images: int) -> Tensor:
    """Mean over the rows of each image, summed in float32 or better.

    Args:
        hidden_states: `(L, D)`.
        image_ids: `(L,)` int64 image of each row; rows with the index n (padding) are ignored.
        num_images: n.

    Returns:
        `(n, D)` in the dtype of `hidden_states`; zeros for an image without rows.
    """
    precise = torch.promote_types(hidden_states.dtype, torch.float32)
    sums = hidden_states.new_zeros(num_images + 1, hidden_states.shape[1], dtype=precise)
    sums = sums.index_add(0, image_ids, hidden_states.to(precise))
    counts = torch.zeros_like(sums[:, :1]).index_add(
        0, image_ids, torch.ones_like(hidden_states[:, :1], dtype=precise)
    )
    return (sums / counts.clamp(min=1))[:num_images].to(hidden_states.dtype)


def max_pooling(hidden_states: Tensor, image_ids: Tensor, num_images: int) -> Tensor:
    """Maximum over the rows of each image; arguments and result are those of [`mean_pooling`]."""
    index = image_ids[:, None].expand_as(hidden_states)
    largest = hidden_states.new_zeros(num_images + 1, hidden_states.shape[1])
    return largest.scatter_reduce(0, index, hidden_states, "amax", include_self=False)[:num_images]
