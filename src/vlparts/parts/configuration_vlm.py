"""Configuration of the composed vision-language model."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from .configuration_navit import NaViTConfig
from .part_configs import config_from_dict
from .vlm_features import count_taps
from .vlm_projectors import check_projector, projector_names


@strict
class VisionLanguageConfig(PreTrainedConfig):
    """Configuration of [`VisionLanguageForConditionalGeneration`]: a vision tower, a projector, a text model.

    Args:
        vision_config: Configuration of the vision tower, ours or native; a dictionary needs a "model_type". The
            default is a NaViT without pooling.
        text_config: Configuration of the text model (native, decoder only). The default is transformers' Qwen3.
        projector_type: Name of a registered projector.
        projector_options: Options of the projector, such as `{"hidden_size": 3584}` of "multi_tap_merger".
        spatial_merge_size: Side m of the block of patches that becomes one token. Taken from the vision configuration
            where that has the field, otherwise 1.
        image_token_id: Id of the placeholder token that each image token replaces.
        video_token_id: The same for videos.
        vision_feature_layer: -1 for what the tower gives (all layers that its `feature_layers` name, where it has that
            field), otherwise an index into its hidden states.
        tie_word_embeddings: Whether the language head shares the input embeddings. Taken from the text configuration
            if absent.
        initializer_range: Standard deviation of the projector's and a new head's initial weights.
    """

    model_type = "vlparts_vlm"
    # A plain attribute and `__post_init__`, not `sub_configs_defaults`: that resolves a dictionary through AutoConfig
    # alone, which does not know our vision parts where they run as remote code.
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values", "router_logits", "aux_loss"]

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    projector_type: str = "mlp2_gelu"
    projector_options: dict | None = None
    spatial_merge_size: int | None = None
    image_token_id: int | None = None
    video_token_id: int | None = None
    vision_feature_layer: int = -1
    tie_word_embeddings: bool | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        if self.vision_config is None:
            self.vision_config = NaViTConfig(pooling="none")
        elif isinstance(self.vision_config, dict):
            self.vision_config = config_from_dict(self.vision_config, "vision_config")
        if self.text_config is None:
            self.text_config = config_from_dict({"model_type": "qwen3"}, "text_config")
        elif isinstance(self.text_config, dict):
            self.text_config = config_from_dict(self.text_config, "text_config")
        if self.spatial_merge_size is None:
            self.spatial_merge_size = getattr(self.vision_config, "spatial_merge_size", 1)
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__post_init__(**kwargs)

    @property
    def merge_size(self) -> int:
        """`spatial_merge_size`, which is always set once the configuration is built."""
        return self.spatial_merge_size or 1

    @property
    def feature_taps(self) -> int:
        """Number of layers of the vision tower that the projector takes."""
        return count_taps(self.vision_config, self.vision_feature_layer)

    def validate_composition(self) -> None:
        """Check that the parts fit together.

        Raises:
            ValueError: If the projector is unknown or does not take what the tower gives or the options, the merge
                sizes disagree, or a placeholder is not in the vocabulary or stands for both images and videos.
        """
        if self.projector_type not in projector_names():
            raise ValueError(
                f"`projector_type` must be one of {', '.join(projector_names())}, got {self.projector_type!r}."
            )
        check_projector(self.projector_type, self.feature_taps, self.projector_options)
        if self.spatial_merge_size is not None and self.spatial_merge_size < 1:
            raise ValueError(f"`spatial_merge_size` must be at least 1, got {self.spatial_merge_size}.")
        own = getattr(self.vision_config, "spatial_merge_size", self.spatial_merge_size)
        if own != self.spatial_merge_size:
            raise ValueError(
                f"`spatial_merge_size` is {self.spatial_merge_size}, but the vision configuration says {own}."
            )
        vocabulary = getattr(self.text_config, "vocab_size", None)
        for name in ("image_token_id", "video_token_id"):
            token = getattr(self, name)
            if token is not None and vocabulary and not 0 <= token < vocabulary:
                raise ValueError(f"`{name}` must lie in the vocabulary of {vocabulary} tokens, got {token}.")
        if self.image_token_id is not None and self.image_token_id == self.video_token_id:
            raise ValueError(
                f"`video_token_id` must differ from `image_token_id`, got {self.video_token_id} for both."
            )


__all__ = ["VisionLanguageConfig"]
