"""Configuration of the two-tower model of images and texts."""

import math
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from .configuration_navit import NaViTConfig
from .dual_encoder_loss import DEFAULT_CHUNK_SIZE
from .part_configs import config_from_dict

# The papers' starting values: CLIP (arXiv 2103.00020, section 2.5), SigLIP (arXiv 2303.15343, section 3.2).
_LOGIT_SCALES = {"softmax": math.log(1 / 0.07), "sigmoid": math.log(10.0)}
_SIGMOID_BIAS = -10.0


@strict
class NaViTDualEncoderConfig(PreTrainedConfig):
    """Configuration of [`NaViTDualEncoder`]: a vision tower and a text tower, compared by cosine similarity.

    Args:
        vision_config: Configuration of the vision tower, ours or native; a dictionary needs a "model_type". It must
            give one pooled vector for each image. The default is a NaViT.
        text_config: Configuration of the text tower, native, encoder or decoder. The default is transformers' CLIP
            text model.
        projection_dim: Width of the common space.
        loss: "softmax" (CLIP) or "sigmoid" (SigLIP, which adds a bias to the logits).
        logit_scale_init_value: Logarithm of the first factor on the similarities. The default is the paper's:
            1/0.07 for "softmax", 10 for "sigmoid" (before the logarithm).
        logit_bias_init_value: First bias of the logits, for "sigmoid" only. The default is the paper's -10.
        text_pooling: Where a text's vector comes from: "pooler" (what the tower pools), "last" or "first" token that
            is not padding, "mean" of those tokens. "auto": "pooler" where the tower has one, otherwise "last" for
            causal towers and "mean" for the others.
        chunk_size: Side of the blocks of logits that the loss holds at a time.
        negatives: "global" compares with the pairs of all processes, "local" with those of the own process.
        initializer_range: Standard deviation of the projections' initial weights.
    """

    model_type = "vlparts_navit_dual_encoder"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 512
    loss: Literal["softmax", "sigmoid"] = "softmax"
    logit_scale_init_value: float | int | None = None
    logit_bias_init_value: float | int | None = None
    text_pooling: Literal["auto", "last", "mean", "first", "pooler"] = "auto"
    chunk_size: int = DEFAULT_CHUNK_SIZE
    negatives: Literal["global", "local"] = "global"
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        if self.vision_config is None:
            self.vision_config = NaViTConfig()
        elif isinstance(self.vision_config, dict):
            self.vision_config = config_from_dict(self.vision_config, "vision_config")
        if self.text_config is None:
            self.text_config = config_from_dict({"model_type": "clip_text_model"}, "text_config")
        elif isinstance(self.text_config, dict):
            self.text_config = config_from_dict(self.text_config, "text_config")
        if self.logit_scale_init_value is None:
            self.logit_scale_init_value = _LOGIT_SCALES.get(self.loss)
        if self.logit_bias_init_value is None and self.loss == "sigmoid":
            self.logit_bias_init_value = _SIGMOID_BIAS
        super().__post_init__(**kwargs)

    def validate_composition(self) -> None:
        """Check the sizes, and that both towers can give one vector for each input.

        Raises:
            ValueError: If a size is below one, a bias is given to a loss without one, the vision tower does not pool,
                or the text tower is an encoder with a decoder.
        """
        for name in ("projection_dim", "chunk_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.loss == "softmax" and self.logit_bias_init_value is not None:
            raise ValueError(
                f"`logit_bias_init_value` must be None for `loss` 'softmax', got {self.logit_bias_init_value}."
            )
        if getattr(self.vision_config, "pooling", None) == "none":
            raise ValueError("`vision_config` must pool (for NaViT `pooling` 'map'), got `pooling` 'none'.")
        if getattr(self.text_config, "is_encoder_decoder", False):
            raise ValueError(
                "`text_config` must be an encoder or a decoder alone, got the encoder-decoder "
                f"{self.text_config.model_type!r}."
            )


__all__ = ["NaViTDualEncoderConfig"]
