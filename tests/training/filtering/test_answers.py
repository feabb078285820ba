"""Answers without the image: greedy, each as if alone, and compared by a rule."""

from typing import Any

import pytest
import torch

from tests.training.filtering.making import Knowing, language_model
from vlparts.training.filtering import Question, generate_answers, is_same_answer

OPTIONS = "Which?\nA. red\nB. a blue cat\nC. green"
SAME: list[tuple[str, str, str]] = [
    ("Paris", "paris.", ""),
    (" two   dogs\n", "Two dogs", ""),
    ("“Yes”, it is!", "yes it is", ""),
    ("**Yes**", "yes", ""),
    ("\uff21\uff22", "ab", ""),
    ("STRASSE", "straße", ""),
    ("don't", "Don't.", ""),
    ("3.5", "3.5.", ""),
    ("是的。", "是的", ""),
    ("B", "B", OPTIONS),
    ("b", "B. a blue cat", OPTIONS),
    ("(B)", "B", OPTIONS),
    ("B. a blue cat", "B", OPTIONS),
    ("B) anything", "B.", OPTIONS),
    ("The answer is B.", "B", OPTIONS),
    ("Answer: (B)", "B", OPTIONS),
    ("**B**", "B", OPTIONS),
    ("**B.** a blue cat", "B", OPTIONS),
    ("the correct option is b", "B", OPTIONS),
    ("red", "Red", OPTIONS),
    ("D", "d", OPTIONS),
]
DIFFERENT: list[tuple[str, str, str]] = [
    ("Paris", "London", ""),
    ("3.5", "35", ""),
    ("-5", "5", ""),
    (".5", "5", ""),
    ("x < 3", "x > 3", ""),
    ("", "yes", ""),
    ("...", "yes", ""),
    ("", "...", ""),
    ("twodogs", "two dogs", ""),
    ("A", "B", OPTIONS),
    ("A blue cat", "A", OPTIONS),
    ("a blue cat", "B", OPTIONS),
    ("Both", "B", OPTIONS),
    ("B or C", "B", OPTIONS),
    ("", "B", OPTIONS),
    ("I. Asimov", "I. Newton", "Who?"),
    ("J. Smith", "J. Jones", "J. Smith or K. Hall or J. Jones?"),
    ("A. Smith", "A. Jones", "A. Smith or A. Jones?"),
]


@pytest.mark.parametrize(("answer", "expected", "question"), SAME)
def test_same_answers(answer: str, expected: str, question: str) -> None:
    assert is_same_answer(answer, expected, question)


@pytest.mark.parametrize(("answer", "expected", "question"), DIFFERENT)
def test_different_answers(answer: str, expected: str, question: str) -> None:
    assert not is_same_answer(answer, expected, question)


def oracle(model: Any, words: Any, prompt: str, tokens: int) -> str:
    """The most probable token, one at a time and without a cache."""
    ids = words(prompt)["input_ids"]
    made: list[int] = []
    while len(made) < tokens and words.eos_token_id not in made:
        made.append(int(model(input_ids=torch.tensor([ids + made])).logits[0, -1].argmax()))
    return words.decode(made, skip_special_tokens=True).strip().partition("\n")[0].strip()


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@torch.no_grad()
def test_answers_are_the_most_probable_tokens_of_each_question_alone(
    batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the model has other options of generation."""
    model, words = language_model()
    for name, value in {"do_sample": True, "repetition_penalty": 5.0, "temperature": 3.0, "num_beams": 4}.items():
        monkeypatch.setattr(model.generation_config, name, value)
    questions = [Question("", "Where is the cat?", ""), Question("Be brief.", "?", ""), Question("", "a" * 50, "")]
    prompts = ["Where is the cat?\n", "Be brief.\n?\n", "a" * 50 + "\n"]
    found = generate_answers(model, words, questions, batch_size=batch_size, max_new_tokens=7)
    assert found == [oracle(model, words, prompt, 7) for prompt in prompts]
    assert any(found)


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<answer{{ kind }}>{% endif %}"
)


def test_the_chat_template_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Knowing({"What": "a cat\nand a dog"})
    monkeypatch.setattr(model.tokenizer, "chat_template", TEMPLATE)
    found = generate_answers(
        model, model.tokenizer, [Question("Be brief.", "What?", "")], template_options={"kind": "!"}
    )
    assert model.prompts == ["<system>Be brief.<user>What?<answer!>"]
    assert found == ["a cat\nand a dog"]
    assert generate_answers(model, model.tokenizer, ["What is it?"]) == found
    assert model.prompts[-1] == "<user>What is it?<answer>"


def test_without_a_template_the_answer_is_the_first_line() -> None:
    model = Knowing({"What": " a cat\nand a dog"})
    assert generate_answers(model, model.tokenizer, ["What?"]) == ["a cat"]
    assert model.prompts == ["What?\n"]


def test_a_template_that_refuses_a_question(monkeypatch: pytest.MonkeyPatch) -> None:
    model, words = language_model()
    monkeypatch.setattr(words, "chat_template", "{{ raise_exception('no system turn') }}")
    with pytest.raises(ValueError, match="The chat template cannot render the question: no system turn"):
        generate_answers(model, words, [Question("Be brief.", "What?", "")])


def test_a_question_that_does_not_fit_has_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, words = language_model()
    monkeypatch.setattr(model.config, "max_position_embeddings", 20)
    short, long = generate_answers(model, words, ["0", "0" * 18], max_new_tokens=2)
    assert short is not None
    assert long is None


@pytest.mark.parametrize("name", ["batch_size", "max_new_tokens"])
def test_numbers_that_are_not_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be an integer of at least 1, got 0"):
        generate_answers(*language_model(), ["What?"], **{name: 0})
