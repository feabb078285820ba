"""Generation without loops: a ban on n-grams that are repeated within a window of the answer.

Shapes: B rows, S tokens of a row, V vocabulary.
"""

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from .utils import positive_integer


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


class NGramBanMixin(GenerationMixin):
    """Generation with the options of a [`WindowedNGramLogitsProcessor`].

    They are fields of the generation configuration, or arguments of `generate`: `no_repeat_ngram_size` (n) and
    `no_repeat_ngram_window_size`, and `no_repeat_ngram_allowed_ids`. Without the second, the first is transformers'
    own option, which compares the whole sequence.
    """

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


__all__ = ["NGramBanMixin", "WindowedNGramLogitsProcessor"]
