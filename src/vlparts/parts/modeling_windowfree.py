"""Window-free vision transformer over packed images, and its relatives: openPangu-VL's hybrid, Qwen-VL's encoders.

Shapes: `L` patches of all images, `n` images, `D` width, `H` heads, `C` channels, `T` frames of a patch, `P` side of a
patch, `m` side of a merge block, `B = L / m^2` merge blocks, `w` blocks along the side of a window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import repeat
from torch import Tensor, nn
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_windowfree import WindowFreeViTConfig
from .distributed import ShardableMixin
from .image_pixels import check_normalized, normalize_raw_pixels
from .ops_activations import get_activation
from .ops_linear import apply_linear
from .ops_rms_norm import RMSNorm
from .ops_rotary import axial_rotary
from .packed_index import (
    get_cu_seqlens,
    get_position_ids,
    resolve_seqlens,
    segment_ids,
    validate_grid,
)
from .packed_layers import PackedLayer, PackedSelfAttention, plan_passes
from .packed_merging import build_merger
from .packed_pooling import mean_pooling
from .packed_segments import Segments, precompute_inputs
from .packed_windows import get_windows, invert, patches_of_blocks, permute_blocks
from .pos_embed_tables import resample_grid
from .utils import ForwardKwargs, activation_dtype, check_encoder_kwargs

__all__ = ["WindowFreeViTModel", "WindowFreeViTPreTrainedModel"]


class WindowFreeViTPatchEmbedding(nn.Module):
    """Patch embedding: a linear layer on the flattened pixels."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.channels, self.frames = config.num_channels, config.temporal_patch_size
        self.features = config.num_channels * config.patch_size**2
        self.projection = nn.Linear(self.features * self.frames, config.hidden_size, bias=config.patch_bias)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Embed `(L, C*P*P)` patches of one frame, or `(L, C*T*P*P)` of T frames, as `(L, D)`.

        Raises:
            ValueError: If patches have another number of values.
        """
        one_frame, all_frames = self.features, self.features * self.frames
        if pixel_values.ndim != 2 or pixel_values.shape[1] not in (one_frame, all_frames):
            raise ValueError(
                f"`pixel_values` must have shape (patches, {one_frame}) or (patches, {all_frames}), got "
                f"{tuple(pixel_values.shape)}."
            )
        if pixel_values.shape[1] != all_frames:
            pixel_values = repeat(pixel_values, "l (c p) -> l (c t p)", c=self.channels, t=self.frames)
        return apply_linear(self.projection, pixel_values)


class WindowFreeViTPositionTable(nn.Embedding):
    """Learned table of N x N positions, interpolated bilinearly to each image; the corners of both coincide."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config.position_grid_size**2, config.hidden_size)
        self.grid_size = config.position_grid_size

    def forward(self, position_ids: Tensor, grid_sizes: Tensor) -> Tensor:  # type: ignore[override]
        """Embed rows and columns `(L, 2)` in grids of `grid_sizes` `(L, 2)` patches as `(L, D)`."""
        table = self.weight.unflatten(0, (self.grid_size, self.grid_size))
        return resample_grid(table, position_ids, grid_sizes, "bilinear", align_corners=True)


class WindowFreeViTMLP(nn.Module):
    """Two linear layers with an activation in between; three with a gate."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.act_fn = get_activation(config.hidden_act)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map `(L, D)` to `(L, D)`."""
        if self.gate_proj is None:
            return apply_linear(self.down_proj, self.act_fn(apply_linear(self.up_proj, hidden_states)))
        gate = self.act_fn(apply_linear(self.gate_proj, hidden_states))
        return apply_linear(self.down_proj, gate * apply_linear(self.up_proj, hidden_states))


class WindowFreeViTAttention(PackedSelfAttention):
    """Self-attention within each segment: a frame or a window."""


class WindowFreeViTLayer(PackedLayer):
    """Pre-norm transformer block."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(WindowFreeViTAttention(config), WindowFreeViTMLP(config), _norm(config), _norm(config))


def _norm(config: PreTrainedConfig) -> nn.Module:
    kind = nn.LayerNorm if config.norm_type == "layer_norm" else RMSNorm
    return kind(config.hidden_size, config.rms_norm_eps)


@dataclass
class WindowFreeViTOutput(BaseModelOutputWithPooling):
    """Output of [`WindowFreeViTModel`].

    Attributes:
        last_hidden_state: `(L, D)`, one vector per row of `pixel_values`, normalized if there is a final norm.
        pooler_output: `(n, D)`, the mean of each image; None if `pooling` is "none".
        hidden_states: With `output_hidden_states`, the input of each layer and the output of the last, `(L, D)` each,
            in window order; see `patch_index`.
        attentions: With `output_attentions` ("eager" only), `(1, H, L, L)` per layer, in window order.
        feature_maps: The output `(L, D)` of each of `config.feature_layers`, normalized likewise.
        patch_index: `(L,)` int64 indices of the patches in each of `hidden_states`; None without windows.
        merge_assignments: After each of `merge_layers`, `(L,)` int64: the token that holds each patch; None without.
    """

    feature_maps: tuple[Tensor, ...] | None = None
    patch_index: Tensor | None = None
    merge_assignments: tuple[Tensor, ...] | None = None


class WindowFreeViTPreTrainedModel(ShardableMixin, PreTrainedModel):
    """Base class: weight initialization and the attributes that transformers expects."""

    config: WindowFreeViTConfig
    base_model_prefix = "windowfree"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["WindowFreeViTLayer", "WindowFreeViTPatchEmbedding"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": WindowFreeViTLayer, "attentions": WindowFreeViTAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RMSNorm):
            init.ones_(module.weight)


class WindowFreeViTModel(WindowFreeViTPreTrainedModel):
    """A vision transformer over images of any size, packed into one sequence.

    Each layer attends over the whole image (each frame of a video), or within windows, as `attention_pattern` says.
    The output of an image does not depend on the images packed with it.
    """

    def __init__(self, config: WindowFreeViTConfig) -> None:
        super().__init__(config)
        self.patch_embedding = WindowFreeViTPatchEmbedding(config)
        self.position_table = None if config.position_grid_size is None else WindowFreeViTPositionTable(config)
        self.layers = nn.ModuleList([WindowFreeViTLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = _norm(config) if config.final_norm else nn.Identity()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding."""
        return self.patch_embedding

    def precompute(self, image_grid_thw: Tensor) -> dict[str, Any]:
        """Compute the arguments of `forward` that follow from grids, so that it compiles to one graph.

        Args:
            image_grid_thw: `(n, 3)` int64, as for `forward`.

        Returns:
            `cu_seqlens`, `max_seqlen` and `position_ids` ([`precompute_inputs`]); with windows also `window_index` and
            `cu_window_seqlens` ([`get_windows`]).
        """
        merge_size = self.config.spatial_merge_size
        inputs = precompute_inputs(image_grid_thw, merge_size)
        if self.config.window_blocks is not None:
            windows = get_windows(image_grid_thw, self.config.window_blocks, merge_size)
            inputs |= {"window_index": windows.order, "cu_window_seqlens": windows.cu_seqlens}
        return inputs

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: Tensor,
        image_grid_thw: Tensor,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        position_ids: Tensor | None = None,
        window_index: Tensor | None = None,
        cu_window_seqlens: Tensor | None = None,
        cu_seqlens_cpu: Sequence[int] | None = None,
        **kwargs: ForwardKwargs,
    ) -> WindowFreeViTOutput:
        """Encode packed images.

        Args:
            pixel_values: `(L, C*P*P)` flattened patches of all images, image after image and frame after frame,
                channels first within a patch, the m x m patches of a merge block consecutive; or `(L, C*T*P*P)` with
                the T frames of each channel. uint8 pixels are raw and are normalized here with `config.image_mean` and
                `config.image_std`; floating-point pixels must be normalized.
            image_grid_thw: `(n, 3)` int64, frames, rows and columns of each image in patches.
            cu_seqlens: `(frames + 1,)` int32 cumulative patch counts of all frames; computed if absent.
            max_seqlen: Patches of the largest frame, or an upper bound; computed if absent.
            position_ids: `(L, 2)` int64, row and column of each patch; computed if absent.
            window_index: `(B,)` int64, `order` of [`get_windows`]; computed if it or `cu_window_seqlens` is absent.
            cu_window_seqlens: `(windows + 1,)` int32 cumulative patch counts of the windows.
            cu_seqlens_cpu: `cu_seqlens` as host integers, so that kernels that need them do not copy from the device.
            **kwargs: `output_hidden_states`, `output_attentions` ("eager" only), `return_dict`. Others that
                transformers passes to every model have no effect, nor have `image_mask`, `indices` and `labels` of a
                batch.

        Raises:
            ValueError: If patches have the wrong size, grids are malformed, not divisible into merge blocks or do not
                sum to L patches, floating-point pixels are out of the range of normalized ones, or a further keyword
                argument is unknown.
        """
        check_encoder_kwargs(kwargs)
        patches, merge_size = pixel_values.shape[0], self.config.spatial_merge_size
        if cu_seqlens is None or max_seqlen is None or position_ids is None:
            validate_grid(image_grid_thw, patches, merge_size)
            check_normalized(pixel_values)
        if cu_seqlens is None:
            cu_seqlens = get_cu_seqlens(image_grid_thw)
        segments = Segments(cu_seqlens, *resolve_seqlens(cu_seqlens, max_seqlen, cu_seqlens_cpu, patches))
        known = patches if torch.compiler.is_exporting() else None  # elsewhere the grids are checked against it
        if position_ids is None:
            position_ids = get_position_ids(image_grid_thw, merge_size, known)
        positions = None
        if self.position_table is not None:
            image_ids = segment_ids(get_cu_seqlens(image_grid_thw, merge_temporal=True), patches)
            positions = self.position_table(position_ids, image_grid_thw[image_ids, 1:].long())

        inverse = None
        if self.config.window_blocks is not None:
            if window_index is None or cu_window_seqlens is None:
                window_index, inverse, cu_window_seqlens = get_windows(
                    image_grid_thw, self.config.window_blocks, merge_size, known
                )
            else:
                inverse = invert(window_index)
            pixel_values, position_ids = (permute_blocks(rows, window_index) for rows in (pixel_values, position_ids))
            positions = None if positions is None else permute_blocks(positions, window_index)
        embedded = self._embed(pixel_values, positions)
        maps, merged = self._encode(embedded, position_ids, segments, cu_window_seqlens, kwargs)
        if inverse is not None:
            maps = {layer: permute_blocks(states, inverse) for layer, states in maps.items()}
            merged = tuple(permute_blocks(held, inverse) for held in merged)
        layers = self.config.num_hidden_layers
        last = maps[layers - 1]
        return WindowFreeViTOutput(
            last_hidden_state=last,
            pooler_output=self._pool(last, image_grid_thw),
            feature_maps=tuple(maps[layer % layers] for layer in self.config.feature_layers),
            patch_index=None if inverse is None else patches_of_blocks(inverse, merge_size),
            merge_assignments=merged or None,
        )

    def _embed(self, pixel_values: Tensor, positions: Tensor | None) -> Tensor:
        """Embed raw or normalized patches `(L, C*P*P)` as `(L, D)`, and add the embedded positions `(L, D)`."""
        dtype = activation_dtype(self, torch.float32)
        if pixel_values.is_floating_point():
            pixel_values = pixel_values.to(dtype)
        else:
            pixel_values = normalize_raw_pixels(pixel_values, self.config.image_mean, self.config.image_std, dtype)
        hidden_states = self.patch_embedding(pixel_values)
        return hidden_states if positions is None else hidden_states + positions.to(hidden_states.dtype)

    def _encode(
        self,
        hidden_states: Tensor,
        position_ids: Tensor,
        segments: Segments,
        cu_window_seqlens: Tensor | None,
        options: dict[str, Any],
    ) -> tuple[dict[int, Tensor], tuple[Tensor, ...]]:
        """Run the layers.

        Returns:
            The output `(L, D)` of each feature layer and of the last, after the final norm; `merge_assignments`.
        """
        config = self.config
        rotary = axial_rotary(position_ids, config.hidden_size // config.num_attention_heads, config.rotary_theta)
        whole = inside = segments._replace(rotary=rotary)
        if config.window_blocks is not None and cu_window_seqlens is not None:
            longest = (config.window_blocks * config.spatial_merge_size) ** 2
            cu_windows_cpu = None if segments.cu_seqlens_cpu is None else cu_window_seqlens.tolist()
            inside = Segments(cu_window_seqlens, longest, cu_windows_cpu, rotary)
        full, windows = (plan_passes(one, hidden_states, config) for one in (whole, inside))
        merger = build_merger(config, inside, options) if config.merge_layers else None
        feature_layers = {layer % config.num_hidden_layers for layer in (*config.feature_layers, -1)}
        maps = {}
        for index, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states, windows if config.has_windows(index) else full, **options)
            if merger is not None and index in merger.layers:
                hidden_states = merger.merge(hidden_states)
                whole, inside = merger.shrink(whole), merger.shrink(inside)
                full, windows = (plan_passes(one, hidden_states, config) for one in (whole, inside))
            if index in feature_layers:
                maps[index] = self.norm(hidden_states if merger is None else merger.restore(hidden_states))
        return maps, () if merger is None else tuple(merger.assignments)

    def _pool(self, hidden_states: Tensor, image_grid_thw: Tensor) -> Tensor | None:
        if self.config.pooling == "none":
            return None
        images, patches = image_grid_thw.shape[0], hidden_states.shape[0]
        ends = get_cu_seqlens(image_grid_thw, merge_temporal=True)
        return mean_pooling(hidden_states, segment_ids(ends, patches), images)
