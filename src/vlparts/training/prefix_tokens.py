"""Token ids of growing texts, such that the ids of each text start with those of the text before it."""

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

__all__ = ["Encoded", "PrefixTokenizer"]


@dataclass(frozen=True)
class Encoded:
    """The tokens of a text, or some of them.

    Args:
        ids: Token ids.
        encoding: The tokens of the whole text with their characters; None for slow tokenizers.
        first: Index of the first of the tokens in it.
        shift: Number of characters before the encoded text.
    """

    ids: list[int]
    encoding: Encoding | None
    first: int = 0
    shift: int = 0

    def __getitem__(self, part: slice) -> "Encoded":
        return Encoded(self.ids[part], self.encoding, self.first + (part.start or 0), self.shift)

    def overlapping(self, start: int, end: int) -> range:
        """Indices of the tokens that overlap characters, which are counted from before the shift.

        Raises:
            ValueError: For slow tokenizers.
        """
        encoding = self.encoding
        if encoding is None:
            raise ValueError("A slow tokenizer does not tell the characters of its tokens.")
        characters = range(max(start - self.shift, 0), end - self.shift)
        # Characters such as spaces may belong to no token.
        first = next((one for one in map(encoding.char_to_token, characters) if one is not None), None)
        if first is None:
            return range(0)
        last = next(one for one in map(encoding.char_to_token, reversed(characters)) if one is not None)
        # A character may be several tokens, and a token of spaces may have no characters.
        while first and (span := encoding.token_to_chars(first - 1)) is not None and span[1] > characters.start:
            first -= 1
        while (span := encoding.token_to_chars(last + 1)) is not None and span[0] < characters.stop:
            last += 1
        return range(max(first - self.first, 0), min(last + 1 - self.first, len(self.ids)))


class PrefixTokenizer:
    """Tokenize growing texts, such as a conversation up to each prompt and each answer.

    The first text is tokenized whole, since tokenizers may encode the first word differently and add a BOS token. Each
    longer one is tokenized whole too, and has these ids if they start with the ids of the text before it. If not, a
    token spans the end of the text before it, and what follows that end is tokenized alone.

    Mostly only the longest text is tokenized: a tokenizer divides a text at special tokens before all else, so that a
    shorter text has the same ids up to its last special token. What is left is compared alone: the tail, such as
    "<|im_start|>assistant" and a line break before an answer.

    Args:
        tokenizer: The tokenizer.
        template: The chat template that wrote the texts. The special tokens in it are looked for.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        self.tokenizer = tokenizer
        self._special: dict[str, int] = {}
        if tokenizer.is_fast and not _appends_tokens(tokenizer):
            named = {str(value) for value in tokenizer.special_tokens_map.values()}
            self._special = {
                token.content: number
                for number, token in tokenizer.added_tokens_decoder.items()
                # The others depend on the characters beside them.
                if token.special and not (token.normalized or token.single_word or token.lstrip or token.rstrip)
                if token.content in template or token.content in named
            }
        self._pattern = re.compile("|".join(map(re.escape, sorted(self._special, key=len, reverse=True))))

    def __call__(self, conversations: Sequence[Sequence[str]]) -> list[list[Encoded]]:
        """Return, for each text of each conversation, its tokens without those of the text before it.

        The tokenizer is called for all of them together, as most of the time of a call is not spent on its texts.

        Args:
            conversations: Growing texts: each starts with the one before it.
        """
        wholes = self._encode(texts[-1] for texts in conversations if texts) if self._special else {}
        tails = [self._tails(texts, wholes[texts[-1]]) if wholes and texts else None for texts in conversations]
        encoded = self._encode_all({tail for found in tails for _, tail in found or ()}, False)
        parts: list[list[Encoded] | None] = []
        for texts, found in zip(conversations, tails, strict=True):
            ends = [] if found is None else [(first, encoded[tail].ids) for first, tail in found]
            parts.append(None if found is None else _divide(wholes[texts[-1]], ends))
        rest = [text for texts, found in zip(conversations, parts, strict=True) if found is None for text in texts]
        alone = self._encode(rest)
        return [
            self._one_by_one(texts, alone) if found is None else found
            for texts, found in zip(conversations, parts, strict=True)
        ]

    def _encode(self, texts: Iterable[str]) -> dict[str, Encoded]:
        """The tokens of each text, with the special tokens around a text that does not start with BOS already."""
        bos = self.tokenizer.bos_token
        # The same condition as in ProcessorMixin.apply_chat_template.
        with_bos = {text: bos is not None and text.startswith(bos) for text in texts}
        starting = self._encode_all([text for text, given in with_bos.items() if given], False)
        return starting | self._encode_all([text for text, given in with_bos.items() if not given], True)

    def _encode_all(self, texts: Iterable[str], add_special_tokens: bool) -> dict[str, Encoded]:
        texts = list(texts)
        if not texts:
            return {}
        found = self.tokenizer(texts, add_special_tokens=add_special_tokens, return_attention_mask=False)
        encodings = found.encodings or [None] * len(texts)
        return dict(zip(texts, map(Encoded, found["input_ids"], encodings), strict=True))

    def _tails(self, texts: Sequence[str], whole: Encoded) -> list[tuple[int, str]] | None:
        """For each text but the last: the index of the last special token in it, and the text from there.

        None if there is no special token in a text, or the tokenizer did not see it as one.
        """
        encoding = whole.encoding
        if encoding is None:
            return None
        spans = [found.span() for found in self._pattern.finditer(texts[-1])]
        tails = []
        for text in texts[:-1]:
            before = bisect_right(spans, len(text), key=itemgetter(1))
            if not before:
                return None
            start, end = spans[before - 1]
            index = encoding.char_to_token(start)
            if index is None or encoding.token_to_chars(index) != (start, end):
                return None
            if whole.ids[index] != self._special[text[start:end]]:
                return None
            tails.append((index, text[start:]))
        return tails

    def _one_by_one(self, texts: Sequence[str], encoded: dict[str, Encoded]) -> list[Encoded]:
        """The parts of a conversation from the tokens of all its texts."""
        ids: list[int] = []
        parts = []
        before = 0
        for text in texts:
            part = encoded[text][len(ids) :]
            if encoded[text].ids[: len(ids)] != ids:
                alone = self._encode_all([text[before:]], False)[text[before:]]
                part = replace(alone, shift=before)
            parts.append(part)
            ids += part.ids
            before = len(text)
        return parts


def _divide(whole: Encoded, ends: list[tuple[int, list[int]]]) -> list[Encoded] | None:
    """Divide a text behind the tails of shorter ones; None if its ids differ from those of a tail.

    Args:
        whole: The tokens of the text.
        ends: Index of the first token and ids of each tail.
    """
    cuts = [0]
    for first, ids in ends:
        cuts.append(first + len(ids))
        if whole.ids[first : cuts[-1]] != ids:
            return None
    cuts.append(len(whole.ids))
    return [whole[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]


def _appends_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer adds, or may add, a token behind a text, such as EOS."""
    alone, added = (tokenizer("a", add_special_tokens=one)["input_ids"] for one in (False, True))
    return not alone or added[len(added) - len(alone) :] != alone
