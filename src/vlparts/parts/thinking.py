"""Fast and slow thinking of openPangu: parsing of reasoning, and the switch in the prompt.

The model writes its reasoning between two special tokens before the answer: `[unused16]` (id 45974) and `[unused17]`
(id 45982) in openPangu's vocabulary. Reasoning is the default; a switch at the end of a user turn requests a fast
answer (`/no_think`) or leaves the choice to the model (`/auto_think`) for that turn.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

__all__ = [
    "THINKING_END",
    "THINKING_START",
    "THINKING_SWITCHES",
    "ThinkingAnswer",
    "split_thinking",
    "split_thinking_ids",
    "with_thinking_mode",
]

THINKING_START, THINKING_START_ID = "[unused16]", 45974
THINKING_END, THINKING_END_ID = "[unused17]", 45982
THINKING_SWITCHES = {"slow": "", "fast": "/no_think", "auto": "/auto_think"}

PartT = TypeVar("PartT", str, list[int])


@dataclass(frozen=True)
class ThinkingAnswer(Generic[PartT]):
    """Reasoning and answer of a generated text or of its token ids.

    Attributes:
        thinking: The reasoning, empty if there is none.
        answer: The rest.
        is_complete: False if the generation ends inside the reasoning.
    """

    thinking: PartT
    answer: PartT
    is_complete: bool


def split_thinking(
    text: str, *, start: str = THINKING_START, end: str = THINKING_END, prompt_opens: bool = False
) -> ThinkingAnswer[str]:
    """Split a generated text into reasoning and answer.

    Decode with `skip_special_tokens=False`, since the markers are special tokens. The rules:

    - Text between `start` and `end` is reasoning. Blocks do not nest: a second `start` in a block is ignored.
    - Several blocks are joined by a line break. The text outside of blocks is concatenated to the answer.
    - If the first marker is an `end`, the prompt held the `start`: all text before it is reasoning. Any other `end`
      outside of a block is ignored.
    - `is_complete` is False if the text ends inside a block.
    - Leading and trailing white space of the answer and of each block is removed.

    Args:
        text: The generated text without the prompt.
        start: Marker before the reasoning.
        end: Marker after the reasoning.
        prompt_opens: Whether the prompt ends inside the reasoning, so that a text without markers is incomplete
            reasoning instead of an answer.

    Returns:
        The two parts.

    Raises:
        ValueError: If `text` is not a string, or the markers are empty or one contains the other.
    """
    if not isinstance(text, str):
        raise ValueError(f"`text` must be a string, got {type(text).__name__}; `split_thinking_ids` takes ids.")
    if not start or not end or start in end or end in start:
        raise ValueError(f"`start` and `end` must be two different markers, got {start!r} and {end!r}.")
    pieces: list[str] = []
    for index, part in enumerate(text.split(start)):
        pieces.extend([start] if index else [])
        for position, piece in enumerate(part.split(end)):
            pieces.extend([end, piece] if position else [piece])
    blocks, answer, is_complete = _split(pieces, start, end, prompt_opens)
    texts = ("".join(block).strip() for block in blocks)
    return ThinkingAnswer("\n".join(text for text in texts if text), "".join(answer).strip(), is_complete)


def split_thinking_ids(
    ids: Sequence[int],
    *,
    start_id: int = THINKING_START_ID,
    end_id: int = THINKING_END_ID,
    prompt_opens: bool = False,
) -> ThinkingAnswer[list[int]]:
    """Split generated token ids into reasoning and answer, without the markers, by the rules of [`split_thinking`].

    Args:
        ids: The ids of one sequence without the prompt; a list, or a tensor or array of shape `(tokens,)`.
        start_id: Id of the marker before the reasoning.
        end_id: Id of the marker after the reasoning.
        prompt_opens: Whether the prompt ends inside the reasoning.

    Returns:
        The two parts, as lists; blocks are concatenated.

    Raises:
        ValueError: If `ids` is not one sequence of integers, or the two ids are the same.
    """
    values = ids.tolist() if hasattr(ids, "tolist") else ids
    if not isinstance(values, Sequence) or not all(type(value) is int for value in values):
        raise ValueError(f"`ids` must be one sequence of integers, got {ids!r}.")
    if start_id == end_id:
        raise ValueError(f"`start_id` and `end_id` must differ, got {start_id} for both.")
    blocks, answer, is_complete = _split(values, start_id, end_id, prompt_opens)
    return ThinkingAnswer([value for block in blocks for value in block], answer, is_complete)


def _split(pieces: Iterable[Any], start: Any, end: Any, is_open: bool) -> tuple[list[list[Any]], list[Any], bool]:
    """Return the blocks of reasoning, the pieces outside of them, and whether the last block is closed."""
    blocks: list[list[Any]] = [[]] if is_open else []
    answer: list[Any] = []
    for piece in pieces:
        if piece == start:
            if not is_open:
                blocks.append([])
            is_open = True
        elif piece == end:
            if not blocks:
                blocks, answer = [answer], []
            is_open = False
        else:
            (blocks[-1] if is_open else answer).append(piece)
    return blocks, answer, not is_open


def with_thinking_mode(messages: Sequence[Mapping[str, Any]], mode: str) -> list[dict[str, Any]]:
    """Add the switch for fast or slow thinking to the end of the last user turn.

    Args:
        messages: The conversation; each message has "role" and "content" (a string, or a list of blocks such as
            `{"type": "text", "text": ...}`).
        mode: "slow" (openPangu's default: nothing is added), "fast" (`/no_think`) or "auto" (`/auto_think`).

    Returns:
        A new list; the given messages are not modified. The switch is appended to the last block if that is text,
        after a space, otherwise as a new text block. It is not repeated if the turn already ends with it.

    Raises:
        ValueError: If the mode is unknown, there is no user message, the content of the last one is neither a string
            nor a list of blocks, or it ends with another switch.
    """
    if mode not in THINKING_SWITCHES:
        raise ValueError(f"`mode` must be one of {', '.join(THINKING_SWITCHES)}, got {mode!r}.")
    changed = [dict(message) for message in messages]
    last = next((i for i in reversed(range(len(changed))) if changed[i].get("role") == "user"), None)
    if last is None:
        raise ValueError("`messages` must have a message with the role user, got none.")
    content = changed[last].get("content")
    if isinstance(content, str):
        changed[last]["content"] = content + _missing_switch(content, mode)
    elif isinstance(content, (list, tuple)):
        changed[last]["content"] = _add_switch(list(content), mode)
    else:
        raise ValueError(f"`messages[{last}]` must have a string or a list of blocks as content, got {content!r}.")
    return changed


def _missing_switch(text: str, mode: str) -> str:
    """Return the suffix with which a turn ends with the mode's switch."""
    ending = text.rstrip()
    present = next((switch for switch in THINKING_SWITCHES.values() if switch and ending.endswith(switch)), None)
    if present is None:
        needs_space = text and not text[-1].isspace() and THINKING_SWITCHES[mode]
        return (" " if needs_space else "") + THINKING_SWITCHES[mode]
    if present != THINKING_SWITCHES[mode]:
        raise ValueError(f"`mode` is {mode!r}, but the last user turn ends with {present!r}.")
    return ""


def _add_switch(blocks: list[Any], mode: str) -> list[Any]:
    # Images and videos are represented by a character that is not a space.
    text = "".join(block["text"] if block.get("type") == "text" else "\0" for block in blocks)
    added = _missing_switch(text, mode)
    if not added:
        return blocks
    last = blocks[-1] if blocks else {}
    if last.get("type") == "text":
        return [*blocks[:-1], {**last, "text": last["text"] + added}]
    return [*blocks, {"type": "text", "text": added}]
