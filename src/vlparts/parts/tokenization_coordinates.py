"""A tokenizer that writes every padded coordinate pair `(ddd,ddd)` digit by digit, in any context."""

import json
import re
from collections.abc import Mapping
from typing import Any, Self

from transformers import AddedToken, PreTrainedTokenizerFast

from .coordinate_splitting import (
    check_characters,
    check_surroundings,
    close_gaps,
    decode_word_ends,
    pair_ids,
    pair_of,
    split_pairs,
)
from .coordinate_tokens import MARKER_NAMES, CoordinateTokenIds, LocationTokens, location_tokens_from

__all__ = ["PaddedCoordinateTokenizer"]

# Attributes of a tokenizer other than its pipeline and special tokens.
_SETTINGS = (
    "chat_control_tokens",
    "chat_template",
    "clean_up_tokenization_spaces",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
    "model_input_names",
    "model_max_length",
    "padding_side",
    "response_template",
    "split_special_tokens",
    "truncation_side",
)


class PaddedCoordinateTokenizer(PreTrainedTokenizerFast):
    """A fast tokenizer that writes each coordinate pair of padded codes with the same number of tokens.

    It is built from any fast tokenizer by `from_tokenizer`, then saved and loaded like any other. A pair such as
    `(012,345)` becomes "(", three digits, ",", three digits and ")": 9 tokens, out of the same 13, at the start of a
    text and next to letters, digits or spaces of any script. Texts without pairs keep their ids. openPangu-VL's
    tokenizer splits pairs between special tokens in the same way.

    The text is normalized as a whole. Then the text between two pairs is split and encoded like a separate text. If
    the original tokenizer prepends a space to each text (SentencePiece's dummy prefix), none is prepended to a pair or
    to the text after one.
    """

    # No __init__ here: with one, transformers rebuilds tokenizer.json on loading and loses the pre-tokenizer.

    @classmethod
    def from_tokenizer(
        cls,
        tokenizer: PreTrainedTokenizerFast,
        digits: int = 3,
        markers: Mapping[str, str] | None = None,
        location_tokens: str | LocationTokens | Mapping[str, Any] | None = None,
    ) -> Self:
        """Build the tokenizer from another one, which is not modified.

        Marker and location tokens that are not in the vocabulary are added at its end; the model's embeddings must
        then be resized (`resize_token_embeddings(len(tokenizer))`). They are not special tokens, so
        `decode(..., skip_special_tokens=True)` keeps them. Pipeline, special tokens and chat template are copied;
        methods that the other tokenizer's class adds in Python are not.

        Args:
            tokenizer: A fast tokenizer of any algorithm.
            digits: Digits of a code, 1 to 9.
            markers: Texts of marker tokens around regions, by names of `MARKER_NAMES`, for example
                `{"box_start": "<|box_start|>", "box_end": "<|box_end|>"}`.
            location_tokens: Name of a style in `LOCATION_STYLES`, or a `LocationTokens`, to write each code as one
                token. Pairs of digits do not change.

        Raises:
            ValueError: If the tokenizer is not a fast one, has a coordinate format already, lacks a token for a single
                digit, a parenthesis or the comma, or has an added token that splits pairs; or if an argument is
                invalid.
        """
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ValueError(f"`tokenizer` must be a PreTrainedTokenizerFast, got {type(tokenizer).__name__}.")
        if "coordinate_format" in tokenizer.init_kwargs:
            raise ValueError("`tokenizer` has a coordinate format already; build the new one from the original.")
        if isinstance(digits, bool) or not isinstance(digits, int) or not 1 <= digits <= 9:
            raise ValueError(f"`digits` must be an integer in 1..9, got {digits!r}.")
        locations, markers = location_tokens_from(location_tokens), _checked_markers(markers)
        _check_added_tokens(tokenizer, digits)
        backend = _build_backend(tokenizer.backend_tokenizer, digits)
        location_fields = None if locations is None else vars(locations)
        settings = {name: value for name in _SETTINGS if (value := getattr(tokenizer, name, None)) is not None}
        made = cls(
            tokenizer_object=backend,
            coordinate_format={"digits": digits, "markers": markers, "location_tokens": location_fields},
            **settings,
            **_special_tokens(tokenizer),
        )
        made.name_or_path = tokenizer.name_or_path
        texts = [*markers.values(), *(locations.texts() if locations else [])]
        made.add_tokens([AddedToken(text, normalized=False, special=False) for text in texts])
        made.coordinate_token_ids()
        return made

    @property
    def coordinate_format(self) -> dict[str, Any]:
        """The arguments of `from_tokenizer`, as stored in tokenizer_config.json."""
        if "coordinate_format" not in self.init_kwargs:
            raise ValueError("This tokenizer has no coordinate format; build it with `from_tokenizer`.")
        return self.init_kwargs["coordinate_format"]

    def coordinate_token_ids(self) -> CoordinateTokenIds:
        """Return the ids of the tokens of coordinates.

        Raises:
            ValueError: If the tokenizer was not built by `from_tokenizer`, or its pipeline has changed since.
        """
        stored = self.coordinate_format
        locations = location_tokens_from(stored["location_tokens"])
        opening, digits, comma, closing = pair_ids(self._encode_text, stored["digits"])
        return CoordinateTokenIds(
            digits=digits,
            opening=opening,
            comma=comma,
            closing=closing,
            width=stored["digits"],
            locations=tuple(self.convert_tokens_to_ids(locations.texts())) if locations else (),
            per_point=locations.per_point if locations else 2,
            markers={name: self.convert_tokens_to_ids(text) for name, text in stored["markers"].items()},
        )

    def _encode_text(self, text: str) -> list[int]:
        """Return the ids of the text without special tokens, truncation and padding, which earlier calls may set."""
        return self(text, add_special_tokens=False, truncation=False, padding=False)["input_ids"]

    @property
    def tokens_per_pair(self) -> int:
        """Number of tokens of a point: of `(ddd,ddd)`, or its location tokens."""
        locations = location_tokens_from(self.coordinate_format["location_tokens"])
        return 2 * self.coordinate_format["digits"] + 3 if locations is None else locations.per_point

    @property
    def tokens_per_box(self) -> int:
        """Number of tokens of a box: two points, the comma between pairs of digits, and box markers if any."""
        stored = self.coordinate_format
        comma = 0 if stored["location_tokens"] else 1
        return 2 * self.tokens_per_pair + comma + sum(name.startswith("box_") for name in stored["markers"])

    def token_ids_with(self, text: str) -> list[int]:
        """Return the ids of all tokens whose text contains `text`, in ascending order.

        Args:
            text: For example "(", to find every token that a parenthesis could be written with.
        """
        return [index for index in range(len(self)) if text in self.backend_tokenizer.decode([index], False)]


def _checked_markers(markers: Mapping[str, str] | None) -> dict[str, str]:
    """Return the markers as a dictionary, or raise ValueError."""
    found = dict(markers or {})
    unknown = sorted(set(found) - set(MARKER_NAMES))
    if unknown:
        raise ValueError(f"`markers` has the unknown names {unknown}; known are {list(MARKER_NAMES)}.")
    for name in MARKER_NAMES:
        other = name.replace("_start", "_end") if name.endswith("_start") else name.replace("_end", "_start")
        if name in found and other not in found:
            raise ValueError(f"`markers` has {name!r} without {other!r}.")
    texts = list(found.values())
    if not all(isinstance(text, str) and text and text == text.strip() for text in texts):
        raise ValueError(f"`markers` must be texts without leading or trailing spaces, got {texts}.")
    if len(set(texts)) != len(texts) or any(re.fullmatch("[0-9(),]*", text) for text in texts):
        raise ValueError(f"`markers` must be distinct texts of more than digits, parentheses and commas, got {texts}.")
    return found


def _check_added_tokens(tokenizer: PreTrainedTokenizerFast, digits: int) -> None:
    """Raise ValueError if an added token can match inside a pair, since added tokens are split off first."""
    code = "0" * digits
    for text in tokenizer.get_added_vocab():
        if text and re.sub("[0-9]", "0", text) in f"({code},{code})":
            raise ValueError(f"`tokenizer` has the added token {text!r}, which splits coordinate pairs.")


def _special_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return the special tokens as arguments of a new tokenizer."""
    named = {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    usual = {name: value for name, value in named.items() if name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES}
    own = {name: value for name, value in named.items() if name not in usual}
    return {**usual, "model_specific_special_tokens": own, "extra_special_tokens": tokenizer.extra_special_tokens}


def _build_backend(backend: Any, digits: int) -> Any:
    """Return a copy of a `tokenizers.Tokenizer` that splits pairs into their characters.

    Raises:
        ValueError: If its vocabulary or its pipeline cannot write pairs.
    """
    pipeline = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
    check_characters(backend.model, pipeline["model"])
    pipeline = decode_word_ends(split_pairs(pipeline, digits))
    made = type(backend).from_str(json.dumps(pipeline))

    def encode(text: str) -> list[int]:
        return made.encode(text, add_special_tokens=False).ids

    pair_ids(encode, digits)
    check_surroundings(encode, digits)
    pair = pair_of("0", digits)
    written = made.decode(encode(pair), skip_special_tokens=False).strip()
    if written.replace(" ", "") != pair:
        raise ValueError(f"`tokenizer` cannot write pairs: {pair!r} is decoded as {written!r}.")
    return made if written == pair else type(backend).from_str(json.dumps(close_gaps(pipeline, written, digits)))
