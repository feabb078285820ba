"""How the composed model generates: what each step takes, and where its tokens stand.

Shapes: B samples, S tokens of a sample.
"""

from typing import Any

from torch import Tensor

from .rope_multimodal import MultiAxisGenerationMixin
from .vlm_positions import has_multimodal_rotary

_ENCODED_ONCE = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "pixel_values_videos",
    "video_grid_thw",
    "mm_encoder_outputs",
)


class VisionLanguageGenerationMixin(MultiAxisGenerationMixin):
    """transformers' `generate` for a model whose `model` is a [`VisionLanguageModel`]."""

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of one step of generation; images and videos are in the cache after the first."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        # Newer transformers drop these themselves.
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in _ENCODED_ONCE:
                inputs.pop(name, None)
        return inputs

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        # Each new token then gets the next place on all axes, so nothing has to be kept between steps.
        if not has_multimodal_rotary(self.config.text_config):
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        input_ids = model_kwargs.get("input_ids")
        if input_ids is None or not input_ids.shape[1]:
            input_ids = inputs_tensor
        is_ids = input_ids.ndim == 2
        names = ("attention_mask", "image_grid_thw", "video_grid_thw", "pixel_values", "spatial_shapes")
        return self.model.get_multimodal_position_ids(
            input_ids=input_ids if is_ids else None,
            inputs_embeds=None if is_ids else input_ids,
            **{name: model_kwargs.get(name) for name in names},
        )

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        # Older transformers do not encode images beforehand, and would repeat packed patches one by one.
        if expand_size > 1 and any(
            model_kwargs.get(name) is not None for name in ("pixel_values", "pixel_values_videos")
        ):
            raise ValueError(
                "Several beams or sequences for prompts with images need a newer transformers (5.23 works)."
            )
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
