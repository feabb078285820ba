"""Fast and slow thinking of openPangu: what of an answer is thought, and the switch in the prompt.

A model that thinks writes its thoughts between two special tokens before the answer: `[unused16]` (id 45974) and
`[unused17]` (id 45982) in openPangu's vocabulary. It thinks by default; a switch at the end of a user turn asks for a
fast answer (`/no_think`) or leaves the choice to the model (`/auto_think`), for that turn.
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
    """A generated text (or its token ids) in two parts.

    Attributes:
        thinking: The thoughts, empty if there are none.
        answer: All else.
        is_complete: False if the generation ends inside the thoughts.
    """

    thinking: PartT
    answer: PartT
    is_complete: bool


def split_thinking(
    text: str, *, start: str = THINKING_START, end: str = THINKING_END, prompt_opens: bool = False
) -> ThinkingAnswer[str]:
    """Split a generated text into thoughts and answer.

    Decode with `skip_special_tokens=False`, since the markers are special tokens. The rules:

    - What stands between `start` and `end` is thinking. Blocks do not nest: a second `start` in a block changes
      nothing.
    - Several blocks are all thinking, joined by a line break. The text around them, joined as it stands, is the
      answer.
    - If the first marker is an `end`, the prompt held the `start`: all before it is thinking. Any other `end`
      without a block is left out.
    - A block that the text's end cuts off makes `is_complete` false.
    - White space at both ends of the answer and of each block is left out.

    Args:
        text: The generated text without the prompt.
        start: Marker that opens the thoughts.
        end: Marker that closes them.
        prompt_opens: Whether the prompt ends inside the thoughts, so that a text without markers is one cut off in
            them, and not an answer.

    Returns:
        The two parts.

    Raises:
        ValueError: If `text` is not a string, or the markers are empty or one contains the other.
    """
    if not isinstance(text, str):
        raise ValueError(f"`text` must be a string, got {type(text).__name__}; for ids see split_thinking_ids.")
    if not start or not end or start in end or end in start:
        raise ValueError(f"`start` and `end` must be two different markers, got {start!r} and {end!r}.")
    pieces: list[str] = []
    for index, part in enumerate(text.split(start)):
        pieces.extend([start] if index else [])
        for place, piece in enumerate(part.split(end)):
            pieces.extend([end, piece] if place else [piece])
    blocks, rest, is_complete = _split(pieces, start, end, prompt_opens)
    thoughts = ("".join(block).strip() for block in blocks)
    return ThinkingAnswer("\n".join(thought for thought in thoughts if thought), "".join(rest).strip(), is_complete)


def split_thinking_ids(
    ids: Sequence[int],
    *,
    start_id: int = THINKING_START_ID,
    end_id: int = THINKING_END_ID,
    prompt_opens: bool = False,
) -> ThinkingAnswer[list[int]]:
    """Split generated token ids into thoughts and answer, by the rules of [`split_thinking`], markers left out.

    Args:
        ids: The ids of one sequence without the prompt; a list, or a tensor or array of shape `(tokens,)`.
        start_id: Id that opens the thoughts.
        end_id: Id that closes them.
        prompt_opens: Whether the prompt ends inside the thoughts.

    Returns:
        The two parts, as lists; blocks are joined without anything between them.

    Raises:
        ValueError: If `ids` is not one sequence of integers, or the two ids are the same.
    """
    values = ids.tolist() if hasattr(ids, "tolist") else ids
    if not isinstance(values, Sequence) or not all(type(value) is int for value in values):
        raise ValueError(f"`ids` must be one sequence of integers, got {ids!r}.")
    if start_id == end_id:
        raise ValueError(f"`start_id` and `end_id` must differ, got {start_id} for both.")
    blocks, rest, is_complete = _split(values, start_id, end_id, prompt_opens)
    return ThinkingAnswer([value for block in blocks for value in block], rest, is_complete)


def _split(pieces: Iterable[Any], start: Any, end: Any, is_open: bool) -> tuple[list[list[Any]], list[Any], bool]:
    """Blocks of thinking, what is outside of them, and whether the last block is closed."""
    blocks: list[list[Any]] = [[]] if is_open else []
    rest: list[Any] = []
    for piece in pieces:
        if piece == start:
            if not is_open:
                blocks.append([])
            is_open = True
        elif piece == end:
            if not blocks:
                blocks, rest = [rest], []
            is_open = False
        else:
            (blocks[-1] if is_open else rest).append(piece)
    return blocks, rest, not is_open


def with_thinking_mode(messages: Sequence[Mapping[str, Any]], mode: str) -> list[dict[str, Any]]:
    """Ask for fast or slow thinking by a switch at the end of the last user turn.

    Args:
        messages: The conversation, each message with "role" and "content" (a string, or a list of blocks such as
            `{"type": "text", "text": ...}`).
        mode: "slow" (openPangu's default: nothing is added), "fast" (`/no_think`) or "auto" (`/auto_think`).

    Returns:
        A new list; the messages that are given stay as they are. The switch is added to the last block if that is a
        text, after a space, otherwise as a new text block. A turn that ends with this switch already gets no
        second one.

    Raises:
        ValueError: If the mode is unknown, no message is a user's, its content is neither a string nor a list of
            blocks, or it ends with another switch.
    """
    if mode not in THINKING_SWITCHES:
        raise ValueError(f"`mode` must be one of {', '.join(THINKING_SWITCHES)}, got {mode!r}.")
    changed = [dict(message) for message in messages]
    place = next((i for i in reversed(range(len(changed))) if changed[i].get("role") == "user"), None)
    if place is None:
        raise ValueError("`messages` must have a message with the role user, got none.")
    content = changed[place].get("content")
    if isinstance(content, str):
        changed[place]["content"] = content + _switch_after(content, mode)
    elif isinstance(content, (list, tuple)):
        changed[place]["content"] = _switched_blocks(list(content), mode)
    else:
        raise ValueError(f"`messages[{place}]` must have a string or a list of blocks as content, got {content!r}.")
    return changed


def _switch_after(text: str, mode: str) -> str:
    """What a turn that is written so needs behind it, to end with the mode's switch."""
    ending = text.rstrip()
    present = next((switch for switch in THINKING_SWITCHES.values() if switch and ending.endswith(switch)), None)
    if present is None:
        is_apart = not text or text[-1].isspace() or not THINKING_SWITCHES[mode]
        return ("" if is_apart else " ") + THINKING_SWITCHES[mode]
    if present != THINKING_SWITCHES[mode]:
        raise ValueError(f"`mode` is {mode!r}, but the last user turn ends with {present!r}.")
    return ""


def _switched_blocks(blocks: list[Any], mode: str) -> list[Any]:
    # Something stands for each image or video, which is no space.
    written = "".join(block["text"] if block.get("type") == "text" else "\0" for block in blocks)
    added = _switch_after(written, mode)
    if not added:
        return blocks
    last = blocks[-1] if blocks else {}
    if last.get("type") == "text":
        return [*blocks[:-1], {**last, "text": last["text"] + added}]
    return [*blocks, {"type": "text", "text": added}]
