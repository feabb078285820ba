"""Chat templates of text models, extended by placeholders of images and videos."""

import json
import re
from os.path import commonprefix
from typing import Any

from .chat_templates import CHATML_START, default_chat_template

__all__ = ["chat_template_of", "end_of_turn_id", "with_placeholders"]

# Put before a template that takes `content` as a string: joins the blocks of each message to one string. All other
# fields of a message are kept. The line break is removed by `trim_blocks`, with which chat templates are rendered.
_JOIN_BLOCKS = (
    "{%- set joined = namespace(messages=[], text='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is defined and message['content'] is not none and message['content'] is not string -%}"
    "{%- set joined.text = '' -%}"
    "{%- for block in message['content'] -%}"
    "{%- if block['type'] == 'text' -%}{%- set joined.text = joined.text + block['text'] -%}"
    "PLACEHOLDERS"
    "{%- else -%}{{ raise_exception('A content block must have the type TYPES, got ' + block['type']) }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set joined.messages = joined.messages + [dict(message, content=joined.text)] -%}"
    "{%- else -%}{%- set joined.messages = joined.messages + [message] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = joined.messages %}\n"
)
_BEFORE, _AFTER = "textbefore", "textafter"


def chat_template_of(
    tokenizer: Any,
    image_token: str,
    video_token: str | None = None,
    vision_start_token: str = "",
    vision_end_token: str = "",
) -> str | dict[str, str]:
    """Return the chat template of a tokenizer with the placeholders of a processor.

    - A template that takes `content` as a string is extended by [`with_placeholders`].
    - A template that places images itself is returned as it is.
    - Without a template, the result is ChatML if the tokenizer has its tokens.

    Args:
        tokenizer: The tokenizer.
        image_token: Placeholder of an image.
        video_token: Placeholder of a video; None to refuse videos.
        vision_start_token: Token before each placeholder.
        vision_end_token: Token after each placeholder.

    Returns:
        The Jinja template, or templates by name if the tokenizer has several.

    Raises:
        ValueError: If the tokenizer has neither a template nor the tokens of ChatML, if its template has other
            placeholders, or if it cannot be extended.
    """
    template = getattr(tokenizer, "chat_template", None)
    if template is None:
        if CHATML_START not in tokenizer.get_vocab() or tokenizer.eos_token is None:
            raise ValueError(
                f"`chat_template` must be given: the tokenizer has none, and for ChatML, the default, it lacks "
                f"{CHATML_START} or an `eos_token`. Pass a Jinja template, or add the tokens to the tokenizer."
            )
        return default_chat_template(image_token, video_token, vision_start_token, vision_end_token)
    tokens = {"image": image_token} | ({} if video_token is None else {"video": video_token})
    placeholders = {kind: vision_start_token + token + vision_end_token for kind, token in tokens.items()}
    if isinstance(template, dict):
        return {name: _extend(tokenizer, one, tokens, placeholders, name) for name, one in template.items()}
    return _extend(tokenizer, template, tokens, placeholders)


def with_placeholders(template: str, placeholders: dict[str, str]) -> str:
    """Return a template of a text model that takes content blocks: the blocks of a message become one string.

    Args:
        template: Jinja template that takes the content of a message as a string.
        placeholders: What a block becomes, by its type. Blocks of the type "text" become their text.

    Returns:
        The Jinja template.
    """
    branches = "".join(
        f"{{%- elif block['type'] == '{kind}' -%}}"
        f"{{%- set joined.text = joined.text + {json.dumps(placeholder, ensure_ascii=False)} -%}}"
        for kind, placeholder in placeholders.items()
    )
    types = ", ".join(placeholders) + " or text"
    return _JOIN_BLOCKS.replace("TYPES", types).replace("PLACEHOLDERS", branches) + template


def end_of_turn_id(tokenizer: Any, template: str | dict[str, str]) -> int | None:
    """Return the id of the special token with which a template ends an assistant turn; None if there is none."""
    if isinstance(template, dict):
        template = template.get("default", next(iter(template.values())))
    chat = [{"role": "user", "content": _BEFORE}, {"role": "assistant", "content": _AFTER}]
    try:
        rendered = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)
    except Exception:  # what the template raises, for conversations of this form too
        return None
    _, answer, end = rendered.rpartition(_AFTER)
    end = end.lstrip() if answer else ""
    special = {
        **tokenizer.get_added_vocab(),
        **dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)),
    }
    found = [token for token in special if end.startswith(token)]
    return special[max(found, key=len)] if found else None


def _extend(
    tokenizer: Any, template: str, tokens: dict[str, str], placeholders: dict[str, str], name: str = "default"
) -> str:
    """The template, extended if it does not place images itself."""
    placed = _placed(tokenizer, template, tokens)
    if len(placed) == len(tokens):
        return template
    if placed:
        raise ValueError(
            f"`chat_template` must be given: that of the tokenizer places {placed[0]}s itself, but no "
            f"{next(kind for kind in tokens if kind not in placed)}s."
        )
    extended = with_placeholders(template, placeholders)
    for kind, placeholder in placeholders.items():
        rendered, reason = _render(tokenizer, extended, kind)
        if rendered is None and name != "default":
            continue  # It may need further variables, such as documents.
        if rendered is None or _BEFORE + placeholder + _AFTER not in rendered:
            raise ValueError(
                f"`chat_template` must be given: that of the tokenizer cannot be extended by {placeholder!r} "
                f"({reason or 'it changes the text of user turns'})."
            )
    return extended


def _placed(tokenizer: Any, template: str, tokens: dict[str, str]) -> list[str]:
    """The kinds of blocks for which a template writes the token itself."""
    text_only, _ = _render(tokenizer, template)
    if text_only is None:
        return []
    placed = []
    for kind, token in tokens.items():
        rendered, _ = _render(tokenizer, template, kind)
        if rendered is None or rendered == text_only:
            continue
        if rendered.count(token) != 1:
            raise ValueError(
                f"`{kind}_token` is {token!r}, but the chat template of the tokenizer writes one {kind} as "
                f"{_difference(text_only, rendered)!r}. Pass its placeholder as `{kind}_token`, or a `chat_template`."
            )
        placed.append(kind)
    return placed


def _render(tokenizer: Any, template: str, kind: str | None = None) -> tuple[str | None, str]:
    """Text of a user turn of two texts, with an image or video between them, or the reason why there is none."""
    blocks = [{"type": "text", "text": _BEFORE}, {"type": "text", "text": _AFTER}]
    if kind is not None:
        blocks.insert(1, {"type": kind})
    try:
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": blocks}], chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template can raise anything, such as TypeError for a list instead of a string
        return None, str(error)
    # Some templates write nothing for a list, or print it as Python or JSON does.
    between = rendered.partition(_BEFORE)[2].rpartition(_AFTER)
    if not between[1] or re.search(r"[\"']type[\"']", between[0]):
        return None, "it does not write the text of user turns"
    return rendered, ""


def _difference(without: str, rendered: str) -> str:
    """What `rendered` has in addition to `without`."""
    start = len(commonprefix([without, rendered]))
    end = len(commonprefix([without[start:][::-1], rendered[start:][::-1]]))
    return rendered[start : len(rendered) - end]
