"""The tokenizer of models that are trained from nothing."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vlparts.training.tokenizer import train_tokenizer

TEXTS = ["Where is the cat?", "The cat is at (123,456).", "user\n", "assistant\n"] * 4
SPECIAL = ["<|endoftext|>", "<|im_end|>", "<|im_start|>", "<image>"]
TOKENIZER = train_tokenizer(TEXTS)
any_text = st.text(st.characters(codec="utf-8"), max_size=60)


def ids_of(text: str, tokenizer: PreTrainedTokenizerFast = TOKENIZER) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@given(text=any_text | st.lists(st.sampled_from([*SPECIAL, " ", "a", "12", "\n"])).map("".join))
def test_any_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(ids_of(text)) == text


@given(before=any_text, digits=st.text("0123456789", min_size=1, max_size=9), after=any_text)
def test_every_digit_is_a_token_of_its_own(before: str, digits: str, after: str) -> None:
    tokens = TOKENIZER.convert_ids_to_tokens(ids_of(before + digits + after))
    assert all(token in "0123456789" for token in tokens if any(digit in token for digit in "0123456789"))


def test_merges_are_learned_except_for_digits() -> None:
    assert len(ids_of("Where is the cat?")) < 10
    assert len(ids_of("(123,456)")) == 9


@pytest.mark.parametrize("token", SPECIAL)
def test_special_tokens_are_one_token_wherever_they_stand(token: str) -> None:
    number = TOKENIZER.convert_tokens_to_ids(token)
    assert ids_of(f"cat{token}cat").count(number) == 1
    assert TOKENIZER.decode(ids_of(f"cat{token}cat"), skip_special_tokens=True) == "catcat"


def test_ends_are_those_of_chatml() -> None:
    assert TOKENIZER.eos_token == "<|im_end|>"
    assert TOKENIZER.pad_token == "<|endoftext|>"
    assert TOKENIZER.bos_token is None
    assert TOKENIZER("cat")["input_ids"] == ids_of("cat")


def test_the_vocabulary_is_bounded() -> None:
    assert len(train_tokenizer(TEXTS, vocab_size=260)) == 260
    assert 260 < len(train_tokenizer(TEXTS, vocab_size=270)) <= 270
    assert len(train_tokenizer([])) == 260
    with pytest.raises(ValueError, match="`vocab_size` must be at least 260, got 259"):
        train_tokenizer(TEXTS, vocab_size=259)


def test_the_same_texts_give_the_same_tokenizer() -> None:
    assert train_tokenizer(TEXTS).backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()


def test_saving_and_loading(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "".join(SPECIAL) + "The  cat , is 12.\n\té"
    assert ids_of(text, loaded) == ids_of(text)
    assert loaded.decode(ids_of(text)) == text
    assert (loaded.eos_token, loaded.pad_token, loaded.bos_token) == ("<|im_end|>", "<|endoftext|>", None)
