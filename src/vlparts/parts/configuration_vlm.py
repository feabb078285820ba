"""Configuration of the composed vision-language model."""

from typing import Any, NamedTuple

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from .part_configs import resolve_config
from .token_reduction_types import TokenReduction
from .utils import check_finite
from .vlm_projector_types import check_projector, get_projector_type, projector_names
from .vlm_towers import leave_out_unused, merges_patches, vision_merge_size, vision_width


class HeadRule(NamedTuple):
    """What a text model's own class does beside the product with the head's weight, in this order.

    Each field but `bias` is the name of the configuration's field with the number; "" or a number of None for none.

    Attributes:
        embedding_multiplier: Factor on the embeddings of `input_ids`, but not on `inputs_embeds`.
        hidden_divisor: Divisor of the hidden states.
        bias: Whether the head has a bias.
        multiplier: Factor on the logits.
        divisor: Divisor of the logits.
        softcap: Logits z become `softcap * tanh(z / softcap)` (Gemma 2, arXiv 2408.00118, section 2).
    """

    embedding_multiplier: str = ""
    hidden_divisor: str = ""
    bias: bool = False
    multiplier: str = ""
    divisor: str = ""
    softcap: str = ""


_BIAS = HeadRule(bias=True)
_SCALED = HeadRule(multiplier="logit_scale")
_DIVIDED = HeadRule(divisor="logits_scaling")
_CAPPED = HeadRule(softcap="final_logit_softcapping")

# By model type. `vlparts.compose` compares every text model with its own class, and refuses those of another rule.
HEAD_RULES: dict[str, HeadRule] = {
    **dict.fromkeys(("codegen", "ctrl", "gptj", "phi"), _BIAS),
    **dict.fromkeys(("cohere", "cohere2", "cohere2_moe", "cohere_compass_text"), _SCALED),
    **dict.fromkeys(
        ("granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared"), _DIVIDED
    ),
    **dict.fromkeys(
        (
            "beam",
            "gemma2",
            "gemma3_text",
            "gemma3n_text",
            "gemma4_text",
            "gemma4_unified_text",
            "nanochat",
            "vaultgemma",
        ),
        _CAPPED,
    ),
    "falcon_h1": HeadRule(embedding_multiplier="embedding_multiplier", multiplier="lm_head_multiplier"),
    "hyperclovax": HeadRule(multiplier="logits_scaling"),
    "minicpm3": HeadRule(hidden_divisor="logits_scaling"),
}


@strict
class VisionLanguageConfig(PreTrainedConfig):
    """Configuration of [`VisionLanguageForConditionalGeneration`]: a vision encoder, a projector, a text model.

    Args:
        vision_config: Configuration of the vision encoder, ours or native; a dictionary needs a "model_type". The
            default is a NaViT without pooling. Options of native encoders that build modules which a composed model
            does not use, such as SigLIP's `vision_use_head`, are switched off in a copy.
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
        token_reduction: Method by which each image, or frame of a video, gets fewer tokens; see [`TokenReduction`].
            None for all tokens.
        token_ratio: Share of the tokens that is left.
        token_count: Number of tokens that are left.
        token_options: Options of the method.
        token_stage: Whose output is reduced: "encoder" or "projector". The default is "encoder" where that is
            possible: not with several feature layers or several views per image.
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
    token_reduction: str | None = None
    token_ratio: float | None = None
    token_count: int | None = None
    token_options: dict | None = None
    token_stage: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        default_vision = {"model_type": "vlparts_navit", "pooling": "none"}
        self.vision_config = leave_out_unused(resolve_config(self.vision_config, "vision_config", default_vision))
        self.text_config = resolve_config(self.text_config, "text_config", {"model_type": "qwen3"})
        if self.spatial_merge_size is None:
            self.spatial_merge_size = vision_merge_size(self.vision_config) or 1
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        if self.token_reduction is not None and self.token_stage is None:
            self.token_stage = "projector" if self.num_feature_layers > 1 or self.has_views else "encoder"
        super().__post_init__(**kwargs)

    @property
    def merge_size(self) -> int:
        """`spatial_merge_size`, which is never None in a built configuration."""
        return self.spatial_merge_size or 1

    @property
    def projector_merge_size(self) -> int:
        """Side of the block that the projector gets: `merge_size`, or 1 if the vision encoder merges patches.

        Times the side of the squares that "pixel_shuffle" puts together.
        """
        side = 1 if merges_patches(self.vision_config) else self.merge_size
        return side if self.reduction is None else side * self.reduction.factor

    @property
    def has_views(self) -> bool:
        """Whether the vision encoder takes several views per image, which the projector assembles."""
        return bool(getattr(self.vision_config, "has_views", False))

    @property
    def reduction(self) -> TokenReduction | None:
        """How the tokens of an image are reduced; None if they are not.

        Raises:
            ValueError: If the method is unknown or does not take the numbers.
        """
        if self.token_reduction is None:
            return None
        return TokenReduction(self.token_reduction, self.token_ratio, self.token_count, self.token_options or {})

    @property
    def vision_width(self) -> int:
        """Width of the features that the projector takes."""
        return vision_width(self.vision_config, self.vision_feature_layer)

    @property
    def num_feature_layers(self) -> int:
        """Number of layers of the vision encoder that the projector takes."""
        return len(getattr(self.vision_config, "feature_layers", (-1,))) if self.vision_feature_layer == -1 else 1

    @property
    def has_multimodal_positions(self) -> bool:
        """Whether the text model's rotary positions have three axes: `rope_parameters` has an "mrope_section"."""
        return bool((getattr(self.text_config, "rope_parameters", None) or {}).get("mrope_section"))

    @property
    def head_rule(self) -> HeadRule:
        """What the text model's own class does beside the product with its head's weight."""
        return HEAD_RULES.get(self.text_config.model_type, HeadRule())

    def validate_composition(self) -> None:
        """Check that the parts fit together.

        Raises:
            ValueError: If the projector is unknown or does not take the encoder's feature layers or the options, the
                merge sizes disagree, the encoder has no such feature layer, or a placeholder is not in the vocabulary
                or is the same for images and videos.
        """
        vision_width(self.vision_config, self.vision_feature_layer)
        if self.projector_type not in projector_names():
            raise ValueError(
                f"`projector_type` must be one of {', '.join(projector_names())}, got {self.projector_type!r}."
            )
        check_projector(self.projector_type, self.num_feature_layers, self.projector_options)
        check_finite(self, "initializer_range")
        has_views = self.has_views
        if get_projector_type(self.projector_type).takes_views != has_views:
            raise ValueError(
                f"`projector_type` must {'' if has_views else 'not '}be one that assembles views, such as "
                f"'deepseek_ocr', for a vision encoder of type {self.vision_config.model_type!r}, got "
                f"{self.projector_type!r}."
            )
        if has_views and self.has_multimodal_positions:
            raise ValueError(
                "`text_config` must have one axis of positions for a vision encoder with several views per image, got "
                "an 'mrope_section'."
            )
        if self.spatial_merge_size is not None and self.spatial_merge_size < 1:
            raise ValueError(f"`spatial_merge_size` must be at least 1, got {self.spatial_merge_size}.")
        expected = vision_merge_size(self.vision_config)
        if expected is not None and expected != self.spatial_merge_size:
            raise ValueError(
                f"`spatial_merge_size` must be that of `vision_config`, {expected}, got {self.spatial_merge_size}."
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
        self._check_reduction()

    def _check_reduction(self) -> None:
        try:
            reduction = self.reduction
        except ValueError as error:
            raise ValueError(
                f"`token_reduction`, `token_ratio`, `token_count` and `token_options` do not fit together: {error}"
            ) from None
        if reduction is None:
            for name in ("token_ratio", "token_count", "token_options", "token_stage"):
                if getattr(self, name) is not None:
                    raise ValueError(f"`{name}` needs `token_reduction`, got {getattr(self, name)!r} without it.")
            return
        if self.token_stage not in ("encoder", "projector"):
            raise ValueError(f"`token_stage` must be 'encoder' or 'projector', got {self.token_stage!r}.")
        if self.token_stage == "encoder" and (self.num_feature_layers > 1 or self.has_views):
            raise ValueError(
                "`token_stage` must be 'projector' for a vision encoder with several feature layers or several views "
                "per image, got 'encoder'."
            )
        if self.has_views and not reduction.kind.chooses and reduction.method != "keep_all":
            raise ValueError(
                f"`token_reduction` must be a method without rows and columns, such as 'merge_similar', for a vision "
                f"encoder with several views per image, got {reduction.method!r}."
            )
        if self.token_stage == "projector" and reduction.kind.widens:
            raise ValueError(f"`token_stage` must be 'encoder' for {reduction.method!r}, got 'projector'.")
        if self.token_stage == "projector" and reduction.options.get("query") == "class_token":
            raise ValueError("`token_stage` must be 'encoder' for the query 'class_token', got 'projector'.")


__all__ = ["VisionLanguageConfig"]
