"""Layers of vision encoders over packed sequences: self-attention, pre-norm blocks, and prefix tokens.

Prefix tokens (class tokens and registers) are learned tokens in front of the patches of each attention segment.

Shapes: `L` tokens of all segments, without prefix tokens; `S` segments; `K` prefix tokens per segment; `D` width; `H`
heads; `d` channels of a head.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from einops import repeat
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from .ops_activations import get_activation
from .ops_attention import PACKED_ATTENTION_FUNCTIONS as ALL_ATTENTION_FUNCTIONS
from .ops_attention import dense_attention_forward
from .ops_linear import apply_linear
from .ops_rotary import apply_rotary_pair
from .packed_index import segment_ids
from .packed_segments import Pass, Segments, split_passes


def plan_passes(segments: Segments, hidden_states: Tensor, config: PreTrainedConfig) -> list[Pass]:
    """Divide a sequence into the passes of a layer; see [`split_passes`].

    Args:
        segments: All segments.
        hidden_states: `(L, D)`, for its device and dtype.
        config: A configuration with `intermediate_size`.
    """
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, dense_attention_forward)
    if attend is dense_attention_forward:  # returns the weights of all pairs of tokens, so there is one pass
        return [Pass(segments)]
    return split_passes(segments, hidden_states, config.intermediate_size)


class TwoLayerMLP(nn.Module):
    """Two linear layers with an activation in between."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.act_fn = get_activation(config.hidden_act)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map `(L, D)` to `(L, D)`."""
        return apply_linear(self.fc2, self.act_fn(apply_linear(self.fc1, hidden_states)))


class PackedSelfAttention(nn.Module):
    """Self-attention within each segment.

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
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)

    def normalize(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Normalize queries and keys `(L, H, d)` before they are rotated. By default they are returned unchanged."""
        return query, key

    def forward(self, hidden_states: Tensor, segments: Segments, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Attend within segments; returns `(L, D)` and the attention weights, if any."""
        projected = apply_linear(self.qkv, hidden_states)
        query, key, value = projected.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        query, key = self.normalize(query, key)
        if segments.rotary is not None:
            query, key = apply_rotary_pair(query, key, *segments.rotary)
        if segments.log_sizes is not None:
            query, key, value = self._add_to_scores(query, key, value, segments.log_sizes)
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
        return apply_linear(self.o_proj, attended.squeeze(0)[..., : self.head_dim].flatten(-2)), weights

    def _add_to_scores(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add channels to states `(L, H, d)`, by which `bias` `(L,)` is added to the scores of each key."""
        # One channel does it; fused kernels take widths that are multiples of 8, and equal ones.
        query, key, value = (torch.nn.functional.pad(states, (0, 8)) for states in (query, key, value))
        query[..., self.head_dim] = 1 / self.scaling
        key[..., self.head_dim] = bias.to(key.dtype).unsqueeze(-1)
        return query, key, value


class PackedLayer(GradientCheckpointingLayer):
    """Pre-norm transformer block of the given attention, MLP and normalizations."""

    def __init__(self, self_attn: PackedSelfAttention, mlp: nn.Module, norm1: nn.Module, norm2: nn.Module) -> None:
        super().__init__()
        self.norm1 = norm1
        self.self_attn = self_attn
        self.norm2 = norm2
        self.mlp = mlp

    def forward(self, hidden_states: Tensor, passes: list[Pass], **kwargs: Any) -> Tensor:
        """Map `(L, D)` to `(L, D)`, pass by pass."""
        if len(passes) == 1:
            return self._forward_pass(hidden_states, passes[0], **kwargs)
        parts = hidden_states.split([one.tokens for one in passes])
        return torch.cat([self._forward_pass(part, one, **kwargs) for part, one in zip(parts, passes, strict=True)])

    def _forward_pass(self, hidden_states: Tensor, current: Pass, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(self.norm1(hidden_states), current.segments, **kwargs)
        hidden_states = hidden_states + attended
        if 0 < current.mlp_chunk_size < current.tokens:
            chunks = hidden_states.split(current.mlp_chunk_size)
            return torch.cat([chunk + self.mlp(self.norm2(chunk)) for chunk in chunks])
        return hidden_states + self.mlp(self.norm2(hidden_states))


class PrefixLayout(NamedTuple):
    """Indices of patches and prefix tokens in the joint sequence of `L + S * K` tokens.

    Attributes:
        patches: `(L,)` int64 indices of the patches.
        prefix: `(S, K)` int64 indices of the prefix tokens.
        cu_seqlens: `(S + 1,)` int32 cumulative lengths of the segments with their prefix tokens.
        cu_seqlens_cpu: `cu_seqlens` as host integers, if known.
    """

    patches: Tensor
    prefix: Tensor
    cu_seqlens: Tensor
    cu_seqlens_cpu: Sequence[int] | None


def get_prefix_layout(
    cu_seqlens: Tensor, num_patches: int, count: int, cu_seqlens_cpu: Sequence[int] | None = None
) -> PrefixLayout:
    """Compute where prefix tokens go.

    Args:
        cu_seqlens: `(S + 1,)` int32 cumulative patch counts.
        num_patches: L.
        count: K.
        cu_seqlens_cpu: `cu_seqlens` as host integers, if known.
    """
    device = cu_seqlens.device
    longer = cu_seqlens + count * torch.arange(cu_seqlens.shape[0], device=device, dtype=torch.int32)
    longer_cpu = None
    if cu_seqlens_cpu is not None:
        longer_cpu = [bound + count * index for index, bound in enumerate(cu_seqlens_cpu)]
    patches = torch.arange(num_patches, device=device) + count * (segment_ids(cu_seqlens, num_patches) + 1)
    prefix = longer[:-1, None].long() + torch.arange(count, device=device)
    return PrefixLayout(patches, prefix, longer, longer_cpu)


class PrefixTokens(nn.Module):
    """Learned tokens that are inserted in front of each segment.

    A class token aggregates the segment (ViT, arXiv 2010.11929). Registers hold global information that would
    otherwise replace that of some patches (arXiv 2309.16588).

    Args:
        count: K.
        hidden_size: D.
    """

    def __init__(self, count: int, hidden_size: int) -> None:
        super().__init__()
        self.count = count
        self.tokens = nn.Parameter(torch.zeros(count, hidden_size))

    def forward(self, hidden_states: Tensor, layout: PrefixLayout) -> Tensor:
        """Insert the tokens in front of each segment of `(L, D)`; returns `(L + S * K, D)`."""
        segments = layout.prefix.shape[0]
        longer = hidden_states.new_empty(hidden_states.shape[0] + segments * self.count, hidden_states.shape[1])
        longer = longer.index_copy(0, layout.patches, hidden_states)
        tokens = repeat(self.tokens.to(hidden_states.dtype), "k d -> (s k) d", s=segments)
        return longer.index_copy(0, layout.prefix.flatten(), tokens)


def insert_unrotated(rotary: tuple[Tensor, Tensor], layout: PrefixLayout) -> tuple[Tensor, Tensor]:
    """Add rows for prefix tokens, which have no position and are not rotated, to cosines and sines `(L, d)`."""
    cos, sin = rotary
    length = cos.shape[0] + layout.prefix.numel()
    ones, zeros = cos.new_ones(length, cos.shape[1]), sin.new_zeros(length, sin.shape[1])
    return ones.index_copy(0, layout.patches, cos), zeros.index_copy(0, layout.patches, sin)
