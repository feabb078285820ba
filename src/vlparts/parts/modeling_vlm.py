"""The composed vision-language model: a vision tower, a projector, a text model.

Shapes: B samples, S tokens of a sample, n images of the batch, T image tokens of the batch, E width of the text model.
"""

import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .auto_classes import add_auto_classes
from .configuration_vlm import VisionLanguageConfig
from .projectors import Projector
from .vision_features import encode_images
from .vision_parts import model_from_config


def check_placeholders(image_mask: Tensor, tokens_per_image: list[int]) -> None:
    """Match placeholders and image features sample by sample, image by image.

    Args:
        image_mask: `(B, S)` bool, true at the placeholders.
        tokens_per_image: Tokens of each image of the batch, in order.

    Raises:
        ValueError: If the images of a sample do not have exactly as many tokens as the sample has placeholders (also
            when the totals of the batch agree); names the sample, the placeholders and the features.
    """
    images = iter(tokens_per_image)
    for sample, placeholders in enumerate(image_mask.sum(-1).tolist()):
        taken: list[int] = []
        while sum(taken) < placeholders:
            following = next(images, None)
            if following is None:
                break
            taken.append(following)
        if sum(taken) != placeholders:
            raise ValueError(
                f"Image features and image tokens do not match: sample {sample} has {placeholders} image tokens, but "
                f"its images have {' + '.join(map(str, taken)) or '0'} features. Was it truncated inside an image?"
            )
    left_over = list(images)
    if left_over:
        raise ValueError(
            f"Image features and image tokens do not match: {len(left_over)} images with "
            f"{sum(left_over)} features have no image tokens in any of the {len(image_mask)} samples."
        )


class VisionLanguagePreTrainedModel(PreTrainedModel):
    """What transformers asks of both classes below."""

    config: VisionLanguageConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True


class VisionLanguageModel(VisionLanguagePreTrainedModel):
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
    def get_image_features(
        self,
        pixel_values: Tensor,
        image_grid_thw: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode and project images.

        Args:
            pixel_values: What the vision tower takes: packed `(L, C*P*P)`, padded `(n, patches, C*P*P)`, or square
                `(n, C, H, W)`.
            image_grid_thw: `(n, 3)` int64 for packed towers.
            pixel_attention_mask: `(n, patches)` for padded towers (Siglip2).
            spatial_shapes: `(n, 2)` rows and columns for padded towers (Siglip2).
            **kwargs: Precomputed inputs of packed towers, with the prefix "image_" (`image_cu_seqlens`,
                `image_max_seqlen`, `image_position_ids`).

        Returns:
            The tower's output with `pooler_output` replaced by a tuple of n tensors `(tokens, E)`. While compiling it
            holds one tensor `(T, E)`, since the lengths of the images are not known to the compiler.
        """
        outputs, features, patches = encode_images(
            self.vision_tower,
            pixel_values.to(self.vision_tower.dtype),
            image_grid_thw,
            pixel_attention_mask,
            spatial_shapes,
            layer=self.config.vision_feature_layer,
            merge_size=self.config.merge_size,
            **{name.removeprefix("image_"): value for name, value in kwargs.items() if name.startswith("image_")},
        )
        tokens = self.projector(features)
        if torch.compiler.is_compiling():
            outputs.pooler_output = (tokens,)
        else:
            outputs.pooler_output = tokens.split((patches // self.config.merge_size**2).tolist())
        return outputs

    def get_placeholder_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor) -> Tensor:
        """Find the placeholders `(B, S)`, in the ids if given, otherwise by comparing embeddings."""
        if self.config.image_token_id is None:
            raise ValueError("`config.image_token_id` must be set for inputs with images, got None.")
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        placeholder = torch.full((), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(placeholder)).all(-1)

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
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Put the images' features in place of their placeholders and run the text model.

        Args:
            input_ids: `(B, S)` int64.
            attention_mask: `(B, S)`, 0 at padding.
            position_ids: `(B, S)`.
            past_key_values: Cache of the text model.
            inputs_embeds: `(B, S, E)` in place of `input_ids`.
            pixel_values: See [`get_image_features`], as for the next three.
            image_grid_thw: As above.
            pixel_attention_mask: As above.
            spatial_shapes: As above.
            mm_encoder_outputs: `{"image": output of get_image_features}` in place of `pixel_values`.
            use_cache: Whether to return a cache.
            **kwargs: Passed to the text model (`cu_seq_lens_q` of packed samples, `output_hidden_states`, ...).

        Raises:
            ValueError: If both or neither of ids and embeddings are given, if images are given twice, or if
                placeholders and features do not match.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds.")
        if pixel_values is not None and mm_encoder_outputs is not None and mm_encoder_outputs.get("image") is not None:
            raise ValueError("You cannot specify both `pixel_values` and `mm_encoder_outputs['image']`.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        image_kwargs = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("image_")}
        images = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None:
            images = self.get_image_features(
                pixel_values,
                image_grid_thw,
                pixel_attention_mask,
                spatial_shapes,
                return_dict=True,
                **image_kwargs,
            )
        if images is not None:
            image_mask = self.get_placeholder_mask(input_ids, inputs_embeds)
            if not torch.compiler.is_compiling():
                check_placeholders(image_mask, [len(tokens) for tokens in images.pooler_output])
            tokens = torch.cat(tuple(images.pooler_output)).to(inputs_embeds.device, inputs_embeds.dtype)
            inputs_embeds = inputs_embeds.masked_scatter(image_mask.unsqueeze(-1), tokens)

        return self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )


class VisionLanguageForConditionalGeneration(VisionLanguagePreTrainedModel, GenerationMixin):
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

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Inputs of one step of generation; images are in the cache after the first."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, is_first_iteration=is_first_iteration, **kwargs
        )
        # Newer transformers drop these themselves.
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in ("pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes"):
                inputs.pop(name, None)
        return inputs

    def _expand_inputs_for_generation(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Any]]:
        # Older transformers do not encode images beforehand, and would repeat packed patches one by one.
        if kwargs.get("expand_size", 1) > 1 and kwargs.get("pixel_values") is not None:
            raise ValueError(
                "Several beams or sequences for prompts with images need a newer transformers (5.23 works)."
            )
        return super()._expand_inputs_for_generation(*args, **kwargs)

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
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
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
            mm_encoder_outputs: As above.
            use_cache: As above.
            labels: `(B, S)` int64, -100 where no loss is wanted; shifted by the loss.
            logits_to_keep: Logits of the last so many positions only, or of the positions in a tensor; 0 for all.
            **kwargs: As above.

        Returns:
            `loss` (if `labels` are given), `logits` `(B, S, vocabulary)`, `past_key_values`, `hidden_states`,
            `attentions`.
        """
        loss_kwargs = {name: kwargs.pop(name) for name in ("num_items_in_batch", "shift_labels") if name in kwargs}
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
            mm_encoder_outputs=mm_encoder_outputs,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **loss_kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["VisionLanguageForConditionalGeneration", "VisionLanguageModel", "VisionLanguagePreTrainedModel"]
