"""Logits processors for vLLM: the ban on repeated n-grams and the grammar of coordinates, per request.

Named on vLLM's command line as `--logits-processors vlparts.serving.vllm_logits:WindowedNGrams`. They are no entry
points of `vllm.logits_processors`, which would be loaded for every model: vLLM does not keep the generated tokens of
those up to date when it schedules ahead.

vLLM has two model runners with an interface each, and chooses one by device and options. A class here has both.
"""

import logging
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor
from vllm.tokenizers.registry import cached_tokenizer_from_config
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SlotLogitsProcessor

from ..generation import CoordinateLogitsProcessor
from .request_options import NGRAM_OPTIONS, coordinate_processor, ngram_processor, read_coordinate_options

__all__ = ["Coordinates", "WindowedNGrams"]

logger = logging.getLogger(__name__)


class RequestProcessor(AdapterLogitsProcessor, SlotLogitsProcessor):
    """Applies to each request the processor of transformers that its options ask for.

    Args:
        vllm_config: vLLM's configuration.
        state: The device (first model runner), or the tokens of all requests (second).
        is_pin_memory: Given by the first model runner only; not used.

    Raises:
        ValueError: If vLLM decodes speculatively.
    """

    def __init__(self, vllm_config: Any, state: Any, is_pin_memory: bool | None = None) -> None:
        if vllm_config.speculative_config is not None:
            raise ValueError(f"{type(self).__name__} cannot be used with speculative decoding; remove one of them.")
        super().__init__(vllm_config, state, bool(is_pin_memory))
        self.state = state
        self.processors: dict[int, LogitsProcessor] = {}

    @abstractmethod
    def make_processor(self, params: Any) -> LogitsProcessor | None:
        """Return the processor that a request asks for, or None."""

    def is_argmax_invariant(self) -> bool:
        """Return False: the largest score may change."""
        return False

    def new_req_logits_processor(self, params: Any) -> Any:
        """Return a function of the generated tokens and the scores of the next, for the first model runner."""
        processor = self.make_processor(params)
        if processor is None:
            return None
        window = getattr(processor, "window_size", None)

        def apply_to_row(output_ids: list[int], scores: Tensor) -> Tensor:
            recent = output_ids if window is None else output_ids[-window:]
            return apply_processor(processor, torch.tensor(recent, dtype=torch.int64, device=scores.device), scores)

        return apply_to_row

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Keep the processor of a request, for the second model runner; returns whether it has one."""
        self.processors.pop(req_idx, None)
        processor = self.make_processor(sampling_params)
        if processor is not None:
            self.processors[req_idx] = processor
        return processor is not None

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Apply the processors to `(rows, V)` scores, one row per request."""
        if ctx is None:
            return super().apply(logits)
        for row, request in enumerate(ctx.idx_mapping_np.tolist()):
            if request in self.processors:
                start, end = int(self.state.prompt_len.np[request]), int(ctx.seq_lens_upper_bound_np[row])
                tokens = self.state.all_token_ids.gpu[request, start : max(start, end)].long()
                logits[row] = apply_processor(self.processors[request], tokens, logits[row])
        return logits


class WindowedNGrams(RequestProcessor):
    """The ban of a [`WindowedNGramLogitsProcessor`].

    A request asks for it by the options of [`ngram_processor`]. Otherwise that of the folder's generation options
    applies, as in `generate`; `no_repeat_ngram_size` 0 switches it off.
    """

    def __init__(self, vllm_config: Any, state: Any, is_pin_memory: bool | None = None) -> None:
        super().__init__(vllm_config, state, is_pin_memory)
        options = generation_options(vllm_config.model_config)
        # Without a window the size is an option of transformers, which compares the prompt too.
        has_window = options.get(NGRAM_OPTIONS[1]) is not None
        self.default = ngram_processor(options) if has_window else None

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raise a ValueError if an option of the request is unknown or out of range."""
        ngram_processor(sampling_params.extra_args)

    def make_processor(self, params: Any) -> LogitsProcessor | None:
        """Return the ban of the request or of the folder, or None."""
        asked = any(name in NGRAM_OPTIONS for name in params.extra_args or ())
        return ngram_processor(params.extra_args) if asked else self.default


class Coordinates(RequestProcessor):
    """The constraint of a [`CoordinateLogitsProcessor`], by the options of [`read_coordinate_options`].

    Options that do not fit the served tokenizer are seen by the model runner alone, which can no longer refuse the
    request: its answer is empty, and the log has the reason.

    Raises:
        ValueError: If the tokenizer has no tokens of coordinates or no end, or the model no scores for them.
    """

    def __init__(self, vllm_config: Any, state: Any, is_pin_memory: bool | None = None) -> None:
        super().__init__(vllm_config, state, is_pin_memory)
        tokenizer = cached_tokenizer_from_config(vllm_config.model_config)
        if not hasattr(tokenizer, "coordinate_token_ids"):
            raise ValueError(
                f"Coordinates needs the tokenizer PaddedCoordinateTokenizer, got {type(tokenizer).__name__}."
            )
        self.ids = tokenizer.coordinate_token_ids()
        ends = generation_options(vllm_config.model_config).get("eos_token_id")
        ends = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
        self.eos = sorted({one for one in ends if one is not None})
        self.vocab_size = vllm_config.model_config.get_vocab_size()
        CoordinateLogitsProcessor(self.ids, 0, self.eos)(
            torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, self.vocab_size)
        )

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raise a ValueError if an option of the request is unknown or out of range."""
        read_coordinate_options(sampling_params.extra_args)

    def make_processor(self, params: Any) -> LogitsProcessor | None:
        """Return the constraint of the request, or None."""
        try:
            return coordinate_processor(params.extra_args, self.ids, self.eos, self.vocab_size, params.max_tokens)
        except ValueError as error:
            logger.error("The answer to a request is empty, since its options do not fit: %s", error)
            return EndAtOnce(self.eos)


class EndAtOnce(LogitsProcessor):
    """Allows only tokens that end the answer.

    Args:
        eos_token_id: Their ids.
    """

    def __init__(self, eos_token_id: list[int]) -> None:
        self.eos_token_id = eos_token_id

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return `(B, V)` scores, 0 for the ids and minus infinity for others."""
        ended = torch.full_like(scores, -torch.inf)
        ended[:, self.eos_token_id] = 0.0
        return ended


def apply_processor(processor: LogitsProcessor, tokens: Tensor, scores: Tensor) -> Tensor:
    """Return the scores `(V,)` of the next token after the generated tokens, int64 `(S,)`."""
    return processor(tokens[None], scores[None])[0]


def generation_options(model_config: Any) -> dict[str, Any]:
    """Return the folder's generation options, unless vLLM is told not to use them, and those of the command line."""
    stored = {} if model_config.generation_config == "vllm" else model_config.try_get_generation_config()
    return {**stored, **model_config.override_generation_config}
