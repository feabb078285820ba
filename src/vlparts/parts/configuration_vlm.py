"""Configuration of the composed vision-language model."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from .configuration_navit import NaViTConfig
from .projectors import projector_names
from .vision_parts import config_from_dict


@strict
class VisionLanguageConfig(PreTrainedConfig):
    """Configuration of [`VisionLanguageForConditionalGeneration`]: a vision tower, a projector, a text model.

    Args:
        vision_config: Configuration of the vision tower, ours or native; a dictionary needs a "model_type". The
            default is a NaViT without pooling.
        text_config: Configuration of the text model (native, decoder only). The default is transformers' Qwen3.
        projector_type: Name of a registered projector.
        spatial_merge_size: Side m of the block of patches that becomes one token. Taken from the vision configuration
            where that has the field, otherwise 1.
        image_token_id: Id of the placeholder token that each image token replaces.
        vision_feature_layer: -1 for the tower's output, otherwise an index into its hidden states.
        tie_word_embeddings: Whether the language head shares the input embeddings. Taken from the text configuration
            if absent.
        initializer_range: Standard deviation of the projector's and a new head's initial weights.
    """

    model_type = "vlparts_vlm"
    # A plain attribute and `__post_init__`, not `sub_configs_defaults`: that resolves a dictionary through AutoConfig
    # alone, which does not know our vision parts where they run as remote code.
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values"]

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    projector_type: str = "mlp2_gelu"
    spatial_merge_size: int | None = None
    image_token_id: int | None = None
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

    def validate_composition(self) -> None:
        """Check that the parts fit together.

        Raises:
            ValueError: If the projector is unknown, the merge sizes disagree, or the placeholder is not in the
                vocabulary.
        """
        if self.projector_type not in projector_names():
            raise ValueError(
                f"`projector_type` must be one of {', '.join(projector_names())}, got {self.projector_type!r}."
            )
        if self.spatial_merge_size is not None and self.spatial_merge_size < 1:
            raise ValueError(f"`spatial_merge_size` must be at least 1, got {self.spatial_merge_size}.")
        own = getattr(self.vision_config, "spatial_merge_size", self.spatial_merge_size)
        if own != self.spatial_merge_size:
            raise ValueError(
                f"`spatial_merge_size` is {self.spatial_merge_size}, but the vision configuration says {own}."
            )
        vocabulary = getattr(self.text_config, "vocab_size", None)
        if self.image_token_id is not None and vocabulary and not 0 <= self.image_token_id < vocabulary:
            raise ValueError(
                f"`image_token_id` must lie in the vocabulary of {vocabulary} tokens, got {self.image_token_id}."
            )


__all__ = ["VisionLanguageConfig"]
