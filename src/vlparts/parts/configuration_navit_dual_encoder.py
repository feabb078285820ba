"""Configuration of the dual encoder of images and texts."""

import math
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from .dual_encoder_loss import DEFAULT_CHUNK_SIZE
from .part_configs import resolve_config
from .utils import check_finite, check_finite_number, check_minimum

# Initial values of the papers: CLIP (arXiv 2103.00020, section 2.5), SigLIP (arXiv 2303.15343, section 3.2).
_LOGIT_SCALES = {"softmax": math.log(1 / 0.07), "sigmoid": math.log(10.0)}
_SIGMOID_BIAS = -10.0


@strict
class NaViTDualEncoderConfig(PreTrainedConfig):
    """Configuration of [`NaViTDualEncoder`]: a vision tower and a text tower, compared by cosine similarity.

    Args:
        vision_config: Configuration of the vision tower, ours or native; a dictionary needs a "model_type". The tower
            must return one pooled vector per image. The default is a NaViT.
        text_config: Configuration of the text tower, native, encoder or decoder. The default is transformers' CLIP
            text model.
        projection_dim: Width of the shared embedding space.
        loss: "softmax" (CLIP) or "sigmoid" (SigLIP, which adds a bias to the logits).
        logit_scale_init_value: Logarithm of the initial factor of the similarities. The default is the paper's, the
            logarithm of 1/0.07 for "softmax" and of 10 for "sigmoid".
        logit_bias_init_value: Initial bias of the logits, for "sigmoid" only. The default is the paper's -10.
        text_pooling: Pooling of texts: "pooler" (the tower's own), the "last" or "first" token that is not padding, or
            the "mean" of those tokens. "auto": "pooler" if the tower has one, otherwise "last" for causal towers and
            "mean" for the others.
        chunk_size: Side of the blocks of logits that the loss computes at a time.
        negatives: "global" compares with the pairs of all processes, "local" only with those of this process.
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
        self.vision_config = resolve_config(self.vision_config, "vision_config", {"model_type": "vlparts_navit"})
        self.text_config = resolve_config(self.text_config, "text_config", {"model_type": "clip_text_model"})
        if self.logit_scale_init_value is None:
            self.logit_scale_init_value = _LOGIT_SCALES.get(self.loss)
        if self.logit_bias_init_value is None and self.loss == "sigmoid":
            self.logit_bias_init_value = _SIGMOID_BIAS
        super().__post_init__(**kwargs)

    def validate_composition(self) -> None:
        """Check the sizes, and that both towers can return one vector per input.

        Raises:
            ValueError: If a size is below one, a bias is given with `loss` "softmax", the vision tower does not pool,
                or the text tower is an encoder-decoder.
        """
        check_minimum(self, 1, "projection_dim", "chunk_size")
        check_finite(self, "initializer_range")
        for name in ("logit_scale_init_value", "logit_bias_init_value"):
            check_finite_number(name, getattr(self, name), signed=True)
        if self.loss == "softmax" and self.logit_bias_init_value is not None:
            raise ValueError(
                f"`logit_bias_init_value` must be None for `loss` 'softmax', got {self.logit_bias_init_value}."
            )
        if getattr(self.vision_config, "pooling", None) == "none":
            raise ValueError("`vision_config` must pool (`pooling` 'map' for NaViT), got `pooling` 'none'.")
        if getattr(self.text_config, "is_encoder_decoder", False):
            raise ValueError(
                "`text_config` must be an encoder or a decoder, got the encoder-decoder "
                f"{self.text_config.model_type!r}."
            )


__all__ = ["NaViTDualEncoderConfig"]
