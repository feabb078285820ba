"""Training records in the shapes of OpenAI, ShareGPT, LLaVA and TRL, and of pages, converted to those of `records`."""

import reprlib
from collections.abc import Set
from typing import Any

__all__ = ["FIELDS", "SCORES", "convert_record"]

SCORES = "filter_scores"
"""Key of the scores of `vlparts data filter`, an object; training accepts and ignores it."""
PAGE_FIELDS = frozenset({"page", "page_number", "markdown", "blocks", "prompt"})
FIELDS = PAGE_FIELDS | {"messages", "image", "images", "conversations", "system", "completion", "id", SCORES}
"""Keys of a record in any of the shapes."""

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
IMAGE_MARK = "<image>"


def convert_record(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a record with `messages`, image blocks and `images`.

    The shape is found by the keys: `page` is that of `PageRecord`, `conversations` ShareGPT's or LLaVA's, `completion`
    TRL's, `messages` ours or TRL's, or OpenAI's if a part has the type "image_url". What is no known shape is returned
    as it is, for the checks of `Record`.

    Args:
        fields: The JSON object.

    Raises:
        ValueError: If the shape is ambiguous, or `page`, `conversations` or `completion` come with unknown keys.
    """
    if "page" in fields:
        _check_keys("A record with 'page'", fields, PAGE_FIELDS)
    elif "conversations" in fields:
        fields = _from_conversations(fields)
    elif "completion" in fields:
        fields = _from_completion(fields)
    if isinstance(fields.get("messages"), list):
        fields = _from_image_urls(fields)
    return fields


def _from_completion(fields: dict[str, Any]) -> dict[str, Any]:
    """Convert TRL's shape of a prompt and a completion, of messages or texts; only the completion is trained on."""
    if "messages" in fields:
        raise ValueError("A record must have either 'messages' or 'completion', got both.")
    _check_keys("A record with 'completion'", fields, {"prompt", "completion", "image", "images", "id"})
    turns = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        given = fields.get(name, [])
        given = [{"role": role, "content": given}] if isinstance(given, str) else given
        if not isinstance(given, list):
            raise ValueError(f"'{name}' must be a list of messages or a string, got {type(given).__name__}.")
        answers = [isinstance(one, dict) and one.get("role") == "assistant" for one in given]
        if name == "prompt" and any(answers):
            raise ValueError("'prompt' has a turn of the assistant, which would have a loss; use 'messages' instead.")
        if name == "completion" and not all(answers):
            raise ValueError("'completion' must have turns of the assistant only; use 'messages' instead.")
        turns += given
    kept = {name: value for name, value in fields.items() if name in ("image", "images")}
    return {**kept, "messages": turns}


def _from_conversations(fields: dict[str, Any]) -> dict[str, Any]:
    """Convert ShareGPT's and LLaVA's shape."""
    if "messages" in fields:
        raise ValueError("A record must have either 'messages' or 'conversations', got both.")
    _check_keys("A record with 'conversations'", fields, {"conversations", "image", "images", "system", "id"})
    turns = fields["conversations"]
    if not isinstance(turns, list):
        raise ValueError(f"'conversations' must be a list, got {type(turns).__name__}.")
    messages: list[Any] = []
    if "system" in fields:
        messages.append({"role": "system", "content": fields["system"]})
    for index, turn in enumerate(turns):
        place = f"conversations.{index}"
        if not isinstance(turn, dict):
            raise ValueError(f"{place}: Expected an object, got {type(turn).__name__}.")
        _check_keys(place, turn, {"from", "value"}, required=True)
        sender, value = turn["from"], turn["value"]
        if not isinstance(sender, str) or sender not in ROLES:
            raise ValueError(f"{place}.from: Expected one of {', '.join(ROLES)}, got {reprlib.repr(sender)}.")
        if not isinstance(value, str):
            raise ValueError(f"{place}.value: Expected a string, got {type(value).__name__}.")
        if ROLES[sender] == "system" and messages:
            raise ValueError(f"{place}.from: A system turn must be the first and only one.")
        messages.append({"role": ROLES[sender], "content": _split_marks(value)})
    found: dict[str, Any] = {name: fields[name] for name in ("image", "images") if name in fields}
    if isinstance(found.get("image"), list):  # LLaVA-NeXT has lists under this key
        if "images" in found:
            raise ValueError("A record must have either 'image' or 'images', got both.")
        found["images"] = found.pop("image")
    return {**found, "messages": messages}


def _split_marks(text: str) -> list[Any]:
    """Text and image blocks of a turn."""
    blocks: list[Any] = []
    for index, piece in enumerate(text.split(IMAGE_MARK)):
        if index:
            blocks.append({"type": "image"})
        if piece:
            blocks.append(piece)
    return blocks


def _from_image_urls(fields: dict[str, Any]) -> dict[str, Any]:
    """Convert OpenAI's parts of type "image_url" to image blocks and `images`; other records are not changed."""
    images: list[str] = []
    messages = []
    for number, message in enumerate(fields["messages"]):
        if isinstance(message, dict) and isinstance(message.get("content"), list | dict):
            parts = [message["content"]] if isinstance(message["content"], dict) else message["content"]
            content = [
                _image_part(part, f"messages.{number}.content.{index}", images) for index, part in enumerate(parts)
            ]
            message = {**message, "content": content}
        messages.append(message)
    if not images:
        return fields
    for name in ("image", "images"):
        if name in fields:
            raise ValueError(f"A record must have either parts of type 'image_url' or {name!r}, got both.")
    return {**fields, "messages": messages, "images": images}


def _image_part(part: Any, place: str, images: list[str]) -> Any:
    """Replace a part of type "image_url" by an image block and append its URL to `images`."""
    if not isinstance(part, dict) or part.get("type") != "image_url":
        return part
    _check_keys(place, part, {"type", "image_url"}, required=True)
    url = part["image_url"]
    if isinstance(url, dict):
        _check_keys(f"{place}.image_url", url, {"url"}, required=True)
        url = url["url"]
    if not isinstance(url, str):
        raise ValueError(f"{place}.image_url: Expected a URL, got {type(url).__name__}.")
    images.append(url)
    return {"type": "image"}


def _check_keys(place: str, fields: dict[str, Any], known: Set[str], required: bool = False) -> None:
    unknown = [name for name in fields if name not in known]
    missing = [name for name in sorted(known) if name not in fields] if required else []
    if unknown or missing:
        found = f"unknown: {', '.join(map(repr, unknown))}" if unknown else f"missing: {', '.join(map(repr, missing))}"
        raise ValueError(f"{place}: Expected the keys {', '.join(map(repr, sorted(known)))}; {found:.200}.")
