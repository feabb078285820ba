"""The dual encoder of images and texts (CLIP, SigLIP) for images of any size.

Shapes: n images, B texts, S tokens per text, E width of the shared embedding space. For a loss B = n, and row i of
both is a pair.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import ModelOutput, can_return_tuple

from .configuration_navit_dual_encoder import NaViTDualEncoderConfig
from .distributed import ShardableMixin
from .dual_encoder_loss import sigmoid_contrastive_loss, softmax_contrastive_loss
from .dual_encoder_towers import (
    blank_padding,
    check_inputs,
    check_same_weights,
    example_mask,
    find_tower,
    input_names,
    pool_tokens,
)
from .part_models import model_from_config
from .utils import ForwardKwargs, SubmodelInitializationMixin, activation_dtype, add_auto_classes, mark_initialized

# Inputs that only some towers take.
_VISION_INPUTS = {
    "image_grid_thw",
    "cu_seqlens",
    "max_seqlen",
    "cu_seqlens_cpu",
    "position_ids",
    "keep_index",
    "pixel_attention_mask",
    "spatial_shapes",
}
_TEXT_INPUTS = {"token_type_ids", "position_ids"}


@dataclass
class NaViTDualEncoderOutput(ModelOutput):
    """Output of [`NaViTDualEncoder`].

    Args:
        loss: `()` float32, with `return_loss=True`: over the pairs of all processes or of this process, depending on
            `config.negatives`.
        logits_per_image: `(n, B)` float32, without `return_loss` only; training never computes it.
        logits_per_text: `(B, n)`, its transpose.
        text_embeds: `(B, E)`, L2-normalised; zeros for padding examples.
        image_embeds: `(n, E)`, L2-normalised; zeros for padding examples.
        text_model_output: Output of the text tower; `pooler_output` is the projection before normalisation.
        vision_model_output: Output of the vision tower; `pooler_output` is the projection before normalisation.
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None


class NaViTDualEncoder(ShardableMixin, SubmodelInitializationMixin, PreTrainedModel):
    """A vision tower and a text tower, each with a projection, trained contrastively.

    The loss is exact but never materialises the logits of all pairs ([`softmax_contrastive_loss`],
    [`sigmoid_contrastive_loss`]); it runs over the pairs of all processes.
    """

    config: NaViTDualEncoderConfig
    base_model_prefix = "navit_dual_encoder"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: NaViTDualEncoderConfig) -> None:
        super().__init__(config)
        self.vision_model = model_from_config(config.vision_config)
        self.text_model = model_from_config(config.text_config)
        self._make_heads()
        self._vision_inputs = input_names(self.vision_model)
        self._text_inputs = input_names(self.text_model)
        self._causal_text = any(getattr(module, "is_causal", False) for module in self.text_model.modules())
        self.post_init()

    @classmethod
    def from_towers(
        cls,
        vision: PreTrainedModel | PreTrainedConfig,
        text: PreTrainedModel | PreTrainedConfig,
        **config_changes: Any,
    ) -> "NaViTDualEncoder":
        """Build a dual encoder from two towers.

        Models keep their weights and are shared, not copied; configurations give new weights.

        Args:
            vision: The vision tower, a dual encoder (CLIP, ...) whose vision tower is used, or a model with a head
                whose base model is used; or a configuration.
            text: The text tower, likewise.
            **config_changes: Further fields of [`NaViTDualEncoderConfig`].

        Returns:
            The model. The projections, the logit scale and the logit bias are new.

        Raises:
            ValueError: If an argument is neither a model nor a configuration, or the weights of a model are not those
                that its configuration builds, so that it could not be loaded again.
        """
        towers = [
            find_tower(model_from_config(given) if isinstance(given, PreTrainedConfig) else given, name)
            for given, name in ((vision, "vision"), (text, "text"))
        ]
        vision, text = towers
        config = NaViTDualEncoderConfig(
            vision_config=vision.config, text_config=text.config, dtype=text.dtype, **config_changes
        )
        with torch.device("meta"):
            model = cls(config)
        check_same_weights("vision", vision, model.vision_model)
        check_same_weights("text", text, model.text_model)
        model.vision_model, model.text_model = vision, text
        model._make_heads()
        for module in (model.image_projection, model.text_projection, model):
            model._init_weights(module)
        for module in (model.image_projection, model.text_projection):
            module.to(text.device, text.dtype)
        for parameter in (model.logit_scale, model.logit_bias):
            if parameter is not None:
                parameter.data = parameter.data.to(text.device, text.dtype)
        mark_initialized(model)
        return model

    def _make_heads(self) -> None:
        config = self.config
        width = config.projection_dim
        self.image_projection = nn.Linear(config.vision_config.hidden_size, width, bias=False)
        self.text_projection = nn.Linear(config.text_config.hidden_size, width, bias=False)
        # Values are set by `_init_weights`. FSDP does not support parameters without a dimension.
        self.logit_scale = nn.Parameter(torch.zeros(1))
        self.logit_bias = None if config.logit_bias_init_value is None else nn.Parameter(torch.zeros(1))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, NaViTDualEncoder):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
            if module.logit_bias is not None:
                init.constant_(module.logit_bias, self.config.logit_bias_init_value)

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embeddings of the text tower."""
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings of the text tower."""
        self.text_model.set_input_embeddings(value)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save the model and its code for both of its Auto classes."""
        add_auto_classes(self, AutoModel=type(self), AutoModelForZeroShotImageClassification=type(self))
        super().save_pretrained(save_directory, **kwargs)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        image_grid_thw: Tensor | None = None,
        image_mask: Tensor | None = None,
        **kwargs: ForwardKwargs,
    ) -> BaseModelOutputWithPooling:
        """Encode and project images.

        Args:
            pixel_values: In the layout of the vision tower: packed `(L, C*P*P)`, padded `(n, patches, C*P*P)`, or
                square `(n, C, H, W)`.
            image_grid_thw: `(n, 3)` int64 for packed towers; a row of zeros is a padding example.
            image_mask: `(n,)` bool, false at padding examples; by default derived from `image_grid_thw`.
            **kwargs: Further inputs of the vision tower: for packed towers `cu_seqlens`, `max_seqlen`, `position_ids`,
                `keep_index`; for padded towers `pixel_attention_mask`, `spatial_shapes`; `output_hidden_states`.

        Returns:
            The tower's output with `pooler_output` replaced by the projection `(n, E)`, not normalised.

        Raises:
            ValueError: If an input that the tower needs is missing, or the tower does not pool.
        """
        pixel_values = pixel_values.to(activation_dtype(self.vision_model, pixel_values.dtype))
        inputs = {"pixel_values": pixel_values, "image_grid_thw": image_grid_thw, **kwargs}
        inputs = {name: value for name, value in inputs.items() if value is not None}
        check_inputs(self.vision_model, self._vision_inputs, inputs, _VISION_INPUTS)
        outputs = self.vision_model(**inputs, return_dict=True)
        pooled = getattr(outputs, "pooler_output", None)
        if pooled is None:
            raise ValueError(f"The vision tower {type(self.vision_model).__name__} returns no `pooler_output`.")
        mask = example_mask(image_mask, image_grid_thw, "image_mask", len(pooled))
        outputs.pooler_output = self._project(self.image_projection, self.config.vision_config, pooled, mask)
        return outputs

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        text_position_ids: Tensor | None = None,
        text_mask: Tensor | None = None,
        **kwargs: ForwardKwargs,
    ) -> BaseModelOutputWithPooling:
        """Encode, pool and project texts.

        Args:
            input_ids: `(B, S)` int64.
            attention_mask: `(B, S)`, 0 at padding, on either side; a row of zeros is a padding example.
            token_type_ids: `(B, S)` for towers that take them.
            text_position_ids: `(B, S)`. A tower with absolute positions needs them for padding on the left.
            text_mask: `(B,)` bool, false at padding examples; by default derived from `attention_mask`.
            **kwargs: Passed to the text tower (`output_hidden_states`, ...).

        Returns:
            `last_hidden_state` `(B, S, D)`, `pooler_output` `(B, E)`, not normalised, `hidden_states` and
            `attentions`.

        Raises:
            ValueError: If the tower does not take an input that is given, or has no pooler although
                `config.text_pooling` is "pooler".
        """
        inputs = {"token_type_ids": token_type_ids, "position_ids": text_position_ids, **kwargs}
        inputs = {name: value for name, value in inputs.items() if value is not None}
        check_inputs(self.text_model, self._text_inputs, {"input_ids": input_ids, **inputs}, _TEXT_INPUTS)
        if "use_cache" in self._text_inputs:
            inputs["use_cache"] = False
        outputs = self.text_model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **inputs)
        mask = example_mask(text_mask, attention_mask, "text_mask", len(input_ids))
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=self._project(
                self.text_projection, self.config.text_config, self._pool_text(outputs, attention_mask), mask
            ),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )

    def _pool_text(self, outputs: ModelOutput, attention_mask: Tensor | None) -> Tensor:
        pooling, pooled = self.config.text_pooling, outputs.get("pooler_output")
        if pooling == "auto" and pooled is None:
            pooling = "last" if self._causal_text else "mean"
        if pooling not in ("auto", "pooler"):
            return pool_tokens(outputs.last_hidden_state, attention_mask, pooling)
        if pooled is None:
            raise ValueError(
                f"`text_pooling` is 'pooler', but the text tower {type(self.text_model).__name__} has no pooler."
            )
        return pooled

    @staticmethod
    def _project(projection: nn.Module, config: PreTrainedConfig, pooled: Tensor, mask: Tensor | None) -> Tensor:
        if pooled.shape[-1] != config.hidden_size:
            raise ValueError(
                f"The tower pools to {pooled.shape[-1]} channels; expected `hidden_size`, {config.hidden_size}."
            )
        return projection(blank_padding(pooled, mask).to(activation_dtype(projection, pooled.dtype)))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_loss: bool | None = None,
        image_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        position_ids: Tensor | None = None,
        keep_index: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        cu_seqlens_cpu: Sequence[int] | None = None,
        token_type_ids: Tensor | None = None,
        text_position_ids: Tensor | None = None,
        **kwargs: ForwardKwargs,
    ) -> NaViTDualEncoderOutput:
        """Encode images and texts, and compute the loss or the logits.

        Args:
            input_ids: `(B, S)` int64; see [`get_text_features`] for the inputs of the text tower.
            pixel_values: Pixels; see [`get_image_features`] for the inputs of the vision tower.
            image_grid_thw: `(n, 3)` int64 for packed towers.
            attention_mask: `(B, S)`, 0 at padding.
            return_loss: Whether to compute the loss instead of the logits. Needs as many texts as images.
            image_mask: `(n,)` bool, false at padding examples. A pair is real if its image and its text are.
            text_mask: `(B,)` bool, false at padding examples.
            cu_seqlens: `(segments + 1,)` int32 cumulative patch counts for packed towers.
            max_seqlen: Longest segment for packed towers.
            position_ids: `(L, 2)` row and column of each patch for packed towers.
            keep_index: `(L,)` index of each patch before patches were dropped, for packed towers.
            pixel_attention_mask: `(n, patches)` for padded towers.
            spatial_shapes: `(n, 2)` for padded towers.
            cu_seqlens_cpu: `cu_seqlens` as host integers.
            token_type_ids: `(B, S)` for text towers that take them.
            text_position_ids: `(B, S)` positions of text tokens.
            **kwargs: Passed to both towers (`output_hidden_states`, ...).

        Raises:
            ValueError: If images or texts are missing, or `return_loss` is set and their numbers differ.
        """
        if pixel_values is None or input_ids is None:
            raise ValueError(
                "`pixel_values` and `input_ids` must both be given; for one of them call `get_image_features` or "
                "`get_text_features`."
            )
        images = self.get_image_features(
            pixel_values,
            image_grid_thw,
            image_mask,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            position_ids=position_ids,
            keep_index=keep_index,
            pixel_attention_mask=pixel_attention_mask,
            spatial_shapes=spatial_shapes,
            cu_seqlens_cpu=cu_seqlens_cpu,
            return_dict=True,
            **kwargs,
        )
        texts = self.get_text_features(
            input_ids, attention_mask, token_type_ids, text_position_ids, text_mask, return_dict=True, **kwargs
        )
        image_embeds = F.normalize(images.pooler_output, dim=-1)
        text_embeds = F.normalize(texts.pooler_output, dim=-1).to(image_embeds.device)
        logits = loss = None
        if return_loss:
            masks = (
                example_mask(image_mask, image_grid_thw, "image_mask", len(image_embeds)),
                example_mask(text_mask, attention_mask, "text_mask", len(text_embeds)),
            )
            loss = self._loss(image_embeds, text_embeds, masks)
        else:
            logits = self._logits(image_embeds, text_embeds)
        return NaViTDualEncoderOutput(
            loss=loss,
            logits_per_image=logits,
            logits_per_text=None if logits is None else logits.T,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=texts,
            vision_model_output=images,
        )

    def _scale_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """Return the factor of the similarities and the bias of the logits, in float32 or float64."""
        dtype = torch.promote_types(self.logit_scale.dtype, torch.float32)
        bias = self.logit_bias
        return self.logit_scale.to(dtype).exp(), None if bias is None else bias.to(dtype)

    def _logits(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        scale, bias = self._scale_and_bias()
        logits = scale.to(image_embeds.device) * (image_embeds.to(scale.dtype) @ text_embeds.to(scale.dtype).T)
        return logits if bias is None else logits + bias.to(logits.device)

    def _loss(self, image_embeds: Tensor, text_embeds: Tensor, masks: Iterable[Tensor | None]) -> Tensor:
        if len(image_embeds) != len(text_embeds):
            raise ValueError(
                f"`return_loss` needs one text per image, got {len(image_embeds)} images and {len(text_embeds)} texts."
            )
        scale, bias = self._scale_and_bias()
        pair_mask = None
        for mask in masks:
            if mask is not None:
                mask = mask.to(image_embeds.device)
                pair_mask = mask if pair_mask is None else pair_mask & mask
        options: dict[str, Any] = {
            "pair_mask": pair_mask,
            "chunk_size": self.config.chunk_size,
            "group": "local" if self.config.negatives == "local" else None,
        }
        if bias is None:
            return softmax_contrastive_loss(image_embeds, text_embeds, scale, **options)
        return sigmoid_contrastive_loss(image_embeds, text_embeds, scale, bias, **options)


__all__ = ["NaViTDualEncoder", "NaViTDualEncoderOutput"]
