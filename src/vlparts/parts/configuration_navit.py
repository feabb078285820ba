"""Configuration of the packed-sequence NaViT encoder."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .pos_embed_options import (
    PositionCombination,
    PositionCoordinates,
    PositionInterpolation,
    PositionOverflow,
    check_position_options,
)
from .token_reduction_types import check_merge_options
from .utils import NamedPresets, check_finite

# "b32", "b16" and "l16" are the encoders of the paper (Table 2), with 94.5, 92.8 and 315.7 million parameters;
# attention pooling has 7.1 (width 768) or 12.6 million of them.
_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4},
    "small": {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6},
    "b32": {"patch_size": 32},
    "b16": {},
    "l16": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
}


@strict
class NaViTConfig(NamedPresets, PreTrainedConfig):
    """Configuration of [`NaViTModel`], a ViT over packed images of any size (NaViT, arXiv 2307.06304).

    The defaults are ViT-B/16 with the paper's three changes (section 3): query-key normalization, no biases in the
    attention projections, and masked attention pooling.

    Args:
        hidden_size: Width D of the residual stream.
        intermediate_size: Width of the MLP.
        num_hidden_layers: Number of blocks.
        num_attention_heads: Number of heads; divides `hidden_size`.
        num_channels: Channels C of the images.
        patch_size: Side P of a patch in pixels.
        spatial_merge_size: Side m of the block of patches that a projector merges into one token. It sets the order of
            patches (block after block), and grids must be multiples of m; the encoder itself does not merge.
        hidden_act: Activation of the MLP.
        layer_norm_eps: Epsilon of the normalizations.
        attention_dropout: Must be 0.0: packed kernels do not support dropout.
        qkv_bias: Whether the query, key and value projections have biases.
        mlp_bias: Whether the MLP has biases.
        layer_norm_bias: Whether the layer normalizations have biases.
        use_qk_norm: Whether queries and keys are layer-normalized per head (ViT-22B, arXiv 2302.05442, eq. 2).
        max_grid_size: Rows N per axis of a learned or sinusoidal table.
        position_kind: "learned" tables, fixed "sinusoidal" ones, a learned "fourier" map, or "none". See
            [`PositionEmbedding`] for this and the next four fields.
        position_coordinates: "absolute" counts rows and columns; "fractional" divides each by the size of its axis
            (paper, section 3.4), for images of any size; "fractional_aspect" divides both by the longer axis.
        position_combination: How the two axes are combined: "add", "stack", "product", or one function of both:
            "joint" (a 2-D table, or the paper's Fourier map), "flat" (ViT's 1-D table).
        position_interpolation: Interpolation of tables: "bilinear" or "bicubic", with "_antialias" for wider filters
            where an image has fewer patches than the table has rows.
        position_overflow: Whether a grid that exceeds an absolute table is an "error", or the table is resampled,
            "interpolate".
        rotary_theta: Base of 2-D axial rotary positions in attention (absolute coordinates, as in Qwen2-VL); None
            for none.
        max_frames: Rows of a learned table of frame positions, for video; None for none.
        video_attention: Whether a patch of a video attends to its "frame" or to the whole "clip".
        num_register_tokens: Number of learned register tokens per attention segment (arXiv 2309.16588).
        pooling: "map" for masked attention pooling (one learned query per image), "mean" or "max" over the patches of
            an image, "class_token" for a learned token per segment (averaged over the frames of a video), or "none".
        merge_layers: Layers after which similar patches are merged, so that the following ones compute fewer; see
            `packed_merging`. None for none.
        merge_ratio: Share of the patches of a segment that each merge leaves.
        initializer_range: Standard deviation of the initial weights.
        position_initializer_range: Standard deviation of the initial position tables. At 0.02 positions are small
            relative to embedded pixels; a larger value helps small models to learn positions from little data.
        position_fourier_std: Standard deviation of the initial frequencies of a Fourier map, in radians along a whole
            axis (of `max_grid_size` patches with absolute coordinates). The paper does not state it.
    """

    model_type = "vlparts_navit"
    named_presets = _PRESETS
    base_config_key = "vision_config"

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    patch_size: int = 16
    spatial_merge_size: int = 1
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    qkv_bias: bool = False
    mlp_bias: bool = True
    layer_norm_bias: bool = False
    use_qk_norm: bool = True
    max_grid_size: int = 64
    position_kind: Literal["learned", "sinusoidal", "fourier", "none"] = "learned"
    position_coordinates: PositionCoordinates = "fractional"
    position_combination: PositionCombination = "add"
    position_interpolation: PositionInterpolation = "bilinear"
    position_overflow: PositionOverflow = "error"
    rotary_theta: float | None = None
    max_frames: int | None = None
    video_attention: Literal["frame", "clip"] = "frame"
    num_register_tokens: int = 0
    pooling: Literal["map", "mean", "max", "class_token", "none"] = "map"
    merge_layers: list[int] | None = None
    merge_ratio: float = 0.5
    initializer_range: float = 0.02
    position_initializer_range: float = 0.02
    position_fourier_std: float = 10.0

    def validate_architecture(self) -> None:
        """Check sizes.

        Raises:
            ValueError: If a size is not positive, the heads do not divide `hidden_size`, `attention_dropout` is not
                zero, or position options exclude each other.
        """
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_channels",
            "patch_size",
            "spatial_merge_size",
            "max_grid_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.num_hidden_layers < 0:
            raise ValueError(f"`num_hidden_layers` must not be negative, got {self.num_hidden_layers}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`num_attention_heads` must divide `hidden_size`, got {self.num_attention_heads} and "
                f"{self.hidden_size}."
            )
        if self.attention_dropout != 0.0:
            raise ValueError(f"`attention_dropout` must be 0.0, got {self.attention_dropout}.")
        if self.max_frames is not None and self.max_frames < 1:
            raise ValueError(f"`max_frames` must be at least 1 or None, got {self.max_frames}.")
        if self.num_register_tokens < 0:
            raise ValueError(f"`num_register_tokens` must not be negative, got {self.num_register_tokens}.")
        check_finite(self, "layer_norm_eps", "initializer_range", "position_initializer_range", "position_fourier_std")
        check_merge_options(self.merge_layers, self.merge_ratio, self.num_hidden_layers)
        self._validate_positions()

    def _validate_positions(self) -> None:
        head_dim = self.hidden_size // self.num_attention_heads
        check_finite(self, "rotary_theta", positive=True)
        if self.rotary_theta is not None and head_dim % 4:
            raise ValueError(
                f"`hidden_size` / `num_attention_heads` must be a multiple of 4 with `rotary_theta`, got {head_dim}."
            )
        if self.position_kind != "none":
            check_position_options(
                self.hidden_size,
                self.max_grid_size,
                kind=self.position_kind,
                coordinates=self.position_coordinates,
                combination=self.position_combination,
                interpolation=self.position_interpolation,
                overflow=self.position_overflow,
                prefix="position_",
            )


__all__ = ["NaViTConfig"]
