"""Embeddings and blocks of the NaViT encoder (arXiv 2307.06304). Their `config` is a [`NaViTConfig`].

Shapes: L tokens of all segments, D width, H heads, C channels, P side of a patch.
"""

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig

from .activations import get_activation
from .linear import Linear
from .packed_layers import PackedLayer, PackedSelfAttention
from .patch_layout import PatchLayout
from .positions import PositionEmbedding


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


class NaViTAttention(PackedSelfAttention):
    """Self-attention inside each segment, with normalised queries and keys."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.use_qk_norm:
            self.q_norm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps, bias=False)
            self.k_norm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps, bias=False)

    def normalize(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise queries and keys `(L, H, D / H)` head by head."""
        return self.q_norm(query), self.k_norm(key)


class NaViTMLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.act_fn = get_activation(config.hidden_act)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map `(L, D)` to `(L, D)`."""
        return self.fc2(self.act_fn(self.fc1(hidden_states)))


class NaViTLayer(PackedLayer):
    """A pre-norm transformer block with layer normalisations."""

    def __init__(self, config: PreTrainedConfig) -> None:
        norms = [
            nn.LayerNorm(config.hidden_size, config.layer_norm_eps, bias=config.layer_norm_bias) for _ in range(2)
        ]
        super().__init__(NaViTAttention(config), NaViTMLP(config), *norms)
