"""What the padded-coordinate tokenizer refuses."""

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast

from tests.tokenizers_made import made
from vlparts.parts.coordinate_tokens import CoordinateTokenIds
from vlparts.parts.tokenization_coordinates import PaddedCoordinateTokenizer


def wrong(change: str) -> PreTrainedTokenizerFast:
    """A tokenizer that cannot write pairs, in one of the ways in which that can be."""
    backend = Tokenizer.from_str(made("bytes").backend_tokenizer.to_str())
    if change == "characters":
        backend = Tokenizer(models.BPE({"a": 0, "1": 1, "(": 2, "<unk>": 3}, [], unk_token="<unk>"))
    elif change == "unigram":
        backend = Tokenizer(models.Unigram([("<unk>", 0.0), *((one, -1.0) for one in "0123456789(,")], unk_id=0))
    elif change == "normalizer":
        backend.normalizer = normalizers.Replace("7", "77")
    elif change == "pre-tokenizer":
        prefix = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), prefix])
    else:
        backend.add_tokens([AddedToken(change)])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("characters", r"`tokenizer` has no token for the single characters \['0', '2'"),
        ("unigram", r"`tokenizer` has no token for the single characters \['\)'\]"),
        ("normalizer", "writes two pairs with .* tokens, expected 19"),
        ("pre-tokenizer", r"pre-tokenizers \['Digits', 'ByteLevel'\]"),
        ("7", "added token '7'"),
        ("12,3", "added token '12,3'"),
        ("(", r"added token '\('"),
    ],
)
def test_a_tokenizer_that_cannot_write_pairs_is_refused(change: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PaddedCoordinateTokenizer.from_tokenizer(wrong(change))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"digits": 0}, r"`digits` must be an integer in 1\.\.9, got 0"),
        ({"digits": True}, "`digits`"),
        ({"markers": {"box": "<b>"}}, r"`markers` has the unknown names \['box'\]"),
        ({"markers": {"box_start": "<b>"}}, "'box_start' without 'box_end'"),
        ({"markers": {"box_end": "<b>"}}, "'box_end' without 'box_start'"),
        ({"markers": {"box_start": "<b>", "box_end": "<b>"}}, "`markers` must be distinct"),
        ({"markers": {"box_start": "(", "box_end": ")"}}, "`markers` must be distinct texts of more than"),
        ({"markers": {"box_start": "", "box_end": "x"}}, "`markers` must be texts without leading or trailing spaces"),
        ({"location_tokens": "nowhere"}, "`location_tokens` must be None, one of"),
        ({"location_tokens": {"template": "<{}>", "step": 1}}, "`location_tokens` must be None"),
        ({"location_tokens": {"template": "<x>"}}, "`template` must give a distinct text for each code, got '<x>'"),
        ({"location_tokens": {"template": "<{} {}>"}}, "`template` must have one field"),
        ({"location_tokens": {"template": "<{}>", "levels": 1}}, "`levels` must be an integer of at least 2"),
        ({"location_tokens": {"template": "<{}>", "per_point": 3}}, "`per_point` must be 1 or 2"),
        ({"location_tokens": {"template": "<{}>", "per_point": 1}}, "`levels` must be a square number"),
    ],
)
def test_wrong_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PaddedCoordinateTokenizer.from_tokenizer(made("bytes"), **arguments)


def test_what_is_no_fast_tokenizer_or_has_coordinates_already_is_refused() -> None:
    with pytest.raises(ValueError, match="`tokenizer` must be a PreTrainedTokenizerFast, got Tokenizer"):
        PaddedCoordinateTokenizer.from_tokenizer(made("bytes").backend_tokenizer)
    with pytest.raises(ValueError, match="has a coordinate format already"):
        PaddedCoordinateTokenizer.from_tokenizer(PaddedCoordinateTokenizer.from_tokenizer(made("bytes")))
    bare = PaddedCoordinateTokenizer(tokenizer_object=made("bytes").backend_tokenizer)
    with pytest.raises(ValueError, match="has no coordinate format; build it with `from_tokenizer`"):
        bare.coordinate_token_ids()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"digits": tuple(range(9))}, "`digits` must hold ten ids, got 9"),
        ({"width": 0}, r"`width` must lie in 1\.\.9"),
        ({"per_point": 3}, "`per_point` must be 1 or 2"),
        ({"markers": {"circle": 50}}, r"`markers` has the unknown names \['circle'\]"),
        ({"comma": 3}, r"All ids must be distinct and not negative, got \[3\]"),
        ({"comma": -3}, r"All ids must be distinct and not negative, got \[-3\]"),
    ],
)
def test_wrong_ids(fields: dict, message: str) -> None:
    good = {"digits": tuple(range(10)), "opening": 10, "comma": 11, "closing": 12}
    with pytest.raises(ValueError, match=message):
        CoordinateTokenIds(**{**good, **fields})
