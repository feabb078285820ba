"""The texts of a training record that a language model reads: what is scored, and questions with their answers."""

from typing import Any, NamedTuple

from ..record_formats import FIELDS, PAGE_FIELDS
from ..records import Message, PageRecord, Record, RegionBlock, TextBlock, parse_record, pop_scores

__all__ = ["TEXTS", "Question", "open_record", "read_questions", "scored_text"]

TEXTS = ("assistant", "all")
"""Which turns are scored: those of the assistant, or all."""


class Question(NamedTuple):
    """A question of a record.

    Attributes:
        system: Text of the system turn, "" without one.
        text: The question, without its images.
        answer: The record's answer.
    """

    system: str
    text: str
    answer: str


def open_record(fields: dict[str, Any]) -> Record | PageRecord:
    """Return the record of a JSON object in any of the shapes that training reads; other keys may be there too.

    Raises:
        ValueError: If it is not a record, or has scores that are not an object; names the field.
    """
    names = FIELDS - {"id"} - (frozenset() if "page" in fields or "completion" in fields else PAGE_FIELDS)
    known = {name: value for name, value in fields.items() if name in names}
    pop_scores(known)
    return parse_record(known)


def scored_text(record: Record | PageRecord, text: str = "assistant") -> str:
    """Return the text of a record that is scored: the texts of its turns, one per line.

    Images are left out. A region has the text of its label, since a language model without the image cannot know its
    coordinates. The turn of the assistant in a record of a page is its Markdown, or the texts of its blocks.

    Args:
        record: The record.
        text: "assistant" for the turns of the assistant, such as captions and answers, or "all".

    Returns:
        The text without white space at its ends; "" if there is none.

    Raises:
        ValueError: If `text` is unknown.
    """
    if text not in TEXTS:
        raise ValueError(f"`text` must be one of {', '.join(TEXTS)}, got {text!r}.")
    if isinstance(record, PageRecord):
        turns = _page_turns(record)
    else:
        turns = [(message.role, _turn_text(message)) for message in record.messages]
    return "\n".join(turn for role, turn in turns if turn and text in ("all", role))


def read_questions(record: Record | PageRecord) -> list[Question]:
    """Return the questions of a record that can be asked without its image: each with the answer that follows it.

    Args:
        record: The record.

    Returns:
        One question for each turn of the assistant. Empty for a record that cannot be judged by its text: one of a
        page, without images, with a region in an answer, or with an empty question or answer.
    """
    if isinstance(record, PageRecord) or not record.all_images:
        return []
    questions: list[Question] = []
    system, asked = "", []
    for message in record.messages:
        text = _turn_text(message)
        if message.role == "system":
            system = text
        elif message.role == "user":
            asked.append(text)
        else:
            question = "\n".join(one for one in asked if one)
            if not question or not text or any(isinstance(block, RegionBlock) for block in message.content):
                return []
            questions.append(Question(system, question, text))
            asked = []
    return questions


def _page_turns(record: PageRecord) -> list[tuple[str, str]]:
    prompt = "".join(part.get("text", "") for part in record.user_content).strip()
    texts = [record.markdown] if record.markdown is not None else [block.text for block in record.blocks or ()]
    return [("user", prompt), ("assistant", "\n".join(text.strip() for text in texts if text.strip()))]


def _turn_text(message: Message) -> str:
    parts = [
        block.text if isinstance(block, TextBlock) else block.label or ""
        for block in message.content
        if isinstance(block, (TextBlock, RegionBlock))
    ]
    return "".join(parts).strip()
