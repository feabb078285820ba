"""Training of a tokenizer for text models with random weights."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_END = "<|im_end|>"
_SPECIAL = ("<|endoftext|>", _END, "<|im_start|>", "<image>")


def train_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer in which every digit is a separate token.

    It encodes any text, since all 256 bytes are tokens; codes such as `(123,456)` are always encoded digit by digit.

    Args:
        texts: Texts to learn merges from.
        vocab_size: Maximum vocabulary size, special tokens included; at least 260.

    Returns:
        A tokenizer with ChatML's special tokens and the image placeholder `<image>`.

    Raises:
        ValueError: If `vocab_size` is too small for the bytes and the special tokens.
    """
    if vocab_size < 256 + len(_SPECIAL):
        raise ValueError(f"`vocab_size` must be at least {256 + len(_SPECIAL)}, got {vocab_size}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=_END,
        pad_token=_SPECIAL[0],
        extra_special_tokens=["<|im_start|>", "<image>"],
        clean_up_tokenization_spaces=False,
    )
