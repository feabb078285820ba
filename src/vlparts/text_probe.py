"""Check at composition that a text model works in a composed model, and computes there what it computes alone."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .parts.modeling_vlm import VisionLanguageForConditionalGeneration
from .parts.vlm_inputs import compute_logits

_ARGUMENTS = ("inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache")
_TOKENS = 4
_LARGEST_LOGIT = 60.0  # soft caps of models are 15 to 50
# Largest relative differences, of float32 and wider types, and of half precision. Calls of equal shapes differ by
# rounding alone. A cached step has another shape, for which half precision can select other experts.
_SAME, _STEP = (1e-4, 3e-2), (1e-3, 0.5)


def check_text_model(model: VisionLanguageForConditionalGeneration, text: Any) -> None:
    """Check that the text model of a composed model works, and computes what its own class computes.

    Runs the text model five times over at most two rows of four tokens, in evaluation mode, without gradients and on
    its own weights. Where these are not at hand (on the meta device, offloaded, partitioned), only the arguments and
    the head's parameters are checked.

    Args:
        model: The composed model.
        text: The text model as the user gave it to [`compose`].

    Raises:
        ValueError: If the text model does not take the arguments of a decoder, its head is more than a linear layer, a
            call fails, a later token changes the output of earlier ones, embeddings or logits are others than those
            of its own class, or it does not continue from a cache.
    """
    probe = _Probe(model, text)
    probe.check_structure()
    tensors = (*model.model.language_model.parameters(), *model.lm_head.parameters())
    if not any(one.is_meta or not one.numel() for one in tensors):
        with _evaluation_mode(model), torch.no_grad():
            probe.compare_outputs()


def _own_class(model: VisionLanguageForConditionalGeneration, text: Any) -> PreTrainedModel | None:
    """The text model in its own class with a head; None if transformers has no such class.

    A text model without its head is put into a new model on the meta device.
    """
    if isinstance(text, PreTrainedModel) and text.get_output_embeddings() is not None:
        return text
    language_model = model.model.language_model
    if type(language_model.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    with torch.device("meta"):
        own = AutoModelForCausalLM.from_config(deepcopy(language_model.config))
    if type(own.base_model) is not type(language_model):
        return None
    setattr(own, own.base_model_prefix, language_model)
    return own.eval()


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Probe:
    """A composed model, and its text model in its own class."""

    def __init__(self, model: VisionLanguageForConditionalGeneration, text: Any) -> None:
        self.model, self.language_model = model, model.model.language_model
        self.config = self.language_model.config
        self.own = _own_class(model, text)
        self.name = type(self.own or self.language_model).__name__

    def check_structure(self) -> None:
        """Check the arguments, and the parameters of the head."""
        parameters = inspect.signature(self.language_model.forward).parameters
        missing = [name for name in _ARGUMENTS if name not in parameters]
        if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
            missing = [name for name in missing if name != "position_ids"]  # a model without positions ignores them
        if missing:
            raise self._refusal(f"its forward does not take {', '.join(f'`{name}`' for name in missing)}")
        if "per_layer_inputs" in parameters and getattr(self.config, "hidden_size_per_layer_input", None):
            raise self._refusal("its layers take embeddings of `input_ids` beside `inputs_embeds`")
        if self.own is None:
            return
        head = self.own.get_output_embeddings()
        held = {id(one) for one in (*self.language_model.parameters(), *head.parameters())}
        further = [name for name, one in self.own.named_parameters() if id(one) not in held]
        if further:
            raise self._refusal(f"its head has parameters besides a linear layer's, {', '.join(further[:4])}")
        bias, expected = getattr(head, "bias", None) is not None, self.model.config.head_rule.bias
        if bias != expected:
            raise self._refusal(f"its head has {'a' if bias else 'no'} bias, unlike that of a loaded composed model")

    def compare_outputs(self) -> None:
        """Check causality, embeddings, logits and a step with a cache."""
        ids = self._ids()
        hidden, wide, logits = self._try("its forward", self._run_alone, ids)
        self._compare(hidden[1, :-1], hidden[0, :-1], _SAME, "a later token changes the output of earlier ones")
        composed = self._try("its forward in the composed model", self._run, input_ids=ids).last_hidden_state
        self._compare(composed, hidden, _SAME, "its embeddings of `input_ids` are not its `inputs_embeds`")
        if logits is not None:
            found = compute_logits(self.model.lm_head, wide, self.model.config)
            self._compare(found, logits, _SAME, "its own class computes other logits")
        # Like the features of images, these are the embeddings of no token.
        embeds = self.model.model.embed_tokens(ids)
        embeds = (embeds + embeds.roll(1, dims=1)) / 2
        whole = self._try("its forward with images", self._run, inputs_embeds=embeds.clone()).last_hidden_state
        step = self._try("its forward with a cache", self._run_steps, embeds)
        self._compare(step, whole[:, -1:], _STEP, "a step with a cache differs from the whole text")

    def _ids(self) -> Tensor:
        """Two rows of tokens that differ in the last one; no padding, which some models do not attend to."""
        padding = getattr(self.config, "pad_token_id", None)
        used = [one for one in range(min(self.config.vocab_size, _TOKENS + 2)) if one != padding]
        rows = [[used[index % len(used)] for index in (*range(_TOKENS - 1), last)] for last in (_TOKENS - 1, _TOKENS)]
        return torch.tensor(rows, device=next(self.model.get_input_embeddings().parameters()).device)

    def _run_alone(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run the text model in its own class, with other hidden states for its head, whose logits reach soft caps.

        Returns:
            The hidden states; the other ones; their logits, or None without an own class.
        """
        found: list[Tensor] = []

        def replace(module: nn.Module, inputs: Any, outputs: Any) -> Any:
            states = outputs[0]
            wide = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(states)
            wide = wide * (_LARGEST_LOGIT / self.model.lm_head(wide).abs().max().clamp(min=1e-3))
            found.extend((states, wide))
            outputs["last_hidden_state"] = wide
            return outputs

        own = self.own or self.language_model
        head = own.get_output_embeddings()
        if head is not None and head is not self.model.lm_head:
            own.set_output_embeddings(self.model.lm_head)
        # A class may call a model inside its text model (OPT).
        inner = (module for module in self.language_model.modules() if isinstance(module, PreTrainedModel))
        while not found:
            hook = next(inner).register_forward_hook(replace)
            try:
                outputs = own(input_ids=input_ids, use_cache=False, return_dict=True)
            finally:
                hook.remove()
        return found[0], found[1], None if self.own is None else outputs.logits

    def _run(self, **inputs: Any) -> Any:
        return self.model.model(**{"use_cache": False, **inputs}, return_dict=True)

    def _run_steps(self, embeds: Tensor) -> Tensor:
        """Last hidden states of the last token, from a cache of the others; with the inputs of `generate`."""
        mask = torch.ones(embeds.shape[:2], dtype=torch.int64, device=embeds.device)
        places = mask.cumsum(-1) - 1
        cache = None
        for part in (slice(0, _TOKENS - 1), slice(_TOKENS - 1, _TOKENS)):
            outputs = self._run(
                inputs_embeds=embeds[:, part].clone(),  # CTRL scales them in place
                attention_mask=mask[:, : part.stop],
                position_ids=places[:, part],
                past_key_values=cache,
                use_cache=True,
            )
            cache = outputs.past_key_values
            if cache is None:
                raise ValueError("`past_key_values` of its output is None")
        return outputs.last_hidden_state

    def _try(self, what: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:  # text models raise errors of any class
            raise self._refusal(f"{what} fails with {type(error).__name__}: {error}") from error

    def _compare(self, found: Tensor, expected: Tensor, limits: tuple[float, float], reason: str) -> None:
        if found.shape != expected.shape:
            raise self._refusal(f"{reason}, of shapes {tuple(found.shape)} and {tuple(expected.shape)}")
        limit = limits[torch.finfo(found.dtype).bits < 32]
        difference = (found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12)
        if not difference <= limit:
            raise self._refusal(f"{reason} (relative difference {difference:.1e})")

    def _refusal(self, reason: str) -> ValueError:
        return ValueError(f"`text` {self.name} cannot be composed: {reason}.")
