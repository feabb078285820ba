"""Two vision encoders that see the same images, as in POINTS1.0 (arXiv 2409.04828).

Shapes: n images, L patches of each, D width of the encoders.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .configuration_fused_vision import FusedVisionConfig
from .distributed import ShardableMixin
from .utils import ForwardKwargs, SubmodelInitializationMixin, check_encoder_kwargs, mark_initialized
from .vlm_features import encode_images
from .vlm_towers import native_encoder_from_config


@dataclass
class FusedVisionOutput(BaseModelOutputWithPooling):
    """Output of [`FusedVisionModel`].

    Attributes:
        last_hidden_state: `(n, L, 2 * D)`, the features of both encoders, those of the first before the others.
        hidden_states: With `output_hidden_states`, the states of the first encoder and then those of the second.
        attentions: With `output_attentions`, the same of the attention weights.
        feature_maps: The features of each encoder, two of `(n, L, D)` without class and register tokens.
    """

    feature_maps: tuple[Tensor, ...] | None = None


class FusedVisionPreTrainedModel(ShardableMixin, SubmodelInitializationMixin, PreTrainedModel):
    """Base class: weight initialisation and the attributes that transformers expects."""

    config: FusedVisionConfig
    base_model_prefix = "fused_vision"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True


class FusedVisionModel(FusedVisionPreTrainedModel):
    """Two native vision encoders of images of one size, both of which see every image.

    In a composed model the projector "fused_mlp2_gelu" maps the features of each encoder with the same weights and
    adds them up.
    """

    def __init__(self, config: FusedVisionConfig) -> None:
        super().__init__(config)
        self.general_encoder = native_encoder_from_config(config.general_config)
        self.ocr_encoder = native_encoder_from_config(config.ocr_config)
        self.post_init()

    @classmethod
    def from_encoders(cls, general: PreTrainedModel, ocr: PreTrainedModel, **changes: Any) -> Self:
        """Build the model from two encoders, whose modules are shared and keep their weights.

        Args:
            general: The first encoder, such as a `CLIPVisionModel`.
            ocr: The second encoder.
            **changes: Further fields of [`FusedVisionConfig`].

        Raises:
            ValueError: If one is no native vision encoder of images of one size or has modules that composed models
                leave out, such as a pooling head, or if the two do not fit together.
        """
        config = FusedVisionConfig(
            general_config=general.config, ocr_config=ocr.config, dtype=general.dtype, **changes
        )
        with torch.device("meta"):
            model = cls(config)
        for name, encoder in (("general", general), ("ocr", ocr)):
            built = getattr(model, f"{name}_encoder")
            differing = sorted(encoder.state_dict().keys() ^ built.state_dict().keys())
            if type(encoder) is not type(built) or differing:
                raise ValueError(
                    f"`{name}` must be a {type(built).__name__} with the weights that its configuration builds for "
                    f"composed models, got a {type(encoder).__name__}; in one of them only: {differing[:4]}."
                )
            setattr(model, f"{name}_encoder", encoder)
        mark_initialized(model)
        return model.train(general.training)

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding of the first encoder."""
        return self.general_encoder.get_input_embeddings()

    @can_return_tuple
    def forward(self, pixel_values: Tensor, **kwargs: ForwardKwargs) -> FusedVisionOutput:
        """Encode images with both encoders.

        Args:
            pixel_values: `(n, C, H, W)` normalized images of one size.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Raises:
            ValueError: If the images have another shape or are not in floating point, or a keyword argument is
                unknown.
        """
        check_encoder_kwargs(kwargs)
        fields = {"hidden_states": "output_hidden_states", "attentions": "output_attentions"}
        given = {name: kwargs.get(name, getattr(self.config, name)) for name in fields.values()}
        options = {name: value for name, value in given.items() if value}
        encoders = (self.general_encoder, self.ocr_encoder)
        outputs, maps = [], []
        for encoder, layer in zip(encoders, self.config.feature_layers, strict=True):
            output, (patches,), _ = encode_images(
                encoder, pixel_values, None, None, None, layer=layer, merge_size=1, **options
            )
            outputs.append(output)
            maps.append(patches.unflatten(0, (pixel_values.shape[0], -1)))
        kept = {
            field: sum((getattr(output, field) or () for output in outputs), ()) or None
            for field, name in fields.items()
            if name in options
        }
        return FusedVisionOutput(last_hidden_state=torch.cat(maps, -1), feature_maps=tuple(maps), **kept)


__all__ = ["FusedVisionModel", "FusedVisionPreTrainedModel"]
