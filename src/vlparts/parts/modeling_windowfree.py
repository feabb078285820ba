"""The window-free vision transformer, and the hybrid with windows that openPangu-VL released.

Shapes: L patches of all images of a batch, n images, D width, H heads, C channels, T frames of a patch, P side of a
patch, m side of a merged block, B = L / m^2 blocks.

Embedding and blocks of the window-free encoder. Their `config` is a [`WindowFreeViTConfig`].

Shapes: L patches of all images, D width, C channels, T frames of a patch, P side of a patch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_windowfree import WindowFreeViTConfig
from .image_pixels import check_normalized, normalize_raw_pixels
from .ops_activations import get_activation
from .ops_attention import PACKED_ATTENTION_FUNCTIONS as ALL_ATTENTION_FUNCTIONS
from .ops_attention import dense_attention_forward
from .ops_linear import Linear
from .ops_rms_norm import RMSNorm
from .ops_rotary import axial_rotary
from .packed_index import get_cu_seqlens, get_position_ids, resolve_seqlens, segment_ids, validate_grid
from .packed_layers import PackedLayer, PackedSelfAttention
from .packed_pooling import mean_pooling
from .packed_segments import Pass, Segments, split_passes
from .packed_windows import get_windows, permute_cells

__all__ = ["WindowFreeViTModel", "WindowFreeViTPreTrainedModel"]


class WindowFreeViTPatchEmbedding(nn.Module):
    """Patches to vectors by one matrix product, without a bias and without positions."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.channels, self.frames = config.num_channels, config.temporal_patch_size
        self.features = config.num_channels * config.patch_size**2
        self.projection = Linear(self.features * self.frames, config.hidden_size, bias=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Embed `(L, C*P*P)` patches of one frame, or `(L, C*T*P*P)` of T frames, as `(L, D)`.

        Raises:
            ValueError: If patches have another number of values.
        """
        given, wanted = pixel_values.shape[-1], (self.features, self.features * self.frames)
        if pixel_values.ndim != 2 or given not in wanted:
            raise ValueError(
                f"`pixel_values` must have shape (patches, {wanted[0]}) or (patches, {wanted[1]}), got "
                f"{tuple(pixel_values.shape)}."
            )
        if given != wanted[1]:
            planes = pixel_values.unflatten(1, (self.channels, 1, -1))
            pixel_values = planes.expand(-1, -1, self.frames, -1).flatten(1)
        return self.projection(pixel_values)


class WindowFreeViTMLP(nn.Module):
    """Two linear layers with an activation between them; or, with a gate, three."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(width, inner, bias=bias) if config.gated_mlp else None
        self.up_proj = Linear(width, inner, bias=bias)
        self.act_fn = get_activation(config.hidden_act)
        self.down_proj = Linear(inner, width, bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map `(L, D)` to `(L, D)`."""
        if self.gate_proj is None:
            return self.down_proj(self.act_fn(self.up_proj(hidden_states)))
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class WindowFreeViTAttention(PackedSelfAttention):
    """Self-attention inside each segment: a frame, or a window."""


class WindowFreeViTLayer(PackedLayer):
    """A pre-norm transformer block with RMS normalisations."""

    def __init__(self, config: PreTrainedConfig) -> None:
        norms = [RMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(2)]
        super().__init__(WindowFreeViTAttention(config), WindowFreeViTMLP(config), *norms)


@dataclass
class WindowFreeViTOutput(BaseModelOutputWithPooling):
    """What [`WindowFreeViTModel`] returns.

    Attributes:
        last_hidden_state: `(L, D)`, one normalised vector for each row of `pixel_values`.
        pooler_output: `(n, D)`, the mean of each image; None if `pooling` is "none".
        hidden_states: With `output_hidden_states`, the input of each layer and the output of the last, `(L, D)` each,
            in the order of the windows; see `patch_index`.
        attentions: With `output_attentions` ("eager" only), `(1, H, L, L)` for each layer, in the order of the
            windows.
        feature_maps: For each of `config.feature_layers`, the layer's normalised output `(L, D)`.
        patch_index: `(L,)` int64 places of the patches in each of `hidden_states`, where windows reorder them.
    """

    feature_maps: tuple[Tensor, ...] | None = None
    patch_index: Tensor | None = None


class WindowFreeViTPreTrainedModel(PreTrainedModel):
    """Weight initialisation and the abilities that transformers asks a model for."""

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

    Every layer attends over the whole image (over each frame of a video), or, where `attention_pattern` says so,
    inside windows. An image's output does not depend on the images that it is packed with.
    """

    def __init__(self, config: WindowFreeViTConfig) -> None:
        super().__init__(config)
        self.patch_embedding = WindowFreeViTPatchEmbedding(config)
        self.layers = nn.ModuleList([WindowFreeViTLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding."""
        return self.patch_embedding

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
        **kwargs: Any,
    ) -> WindowFreeViTOutput:
        """Encode packed images.

        Args:
            pixel_values: `(L, C*P*P)` flattened patches of all images, image after image, frame after frame, channels
                first inside a patch, the m x m patches of a block one after the other; or `(L, C*T*P*P)`, channel by
                channel the T frames of a patch. uint8 pixels are raw, and normalised here with `config.image_mean` and
                `config.image_std`; floating-point pixels are normalised already.
            image_grid_thw: `(n, 3)` int64, frames, rows and columns of each image in patches.
            cu_seqlens: `(frames + 1,)` int32 cumulative patch counts of all frames; computed if absent.
            max_seqlen: Patches of the largest frame, or a bound on it; computed if absent.
            position_ids: `(L, 2)` int64, row and column of each patch; computed if absent.
            window_index: `(B,)` int64, which block stands at each place when windows stand together; computed if
                absent, as the next.
            cu_window_seqlens: `(windows + 1,)` int32 cumulative patch counts of the windows.
            cu_seqlens_cpu: `cu_seqlens` as host integers, which spares kernels that need them a copy from the device.
            **kwargs: `output_hidden_states`, `output_attentions` ("eager" only), `return_dict`.

        Raises:
            ValueError: If patches have the wrong size, if grids are malformed, do not divide into blocks of m x m, or
                do not add up to L patches, or if floating-point pixels are plainly not normalised.
        """
        patches, merge_size = pixel_values.shape[0], self.config.spatial_merge_size
        if cu_seqlens is None or max_seqlen is None or position_ids is None:
            validate_grid(image_grid_thw, patches, merge_size)
            check_normalized(pixel_values)
        if cu_seqlens is None:
            cu_seqlens = get_cu_seqlens(image_grid_thw)
        segments = Segments(cu_seqlens, *resolve_seqlens(cu_seqlens, max_seqlen, cu_seqlens_cpu))
        if position_ids is None:
            position_ids = get_position_ids(image_grid_thw, merge_size)

        inverse = None
        if self.config.window_cells is not None:
            if window_index is None or cu_window_seqlens is None:
                window_index, inverse, cu_window_seqlens = get_windows(
                    image_grid_thw, self.config.window_cells, merge_size
                )
            else:
                inverse = torch.empty_like(window_index).scatter_(
                    0, window_index, torch.arange(window_index.shape[0], device=window_index.device)
                )
            pixel_values, position_ids = (permute_cells(rows, window_index) for rows in (pixel_values, position_ids))
        maps = self._encode(self._embed(pixel_values), position_ids, segments, cu_window_seqlens, kwargs)
        if inverse is not None:
            maps = {layer: permute_cells(states, inverse) for layer, states in maps.items()}
        layers = self.config.num_hidden_layers
        last = maps[layers - 1]
        return WindowFreeViTOutput(
            last_hidden_state=last,
            pooler_output=self._pool(last, image_grid_thw),
            feature_maps=tuple(maps[layer % layers] for layer in self.config.feature_layers),
            patch_index=None if inverse is None else _patches_of(inverse, merge_size),
        )

    def _embed(self, pixel_values: Tensor) -> Tensor:
        """Patches `(L, C*P*P)`, raw or normalised, to `(L, D)`."""
        dtype = self.patch_embedding.projection.weight.dtype
        if pixel_values.is_floating_point():
            pixel_values = pixel_values.to(dtype)
        else:
            pixel_values = normalize_raw_pixels(pixel_values, self.config.image_mean, self.config.image_std, dtype)
        return self.patch_embedding(pixel_values)

    def _encode(
        self,
        hidden_states: Tensor,
        position_ids: Tensor,
        segments: Segments,
        cu_window_seqlens: Tensor | None,
        options: dict[str, Any],
    ) -> dict[int, Tensor]:
        """Run the layers over `(L, D)`; returns the normalised output `(L, D)` of the last layer and of each tap."""
        config = self.config
        rotary = axial_rotary(position_ids, config.hidden_size // config.num_attention_heads, config.rotary_theta)
        full = self._passes(segments._replace(rotary=rotary), hidden_states)
        windows = full
        if config.window_cells is not None and cu_window_seqlens is not None:
            longest = (config.window_cells * config.spatial_merge_size) ** 2
            on_host = None if segments.cu_seqlens_cpu is None else cu_window_seqlens.tolist()
            windows = self._passes(Segments(cu_window_seqlens, longest, on_host, rotary), hidden_states)
        taps = {layer % config.num_hidden_layers for layer in (*config.feature_layers, -1)}
        maps = {}
        for index, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states, windows if config.has_windows(index) else full, **options)
            if index in taps:
                maps[index] = self.norm(hidden_states)
        return maps

    def _passes(self, segments: Segments, hidden_states: Tensor) -> list[Pass]:
        """The passes in which a layer computes the segments."""
        # Dense weights are those of all pairs of tokens, so they are made in one go.
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, dense_attention_forward)
        if attend is dense_attention_forward:
            return [Pass(segments)]
        return split_passes(segments, hidden_states, self.config.intermediate_size)

    def _pool(self, hidden_states: Tensor, image_grid_thw: Tensor) -> Tensor | None:
        if self.config.pooling == "none":
            return None
        images, patches = image_grid_thw.shape[0], hidden_states.shape[0]
        ends = get_cu_seqlens(image_grid_thw, merge_temporal=True)
        return mean_pooling(hidden_states, segment_ids(ends, patches), images)


def _patches_of(cells: Tensor, merge_size: int) -> Tensor:
    """Places `(L,)` of patches from the places `(B,)` of their blocks."""
    inside = torch.arange(merge_size**2, device=cells.device)
    return (cells.unsqueeze(1) * merge_size**2 + inside).flatten()
