"""Embeddings and blocks of the NaViT encoder (arXiv 2307.06304). Their `config` is a [`NaViTConfig`].

Shapes: L tokens of all segments, D width, H heads, C channels, P side of a patch.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import PACKED_ATTENTION_FUNCTIONS as ALL_ATTENTION_FUNCTIONS
from .attention import dense_attention_forward
from .linear import Linear
from .patch_layout import PatchLayout
from .positions import PositionEmbedding
from .rotary import apply_rotary
from .segments import Segments


class NaViTEmbeddings(nn.Module):
    """Patches to vectors: a linear layer on the flattened pixels, plus the position of each patch."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.patch_embedding = Linear(config.num_channels * config.patch_size**2, config.hidden_size)
        self.position_embedding = None
        if config.position_kind != "none":
            self.position_embedding = PositionEmbedding(
                config.hidden_size,
                config.max_grid_size,
                kind=config.position_kind,
                coordinates=config.position_coordinates,
                combination=config.position_combination,
                interpolation=config.position_interpolation,
                overflow=config.position_overflow,
            )
        self.frame_embedding = nn.Embedding(config.max_frames, config.hidden_size) if config.max_frames else None

    def forward(self, pixel_values: Tensor, layout: PatchLayout) -> Tensor:
        """Embed `(L, C*P*P)` patches as `(L, D)`.

        Raises:
            ValueError: If a video has more frames than `max_frames`.
        """
        hidden_states = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        if self.position_embedding is not None:
            hidden_states = hidden_states + self.position_embedding(
                layout.position_ids, layout.grid_sizes, hidden_states.dtype
            )
        if self.frame_embedding is not None:
            limit, frames = self.frame_embedding.num_embeddings, layout.frame_ids
            if not torch.compiler.is_compiling() and frames.numel() and int(frames.max()) >= limit:
                raise ValueError(
                    f"`image_grid_thw` holds a video of {int(frames.max()) + 1} frames or more, "
                    f"but `max_frames` is {limit}."
                )
            hidden_states = hidden_states + self.frame_embedding(frames)
        return hidden_states


class NaViTAttention(nn.Module):
    """Self-attention inside each segment, with normalised queries and keys."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.o_proj = Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        if config.use_qk_norm:
            self.q_norm: nn.Module = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps, bias=False)
            self.k_norm: nn.Module = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps, bias=False)
        else:
            self.q_norm, self.k_norm = nn.Identity(), nn.Identity()

    def forward(self, hidden_states: Tensor, segments: Segments, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Attend `(L, D)` tokens inside their segments; returns `(L, D)` and the weights, if any."""
        query, key, value = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        query, key = self.q_norm(query), self.k_norm(key)
        if segments.rotary is not None:
            query, key = apply_rotary(query, *segments.rotary), apply_rotary(key, *segments.rotary)
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
            **kwargs,
        )
        return self.o_proj(attended.squeeze(0).flatten(-2)), weights


class NaViTMLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map `(L, D)` to `(L, D)`."""
        return self.fc2(self.act_fn(self.fc1(hidden_states)))


class NaViTLayer(GradientCheckpointingLayer):
    """A pre-norm transformer block."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps, bias=config.layer_norm_bias)
        self.self_attn = NaViTAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps, bias=config.layer_norm_bias)
        self.mlp = NaViTMLP(config)

    def forward(self, hidden_states: Tensor, passes: list[Segments], **kwargs: Any) -> Tensor:
        """Map `(L, D)` to `(L, D)`, one group of segments after the other."""
        parts = hidden_states.split([one.tokens for one in passes]) if len(passes) > 1 else (hidden_states,)
        outputs = [self._forward(part, one, **kwargs) for part, one in zip(parts, passes, strict=True)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _forward(self, hidden_states: Tensor, segments: Segments, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(self.norm1(hidden_states), segments, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.norm2(hidden_states))
