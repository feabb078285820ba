"""Conversations to token ids and the tokens that have a loss, by a chat template."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from ..parts.chat_placeholders import end_of_turn_id
from ..parts.processing_vlm import VisionLanguageProcessor
from .prefix_tokens import Encoded, PrefixTokenizer

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
    """Texts of a conversation, before each answer and after it in turn; and the marked characters of the last one."""

    texts: list[str]
    marked: list[tuple[int, int]]


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
        self._tokenize = PrefixTokenizer(processor.tokenizer, self._template)

    def __call__(self, conversations: Sequence[_Chat]) -> list[Tokens | ValueError]:
        """Return the tokens of each conversation, or the error of one that cannot be tokenized.

        Args:
            conversations: Messages for the chat template, with an answer. What follows the last one is left out.
        """
        rendered = self._render(conversations)
        parts = iter(self._tokenize([one.texts for one in rendered if isinstance(one, _Rendered)]))
        return [self._tokens(next(parts), one.marked) if isinstance(one, _Rendered) else one for one in rendered]

    def _render(self, conversations: Sequence[_Chat]) -> list[_Rendered | ValueError]:
        """Render together, as half of the time of a call is not spent on its conversations; each alone on an error."""
        try:
            return self._render_together(conversations)
        except TemplateError as error:
            if len(conversations) > 1:
                return [one for chat in conversations for one in self._render([chat])]
            return [ValueError(f"The chat template cannot render the conversation: {error}")]

    def _render_together(self, conversations: Sequence[_Chat]) -> list[_Rendered | ValueError]:
        answers = [(chat, at) for chat in conversations for at, one in enumerate(chat) if one["role"] == "assistant"]
        prompts, _ = self._render_all([chat[:at] for chat, at in answers], add_generation_prompt=True)
        options = {"return_assistant_tokens_mask": self._has_marks}
        answered, marked = self._render_all([chat[: at + 1] for chat, at in answers], **options)
        found: list[_Rendered | ValueError] = []
        last = 0
        for chat in conversations:
            first, last = last, last + sum(one["role"] == "assistant" for one in chat)
            texts = [text for both in zip(prompts[first:last], answered[first:last], strict=True) for text in both]
            if all(text.startswith(before) for before, text in pairwise(texts)):
                found.append(_Rendered(texts, _joined(marked[last - 1]) if first < last and marked else []))
            else:
                message = "The chat template rewrites earlier turns, so the assistant tokens cannot be located."
                found.append(ValueError(message))
        return found

    def _render_all(self, chats: list[_Chat], **options: Any) -> tuple[list[str], list[list[tuple[int, int]]]]:
        """The texts as `apply_chat_template` gives them, and the marked characters if they are asked for."""
        special = self.processor.tokenizer.special_tokens_map
        return render_jinja_template(chats, chat_template=self._template, **special, **options)

    def _tokens(self, parts: list[Encoded], marked: list[tuple[int, int]]) -> Tokens:
        ids: list[int] = []
        in_loss: list[bool] = []
        for number, part in enumerate(parts):
            ids += part.ids
            if self._has_marks:
                in_loss += self._marked_mask(part, marked)
            else:
                in_loss += self._answer_mask(part.ids) if number % 2 else [False] * len(part.ids)
        return Tokens(ids, in_loss)

    def _marked_mask(self, part: Encoded, spans: list[tuple[int, int]]) -> list[bool]:
        """True for the tokens that overlap a marked span, except image placeholders."""
        mask = [False] * len(part.ids)
        for start, end in spans:
            for index in part.overlapping(start, end):
                mask[index] = part.ids[index] != self.processor.image_token_id
        return mask

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
