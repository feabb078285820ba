"""Pooling of packed segments: one vector for each image.

Shapes: L patches of all images, n images, D width, H heads.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .ops_activations import get_activation
from .ops_attention import packed_attention
from .ops_linear import Linear


class MaskedAttentionPooling(nn.Module):
    """Attention pooling with one learned query for each image, restricted to that image's patches.

    The MAP head of arXiv 2106.04560 as NaViT uses it (arXiv 2307.06304, section 2.1): a learned probe attends to the
    patches of one image; a normalised MLP follows as a residual.

    Args:
        config: Fields `hidden_size`, `intermediate_size`, `num_attention_heads`, `layer_norm_eps`, `hidden_act`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.probe = nn.Parameter(torch.zeros(width))
        self.q_proj = nn.Linear(width, width)
        self.k_proj = Linear(width, width)
        self.v_proj = Linear(width, width)
        self.o_proj = Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc1 = Linear(width, config.intermediate_size)
        self.act_fn = get_activation(config.hidden_act)
        self.fc2 = Linear(config.intermediate_size, width)

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        cu_seqlens_cpu: Sequence[int] | None = None,
    ) -> Tensor:
        """Pool each segment.

        Args:
            hidden_states: `(L, D)` patches of all images.
            cu_seqlens: `(n + 1,)` int32 cumulative patch counts of the images.
            max_seqlen: Longest segment, or a bound on it.
            cu_seqlens_cpu: `cu_seqlens` as host integers, if known.

        Returns:
            `(n, D)`, one vector for each image.
        """
        images = cu_seqlens.shape[0] - 1
        query = self.q_proj(self.probe).expand(images, -1).unflatten(-1, (self.num_heads, -1))
        key = self.k_proj(hidden_states).unflatten(-1, (self.num_heads, -1))
        value = self.v_proj(hidden_states).unflatten(-1, (self.num_heads, -1))
        one_each = torch.arange(images + 1, dtype=torch.int32, device=cu_seqlens.device)
        pooled = packed_attention(
            query,
            key,
            value,
            one_each,
            cu_seqlens,
            max_seqlen_q=1,
            max_seqlen_k=max_seqlen,
            cu_seqlens_q_cpu=range(images + 1),
            cu_seqlens_k_cpu=cu_seqlens_cpu,
        )
        pooled = self.o_proj(pooled.flatten(-2))
        return pooled + self.fc2(self.act_fn(self.fc1(self.norm(pooled))))


def mean_pooling(hidden_states: Tensor, image_ids: Tensor, num_images: int) -> Tensor:
    """Mean over the rows of each image, summed in float32 or better.

    Args:
        hidden_states: `(L, D)`.
        image_ids: `(L,)` int64 image of each row; rows with `num_images` count nowhere.
        num_images: n.

    Returns:
        `(n, D)` in the type of `hidden_states`; zeros for an image without rows.
    """
    precise = torch.promote_types(hidden_states.dtype, torch.float32)
    sums = hidden_states.new_zeros(num_images + 1, hidden_states.shape[1], dtype=precise)
    sums = sums.index_add(0, image_ids, hidden_states.to(precise))
    counts = torch.zeros_like(sums[:, :1]).index_add(
        0, image_ids, torch.ones_like(hidden_states[:, :1], dtype=precise)
    )
    return (sums / counts.clamp(min=1))[:num_images].to(hidden_states.dtype)


def max_pooling(hidden_states: Tensor, image_ids: Tensor, num_images: int) -> Tensor:
    """Largest value of each channel over the rows of each image; arguments and result as in [`mean_pooling`]."""
    index = image_ids[:, None].expand_as(hidden_states)
    largest = hidden_states.new_zeros(num_images + 1, hidden_states.shape[1])
    return largest.scatter_reduce(0, index, hidden_states, "amax", include_self=False)[:num_images]
