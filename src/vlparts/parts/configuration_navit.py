"""Configuration of the packed-sequence NaViT encoder."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4},
    "small": {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6},
    "base": {},
    "large": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
}


@strict
class NaViTConfig(PreTrainedConfig):
    """Configuration of [`NaViTModel`], a ViT over packed images of any size (NaViT, arXiv 2307.06304).

    The defaults are ViT-B/16 with the paper's three changes (section 3): query-key normalisation, no biases in the
    attention projections, and masked attention pooling.

    Args:
        hidden_size: Width D of the residual stream.
        intermediate_size: Width of the MLP.
        num_hidden_layers: Number of blocks.
        num_attention_heads: Number of heads; divides `hidden_size`.
        num_channels: Channels C of the images.
        patch_size: Side P of a patch in pixels.
        spatial_merge_size: Side m of the block of patches that a consumer will merge into one token. It sets the
            order of the patches (block after block) and makes grids multiples of m; the encoder itself does not merge.
        hidden_act: Activation of the MLP.
        layer_norm_eps: Epsilon of every normalisation.
        attention_dropout: Only 0.0: the packed kernels have no dropout.
        qkv_bias: Whether the query, key and value projections have biases.
        mlp_bias: Whether the MLP has biases.
        layer_norm_bias: Whether the layer normalisations have biases.
        use_qk_norm: Whether queries and keys are layer-normalised per head (ViT-22B, arXiv 2302.05442, eq. 2).
        max_grid_size: Rows of each axis' position table.
        position_coordinates: "absolute" looks row and column up in the tables, and refuses grids that are longer than
            `max_grid_size`; "fractional" resamples the tables linearly to the grid of each image, whatever its size
            (paper, section 3.4).
        pooling: "map" for masked attention pooling (one learned query for each image), "none" for no pooled output.
        initializer_range: Standard deviation of the initial weights.
        position_initializer_range: Standard deviation of the initial position tables. At 0.02 positions are small
            next to the embedded pixels; a larger value helps where a small model must learn from little data where
            things are.
    """

    model_type = "vlparts_navit"
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
    position_coordinates: Literal["absolute", "fractional"] = "fractional"
    pooling: Literal["map", "none"] = "map"
    initializer_range: float = 0.02
    position_initializer_range: float = 0.02

    def validate_architecture(self) -> None:
        """Check that the sizes fit together.

        Raises:
            ValueError: If a size is not positive, if the heads do not divide `hidden_size`, or if attention dropout
                is asked for.
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
                f"`num_attention_heads` must divide `hidden_size`, got {self.num_attention_heads} heads "
                f"for a width of {self.hidden_size}."
            )
        if self.attention_dropout != 0.0:
            raise ValueError(f"`attention_dropout` must be 0.0, got {self.attention_dropout}.")

    @classmethod
    def presets(cls) -> tuple[str, ...]:
        """Names that [`from_preset`] takes."""
        return tuple(_PRESETS)

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> "NaViTConfig":
        """Build a named configuration, with some fields changed.

        Args:
            name: One of [`presets`].
            **changes: Fields that replace those of the preset.

        Raises:
            ValueError: If there is no such preset.
        """
        if name not in _PRESETS:
            raise ValueError(f"`name` must be one of {', '.join(_PRESETS)}, got {name!r}.")
        return cls(**{**_PRESETS[name], **changes})


__all__ = ["NaViTConfig"]
