"""Generation of composed models: inputs of each step, and a ban on n-grams that the answer repeats.

Shapes: B rows, S tokens of a row, V vocabulary.
"""

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationConfig
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from .rope_multimodal import MultiAxisGenerationMixin
from .utils import positive_integer

_ENCODED_ONCE = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_tile_grid",
    "image_keep_index",
    "pixel_values_videos",
    "video_grid_thw",
    "mm_encoder_outputs",
)
_NGRAM_OPTIONS = ("no_repeat_ngram_window_size", "no_repeat_ngram_allowed_ids")
_PIXELS = ("pixel_values", "pixel_values_videos")


class WindowedNGramLogitsProcessor(LogitsProcessor):
    """Ban each token that would repeat an n-gram of the last tokens of the answer, as DeepSeek-OCR's programs do.

    Args:
        ngram_size: Length n of the n-grams, at least 2.
        window_size: Number of tokens at the end of the answer in which n-grams are compared, at least n.
        allowed_token_ids: Tokens that are never banned, such as those of the cells of a table.
        prompt_length: Number of tokens before the answer, which are not compared.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self, ngram_size: int, window_size: int, allowed_token_ids: Sequence[int] = (), prompt_length: int = 0
    ) -> None:
        self.ngram_size = positive_integer(ngram_size, "ngram_size")
        self.window_size = positive_integer(window_size, "window_size")
        if self.ngram_size < 2:
            raise ValueError(f"`ngram_size` must be at least 2, got {ngram_size}.")
        if self.window_size < self.ngram_size:
            raise ValueError(f"`window_size` must be at least `ngram_size`={ngram_size}, got {window_size}.")
        if prompt_length < 0:
            raise ValueError(f"`prompt_length` must be at least 0, got {prompt_length}.")
        self.allowed_token_ids = tuple(allowed_token_ids)
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Set the scores of banned tokens to minus infinity.

        Args:
            input_ids: `(B, S)` int64, the prompt and the answer so far.
            scores: `(B, V)` scores of the next token.

        Returns:
            `(B, V)`.
        """
        answer = input_ids[:, self.prompt_length :][:, -self.window_size :]
        if answer.shape[1] < self.ngram_size:
            return scores
        ngrams = answer.unfold(1, self.ngram_size, 1)
        last, prefix = ngrams[..., -1], answer[:, None, 1 - self.ngram_size :]
        banned = (ngrams[..., :-1] == prefix).all(dim=-1)
        if self.allowed_token_ids:
            banned &= ~torch.isin(last, torch.tensor(self.allowed_token_ids, device=last.device))
        # A column more than tokens, for the n-grams that ban nothing.
        vocabulary = scores.shape[1]
        mask = torch.zeros(len(scores), vocabulary + 1, dtype=torch.bool, device=scores.device)
        mask.scatter_(1, torch.where(banned, last, vocabulary), True)
        return scores.masked_fill(mask[:, :-1], -torch.inf)


class VisionLanguageGenerationMixin(MultiAxisGenerationMixin):
    """`GenerationMixin` of composed models, with the options of a [`WindowedNGramLogitsProcessor`].

    They are fields of the generation configuration, or arguments of `generate`: `no_repeat_ngram_size` (n) and
    `no_repeat_ngram_window_size`, and `no_repeat_ngram_allowed_ids`. Without the second, the first is transformers'
    own option, which compares the whole sequence. An argument without effect raises a ValueError.
    """

    config: PreTrainedConfig
    model: Any

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Prepare the inputs of one step; images and videos are in the cache after the first."""
        # transformers reads from this signature that generation takes `inputs_embeds`.
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        # Newer transformers drop these themselves.
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in _ENCODED_ONCE:
                inputs.pop(name, None)
        return inputs

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        # Each new token gets the next position on all axes, so no state is kept between steps.
        if not self.config.has_multimodal_positions:
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        input_ids = model_kwargs.get("input_ids")
        if input_ids is None or not input_ids.shape[1]:
            input_ids = inputs_tensor
        is_ids = input_ids.ndim == 2
        names = ("attention_mask", "image_grid_thw", "video_grid_thw", "pixel_values", "spatial_shapes")
        given = {name: model_kwargs.get(name) for name in names}
        if self.config.token_reduction is not None or model_kwargs.get("image_keep_index") is not None:
            # The features decide where the tokens are. This takes the pixels out of the arguments.
            self._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)
        return self.model.get_multimodal_position_ids(
            input_ids=input_ids if is_ids else None,
            inputs_embeds=None if is_ids else input_ids,
            **given,
            mm_encoder_outputs=model_kwargs.get("mm_encoder_outputs"),
        )

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, *args: Any, **model_kwargs: Any
    ) -> tuple[Tensor | None, dict[str, Any]]:
        # Older transformers do not encode images beforehand, and would repeat packed patches one by one.
        if expand_size > 1 and any(model_kwargs.get(name) is not None for name in _PIXELS):
            raise ValueError(
                "Several beams or sequences for prompts with images need a newer transformers (5.23 works)."
            )
        return super()._expand_inputs_for_generation(expand_size, *args, **model_kwargs)

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, *args: Any, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        # transformers takes as arguments only options that the configuration has already.
        given = {name: kwargs.pop(name) for name in _NGRAM_OPTIONS if name in kwargs}
        prepared, model_kwargs = super()._prepare_generation_config(generation_config, *args, **kwargs)
        for name, value in given.items():
            setattr(prepared, name, value)
        for name, needed in zip(_NGRAM_OPTIONS, ("no_repeat_ngram_size", _NGRAM_OPTIONS[0]), strict=True):
            if given.get(name) and not getattr(prepared, needed, None):
                raise ValueError(f"`{name}` needs `{needed}`, got {given[name]!r} without it.")
        return prepared, model_kwargs

    def _get_logits_processor(
        self,
        generation_config: GenerationConfig,
        input_ids_seq_length: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> LogitsProcessorList:
        window = getattr(generation_config, "no_repeat_ngram_window_size", None)
        size = generation_config.no_repeat_ngram_size
        if not window or not size:
            return super()._get_logits_processor(generation_config, input_ids_seq_length, *args, **kwargs)
        allowed = getattr(generation_config, "no_repeat_ngram_allowed_ids", None) or ()
        ban = WindowedNGramLogitsProcessor(size, window, allowed, input_ids_seq_length or 0)
        others = copy(generation_config)
        others.no_repeat_ngram_size = None  # otherwise transformers would compare the whole sequence too
        processors = super()._get_logits_processor(others, input_ids_seq_length, *args, **kwargs)
        return LogitsProcessorList([*processors, ban])


def keep_ngram_options(generation_config: GenerationConfig) -> None:
    """Make the options of a [`WindowedNGramLogitsProcessor`] part of what is loaded from a saved configuration."""
    # transformers loads only fields of its own from a configuration that it has made from that of the model.
    if any(getattr(generation_config, name, None) is not None for name in _NGRAM_OPTIONS):
        generation_config._from_model_config = False


__all__ = ["VisionLanguageGenerationMixin", "WindowedNGramLogitsProcessor", "keep_ngram_options"]
