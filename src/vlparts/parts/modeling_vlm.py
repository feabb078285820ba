"""The composed vision-language model: a vision tower, a projector, a text model.

Shapes: B samples, S tokens of a sample, n images or videos of the batch, T tokens of all of them, E width of the text
model.
"""

import os
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
    MoeCausalLMOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .configuration_vlm import VisionLanguageConfig
from .decoder_inputs import kept_states
from .moe_experts import check_whole_groups
from .part_models import model_from_config
from .utils import add_auto_classes
from .vlm_generation import VisionLanguageGenerationMixin
from .vlm_inputs import MultimodalInputsMixin
from .vlm_placeholders import fill_placeholders
from .vlm_positions import check_continued, has_multimodal_rotary
from .vlm_projectors import Projector
from .vlm_router_loss import asks_for_router_logits, balances_every_loss, text_balance_loss

_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


class VisionLanguagePreTrainedModel(PreTrainedModel):
    """What transformers asks of both classes below."""

    config: VisionLanguageConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @classmethod
    def maybe_distribute_model(
        cls, model: "VisionLanguagePreTrainedModel", distributed_config: Any, mesh_manager: Any
    ) -> "VisionLanguagePreTrainedModel":
        """Spread a model over processes, as transformers does when it loads one, but no group of experts."""
        check_whole_groups(model.config, distributed_config)
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)


class VisionLanguageModel(MultimodalInputsMixin, VisionLanguagePreTrainedModel):
    """A vision tower and a text model joined by a projector, without a language head."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

    def __init__(self, config: VisionLanguageConfig) -> None:
        super().__init__(config)
        self.vision_tower = model_from_config(config.vision_config)
        self.projector = Projector(
            config.projector_type,
            config.vision_config.hidden_size,
            config.text_config.hidden_size,
            config.merge_size,
            config.feature_taps,
            **(config.projector_options or {}),
        )
        self.language_model = model_from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The text model's token embeddings."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the text model's token embeddings."""
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Put the features of images and videos in place of their placeholders and run the text model.

        Args:
            input_ids: `(B, S)` int64.
            attention_mask: `(B, S)`, 0 at padding.
            position_ids: `(B, S)`; for a text model with multimodal rotary positions also what
                [`get_multimodal_position_ids`] returns, which is computed here for images and videos, but not where
                they go on from a cache.
            past_key_values: Cache of the text model.
            inputs_embeds: `(B, S, E)` in place of `input_ids`.
            pixel_values: See [`get_image_features`], as for the next three.
            image_grid_thw: As above.
            pixel_attention_mask: As above.
            spatial_shapes: As above.
            pixel_values_videos: See [`get_video_features`], as for the next.
            video_grid_thw: As above.
            mm_encoder_outputs: `{"image": output of get_image_features}` in place of `pixel_values`, and "video"
                likewise.
            use_cache: Whether to return a cache.
            **kwargs: Passed to the text model (`cu_seq_lens_q` of packed samples, `output_hidden_states`, ...).

        Raises:
            ValueError: If both or neither of ids and embeddings are given, if images or videos are given twice, if
                placeholders and features do not match, or if multimodal positions cannot be known.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds.")
        media = dict(mm_encoder_outputs or {})
        for kind, pixels in (("image", pixel_values), ("video", pixel_values_videos)):
            if pixels is not None and media.get(kind) is not None:
                raise ValueError(f"You cannot specify both `{_PIXELS[kind]}` and `mm_encoder_outputs['{kind}']`.")
        image_kwargs, video_kwargs = (
            {name: kwargs.pop(name) for name in list(kwargs) if name.startswith(f"{kind}_")} for kind in _PIXELS
        )
        if pixel_values is not None:
            media["image"] = self.get_image_features(
                pixel_values, image_grid_thw, pixel_attention_mask, spatial_shapes, return_dict=True, **image_kwargs
            )
        if pixel_values_videos is not None:
            media["video"] = self.get_video_features(
                pixel_values_videos, video_grid_thw, return_dict=True, **video_kwargs
            )
        media = {kind: media[kind] for kind in _PIXELS if media.get(kind) is not None}

        if has_multimodal_rotary(self.config.text_config) and (position_ids is None or position_ids.ndim == 2):
            check_continued(position_ids, past_key_values, bool(media))
            if media:
                position_ids = self.get_multimodal_position_ids(
                    input_ids,
                    inputs_embeds,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    image_grid_thw=image_grid_thw,
                    video_grid_thw=video_grid_thw,
                    pixel_values=pixel_values,
                    spatial_shapes=spatial_shapes,
                )
        masks = {kind: self.get_placeholder_mask(input_ids, inputs_embeds, kind) for kind in media}
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        for kind, outputs in media.items():
            inputs_embeds = fill_placeholders(inputs_embeds, masks[kind], outputs.pooler_output, kind)

        return self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )


class VisionLanguageForConditionalGeneration(VisionLanguagePreTrainedModel, VisionLanguageGenerationMixin):
    """The composed model with a language head: `generate`, training, pipelines."""

    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: VisionLanguageConfig) -> None:
        super().__init__(config)
        self.model = VisionLanguageModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        embeddings = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The text model's token embeddings."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the text model's token embeddings."""
        self.model.set_input_embeddings(value)

    def get_image_features(
        self,
        pixel_values: Tensor,
        image_grid_thw: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode and project images; see [`VisionLanguageModel.get_image_features`]."""
        return self.model.get_image_features(
            pixel_values, image_grid_thw, pixel_attention_mask, spatial_shapes, **kwargs
        )

    def get_video_features(
        self, pixel_values_videos: Tensor, video_grid_thw: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Encode and project videos; see [`VisionLanguageModel.get_video_features`]."""
        return self.model.get_video_features(pixel_values_videos, video_grid_thw, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save the model and its code, such that `AutoModel` finds the model without its head there too."""
        add_auto_classes(self, AutoModel=VisionLanguageModel)
        super().save_pretrained(save_directory, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        loss_weights: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | MoeCausalLMOutputWithPast:
        """Run the model and, with `labels`, compute the loss.

        Args:
            input_ids: See [`VisionLanguageModel.forward`], as for all that are not described here.
            attention_mask: As above.
            position_ids: As above.
            past_key_values: As above.
            inputs_embeds: As above.
            pixel_values: As above.
            image_grid_thw: As above.
            pixel_attention_mask: As above.
            spatial_shapes: As above.
            pixel_values_videos: As above.
            video_grid_thw: As above.
            mm_encoder_outputs: As above.
            use_cache: As above.
            labels: `(B, S)` int64, -100 where no loss is wanted; shifted by the loss.
            output_router_logits: Whether to return `router_logits` and `aux_loss` of a text model with experts.
            logits_to_keep: Logits of the last so many positions only, or of the positions in a tensor; 0 for all.
            loss_weights: `(B, S)` final weight of each token in the loss, standing where its label stands; for the
                loss "vlparts_weighted" ([`weighted_causal_lm_loss`]).
            **kwargs: As above.

        Returns:
            `loss` (if `labels` are given), `logits` `(B, S, vocabulary)`, `past_key_values`, `hidden_states`,
            `attentions`. With experts, `loss` holds `router_aux_loss_coef` times `aux_loss`, the balance loss, where
            the text model's own head adds it: [`MoGEForCausalLM`]'s at every loss, transformers' own with
            `output_router_logits` only.

        Raises:
            ValueError: If router logits are asked for, and the text model has no balance loss that is known.
        """
        text_model = self.model.language_model
        asked = asks_for_router_logits(text_model, output_router_logits)
        balanced = asked or (labels is not None and balances_every_loss(text_model))
        if balanced:
            kwargs["output_router_logits"] = True
        names = ("num_items_in_batch", "shift_labels")
        loss_kwargs: dict[str, Any] = {name: kwargs.pop(name) for name in names if name in kwargs}
        if loss_weights is not None:
            loss_kwargs["loss_weights"] = loss_weights
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            pixel_attention_mask=pixel_attention_mask,
            spatial_shapes=spatial_shapes,
            pixel_values_videos=pixel_values_videos,
            video_grid_thw=video_grid_thw,
            mm_encoder_outputs=mm_encoder_outputs,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(kept_states(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **loss_kwargs
            )
        fields = {
            "logits": logits,
            "past_key_values": outputs.past_key_values,
            "hidden_states": outputs.hidden_states,
            "attentions": outputs.attentions,
        }
        if not balanced:
            return CausalLMOutputWithPast(loss=loss, **fields)
        aux_loss = text_balance_loss(text_model, outputs.router_logits, attention_mask)
        if loss is not None:
            loss = loss + text_model.config.router_aux_loss_coef * aux_loss.to(loss.device)
        router_logits = outputs.router_logits if asked else None
        return MoeCausalLMOutputWithPast(loss=loss, aux_loss=aux_loss, router_logits=router_logits, **fields)


__all__ = ["VisionLanguageForConditionalGeneration", "VisionLanguageModel", "VisionLanguagePreTrainedModel"]
