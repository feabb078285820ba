"""Configuration of DeepSeek-OCR's vision encoder."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .utils import NamedPresets, check_minimum

PATCHES_PER_TOKEN = 4
"""Rows, and columns, of patches that the convolutions with stride 2 compress into one of tokens."""
_PRESETS: dict[str, dict[str, Any]] = {
    "deepseek_ocr": {},
    "deepencoder_tiny": {
        "sam_hidden_size": 32,
        "sam_intermediate_size": 64,
        "sam_num_hidden_layers": 2,
        "sam_num_attention_heads": 2,
        "sam_position_size": 8,
        "sam_window_size": 3,
        "sam_global_layers": [1],
        "neck_channels": 16,
        "compressor_channels": [24, 48],
        "clip_hidden_size": 48,
        "clip_intermediate_size": 96,
        "clip_num_hidden_layers": 2,
        "clip_num_attention_heads": 4,
        "clip_position_size": 2,
    },
}


@strict
class DeepEncoderConfig(NamedPresets, PreTrainedConfig):
    """Configuration of [`DeepEncoderModel`], the vision encoder of DeepSeek-OCR (arXiv 2510.18234, section 3.2).

    A SAM encoder, mostly with attention in windows, a convolutional compressor to a sixteenth of the patches, and the
    body of a CLIP encoder with attention over the whole view. The defaults are those of DeepSeek-OCR: SAM-base with
    95,569,152 parameters and CLIP-large with 302,575,616; preset "deepseek_ocr". "deepencoder_tiny" is a small encoder
    with the same layers.

    Args:
        num_channels: Channels C of the images.
        patch_size: Side P of a patch in pixels. Sides of a view are multiples of 4 P.
        sam_hidden_size: Width of the SAM encoder.
        sam_intermediate_size: Width of its MLPs.
        sam_num_hidden_layers: Number of its layers.
        sam_num_attention_heads: Number of its heads.
        sam_position_size: Side in patches of its table of positions, and of the grid that the relative positions of
            its global layers were made for. Tables are resampled for views of other sizes.
        sam_window_size: Side of an attention window in patches.
        sam_global_layers: Indices of the SAM layers without windows.
        sam_layer_norm_eps: Epsilon of its normalizations.
        neck_channels: Channels of the two convolutions after the SAM encoder.
        compressor_channels: Channels of the two convolutions with stride 2. The last equals `clip_hidden_size`, since
            the CLIP encoder takes their output in place of patch embeddings.
        clip_hidden_size: Width of the CLIP encoder.
        clip_intermediate_size: Width of its MLPs.
        clip_num_hidden_layers: Number of its layers.
        clip_num_attention_heads: Number of its heads.
        clip_position_size: Side in tokens of its table of positions, which is resampled for views of other sizes.
        clip_layer_norm_eps: Epsilon of its normalizations.
        clip_patch_embedding: Patch size of a patch embedding of the CLIP encoder that is kept as a buffer and never
            used, so that published files are written back complete (14 in DeepSeek-OCR's); None for none.
        feature_layers: Layers of the CLIP encoder whose output, beside the output of the compressor, is returned in
            `feature_maps`; -1 is the last.
        initializer_range: Standard deviation of the initial weights.
    """

    model_type = "vlparts_deepencoder"
    named_presets = _PRESETS
    base_config_key = "vision_config"
    has_views = True
    """Whether an image may be given as several views, which the projector assembles."""

    num_channels: int = 3
    patch_size: int = 16
    sam_hidden_size: int = 768
    sam_intermediate_size: int = 3072
    sam_num_hidden_layers: int = 12
    sam_num_attention_heads: int = 12
    sam_position_size: int = 64
    sam_window_size: int = 14
    sam_global_layers: list[int] | tuple[int, ...] = (2, 5, 8, 11)
    sam_layer_norm_eps: float = 1e-6
    neck_channels: int = 256
    compressor_channels: list[int] | tuple[int, ...] = (512, 1024)
    clip_hidden_size: int = 1024
    clip_intermediate_size: int = 4096
    clip_num_hidden_layers: int = 24
    clip_num_attention_heads: int = 16
    clip_position_size: int = 16
    clip_layer_norm_eps: float = 1e-5
    clip_patch_embedding: int | None = None
    feature_layers: list[int] | tuple[int, ...] = (-1,)
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        # JSON has no tuples: a saved configuration must equal the loaded one.
        for name in ("sam_global_layers", "compressor_channels", "feature_layers"):
            setattr(self, name, list(getattr(self, name)))
        super().__post_init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Width D of the output: the CLIP encoder's and the compressor's channels."""
        return self.clip_hidden_size + self.compressor_channels[-1]

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers of the CLIP encoder, which `hidden_states` are of."""
        return self.clip_num_hidden_layers

    @property
    def num_attention_heads(self) -> int:
        """Number of heads of the CLIP encoder."""
        return self.clip_num_attention_heads

    def validate_architecture(self) -> None:
        """Check sizes and layers.

        Raises:
            ValueError: If a size is not positive, heads do not divide a width, the compressor does not end with the
                width of the CLIP encoder, or a layer does not exist.
        """
        names = [
            name for name in vars(self) if name.startswith(("sam_", "clip_")) and isinstance(vars(self)[name], int)
        ]
        check_minimum(self, 1, "num_channels", "patch_size", "neck_channels", *names)
        for part in ("sam", "clip"):
            width, heads = getattr(self, f"{part}_hidden_size"), getattr(self, f"{part}_num_attention_heads")
            if width % heads:
                raise ValueError(
                    f"`{part}_num_attention_heads` must divide `{part}_hidden_size`, got {heads} and {width}."
                )
        channels = self.compressor_channels
        if len(channels) != 2 or min(channels) < 1 or channels[-1] != self.clip_hidden_size:
            raise ValueError(
                f"`compressor_channels` must be two positive numbers, the second `clip_hidden_size` "
                f"({self.clip_hidden_size}), got {channels}."
            )
        layers = self.sam_num_hidden_layers
        if any(not 0 <= layer < layers for layer in self.sam_global_layers):
            raise ValueError(f"`sam_global_layers` must be between 0 and {layers - 1}, got {self.sam_global_layers}.")
        layers = self.clip_num_hidden_layers
        if not self.feature_layers or any(not -layers <= layer < layers for layer in self.feature_layers):
            raise ValueError(
                f"`feature_layers` must hold at least one layer from {-layers} to {layers - 1}, got "
                f"{self.feature_layers}."
            )


__all__ = ["DeepEncoderConfig"]
