"""Conversations to token ids and the tokens that have a loss, by a chat template."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from ..parts.chat_placeholders import end_of_turn_id
from ..parts.processing_vlm import VisionLanguageProcessor

__all__ = ["ChatTokenizer", "Tokens"]

# transformers looks for the same.
_MARK = re.compile(r"\{\%-?\s*generation\s*-?\%\}")
# The contents of the turns, with a line break after the text of a turn that is not the assistant's.
_CONTINUATION = (
    "{%- for message in messages -%}"
    "{%- for block in message['content'] -%}"
    "{%- if block['type'] == 'image' -%}{{ IMAGE }}"
    "{%- elif message['role'] == 'assistant' -%}{%- generation -%}{{ block['text'] }}{%- endgeneration -%}"
    "{%- else -%}{{ block['text'] }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if message['role'] == 'assistant' -%}{%- generation -%}{{ eos_token }}{%- endgeneration -%}"
    "{%- elif message['content'] | selectattr('text') | list -%}{{ '\\n' }}{%- endif -%}"
    "{%- endfor -%}"
)
_Chat = list[dict[str, Any]]
_Encoded = tuple[list[int], list[tuple[int, int]]]


@dataclass(frozen=True)
class Tokens:
    """The tokens of a conversation, with one placeholder per image.

    Args:
        ids: Token ids.
        in_loss: True for the tokens that have a loss, never for placeholders.
    """

    ids: list[int]
    in_loss: list[bool]


@dataclass(frozen=True)
class _Rendered:
    """Texts of a conversation: before each answer and after it, in turn; and the marked characters of the last one."""

    texts: list[str]
    marked: list[tuple[int, int]] | None


class ChatTokenizer:
    """Tokenize conversations with the loss on the answers.

    The ids before each answer equal those of the generation prompt.

    Args:
        processor: The composed model's processor.
        template: "chat" for the processor's chat template, or "continuation", see `SampleEncoder`.

    Raises:
        ValueError: If `template` is unknown.
    """

    def __init__(self, processor: VisionLanguageProcessor, template: str = "chat") -> None:
        if template not in ("chat", "continuation"):
            raise ValueError(f"`template` must be 'chat' or 'continuation', got {template!r}.")
        self.processor = processor
        given = processor.chat_template
        chat = given["default"] if isinstance(given, dict) else given
        self._template = _continuation_template(processor) if template == "continuation" else chat
        self._has_marks = processor.tokenizer.is_fast and _MARK.search(self._template) is not None
        self._ends = {processor.tokenizer.eos_token_id, end_of_turn_id(processor.tokenizer, processor.chat_template)}

    def __call__(self, conversations: Sequence[_Chat]) -> list[Tokens | ValueError]:
        """Return the tokens of each conversation, or the error of one that cannot be tokenized.

        The tokenizer is called once for all of them, as most of the time of a call is not spent on its texts.

        Args:
            conversations: Messages for the chat template, with an answer. What follows the last one is left out.
        """
        rendered = [self._render(one) for one in conversations]
        texts = {text: None for one in rendered if isinstance(one, _Rendered) for text in one.texts}
        encoded = self._encode([*texts])
        return [self._tokens(one, encoded) if isinstance(one, _Rendered) else one for one in rendered]

    def _render(self, messages: _Chat) -> _Rendered | ValueError:
        texts: list[str] = []
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        marked = None
        try:
            for index in answers:
                prompt, _ = self._render_template(messages[:index], add_generation_prompt=True)
                marks = self._has_marks and index == answers[-1]
                answered, marked = self._render_template(messages[: index + 1], return_assistant_tokens_mask=marks)
                if not prompt.startswith(texts[-1] if texts else "") or not answered.startswith(prompt):
                    return ValueError(
                        "The chat template rewrites earlier turns, so the assistant tokens cannot be located."
                    )
                texts += [prompt, answered]
        except TemplateError as error:
            return ValueError(f"The chat template cannot render the conversation: {error}")
        return _Rendered(texts, marked if self._has_marks else None)

    def _render_template(self, messages: _Chat, **options: Any) -> tuple[str, Any]:
        """The text as `apply_chat_template` gives it, and the marked characters if they are asked for."""
        special = self.processor.tokenizer.special_tokens_map
        (text,), spans = render_jinja_template([messages], chat_template=self._template, **special, **options)
        return text, _joined(spans[0]) if spans else None

    def _encode(self, texts: list[str]) -> dict[str, _Encoded]:
        """Ids of each text, and the start and end of the characters of each token, empty for slow tokenizers."""
        bos = self.processor.tokenizer.bos_token
        # The same condition as in ProcessorMixin.apply_chat_template.
        with_bos = [text for text in texts if bos is not None and text.startswith(bos)]
        without = [text for text in texts if bos is None or not text.startswith(bos)]
        return {**self._encode_all(with_bos, False), **self._encode_all(without, True)}

    def _encode_all(self, texts: list[str], add_special_tokens: bool) -> dict[str, _Encoded]:
        if not texts:
            return {}
        tokenizer = self.processor.tokenizer
        options = {"return_offsets_mapping": True} if tokenizer.is_fast else {}
        found = tokenizer(texts, add_special_tokens=add_special_tokens, return_attention_mask=False, **options)
        offsets = found.get("offset_mapping", [[]] * len(texts))
        return dict(zip(texts, zip(found["input_ids"], offsets, strict=True), strict=True))

    def _tokens(self, rendered: _Rendered, encoded: dict[str, _Encoded]) -> Tokens:
        ids: list[int] = []
        in_loss: list[bool] = []
        before = ""
        for number, text in enumerate(rendered.texts):
            part, offsets = self._continuation(ids, before, text, encoded[text])
            if rendered.marked is not None:
                in_loss += self._marked_mask(part, offsets, rendered.marked)
            else:
                in_loss += self._answer_mask(part) if number % 2 else [False] * len(part)
            ids += part
            before = text
        return Tokens(ids, in_loss)

    def _continuation(self, ids: list[int], start: str, text: str, whole: _Encoded) -> _Encoded:
        """Token ids of the part of `text` after its prefix `start`, whose ids are `ids`; and their characters.

        The whole text is tokenized, since tokenizers may encode the first word of a text differently and add a BOS
        token. The rest is tokenized alone only if a token would span the end of `start`. The characters, as start and
        end in `text`, are empty for tokenizers without offsets.
        """
        if whole[0][: len(ids)] == ids:
            return whole[0][len(ids) :], whole[1][len(ids) :]
        rest = text[len(start) :]
        found, offsets = self._encode_all([rest], False)[rest]
        return found, [(first + len(start), last + len(start)) for first, last in offsets]

    def _marked_mask(self, ids: list[int], offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[bool]:
        """True for the tokens that overlap a marked span, except image placeholders."""
        if not ids:
            return []
        firsts, lasts = zip(*offsets, strict=True)
        low, high = min(firsts), max(lasts)
        near = [(start, end) for start, end in spans if low < end and high > start]
        if not near:
            return [False] * len(ids)
        image = self.processor.image_token_id
        if len(near) == 1:  # as in most answers
            ((start, end),) = near
            found = zip(ids, firsts, lasts, strict=True)
            return [first < end and last > start and token != image for token, first, last in found]
        inside = [any(first < end and last > start for start, end in near) for first, last in offsets]
        return [one and token != image for one, token in zip(inside, ids, strict=True)]

    def _answer_mask(self, answer: list[int]) -> list[bool]:
        """True for the tokens of an answer up to and including the end of its turn, except image placeholders."""
        length = next((at for at in range(len(answer), 0, -1) if answer[at - 1] in self._ends), len(answer))
        return [index < length and token != self.processor.image_token_id for index, token in enumerate(answer)]


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans in order, with those that touch as one: a template marks the text of an answer and its end separately."""
    found: list[tuple[int, int]] = []
    for start, end in spans:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return found


def _continuation_template(processor: VisionLanguageProcessor) -> str:
    names = ("vision_start_token", "image_token", "vision_end_token")
    image = "".join(getattr(processor, name) or "" for name in names)
    return _CONTINUATION.replace("IMAGE", json.dumps(image))  # quoted as in Jinja
