"""Configuration of the window-free vision transformer."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .token_reduction_types import check_merge_options
from .utils import NamedPresets, check_finite, check_finite_number

_SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "patch_size": 8,
}
_PRESETS: dict[str, dict[str, Any]] = {
    "window_free_600m": {},
    "window_free_tiny": _SMALL,
    "openpangu_vl_vit": {
        "attention_pattern": {"window_size": 112, "full_attention_layers": [5, 12, 19, 25]},
        "feature_layers": [-1, -3],
    },
    "hybrid_tiny": {
        **_SMALL,
        "attention_pattern": {"window_size": 64, "full_attention_layers": [1, 3]},
        "feature_layers": [-1, -3],
    },
    "qwen2_vl_vit": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "hidden_act": "quick_gelu",
        "norm_type": "layer_norm",
        "final_norm": False,
    },
    "qwen2_5_vl_vit": {
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_hidden_layers": 32,
        "hidden_act": "silu",
        "gated_mlp": True,
        "final_norm": False,
        "attention_pattern": {"window_size": 112, "full_attention_layers": [7, 15, 23, 31]},
    },
    "qwen3_vl_vit": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "norm_type": "layer_norm",
        "final_norm": False,
        "patch_bias": True,
        "position_grid_size": 48,
        "feature_layers": [-1, 8, 16, 24],
        "image_mean": IMAGENET_STANDARD_MEAN,
        "image_std": IMAGENET_STANDARD_STD,
    },
}


@strict
class WindowFreeViTConfig(NamedPresets, PreTrainedConfig):
    """Configuration of [`WindowFreeViTModel`], a native-resolution ViT whose sizes suit matrix units.

    It is wide and shallow, and the sizes of its matrix products are multiples of large powers of two. The defaults are
    those of openPangu-VL-7B's vision encoder without windows: 26 layers of 1,536 channels, 615,624,192 parameters, RMS
    normalization, 2-D rotary positions, an MLP of two layers with the exact GELU. The released encoder is a hybrid of
    22 layers with windows and 4 without: preset "openpangu_vl_vit". "window_free_tiny" and "hybrid_tiny" are small
    encoders of each kind.

    "qwen2_vl_vit" (631,183,360 parameters), "qwen2_5_vl_vit" and "qwen3_vl_vit" are the encoders of Qwen2-VL (arXiv
    2409.12191; also POINTS1.5's, arXiv 2412.08443), Qwen2.5-VL (arXiv 2502.13923) and Qwen3-VL (the one of 27 layers),
    without their mergers.

    Args:
        hidden_size: Width D of the residual stream.
        intermediate_size: Width of the MLP.
        num_hidden_layers: Number of blocks.
        num_attention_heads: Number of heads; divides `hidden_size`.
        num_channels: Channels C of the images.
        patch_size: Side P of a patch in pixels.
        temporal_patch_size: Frames T of the weights of the patch embedding. Patches of one frame are repeated, as in
            the published models.
        spatial_merge_size: Side m of the block of patches that a projector merges into one token; it sets the order of
            patches.
        hidden_act: Activation of the MLP.
        gated_mlp: Whether the MLP is gated, `down(act(gate(x)) * up(x))` as in Qwen2.5-VL, or `down(act(up(x)))`.
        norm_type: Kind of the normalizations: "rms_norm", or "layer_norm" with biases.
        rms_norm_eps: Epsilon of the normalizations, of either kind.
        final_norm: Whether the output is normalized. In the Qwen-VL family the merger normalizes it.
        qkv_bias: Whether the attention projections have biases.
        mlp_bias: Whether the MLP has biases.
        patch_bias: Whether the patch embedding has a bias.
        attention_dropout: Must be 0.0: packed kernels do not support dropout.
        rotary_theta: Base of the 2-D axial rotary positions.
        position_grid_size: Rows and columns N of a learned position table, which is interpolated to each image and
            added to the embedded patches, as in Qwen3-VL; None for rotary positions only.
        attention_pattern: "full" if every layer attends over the whole frame; or a dictionary with "window_size", the
            side of a window in pixels, and "full_attention_layers", the indices of the layers without windows.
        feature_layers: Layers whose output, normalized by the final norm if there is one, is returned in
            `feature_maps`; -1 is the last.
        pooling: "mean" over the patches of each image, or "none".
        image_mean: Mean of each channel in [0, 1], for raw pixels.
        image_std: Standard deviation of each channel in [0, 1], for raw pixels.
        merge_layers: Layers after which similar patches are merged, so that the following ones compute fewer; see
            `packed_merging`. None for none.
        merge_ratio: Share of the patches of a frame (of a window, if there are any) that each merge leaves.
        initializer_range: Standard deviation of the initial weights.
    """

    model_type = "vlparts_windowfree"
    named_presets = _PRESETS
    base_config_key = "vision_config"

    hidden_size: int = 1536
    intermediate_size: int = 4608
    num_hidden_layers: int = 26
    num_attention_heads: int = 16
    num_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    hidden_act: str = "gelu"
    gated_mlp: bool = False
    norm_type: Literal["rms_norm", "layer_norm"] = "rms_norm"
    rms_norm_eps: float = 1e-6
    final_norm: bool = True
    qkv_bias: bool = True
    mlp_bias: bool = True
    patch_bias: bool = False
    attention_dropout: float = 0.0
    rotary_theta: float = 10000.0
    position_grid_size: int | None = None
    attention_pattern: Literal["full"] | dict[str, Any] = "full"
    feature_layers: list[int] | tuple[int, ...] = (-1,)
    pooling: Literal["none", "mean"] = "none"
    image_mean: list[float] | tuple[float, ...] = tuple(OPENAI_CLIP_MEAN)
    image_std: list[float] | tuple[float, ...] = tuple(OPENAI_CLIP_STD)
    merge_layers: list[int] | None = None
    merge_ratio: float = 0.5
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        # JSON has no tuples: a saved configuration must equal the loaded one.
        self.feature_layers, self.image_mean = list(self.feature_layers), list(self.image_mean)
        self.image_std = list(self.image_std)
        super().__post_init__(**kwargs)

    @property
    def window_blocks(self) -> int | None:
        """Side of a window in merge blocks; None without windows."""
        if isinstance(self.attention_pattern, str):
            return None
        return self.attention_pattern["window_size"] // (self.patch_size * self.spatial_merge_size)

    def has_windows(self, layer: int) -> bool:
        """Whether a layer attends within windows."""
        pattern = self.attention_pattern
        return not isinstance(pattern, str) and layer not in pattern["full_attention_layers"]

    def validate_architecture(self) -> None:
        """Check sizes and statistics.

        Raises:
            ValueError: If a size is not positive, the heads do not divide `hidden_size` into multiples of 4 channels,
                `attention_dropout` is not zero, or `image_mean` or `image_std` does not match the channels.
        """
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_channels",
            "patch_size",
            "temporal_patch_size",
            "spatial_merge_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.hidden_size % self.num_attention_heads or self.hidden_size // self.num_attention_heads % 4:
            raise ValueError(
                f"`num_attention_heads` must divide `hidden_size` into heads of a multiple of 4 channels, got "
                f"{self.num_attention_heads} and {self.hidden_size}."
            )
        if self.position_grid_size is not None and self.position_grid_size < 1:
            raise ValueError(f"`position_grid_size` must be at least 1, or None, got {self.position_grid_size}.")
        check_finite(self, "rotary_theta", positive=True)
        check_finite(self, "rms_norm_eps", "initializer_range")
        if self.attention_dropout != 0.0:
            raise ValueError(f"`attention_dropout` must be 0.0, got {self.attention_dropout}.")
        for name in ("image_mean", "image_std"):
            if len(getattr(self, name)) != self.num_channels:
                raise ValueError(
                    f"`{name}` must have one value per channel, {self.num_channels}, got {getattr(self, name)}."
                )
        for mean, deviation in zip(self.image_mean, self.image_std, strict=True):
            check_finite_number("image_mean", mean, signed=True)
            check_finite_number("image_std", deviation, positive=True)

    def validate_layers(self) -> None:
        """Check `feature_layers` and `attention_pattern`.

        Raises:
            ValueError: If a layer does not exist or occurs twice, or the pattern is malformed.
        """
        layers = self.num_hidden_layers
        indices = [index % layers for index in self.feature_layers if -layers <= index < layers]
        if not indices or len(indices) != len(self.feature_layers):
            raise ValueError(
                f"`feature_layers` must name layers from {-layers} to {layers - 1}, got {list(self.feature_layers)}."
            )
        check_merge_options(self.merge_layers, self.merge_ratio, layers)
        if len(set(indices)) != len(indices):
            raise ValueError(f"`feature_layers` must name each layer once, got {list(self.feature_layers)}.")
        pattern = self.attention_pattern
        if isinstance(pattern, str):
            return
        if set(pattern) != {"window_size", "full_attention_layers"}:
            raise ValueError(
                "`attention_pattern` must be 'full' or have the keys 'window_size' and 'full_attention_layers', got "
                f"{sorted(pattern)}."
            )
        window, block = pattern["window_size"], self.patch_size * self.spatial_merge_size
        if not isinstance(window, int) or window < 1 or window % block:
            raise ValueError(
                f"`attention_pattern['window_size']` must be a positive multiple of {block} pixels (`patch_size` * "
                f"`spatial_merge_size`), got {window!r}."
            )
        outside = [layer for layer in pattern["full_attention_layers"] if layer not in range(layers)]
        if outside:
            raise ValueError(
                f"`attention_pattern['full_attention_layers']` must name layers from 0 to {layers - 1}, got {outside}."
            )


__all__ = ["WindowFreeViTConfig"]
