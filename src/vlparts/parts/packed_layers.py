"""Pre-norm transformer blocks over packed sequences, which vision parts share and complete.

Shapes: L tokens of all segments, D width, H heads.

Learned tokens in front of the patches of every attention segment: class tokens and registers.

Shapes: `L` patches, `S` segments, `K` prefix tokens of a segment, `D` width, `d` channels of a head.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from .ops_attention import PACKED_ATTENTION_FUNCTIONS as ALL_ATTENTION_FUNCTIONS
from .ops_attention import dense_attention_forward
from .ops_linear import Linear
from .ops_rotary import apply_rotary_pair
from .packed_index import segment_ids
from .packed_segments import Pass, Segments


class PackedSelfAttention(nn.Module):
    """Self-attention inside each segment.

    Args:
        config: A configuration with `hidden_size`, `num_attention_heads` and `qkv_bias`.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.o_proj = Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)

    def normalize(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """What happens to queries and keys `(L, H, D / H)` before they are rotated: nothing here."""
        return query, key

    def forward(self, hidden_states: Tensor, segments: Segments, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Attend `(L, D)` tokens inside their segments; returns `(L, D)` and the weights, if any."""
        query, key, value = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        query, key = self.normalize(query, key)
        if segments.rotary is not None:
            query, key = apply_rotary_pair(query, key, *segments.rotary)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, dense_attention_forward)
        attended, weights = attend(
            self,
            query.transpose(0, 1).unsqueeze(0),
            key.transpose(0, 1).unsqueeze(0),
            value.transpose(0, 1).unsqueeze(0),
            attention_mask=None,
            scaling=self.scaling,
            dropout=0.0,
            is_causal=False,
            cu_seq_lens_q=segments.cu_seqlens,
            cu_seq_lens_k=segments.cu_seqlens,
            max_length_q=segments.max_seqlen,
            max_length_k=segments.max_seqlen,
            cu_seqlens_cpu=segments.cu_seqlens_cpu,
            **kwargs,
        )
        return self.o_proj(attended.squeeze(0).flatten(-2)), weights


class PackedLayer(GradientCheckpointingLayer):
    """A pre-norm transformer block: `norm1`, `self_attn`, `norm2` and `mlp`, which a part gives."""

    def __init__(self, self_attn: PackedSelfAttention, mlp: nn.Module, norm1: nn.Module, norm2: nn.Module) -> None:
        super().__init__()
        self.norm1 = norm1
        self.self_attn = self_attn
        self.norm2 = norm2
        self.mlp = mlp

    def forward(self, hidden_states: Tensor, passes: list[Pass], **kwargs: Any) -> Tensor:
        """Map `(L, D)` to `(L, D)`, one pass after the other."""
        if len(passes) == 1:
            return self._forward(hidden_states, passes[0], **kwargs)
        parts = hidden_states.split([one.tokens for one in passes])
        return torch.cat([self._forward(part, one, **kwargs) for part, one in zip(parts, passes, strict=True)])

    def _forward(self, hidden_states: Tensor, one: Pass, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(self.norm1(hidden_states), one.segments, **kwargs)
        hidden_states = hidden_states + attended
        if 0 < one.mlp_chunk_size < one.tokens:
            chunks = hidden_states.split(one.mlp_chunk_size)
            return torch.cat([chunk + self.mlp(self.norm2(chunk)) for chunk in chunks])
        return hidden_states + self.mlp(self.norm2(hidden_states))


class PrefixPlaces(NamedTuple):
    """Where patches and prefix tokens stand in the longer sequence of `L + S * K` tokens.

    Attributes:
        patches: `(L,)` int64 places of the patches.
        prefix: `(S, K)` int64 places of the prefix tokens.
        cu_seqlens: `(S + 1,)` int32 cumulative lengths of the longer segments.
        cu_seqlens_cpu: `cu_seqlens` as host integers, if known.
    """

    patches: Tensor
    prefix: Tensor
    cu_seqlens: Tensor
    cu_seqlens_cpu: Sequence[int] | None


def get_prefix_places(
    cu_seqlens: Tensor, num_patches: int, count: int, cu_seqlens_cpu: Sequence[int] | None = None
) -> PrefixPlaces:
    """Compute the places.

    Args:
        cu_seqlens: `(S + 1,)` int32 cumulative patch counts.
        num_patches: L.
        count: K.
        cu_seqlens_cpu: `cu_seqlens` as host integers, if known.
    """
    numbers = torch.arange(cu_seqlens.shape[0], device=cu_seqlens.device, dtype=torch.int32)
    longer = cu_seqlens + count * numbers
    longer_cpu = None
    if cu_seqlens_cpu is not None:
        longer_cpu = [bound + count * number for number, bound in enumerate(cu_seqlens_cpu)]
    patches = torch.arange(num_patches, device=cu_seqlens.device)
    patches = patches + count * (segment_ids(cu_seqlens, num_patches) + 1)
    prefix = longer[:-1, None].long() + torch.arange(count, device=cu_seqlens.device)
    return PrefixPlaces(patches, prefix, longer, longer_cpu)


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
