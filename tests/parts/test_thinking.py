"""Thoughts and answers, and the switch in the prompt."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlparts.parts.thinking import ThinkingAnswer, split_thinking, split_thinking_ids, with_thinking_mode

S, E = "[unused16]", "[unused17]"


@pytest.mark.parametrize(
    ("text", "thinking", "answer", "is_complete"),
    [
        ("A cat.", "", "A cat.", True),
        ("", "", "", True),
        (f"{S}It has ears.{E}A cat.", "It has ears.", "A cat.", True),
        (f" {S} It has ears.\n{E}\n\nA cat. ", "It has ears.", "A cat.", True),
        (f"{S}{E}A cat.", "", "A cat.", True),
        (f" {S}It has", "It has", "", False),
        (S, "", "", False),
        (f"It has ears.{E}A cat.", "It has ears.", "A cat.", True),
        (E, "", "", True),
        (f"{S}one{E}A {S}two{E}cat.", "one\ntwo", "A cat.", True),
        (f"{S}one{E}A cat.{S}tw", "one\ntw", "A cat.", False),
        (f"{S}one{S}two{E}A cat.", "onetwo", "A cat.", True),
        (f"{S}one{E}A {E}cat.", "one", "A cat.", True),
        (f"one{E}A {S}two{E}cat.", "one\ntwo", "A cat.", True),
        (f"{S}{S}one{E}{E}A cat.", "one", "A cat.", True),
    ],
)
def test_texts_are_split(text: str, thinking: str, answer: str, is_complete: bool) -> None:
    assert split_thinking(text) == ThinkingAnswer(thinking, answer, is_complete)


def test_a_prompt_may_open_the_thoughts() -> None:
    assert split_thinking("It has", prompt_opens=True) == ThinkingAnswer("It has", "", False)
    assert split_thinking(f"Ears.{E}A cat.", prompt_opens=True) == ThinkingAnswer("Ears.", "A cat.", True)
    assert split_thinking(f"{S}Ears.{E}A cat.", prompt_opens=True) == ThinkingAnswer("Ears.", "A cat.", True)
    assert split_thinking_ids([5], prompt_opens=True) == ThinkingAnswer([5], [], False)


def test_other_markers_can_be_given() -> None:
    split = split_thinking("<think>Ears.</think>A cat.", start="<think>", end="</think>")
    assert split == ThinkingAnswer("Ears.", "A cat.", True)
    assert split_thinking_ids([9, 1, 8, 2], start_id=9, end_id=8) == ThinkingAnswer([1], [2], True)


@pytest.mark.parametrize(
    ("ids", "thinking", "answer", "is_complete"),
    [
        ([], [], [], True),
        ([1, 2], [], [1, 2], True),
        ([45974, 1, 45982, 2], [1], [2], True),
        ([0, 45974, 1], [1], [0], False),
        ([1, 45982, 2], [1], [2], True),
        ([45974, 1, 45982, 2, 45974, 3, 45982, 4], [1, 3], [2, 4], True),
    ],
)
@pytest.mark.parametrize("kind", [list, tuple, lambda ids: torch.tensor(ids, dtype=torch.int64)])
def test_ids_are_split(kind: Any, ids: list[int], thinking: list[int], answer: list[int], is_complete: bool) -> None:
    assert split_thinking_ids(kind(ids)) == ThinkingAnswer(thinking, answer, is_complete)


plain_text = st.text(alphabet="ab [u]\n", max_size=8)


@given(plain_text, plain_text, st.booleans())
def test_parts_come_back(thinking: str, answer: str, prompt_opens: bool) -> None:
    text = f"{'' if prompt_opens else S}{thinking}{E}{answer}"
    for opens in {prompt_opens, False}:  # the first marker tells, even where the caller does not
        found = split_thinking(text, prompt_opens=opens)
        assert found == ThinkingAnswer(thinking.strip(), answer.strip(), True)


@given(st.lists(st.sampled_from([1, 2, 3, 45974, 45982]), max_size=12), st.booleans())
def test_ids_and_text_agree_and_nothing_is_lost(ids: list[int], prompt_opens: bool) -> None:
    words = {1: "a", 2: "b", 3: "c", 45974: S, 45982: E}
    of_ids = split_thinking_ids(ids, prompt_opens=prompt_opens)
    of_text = split_thinking("".join(words[i] for i in ids), prompt_opens=prompt_opens)
    assert "".join(words[i] for i in of_ids.thinking) == of_text.thinking.replace("\n", "")
    assert "".join(words[i] for i in of_ids.answer) == of_text.answer
    assert of_ids.is_complete == of_text.is_complete
    kept = [i for i in ids if i < 4]
    assert sorted(of_ids.thinking + of_ids.answer) == sorted(kept)


@given(st.lists(st.tuples(st.lists(st.integers(0, 9)), st.lists(st.integers(0, 9))), max_size=4))
def test_several_blocks_come_back(pairs: list[tuple[list[int], list[int]]]) -> None:
    ids = [i for thought, rest in pairs for i in (45974, *thought, 45982, *rest)]
    found = split_thinking_ids(ids)
    assert found.thinking == [i for thought, _ in pairs for i in thought]
    assert found.answer == [i for _, rest in pairs for i in rest]
    assert found.is_complete


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: split_thinking([1, 2]), "`text` must be a string, got list"),
        (lambda: split_thinking("a", start=""), "two different markers, got ''"),
        (lambda: split_thinking("a", start="<t>", end="<t>"), "two different markers, got '<t>' and '<t>'"),
        (lambda: split_thinking("a", start="t", end="/t"), "two different markers"),
        (lambda: split_thinking_ids("ab"), "`ids` must be one sequence of integers, got 'ab'"),
        (lambda: split_thinking_ids([[1, 2]]), "`ids` must be one sequence of integers"),
        (lambda: split_thinking_ids([1.0]), "`ids` must be one sequence of integers"),
        (lambda: split_thinking_ids([True]), "`ids` must be one sequence of integers"),
        (lambda: split_thinking_ids(torch.tensor(3)), "`ids` must be one sequence of integers"),
        (lambda: split_thinking_ids([1], start_id=4, end_id=4), "must differ, got 4 for both"),
    ],
)
def test_bad_texts_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def chat(content: Any) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": content},
        {"role": "assistant", "content": "Well,"},
    ]


IMAGE = {"type": "image"}


@pytest.mark.parametrize(
    ("content", "mode", "expected"),
    [
        ("What?", "slow", "What?"),
        ("What?", "fast", "What? /no_think"),
        ("What?", "auto", "What? /auto_think"),
        ("", "fast", "/no_think"),
        ("What? /no_think\n", "fast", "What? /no_think\n"),
        ([IMAGE, {"type": "text", "text": "What?"}], "fast", [IMAGE, {"type": "text", "text": "What? /no_think"}]),
        (
            [{"type": "text", "text": "What?"}, IMAGE],
            "auto",
            [{"type": "text", "text": "What?"}, IMAGE, {"type": "text", "text": " /auto_think"}],
        ),
        ([IMAGE], "fast", [IMAGE, {"type": "text", "text": " /no_think"}]),
        ([], "fast", [{"type": "text", "text": "/no_think"}]),
        ([IMAGE], "slow", [IMAGE]),
    ],
)
def test_the_switch_ends_the_last_user_turn(content: Any, mode: str, expected: Any) -> None:
    given_messages = chat(content)
    kept = copy.deepcopy(given_messages)
    changed = with_thinking_mode(given_messages, mode)
    assert changed == chat(expected)
    assert given_messages == kept
    assert with_thinking_mode(changed, mode) == changed


@pytest.mark.parametrize(
    ("messages", "mode", "message"),
    [
        (chat("What?"), "quick", "`mode` must be one of slow, fast, auto, got 'quick'"),
        ([], "fast", "a message with the role user, got none"),
        ([{"role": "system", "content": "Be brief."}], "fast", "a message with the role user"),
        (chat("What?/auto_think"), "fast", "`mode` is 'fast', but the last user turn ends with '/auto_think'"),
        (chat("What? /no_think "), "slow", "`mode` is 'slow', but the last user turn ends with '/no_think'"),
        (chat([{"type": "text", "text": "/no_think"}]), "auto", "`mode` is 'auto'"),
        (chat(None), "fast", r"`messages\[2\]` must have a string or a list of blocks as content, got None"),
    ],
)
def test_bad_conversations_are_refused(messages: Any, mode: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_thinking_mode(messages, mode)
