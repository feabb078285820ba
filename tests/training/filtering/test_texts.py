"""The texts of records that a language model reads, in every shape of records."""

from typing import Any

import pytest

from tests.training.filtering.making import asked
from vlparts.training.filtering import Question, read_questions, scored_text
from vlparts.training.filtering.texts import open_record

BOX = {"label": "cat", "box": [1, 2, 3, 4]}
OURS = asked("Where is it?", ["It is a ", BOX, "."])
OPENAI = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "a.png"}},
                {"type": "text", "text": "What is it?"},
            ],
        },
        {"role": "assistant", "content": "A cat."},
    ]
}
SHAREGPT = {
    "system": "Be brief.",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": " A cat.\n"},
        {"from": "human", "value": "Its colour?"},
        {"from": "gpt", "value": "Red"},
    ],
    "images": ["a.png"],
}
LLAVA = {"id": "7", "image": "a.png", "conversations": SHAREGPT["conversations"][:2]}
PAGE = {"page": "a.pdf", "page_number": 2, "markdown": "# Title\n\nText.\n"}
BLOCKS = [{"type": "title", "box": [0, 0, 9, 9], "text": "# Title\n"}, {"type": "image", "box": [0, 0, 9, 9]}]
BLOCKS.append({"type": "text", "box": [0, 0, 9, 9], "text": "Text."})
TEXTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "ours": (OURS, "It is a cat.", "Where is it?\nIt is a cat."),
    "OpenAI": (OPENAI, "A cat.", "Be brief.\nWhat is it?\nA cat."),
    "ShareGPT": (SHAREGPT, "A cat.\nRed", "Be brief.\nWhat is it?\nA cat.\nIts colour?\nRed"),
    "LLaVA": (LLAVA, "A cat.", "What is it?\nA cat."),
    "a box without a label": (asked("Where?", {"box": [1, 2, 3, 4]}), "", "Where?"),
    "a page": ({**PAGE, "prompt": "<image>\nRead it."}, "# Title\n\nText.", "Read it.\n# Title\n\nText."),
    "blocks of a page": (
        {"page": "a.png", "blocks": BLOCKS, "prompt": "<image>\nRead it."},
        "# Title\nText.",
        "Read it.\n# Title\nText.",
    ),
    "keys of a page in a conversation": ({**LLAVA, "markdown": 5, "prompt": "?"}, "A cat.", "What is it?\nA cat."),
    "white space": (asked("Where?", " \n"), "", "Where?"),
    "a caption": (asked({"type": "image"}, "A cat."), "A cat.", "A cat."),
}


@pytest.mark.parametrize("name", TEXTS)
def test_the_scored_text(name: str) -> None:
    fields, answers, everything = TEXTS[name]
    record = open_record({**fields, "source": {"any": ["thing"]}, "filter_scores": {"perplexity": 1.0}})
    assert scored_text(record) == scored_text(record, "assistant") == answers
    assert scored_text(record, "all") == everything


def test_an_unknown_text() -> None:
    with pytest.raises(ValueError, match="`text` must be one of assistant, all, got 'user'"):
        scored_text(open_record(OURS), "user")


QUESTIONS: dict[str, tuple[dict[str, Any], list[Question]]] = {
    "OpenAI": (OPENAI, [Question("Be brief.", "What is it?", "A cat.")]),
    "ShareGPT": (
        SHAREGPT,
        [Question("Be brief.", "What is it?", "A cat."), Question("Be brief.", "Its colour?", "Red")],
    ),
    "LLaVA": (LLAVA, [Question("", "What is it?", "A cat.")]),
    "an answer with a region": (OURS, []),
    "no image": (asked("What?", "A cat.", None), []),
    "a caption": (TEXTS["a caption"][0], []),
    "a page": (PAGE, []),
    "no text in the answer": (asked("What?", ""), []),
    "two turns of the user": (
        {
            "image": "a.png",
            "messages": [{"role": "user", "content": "One."}, {"role": "user", "content": "What?"}]
            + [{"role": "assistant", "content": "A cat."}],
        },
        [Question("", "One.\nWhat?", "A cat.")],
    ),
    "one of two answers is empty": (
        {**LLAVA, "conversations": [*SHAREGPT["conversations"][:3], {"from": "gpt", "value": ""}]},
        [],
    ),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_questions(name: str) -> None:
    fields, questions = QUESTIONS[name]
    assert read_questions(open_record(fields)) == questions


def test_scores_must_be_an_object() -> None:
    with pytest.raises(ValueError, match="filter_scores: Expected an object, got float."):
        open_record({**OURS, "filter_scores": 1.5})


def test_a_record_of_two_shapes() -> None:
    with pytest.raises(ValueError, match="A record with 'page': .*unknown: 'image', 'messages'"):
        open_record({**PAGE, **OURS})
