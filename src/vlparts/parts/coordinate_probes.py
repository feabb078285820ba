"""Whether a pipeline writes coordinate pairs as it must, found out by writing some."""

from collections.abc import Callable
from typing import Any

__all__ = ["check_characters", "check_surroundings", "pair_ids", "pair_of"]


def check_characters(model: Any, stored: dict[str, Any]) -> None:
    """Raise ValueError if a character of a pair has no token of its own."""
    unknown = stored.get("unk_id")
    if stored.get("unk_token") is not None:
        unknown = model.token_to_id(stored["unk_token"])
    tokens = {character: model.tokenize(character) for character in "0123456789(),"}
    missing = [one for one, found in tokens.items() if len(found) != 1 or found[0].id == unknown]
    if missing:
        raise ValueError(
            f"`tokenizer` has no token for the single characters {missing}, with which pairs are written."
        )


def pair_of(digit: str, digits: int) -> str:
    """Return the pair whose codes repeat one digit."""
    return f"({digit * digits},{digit * digits})"


def pair_ids(encode: Callable[[str], list[int]], digits: int) -> tuple[int, tuple[int, ...], int, int]:
    """Return the ids of "(", of the ten digits, of "," and of ")".

    Raises:
        ValueError: If two pairs with a comma between them are not written with these tokens alone.
    """
    found = {digit: encode(f"{pair_of(digit, digits)},{pair_of(digit, digits)}") for digit in "0123456789"}
    lengths = {len(ids) for ids in found.values()}
    if lengths != {4 * digits + 7}:
        raise ValueError(
            f"The tokenizer writes two pairs in {sorted(lengths)} tokens, where {4 * digits + 7} are right."
        )
    opening, comma, closing = (found["0"][place] for place in (0, digits + 1, 2 * digits + 2))
    values = []
    for digit, ids in found.items():
        value = ids[1]
        pair = [opening, *[value] * digits, comma, *[value] * digits, closing]
        if ids != [*pair, comma, *pair]:
            raise ValueError(
                f"The tokenizer writes two pairs of the digit {digit} as {ids}, not character by character."
            )
        values.append(value)
    return opening, tuple(values), comma, closing


def check_surroundings(encode: Callable[[str], list[int]], digits: int) -> None:
    """Raise ValueError if a pair's tokens depend on what stands beside it."""
    pair = pair_of("0", digits)
    expected = encode(pair)
    for text in ("a", "1", "(", ",", ".", "\n", "\u6f22", "\u0301"):
        before, after = encode(text + pair), encode(pair + text)
        if before[-len(expected) :] != expected or after[: len(expected)] != expected:
            raise ValueError(f"The tokenizer writes {text + pair!r} as {before}, where the pair alone is {expected}.")
