"""Configuration of the composed vision-language model."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from .part_configs import resolve_config
from .vlm_projectors import check_projector, projector_names


@strict
class VisionLanguageConfig(PreTrainedConfig):
    """Configuration of [`VisionLanguageForConditionalGeneration`]: a vision encoder, a projector, a text model.

    Args:
        vision_config: Configuration of the vision encoder, ours or native; a dictionary needs a "model_type". The
            default is a NaViT without pooling.
        text_config: Configuration of the text model (native or ours, decoder only). The default is transformers'
            Qwen3.
        projector_type: Name of a registered projector.
        projector_options: Options of the projector, such as `{"hidden_size": 3584}` of "multi_tap_merger".
        spatial_merge_size: Side m of the block of patches that is merged into one token. Taken from the vision
            configuration if it has this field, otherwise 1.
        image_token_id: Id of the image placeholder; each occurrence is replaced by one image token.
        video_token_id: Id of the video placeholder.
        vision_feature_layer: -1 for the output of the vision encoder (all layers that its `feature_layers` names, if
            it has that field), otherwise an index into its hidden states.
        tie_word_embeddings: Whether the language head shares the input embeddings. Taken from the text configuration
            if absent.
        initializer_range: Standard deviation of the initial weights of the projector and of a new head.
        image_processor: Settings of the image processor that the vision encoder's folder came with
            (preprocessor_config.json), from which `compose_processor` builds it; None for a new encoder.
    """

    model_type = "vlparts_vlm"
    # A plain attribute and `__post_init__` instead of `sub_configs_defaults`, which resolves a dictionary through
    # AutoConfig alone; AutoConfig does not know our vision parts when they run as remote code.
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
    image_processor: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        default_vision = {"model_type": "vlparts_navit", "pooling": "none"}
        self.vision_config = resolve_config(self.vision_config, "vision_config", default_vision)
        self.text_config = resolve_config(self.text_config, "text_config", {"model_type": "qwen3"})
        if self.spatial_merge_size is None:
            self.spatial_merge_size = getattr(self.vision_config, "spatial_merge_size", 1)
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__post_init__(**kwargs)

    @property
    def merge_size(self) -> int:
        """`spatial_merge_size`, which is never None in a built configuration."""
        return self.spatial_merge_size or 1

    @property
    def num_feature_layers(self) -> int:
        """Number of layers of the vision encoder that the projector takes."""
        return len(getattr(self.vision_config, "feature_layers", (-1,))) if self.vision_feature_layer == -1 else 1

    @property
    def has_multimodal_positions(self) -> bool:
        """Whether the text model's rotary positions have three axes: `rope_parameters` has an "mrope_section"."""
        return bool((getattr(self.text_config, "rope_parameters", None) or {}).get("mrope_section"))

    def validate_composition(self) -> None:
        """Check that the parts fit together.

        Raises:
            ValueError: If the projector is unknown or does not take the encoder's feature layers or the options, the
                merge sizes disagree, or a placeholder is not in the vocabulary or is the same for images and videos.
        """
        if self.projector_type not in projector_names():
            raise ValueError(
                f"`projector_type` must be one of {', '.join(projector_names())}, got {self.projector_type!r}."
            )
        check_projector(self.projector_type, self.num_feature_layers, self.projector_options)
        if self.spatial_merge_size is not None and self.spatial_merge_size < 1:
            raise ValueError(f"`spatial_merge_size` must be at least 1, got {self.spatial_merge_size}.")
        vision_merge_size = getattr(self.vision_config, "spatial_merge_size", self.spatial_merge_size)
        if vision_merge_size != self.spatial_merge_size:
            raise ValueError(
                f"`spatial_merge_size` must be that of `vision_config`, {vision_merge_size}, got "
                f"{self.spatial_merge_size}."
            )
        vocab_size = getattr(self.text_config, "vocab_size", None)
        for name in ("image_token_id", "video_token_id"):
            token = getattr(self, name)
            if token is not None and vocab_size and not 0 <= token < vocab_size:
                raise ValueError(f"`{name}` must lie in the vocabulary of {vocab_size} tokens, got {token}.")
        if self.image_token_id is not None and self.image_token_id == self.video_token_id:
            raise ValueError(
                f"`video_token_id` must differ from `image_token_id`, got {self.video_token_id} for both."
            )


__all__ = ["VisionLanguageConfig"]
