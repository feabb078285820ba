"""A small language model, records and a model with known answers for the tests of filters."""

from functools import cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.tiny import order_one, text_config, tokenizer


@cache
def language_model(kind: str = "qwen3") -> tuple[Any, Any]:
    """A small causal language model and its tokenizer, which callers leave as they are."""
    words = tokenizer()
    return order_one(AutoModelForCausalLM.from_config(text_config(kind, words))).eval(), words


class Knowing:
    """A model that generates known answers to questions, and tokens of nonsense to others.

    Args:
        answers: Answers by question.
    """

    def __init__(self, answers: dict[str, str]) -> None:
        self.model, self.tokenizer = language_model()
        self.answers = answers
        self.prompts: list[str] = []
        self.batches = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, generation_config: Any) -> torch.Tensor:
        self.batches += 1
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            prompt = self.tokenizer.decode(ids[mask.bool()])
            self.prompts.append(prompt)
            known = [answer for question, answer in self.answers.items() if question in prompt]
            answer = self.tokenizer(known[0] if known else "zzz")["input_ids"][: generation_config.max_new_tokens]
            rows.append(torch.tensor([*ids.tolist(), *answer, generation_config.eos_token_id]))
        return torch.nn.utils.rnn.pad_sequence(rows, True, generation_config.pad_token_id)


def asked(question: Any, answer: Any, image: str | None = "a.png", **more: Any) -> dict[str, Any]:
    """A record of one question."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {**({} if image is None else {"image": image}), "messages": turns, **more}
