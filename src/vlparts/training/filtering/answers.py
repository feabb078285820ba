"""Answers of a language model to questions without their image, and their comparison with the records' answers."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from transformers import GenerationConfig

from ...parts.utils import positive_integer
from .perplexity import context_length, like_length
from .texts import Question

__all__ = ["answer_batch", "encode_question", "generate_answers", "is_same_answer"]

_LEADING = "\"'`([{*_\u2018\u201c\u00ab\u00bf\u00a1"
_TRAILING = ".,;:!?\"'`)]}*_\u2019\u201d\u00bb\u3002\u3001"
_OPTION = re.compile(r"(?:^|\s)\(?([A-Z])[.):]\s")
_LETTER = re.compile(
    r"(?:the\s+)?(?:correct\s+)?(?:(?:answer|option|choice)\s*(?:is)?\s*:?\s*)?"
    r"[*(]*([A-Z])[*)]*(?:[.):][*]*(?:\s.*)?)?",
    re.IGNORECASE | re.DOTALL,
)


def is_same_answer(answer: str, expected: str, question: str = "") -> bool:
    """Whether two answers are the same text, or name the same option of a multiple-choice question.

    - Texts are compared without regard to case (after Unicode's NFKC), to white space, and to quotes, brackets,
      asterisks and marks such as `.,;:!?` at the ends of words. Marks inside of words count: 3.5 is not 35.
    - If the question lists options from A on, such as `A. red` or `(A) red`, and `expected` names one of their
      letters, an answer is the same if it names the same letter: `B`, `(b)`, `B. red` or `The answer is B.`.

    Args:
        answer: An answer of a model.
        expected: The record's answer.
        question: The question, in which options are looked for.
    """
    options = set(_OPTION.findall(f"{question}\n"))
    letter = _letter(expected)
    if letter in options and {"A", "B"} <= options:
        return _letter(answer) == letter
    normalized = _normalized(expected)
    return bool(normalized) and _normalized(answer) == normalized


def _letter(text: str) -> str | None:
    match = _LETTER.fullmatch(text.strip())
    return match[1].upper() if match else None


def _normalized(text: str) -> str:
    words = (word.lstrip(_LEADING).rstrip(_TRAILING) for word in unicodedata.normalize("NFKC", text).split())
    return " ".join(word for word in words if word).casefold()


def generate_answers(
    model: Any,
    tokenizer: Any,
    questions: Iterable[Question | str],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 32,
    template_options: dict[str, Any] | None = None,
) -> list[str | None]:
    """Answer questions greedily, each alone.

    With a chat template, a question is the turn of the user, after the system turn if there is one, and the answer is
    all of the response. Without one, the prompt is the text of both with a line break after each, and the answer is
    the first line.

    Args:
        model: A causal language model of transformers in evaluation mode.
        tokenizer: Its tokenizer.
        questions: Questions, or their texts.
        batch_size: Questions per batch; batches have questions of like length.
        max_new_tokens: Maximum number of tokens of an answer, which ends there.
        template_options: Variables of the chat template, such as `{"enable_thinking": False}`.

    Returns:
        One answer for each question, in order; None for a question that does not fit into the model's context.

    Raises:
        ValueError: If a number is not positive, or the chat template cannot render a question.
    """
    positive_integer(batch_size, "batch_size")
    positive_integer(max_new_tokens, "max_new_tokens")
    asked = (Question("", one, "") if isinstance(one, str) else one for one in questions)
    prompts = (
        (index, encode_question(model, tokenizer, one, max_new_tokens, template_options))
        for index, one in enumerate(asked)
    )
    found: dict[int, str | None] = {}
    for batch in like_length(prompts, batch_size, lambda item: len(item[1])):
        answers = answer_batch(model, tokenizer, [ids for _, ids in batch], max_new_tokens)
        found.update(zip((index for index, _ in batch), answers, strict=True))
    return [found[index] for index in range(len(found))]


def encode_question(
    model: Any, tokenizer: Any, question: Question, max_new_tokens: int, template_options: dict[str, Any] | None
) -> list[int]:
    """Return the token ids of a prompt; [] if prompt and answer do not fit into the model's context.

    Raises:
        ValueError: If the chat template cannot render the question.
    """
    if tokenizer.chat_template:
        turns = {"system": question.system, "user": question.text}
        messages = [{"role": role, "content": text} for role, text in turns.items() if text]
        try:
            prompt = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **(template_options or {})
            )
        except TemplateError as error:
            raise ValueError(f"The chat template cannot render the question: {error}") from None
    else:
        prompt = "".join(f"{text}\n" for text in (question.system, question.text) if text)
    # A template writes the beginning of a text itself.
    ids: list[int] = tokenizer(prompt, add_special_tokens=not tokenizer.chat_template, verbose=False)["input_ids"]
    most = context_length(model)
    return [] if most is not None and len(ids) + max_new_tokens > most else ids


@torch.inference_mode()
def answer_batch(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[str | None]:
    """Continue prompts greedily; None for an empty one.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompts: Token ids.
        max_new_tokens: Maximum number of tokens of an answer.
    """
    answers: list[str | None] = [None] * len(prompts)
    asked = [index for index, ids in enumerate(prompts) if ids]
    if not asked:
        return answers
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    candidates = (tokenizer.pad_token_id, ends[0] if isinstance(ends, list) else ends, 0)
    padding = next(one for one in candidates if one is not None)
    longest = max(len(prompts[index]) for index in asked)
    rows = [[padding] * (longest - len(prompts[index])) + list(prompts[index]) for index in asked]
    masks = [[0] * (longest - len(prompts[index])) + [1] * len(prompts[index]) for index in asked]
    # Values that are not set here would come from the model's own options, such as a repetition penalty.
    greedy = GenerationConfig(
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=max_new_tokens,
        min_new_tokens=0,
        eos_token_id=ends,
        pad_token_id=padding,
    )
    output = model.generate(
        input_ids=torch.tensor(rows, device=model.device),
        attention_mask=torch.tensor(masks, device=model.device),
        generation_config=greedy,
    )
    texts = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    for index, text in zip(asked, texts, strict=True):
        answers[index] = text.strip() if tokenizer.chat_template else text.strip().partition("\n")[0].strip()
    return answers
