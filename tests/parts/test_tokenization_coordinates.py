"""The padded-coordinate tokenizer against the tokenizer that it was made from, for all algorithms."""

import json
import re
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.tokenizers_made import ALPHABET, KINDS, WITHOUT_PREFIX, WORDS, made
from vlparts.parts.coordinate_tokens import LocationTokens
from vlparts.parts.tokenization_coordinates import PaddedCoordinateTokenizer

PAIR = re.compile(r"\([0-9]{3},[0-9]{3}\)")
MARKERS = {"box_start": "<|box_start|>", "box_end": "<|box_end|>"}
each_kind = pytest.mark.parametrize("kind", KINDS)
plain = st.text(ALPHABET, max_size=12).filter(lambda text: not PAIR.search(text))
near_misses = st.sampled_from(
    ["(12,345)", "(1234,567)", "(123, 456)", "(123,456", "((", "123,456)", "(\u0661\u0662\u0663,456)"]
)
without_pairs = st.lists(plain | near_misses, max_size=4).map("".join).filter(lambda text: not PAIR.search(text))
pairs = st.builds("({:03d},{:03d})".format, st.integers(0, 999), st.integers(0, 999))
with_pairs = st.lists(st.one_of(plain, pairs, pairs), max_size=6).map("".join)


@cache
def padded(kind: str) -> PaddedCoordinateTokenizer:
    return PaddedCoordinateTokenizer.from_tokenizer(made(kind), markers=MARKERS)


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@cache
def table(kind: str) -> dict[str, int]:
    ids = padded(kind).coordinate_token_ids()
    digits = zip("0123456789", ids.digits, strict=True)
    return {"(": ids.opening, ",": ids.comma, ")": ids.closing, **dict(digits)}


def pair_ids(kind: str, pair: str) -> list[int]:
    """The ids that the documentation promises for a pair, character by character."""
    return [table(kind)[character] for character in pair]


@each_kind
@settings(max_examples=50)
@given(text=without_pairs)
def test_text_without_pairs_is_not_changed(kind: str, text: str) -> None:
    before = made(kind)(text, add_special_tokens=False, return_offsets_mapping=True)
    after = padded(kind)(text, add_special_tokens=False, return_offsets_mapping=True)
    assert after["input_ids"] == before["input_ids"]
    assert after["offset_mapping"] == before["offset_mapping"]


@each_kind
@settings(max_examples=50)
@given(text=with_pairs)
def test_every_pair_is_nine_tokens_and_each_covers_its_character(kind: str, text: str) -> None:
    found = padded(kind)(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = found["input_ids"], [tuple(one) for one in found["offset_mapping"]]
    for match in PAIR.finditer(text):
        characters = [(place, place + 1) for place in range(*match.span())]
        # A space that a pipeline writes for one of the text may claim the character that follows.
        first = offsets.index(characters[1]) - 1
        assert offsets[first : first + 9] == characters
        assert ids[first : first + 9] == pair_ids(kind, match[0])
        assert sum(start >= match.start() + 1 and end <= match.end() for start, end in offsets) == 8


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "t5"])
@settings(max_examples=50)
@given(text=with_pairs)
def test_text_around_pairs_is_encoded_as_if_alone(kind: str, text: str) -> None:
    expected: list[int] = []
    place = 0
    for match in [*PAIR.finditer(text), None]:
        piece = text[place : match.start() if match else len(text)]
        tokenizer = made(kind if place == 0 else WITHOUT_PREFIX.get(kind, kind))
        if piece:
            expected += ids_of(tokenizer, piece)
        if match:
            expected += pair_ids(kind, match[0])
            place = match.end()
    assert ids_of(padded(kind), text) == expected


@each_kind
@settings(max_examples=50)
@given(text=with_pairs)
def test_decoding_is_as_good_as_before(kind: str, text: str) -> None:
    before = made(kind).decode(ids_of(made(kind), text))
    after = padded(kind).decode(ids_of(padded(kind), text))
    if kind == "bytes, prefix" and PAIR.match(text):
        assert (before, after) == (" " + text, text)
        return
    if kind not in WORDS:
        assert after == before
        return
    assert re.sub(" |##", "", after) == re.sub(" |##|</w>", "", before)
    assert PAIR.findall(after) == PAIR.findall(text)


@each_kind
def test_the_count_is_constant_in_every_place(kind: str) -> None:
    tokenizer = padded(kind)
    assert tokenizer.tokens_per_pair == 9
    assert tokenizer.tokens_per_box == 21
    for text in ("(007,999)", "<|box_start|>(007,999)", "<|box_end|>(007,999)", "(123,456)(007,999)", "a(007,999)"):
        assert ids_of(tokenizer, text)[-9:] == pair_ids(kind, "(007,999)")
    box = "<|box_start|>(012,345),(678,999)<|box_end|>"
    assert len(ids_of(tokenizer, box)) == 21
    assert len(ids_of(tokenizer, "(012,345)")) == 9
    ids = tokenizer.coordinate_token_ids()
    assert len({*ids.digits, ids.opening, ids.comma, ids.closing, *ids.markers.values()}) == 15


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("wordpiece")])
def test_no_space_comes_between_a_marker_and_a_pair(kind: str) -> None:
    text = "<|box_start|>(012,345)"
    assert padded(kind).decode(ids_of(padded(kind), text)) == text


def test_a_marker_that_exists_keeps_its_id_and_stays_special() -> None:
    backend = Tokenizer.from_str(made("bytes").backend_tokenizer.to_str())
    backend.add_special_tokens(["<|box_start|>"])
    base = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer = PaddedCoordinateTokenizer.from_tokenizer(base, markers=MARKERS)
    ids = tokenizer.coordinate_token_ids()
    assert ids.markers == {"box_start": len(base) - 1, "box_end": len(base)}
    assert tokenizer.decode(list(ids.markers.values()), skip_special_tokens=True) == "<|box_end|>"


@each_kind
def test_it_is_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    tokenizer = padded(kind)
    tokenizer.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert stored["tokenizer_class"] == "PaddedCoordinateTokenizer"
    assert stored["coordinate_format"] == {"digits": 3, "markers": MARKERS, "location_tokens": None}
    found = AutoTokenizer.from_pretrained(tmp_path)
    assert type(found) is PaddedCoordinateTokenizer
    assert found.coordinate_format == tokenizer.coordinate_format
    assert found.coordinate_token_ids() == tokenizer.coordinate_token_ids()
    text = "the (123,456) and 1234 <|box_start|>(012,345),(678,999)<|box_end|>x"
    assert ids_of(found, text) == ids_of(tokenizer, text)
    assert found.decode(ids_of(found, text)) == tokenizer.decode(ids_of(tokenizer, text))
    assert found.eos_token_id == tokenizer.eos_token_id


@each_kind
def test_the_original_is_not_changed(kind: str) -> None:
    before = made(kind).backend_tokenizer.to_str()
    PaddedCoordinateTokenizer.from_tokenizer(made(kind), markers=MARKERS, location_tokens="kosmos")
    assert made(kind).backend_tokenizer.to_str() == before


def test_special_tokens_templates_and_settings_are_taken_over() -> None:
    base = PreTrainedTokenizerFast(
        tokenizer_object=made("bytes").backend_tokenizer,
        eos_token="<end>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        chat_template="{{ messages }}",
        padding_side="left",
        model_max_length=77,
    )
    tokenizer = PaddedCoordinateTokenizer.from_tokenizer(base)
    for name in (
        "eos_token_id",
        "pad_token_id",
        "image_token_id",
        "chat_template",
        "padding_side",
        "model_max_length",
    ):
        assert getattr(tokenizer, name) == getattr(base, name)
    assert tokenizer.all_special_ids == base.all_special_ids
    assert len(tokenizer) == len(base)
    batch = tokenizer(["a", "a (123,456)"], padding=True)
    assert batch["input_ids"][0][0] == base.pad_token_id


def test_markers_and_locations_survive_skipping_special_tokens() -> None:
    tokenizer = PaddedCoordinateTokenizer.from_tokenizer(made("bytes"), markers=MARKERS, location_tokens="rex")
    text = "<|box_start|><0><12><999><7><|box_end|>"
    assert len(ids_of(tokenizer, text)) == tokenizer.tokens_per_box == 6
    assert tokenizer.decode(ids_of(tokenizer, text) + [tokenizer.eos_token_id], skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("style", "levels", "first", "last", "per_box"),
    [
        ("rex", 1000, "<0>", "<999>", 4),
        ("padded", 1000, "<loc_000>", "<loc_999>", 4),
        ("florence", 1000, "<loc_0>", "<loc_999>", 4),
        ("paligemma", 1024, "<loc0000>", "<loc1023>", 4),
        ("kosmos", 1024, "<patch_index_0000>", "<patch_index_1023>", 2),
        (LocationTokens("<bin_{}>", levels=1001), 1001, "<bin_0>", "<bin_1000>", 4),
    ],
)
def test_location_tokens(
    style: str | LocationTokens, levels: int, first: str, last: str, per_box: int, tmp_path: Path
) -> None:
    base = made("unigram")
    tokenizer = PaddedCoordinateTokenizer.from_tokenizer(base, location_tokens=style)
    ids = tokenizer.coordinate_token_ids()
    assert len(ids.locations) == levels == len(tokenizer) - len(base)
    assert tokenizer.convert_ids_to_tokens([ids.locations[0], ids.locations[-1]]) == [first, last]
    assert tokenizer.tokens_per_box == per_box == 2 * tokenizer.tokens_per_pair
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).coordinate_token_ids() == ids


def test_other_numbers_of_digits() -> None:
    tokenizer = PaddedCoordinateTokenizer.from_tokenizer(made("bytes, three digits"), digits=4)
    assert tokenizer.tokens_per_pair == len(ids_of(tokenizer, "(0123,4567)")) == 11
    assert ids_of(tokenizer, "(123,456)") == ids_of(made("bytes, three digits"), "(123,456)")


def test_tokens_that_hold_a_parenthesis() -> None:
    tokenizer = padded("bytes")
    ids = tokenizer.token_ids_with("(")
    assert ids == [index for index in range(len(tokenizer)) if "(" in tokenizer.decode([index])]
    assert tokenizer.coordinate_token_ids().opening in ids


def test_the_ids_do_not_depend_on_the_last_call() -> None:
    tokenizer = PaddedCoordinateTokenizer.from_tokenizer(made("llama"))
    expected = tokenizer.coordinate_token_ids()
    tokenizer("(123,456) and more", truncation=True, max_length=3)
    assert tokenizer.coordinate_token_ids() == expected
    truncated = PaddedCoordinateTokenizer.from_tokenizer(tokenizer_with_truncation())
    assert truncated.coordinate_token_ids().digits == padded("bytes").coordinate_token_ids().digits


def tokenizer_with_truncation() -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(made("bytes").backend_tokenizer.to_str())
    backend.enable_truncation(2)
    return PreTrainedTokenizerFast(tokenizer_object=backend)
