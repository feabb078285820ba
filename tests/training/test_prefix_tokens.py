"""Ids of growing texts against tokenizing each of them."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.tiny import tokenizer
from tests.training.making import TOKENIZERS, metaspace_tokenizer
from vlparts.training.prefix_tokens import PrefixTokenizer
from vlparts.training.tokenizer import train_tokenizer

TEMPLATE = "<|im_start|> <|im_end|> <image> </s>"
PIECES = [
    "<|im_start|>",
    "<|im_end|>",
    "<s>",
    "</s>",
    "<image>",
    "user\n",
    "assistant\n",
    " ",
    "\n",
    "cat",
    " is",
    "é😀",
]
CONVERSATIONS = st.lists(st.lists(st.sampled_from(PIECES), max_size=6).map("".join), min_size=1, max_size=5)


def with_eos() -> PreTrainedTokenizerFast:
    """Adds a token behind each text too."""
    made = metaspace_tokenizer()
    special = [("<s>", 1), ("</s>", 2)]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    return made


def with_normalizer() -> PreTrainedTokenizerFast:
    """Writes "▁" before the text between two special tokens, as the first tokenizers of Llama did."""
    made = metaspace_tokenizer()
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁"), normalizers.NFC()]
    made.backend_tokenizer.normalizer = normalizers.Sequence(steps)
    return made


def with_trimmed_offsets() -> PreTrainedTokenizerFast:
    """Leaves spaces out of the characters of tokens, as GPT-2's does."""
    made = tokenizer()
    made.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return made


def with_special_tokens_as_text() -> PreTrainedTokenizerFast:
    made = train_tokenizer([" <|im_start|>assistant", " <image>"] * 2)
    made.split_special_tokens = True
    return made


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    **TOKENIZERS,
    "with EOS": with_eos,
    "with normalizer": with_normalizer,
    "trimmed offsets": with_trimmed_offsets,
    "special tokens as text": with_special_tokens_as_text,
}
MADE = {kind: make() for kind, make in KINDS.items()}


def growing(pieces: list[str]) -> list[str]:
    return ["".join(pieces[: index + 1]) for index in range(len(pieces))]


def one_by_one(made: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    found: list[int] = []
    parts = []
    before = ""
    for text in texts:
        special = made.bos_token is None or not text.startswith(made.bos_token)
        ids = made(text, add_special_tokens=special)["input_ids"]
        rest = made(text[len(before) :], add_special_tokens=False)["input_ids"]
        parts.append(ids[len(found) :] if ids[: len(found)] == found else rest)
        found = found + parts[-1]
        before = text
    return parts


@pytest.mark.parametrize("kind", KINDS)
@given(conversations=st.lists(CONVERSATIONS, max_size=3))
@example(conversations=[["<|im_start|>assistant\n", "\ncat<|im_end|>", "\n"]])  # a token spans the end of the first
@example(conversations=[["", "cat"], ["<image>", ""], ["<s>", " cat"]])
def test_ids_are_those_of_tokenizing_every_text(kind: str, conversations: list[list[str]]) -> None:
    texts = [growing(pieces) for pieces in conversations]
    found = PrefixTokenizer(MADE[kind], TEMPLATE)(texts)
    assert [[part.ids for part in parts] for parts in found] == [one_by_one(MADE[kind], one) for one in texts]


@pytest.mark.parametrize("kind", KINDS)
@given(pieces=CONVERSATIONS, start=st.integers(0, 40), length=st.integers(1, 40))
def test_tokens_that_overlap_characters(kind: str, pieces: list[str], start: int, length: int) -> None:
    """Against the offsets of all tokens; none where no token has one of the characters."""
    texts = growing(pieces)
    end = start + length
    (parts,) = PrefixTokenizer(MADE[kind], TEMPLATE)([texts])
    for part in parts:
        assert part.encoding is not None
        offsets = [(first + part.shift, last + part.shift) for first, last in part.encoding.offsets]
        is_there = any(max(first, start) < min(last, end) for first, last in offsets)
        near = [is_there and first < end and last > start for first, last in offsets]
        chosen = part.overlapping(start, end)
        assert [index in chosen for index in range(len(part.ids))] == near[part.first :][: len(part.ids)]


def test_a_tokenizer_that_is_not_fast_tells_no_characters() -> None:
    class Slow:
        """As much of one as is asked for."""

        is_fast = False
        bos_token = None

        def __call__(self, texts: list[str], **_: Any) -> Any:
            found = tokenizer()(texts, add_special_tokens=False)
            found._encodings = None
            return found

    (parts,) = PrefixTokenizer(Slow(), TEMPLATE)([["cat", "cat is"]])  # type: ignore[arg-type]
    assert [part.ids for part in parts] == one_by_one(tokenizer(), ["cat", "cat is"])
    with pytest.raises(ValueError, match="slow tokenizer"):
        parts[0].overlapping(0, 1)


class Counting:
    """A tokenizer that notes its texts."""

    def __init__(self, made: PreTrainedTokenizerFast) -> None:
        self.made = made
        self.texts: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.made, name)

    def __call__(self, texts: Any, **options: Any) -> Any:
        self.texts += [texts] if isinstance(texts, str) else texts
        return self.made(texts, **options)


@pytest.mark.parametrize("kind", ["byte level", "metaspace", "with normalizer", "trimmed offsets"])
def test_only_the_longest_text_and_the_tails_are_tokenized(kind: str) -> None:
    counting = Counting(MADE[kind])
    made = PrefixTokenizer(counting, TEMPLATE)  # type: ignore[arg-type]
    counting.texts.clear()
    eos = MADE[kind].eos_token
    turns = [f"<|im_start|>user\n{{}}{eos}<|im_start|>assistant\n", f"It is here.{eos}"] * 2
    texts = [growing([turn.format(question) for turn in turns]) for question in ("Where is the cat?", "You see")]
    made(texts)
    tails = {"<|im_start|>assistant\n", eos}
    assert sorted(counting.texts) == sorted({one[-1] for one in texts} | tails)
