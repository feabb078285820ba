"""The composed vision-language model: a vision encoder, a projector, a text model.

Shapes: B samples, S tokens per sample, n images or videos of the batch, E width of the text model.
"""

import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    MoeCausalLMOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .configuration_vlm import VisionLanguageConfig
from .distributed import ShardableMixin
from .moe_experts import check_whole_groups
from .moe_losses import find_balance_loss
from .part_models import model_from_config, vision_tower_from_config
from .token_reduction import TokenResampler
from .utils import (
    ForwardKwargs,
    SubmodelInitializationMixin,
    add_auto_classes,
    check_shape,
    check_token_inputs,
    slice_for_logits,
)
from .vlm_distributed import attach_unseen
from .vlm_generation import VisionLanguageGenerationMixin, keep_ngram_options
from .vlm_inputs import MultimodalInputsMixin, build_head, compute_logits, fill_placeholders
from .vlm_positions import check_cache_positions
from .vlm_projectors import build_projector
from .vlm_reduction import build_reducer
from .vlm_serving import ServedModelMixin, check_servable
from .vlm_towers import LEFT_OUT_KEYS
from .vlm_views import ViewAssembler


class VisionLanguagePreTrainedModel(ShardableMixin, SubmodelInitializationMixin, PreTrainedModel):
    """Base class: weight initialisation and the attributes that transformers expects."""

    config: VisionLanguageConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ViewAssembler):
            module.reset_marks()
        elif isinstance(module, TokenResampler):
            init.normal_(module.queries, mean=0.0, std=self.config.initializer_range)

    @classmethod
    def maybe_distribute_model(
        cls, model: "VisionLanguagePreTrainedModel", distributed_config: Any, mesh_manager: Any
    ) -> "VisionLanguagePreTrainedModel":
        """Distribute a model over processes when it is loaded, without dividing a group of experts.

        Raises:
            ValueError: If a group of experts would be divided, or for pipeline parallelism, which transformers has for
                text models only.
        """
        check_whole_groups(model.config, distributed_config)
        if getattr(distributed_config, "pp_size", 1) > 1:
            raise ValueError(f"`pp_size` must be 1 for a composed model, got {distributed_config.pp_size}.")
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)


class VisionLanguageModel(ServedModelMixin, MultimodalInputsMixin, VisionLanguagePreTrainedModel):
    """A vision encoder and a text model joined by a projector, without a language head."""

    _keys_to_ignore_on_load_unexpected = list(LEFT_OUT_KEYS)

    def __init__(self, config: VisionLanguageConfig) -> None:
        check_servable(config)
        super().__init__(config)
        self.vision_tower = vision_tower_from_config(config.vision_config)
        self.projector = build_projector(config)
        self.token_reducer = build_reducer(config)
        self.language_model = model_from_config(config.text_config)
        self.post_init()

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        super()._adjust_missing_and_unexpected_keys(loading_info)
        # Not a pattern in `_keys_to_ignore_on_load_unexpected`, since servers drop the weights that these match.
        keys = loading_info.unexpected_keys
        loading_info.unexpected_keys = {key for key in keys if not key.startswith("lm_head.")}

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embeddings of the text model."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings of the text model."""
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
        image_tile_grid: Tensor | None = None,
        image_keep_index: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        use_cache: bool | None = None,
        **kwargs: ForwardKwargs,
    ) -> BaseModelOutputWithPast:
        """Replace placeholders by the features of images and videos and run the text model.

        Args:
            input_ids: `(B, S)` int64.
            attention_mask: `(B, S)`, 0 at padding.
            position_ids: `(B, S)`; for a text model with multimodal rotary positions also the result of
                [`get_multimodal_position_ids`], which is computed here if absent, except when continuing from a cache.
            past_key_values: Cache of the text model.
            inputs_embeds: `(B, S, E)` instead of `input_ids`.
            pixel_values: Images in the layout of the vision encoder; see [`get_image_features`].
            image_grid_thw: `(n, 3)` int64 for packed encoders.
            pixel_attention_mask: `(n, patches)` for padded encoders.
            spatial_shapes: `(n, 2)` for padded encoders.
            image_tile_grid: `(n, 2)` for encoders of several views per image.
            image_keep_index: `(L,)` int64 patches that are there, where redundant ones were dropped.
            pixel_values_videos: Packed patches of videos; see [`get_video_features`].
            video_grid_thw: `(n, 3)` int64.
            mm_encoder_outputs: Outputs of [`get_image_features`] under "image", instead of `pixel_values`, and of
                [`get_video_features`] under "video".
            use_cache: Whether to return a cache; it must not be True for rows of several samples, which have none.
            **kwargs: Passed to the text model (`cu_seq_lens_q` of packed samples, `output_hidden_states`, ...).

        Raises:
            ValueError: If both or neither of `input_ids` and `inputs_embeds` are given, an input has another
                shape, ids are out of range (checked on the CPU), images or videos are given twice, placeholders and
                features do not match, or multimodal positions cannot be determined.
        """
        check_token_inputs(
            input_ids,
            inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            vocab_size=self.config.text_config.vocab_size,
            width=self.config.text_config.hidden_size,
        )
        media, grids = self.encode_media(
            mm_encoder_outputs,
            {"image": pixel_values, "video": pixel_values_videos},
            kwargs,
            image_grid_thw=image_grid_thw,
            pixel_attention_mask=pixel_attention_mask,
            spatial_shapes=spatial_shapes,
            image_tile_grid=image_tile_grid,
            image_keep_index=image_keep_index,
            video_grid_thw=video_grid_thw,
        )
        blank = None  # encoded before the tokens are embedded, as images are: other processes gather both
        if not media and past_key_values is None:
            blank = self.encode_blank_image((inputs_embeds if input_ids is None else input_ids).device)

        if self.config.has_multimodal_positions and (position_ids is None or position_ids.ndim == 2):
            check_cache_positions(position_ids, past_key_values, bool(media))
            if media:
                position_ids = self.get_multimodal_position_ids(
                    input_ids,
                    inputs_embeds,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    cu_seq_lens_q=kwargs.get("cu_seq_lens_q"),
                    image_grid_thw=image_grid_thw,
                    video_grid_thw=video_grid_thw,
                    pixel_values=pixel_values,
                    spatial_shapes=spatial_shapes,
                    mm_encoder_outputs=media,
                )
        masks = {kind: self.get_placeholder_mask(input_ids, inputs_embeds, kind) for kind in media}
        inputs_embeds = self.embed_tokens(input_ids, inputs_embeds)
        for kind, outputs in media.items():
            inputs_embeds = fill_placeholders(inputs_embeds, masks[kind], outputs.pooler_output, kind, grids.get(kind))
        if blank is not None:
            inputs_embeds = attach_unseen(inputs_embeds, blank)

        return self.run_language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )


class VisionLanguageForConditionalGeneration(VisionLanguagePreTrainedModel, VisionLanguageGenerationMixin):
    """The composed model with a language head, for generation, training and pipelines."""

    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: VisionLanguageConfig) -> None:
        super().__init__(config)
        self.model = VisionLanguageModel(config)
        self.lm_head = build_head(config)
        embeddings = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embeddings of the text model."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings of the text model."""
        self.model.set_input_embeddings(value)

    def get_image_features(
        self,
        pixel_values: Tensor,
        image_grid_thw: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        image_tile_grid: Tensor | None = None,
        **kwargs: ForwardKwargs,
    ) -> BaseModelOutputWithPooling:
        """Encode and project images; see [`VisionLanguageModel.get_image_features`]."""
        return self.model.get_image_features(
            pixel_values, image_grid_thw, pixel_attention_mask, spatial_shapes, image_tile_grid, **kwargs
        )

    def get_video_features(
        self, pixel_values_videos: Tensor, video_grid_thw: Tensor | None = None, **kwargs: ForwardKwargs
    ) -> BaseModelOutputWithPooling:
        """Encode and project videos; see [`VisionLanguageModel.get_video_features`]."""
        return self.model.get_video_features(pixel_values_videos, video_grid_thw, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save the model and its code; `AutoModel` loads the model without its head from the same folder."""
        add_auto_classes(self, AutoModel=VisionLanguageModel, AutoModelForMultimodalLM=type(self))
        keep_ngram_options(self.generation_config)
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
        image_tile_grid: Tensor | None = None,
        image_keep_index: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        loss_weights: Tensor | None = None,
        **kwargs: ForwardKwargs,
    ) -> MoeCausalLMOutputWithPast:
        """Compute logits and, with `labels`, the loss.

        Args:
            input_ids: `(B, S)` int64.
            attention_mask: `(B, S)`, 0 at padding.
            position_ids: `(B, S)` or `(4, B, S)`; see [`VisionLanguageModel.forward`].
            past_key_values: Cache of the text model.
            inputs_embeds: `(B, S, E)` instead of `input_ids`.
            pixel_values: Images in the layout of the vision encoder; see [`get_image_features`].
            image_grid_thw: `(n, 3)` int64 for packed encoders.
            pixel_attention_mask: `(n, patches)` for padded encoders.
            spatial_shapes: `(n, 2)` for padded encoders.
            image_tile_grid: `(n, 2)` for encoders of several views per image.
            image_keep_index: `(L,)` int64 patches that are there, where redundant ones were dropped.
            pixel_values_videos: Packed patches of videos; see [`get_video_features`].
            video_grid_thw: `(n, 3)` int64.
            mm_encoder_outputs: Encoded images and videos; see [`VisionLanguageModel.forward`].
            labels: `(B, S)` int64, -100 at tokens that the loss ignores; the loss shifts them.
            use_cache: Whether to return a cache.
            output_router_logits: Whether to return `router_logits` and `aux_loss` of a text model with experts.
            logits_to_keep: Number of positions at the end to compute logits for, 0 for all; or their indices.
            loss_weights: `(B, S)` final weight of each token in the loss, aligned with `labels`; for the loss
                "vlparts_weighted" ([`weighted_causal_lm_loss`]).
            **kwargs: `num_items_in_batch` and `shift_labels` for the loss; the rest as in
                [`VisionLanguageModel.forward`].

        Returns:
            `loss` (if `labels` are given), `logits` `(B, S, vocabulary)`, `past_key_values`, `hidden_states`,
            `attentions`. With experts, `loss` includes `router_aux_loss_coef` times the balance loss `aux_loss`
            whenever the text model's own head includes it: [`MoGEForCausalLM`]'s in every loss, transformers' own only
            with `output_router_logits`.

        Raises:
            ValueError: If router logits are requested from a text model without a known balance loss, or labels have
                another shape than the tokens with logits.
        """
        text_model = self.model.language_model
        if output_router_logits is None:
            output_router_logits = getattr(text_model.config, "output_router_logits", False)
        in_every_loss = hasattr(text_model, "get_balance_loss") and text_model.config.router_aux_loss_coef > 0
        balance_loss = None
        if output_router_logits or (labels is not None and in_every_loss):
            balance_loss = find_balance_loss(text_model)
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
            image_tile_grid=image_tile_grid,
            image_keep_index=image_keep_index,
            pixel_values_videos=pixel_values_videos,
            video_grid_thw=video_grid_thw,
            mm_encoder_outputs=mm_encoder_outputs,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        logits = compute_logits(self.lm_head, slice_for_logits(outputs.last_hidden_state, logits_to_keep), self.config)
        loss = None
        if labels is not None:
            if not torch.compiler.is_compiling():
                for name, tensor in {"labels": labels, **loss_kwargs}.items():
                    if name != "num_items_in_batch" and tensor is not None:
                        check_shape(name, tensor, *logits.shape[:2])
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **loss_kwargs
            )
        aux_loss = None
        if balance_loss is not None:
            aux_loss = balance_loss(
                outputs.router_logits,
                len(outputs.last_hidden_state),
                attention_mask,
                position_ids,
                kwargs.get("cu_seq_lens_q"),
            )
            if loss is not None:
                loss = loss + text_model.config.router_aux_loss_coef * aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
        )


__all__ = ["VisionLanguageForConditionalGeneration", "VisionLanguageModel", "VisionLanguagePreTrainedModel"]
