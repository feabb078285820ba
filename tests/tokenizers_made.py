"""Small tokenizers of the common algorithms and pipelines, trained here; digits are merged where the algorithm can."""

import json
from collections.abc import Callable
from functools import cache
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPACE = "\u2581"
ALPHABET = sorted(set("abcdefghinorstuxyABCXY0123456789(),.:;<>|/_-\n \u6f22\u5b57\u00e9\u0416"))
TEXTS = [
    "see the cat at (123,456) and the dog at (12, 34), 1234567 dogs.",
    "box (100,200),(300,400) in 2024 and 1999: 12345 123 456 789 000 999",
    "a \u6f22\u5b57 box(1,2)a (999,999) the other (0,0)\nnext line, the end. \u00e9 \u0416",
    *("".join(ALPHABET[index:] + ALPHABET[:index]) for index in range(0, len(ALPHABET), 7)),
] * 4
# As in GPT-4's and Tekken's successors: up to three digits are one piece.
THREE_DIGITS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CLIP_PIECES = r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def _json(component: Any) -> dict:
    """A pre-tokenizer, normalizer or decoder as it stands in tokenizer.json."""
    return json.loads(component.__getstate__())


def _wrap(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", **special)


def _bytes(pre_tokenizer: Any, normalizer: Any = None, suffix: str = "") -> PreTrainedTokenizerFast:
    """Byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if suffix:
        # The trainer knows no alphabet of ends of words, so each byte stands alone once.
        tokens = [*alphabet, *(byte + suffix for byte in alphabet)]
        tokenizer.model = models.BPE({one: index for index, one in enumerate(tokens)}, [], end_of_word_suffix=suffix)
    else:
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(TEXTS, trainer)
    return _wrap(tokenizer)


def _sentencepiece_bpe(scheme: str, in_normalizer: bool = False) -> PreTrainedTokenizerFast:
    """BPE with byte fallback, as converted from SentencePiece; Llama's pipelines, old and new, and Gemma's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=ALPHABET, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    pipeline = json.loads(tokenizer.to_str())
    vocabulary = pipeline["model"]["vocab"]
    for token in ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]:
        vocabulary[token] = len(vocabulary)
    pipeline["model"]["byte_fallback"] = True
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if scheme != "never":
        steps.append(decoders.Strip(" ", 1, 0))
    pipeline["decoder"] = _json(decoders.Sequence(steps))
    if in_normalizer:
        prepend = [normalizers.Prepend(SPACE)] if scheme != "never" else []
        pipeline["normalizer"] = _json(normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE)]))
        pipeline["pre_tokenizer"] = None
    else:
        pipeline["pre_tokenizer"] = _json(pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False))
    return _wrap(Tokenizer.from_str(json.dumps(pipeline)), unk_token="<unk>")


@cache
def _unigram_model() -> str:
    """A trained Unigram model, as a pipeline."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    special = {"special_tokens": ["<unk>"], "unk_token": "<unk>"}
    trainer = trainers.UnigramTrainer(
        vocab_size=200, initial_alphabet=[*ALPHABET, SPACE], show_progress=False, **special
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer.to_str()


def _unigram(scheme: str, words: bool = False) -> PreTrainedTokenizerFast:
    """Unigram; with `words`, T5's and XLM-R's pipeline."""
    tokenizer = Tokenizer.from_str(_unigram_model())
    space = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), space]) if words else space
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return _wrap(tokenizer, unk_token="<unk>")


def _wordpiece(decoder: bool = True) -> PreTrainedTokenizerFast:
    """BERT's pipeline."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, initial_alphabet=ALPHABET, special_tokens=["[UNK]"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if decoder:
        tokenizer.decoder = decoders.WordPiece()
    return _wrap(tokenizer, unk_token="[UNK]")


def _clip() -> PreTrainedTokenizerFast:
    """CLIP's pipeline."""
    split = pre_tokenizers.Split(Regex(CLIP_PIECES), behavior="removed", invert=True)
    steps = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return _bytes(steps, normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()]), suffix="</w>")


def _three_digits() -> PreTrainedTokenizerFast:
    split = pre_tokenizers.Split(Regex(THREE_DIGITS), behavior="isolated")
    return _bytes(pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]))


def _bytes_with_prefix() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer.from_str(made("bytes").backend_tokenizer.to_str())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return _wrap(tokenizer)


MAKERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "bytes": lambda: _bytes(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "bytes, prefix": _bytes_with_prefix,
    "bytes, three digits": _three_digits,
    "clip": _clip,
    "llama, legacy": lambda: _sentencepiece_bpe("always", in_normalizer=True),
    "llama": lambda: _sentencepiece_bpe("first"),
    "gemma": lambda: _sentencepiece_bpe("never", in_normalizer=True),
    "unigram": lambda: _unigram("always"),
    "unigram, first": lambda: _unigram("first"),
    "unigram, never": lambda: _unigram("never"),
    "t5": lambda: _unigram("always", words=True),
    "wordpiece": _wordpiece,
    "wordpiece, no decoder": lambda: _wordpiece(decoder=False),
}
KINDS = sorted(MAKERS)
# A kind that writes a space in front of each text, and the same without it.
WITHOUT_PREFIX = {"llama": "gemma", "llama, legacy": "gemma", "unigram": "unigram, never"}
WITHOUT_PREFIX |= {"unigram, first": "unigram, never", "bytes, prefix": "bytes"}
# Their tokens are words, which decoding joins by spaces.
WORDS = {"wordpiece", "wordpiece, no decoder", "clip"}


@cache
def made(kind: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a kind, trained once; callers leave it as it is."""
    return MAKERS[kind]()
