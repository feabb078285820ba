"""The packed-sequence NaViT encoder (arXiv 2307.06304).

Shapes: L patches of all images of a batch, n images, D width, H heads, C channels, P side of a patch.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import PACKED_ATTENTION_FUNCTIONS as ALL_ATTENTION_FUNCTIONS
from .attention import dense_attention_forward
from .configuration_navit import NaViTConfig
from .packing import get_cu_seqlens, get_max_seqlen, get_position_ids, validate_grid
from .pooling import MaskedAttentionPooling
from .positions import FactorizedPositionEmbedding


class NaViTEmbeddings(nn.Module):
    """Patches to vectors: a linear layer on the flattened pixels, plus the position of each patch."""

    def __init__(self, config: NaViTConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(config.num_channels * config.patch_size**2, config.hidden_size)
        self.position_embedding = FactorizedPositionEmbedding(
            config.max_grid_size, config.hidden_size, config.position_coordinates
        )

    def forward(self, pixel_values: Tensor, position_ids: Tensor, grid_sizes: Tensor) -> Tensor:
        """Embed `(L, C*P*P)` patches at `(L, 2)` positions of `(L, 2)` grids as `(L, D)`."""
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        return patches + self.position_embedding(position_ids, grid_sizes)


class NaViTAttention(nn.Module):
    """Self-attention inside each image, with normalised queries and keys."""

    def __init__(self, config: NaViTConfig) -> None:
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        if config.use_qk_norm:
            self.q_norm: nn.Module = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps, bias=False)
            self.k_norm: nn.Module = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps, bias=False)
        else:
            self.q_norm, self.k_norm = nn.Identity(), nn.Identity()

    def forward(
        self, hidden_states: Tensor, cu_seqlens: Tensor, max_seqlen: int, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend `(L, D)` patches inside the segments of `cu_seqlens`; returns `(L, D)` and the weights, if any."""
        query, key, value = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, dense_attention_forward)
        attended, weights = attend(
            self,
            self.q_norm(query).transpose(0, 1).unsqueeze(0),
            self.k_norm(key).transpose(0, 1).unsqueeze(0),
            value.transpose(0, 1).unsqueeze(0),
            attention_mask=None,
            scaling=self.scaling,
            dropout=0.0,
            is_causal=False,
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=max_seqlen,
            max_length_k=max_seqlen,
            **kwargs,
        )
        return self.o_proj(attended.squeeze(0).flatten(-2)), weights


class NaViTMLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: NaViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map `(L, D)` to `(L, D)`."""
        return self.fc2(self.act_fn(self.fc1(hidden_states)))


class NaViTLayer(GradientCheckpointingLayer):
    """A pre-norm transformer block."""

    def __init__(self, config: NaViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps, bias=config.layer_norm_bias)
        self.self_attn = NaViTAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps, bias=config.layer_norm_bias)
        self.mlp = NaViTMLP(config)

    def forward(self, hidden_states: Tensor, cu_seqlens: Tensor, max_seqlen: int, **kwargs: Any) -> Tensor:
        """Map `(L, D)` to `(L, D)`."""
        attended, _ = self.self_attn(self.norm1(hidden_states), cu_seqlens, max_seqlen, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.norm2(hidden_states))


class NaViTPreTrainedModel(PreTrainedModel):
    """Weight initialisation and the abilities that transformers asks a model for."""

    config: NaViTConfig
    base_model_prefix = "navit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["NaViTLayer", "NaViTEmbeddings"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": NaViTLayer, "attentions": NaViTAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FactorizedPositionEmbedding):
            module.reset_parameters(self.config.position_initializer_range)
        elif isinstance(module, MaskedAttentionPooling):
            init.normal_(module.probe, mean=0.0, std=self.config.initializer_range)


class NaViTModel(NaViTPreTrainedModel):
    """NaViT: a vision transformer over images of any size, packed into one sequence.

    An image's output does not depend on the images that it is packed with: attention and pooling stay inside an image,
    and no gradient crosses between images.
    """

    def __init__(self, config: NaViTConfig) -> None:
        super().__init__(config)
        self.embeddings = NaViTEmbeddings(config)
        self.layers = nn.ModuleList([NaViTLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.layer_norm_bias)
        self.pooling = MaskedAttentionPooling(config) if config.pooling == "map" else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding."""
        return self.embeddings.patch_embedding

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: Tensor,
        image_grid_thw: Tensor,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode packed images.

        Args:
            pixel_values: `(L, C*P*P)` flattened patches of all images, image after image, channels first inside a
                patch; the order of patches inside an image is that of [`get_position_ids`].
            image_grid_thw: `(n, 3)` int64, frames, rows and columns of each image in patches.
            cu_seqlens: `(segments + 1,)` int32 cumulative patch counts, one segment for each frame; computed if
                absent.
            max_seqlen: Longest segment; computed if absent.
            position_ids: `(L, 2)` int64, row and column of each patch; computed if absent.
            **kwargs: `output_hidden_states`, `output_attentions` ("eager" only), `return_dict`.

        Returns:
            `last_hidden_state` `(L, D)`, and `pooler_output` `(n, D)` (None if `pooling` is "none").

        Raises:
            ValueError: If the patches do not have C*P*P values, if the grids are malformed, or if they do not add up
                to L patches.
        """
        features = self.embeddings.patch_embedding.in_features
        if pixel_values.ndim != 2 or pixel_values.shape[1] != features:
            raise ValueError(f"`pixel_values` must have shape (patches, {features}), got {tuple(pixel_values.shape)}.")
        if cu_seqlens is None or max_seqlen is None or position_ids is None:
            validate_grid(image_grid_thw, pixel_values.shape[0], self.config.spatial_merge_size)
        if cu_seqlens is None:
            cu_seqlens = get_cu_seqlens(image_grid_thw)
        if max_seqlen is None:
            max_seqlen = get_max_seqlen(cu_seqlens)
        if position_ids is None:
            position_ids = get_position_ids(image_grid_thw, self.config.spatial_merge_size)

        patches = image_grid_thw.prod(-1)
        grid_sizes = image_grid_thw[:, 1:].repeat_interleave(patches, dim=0, output_size=pixel_values.shape[0])
        hidden_states = self.embeddings(pixel_values, position_ids, grid_sizes)
        for layer in self.layers:
            hidden_states = layer(hidden_states, cu_seqlens, max_seqlen, **kwargs)
        hidden_states = self.norm(hidden_states)

        pooled = None
        if self.pooling is not None:
            # The frames of a video are attended one by one but pooled together.
            cu_images = nn.functional.pad(patches.cumsum(0, dtype=torch.int32), (1, 0))
            pooled = self.pooling(hidden_states, cu_images, pixel_values.shape[0])
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)


__all__ = ["NaViTModel", "NaViTPreTrainedModel"]
