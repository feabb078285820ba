r"""How a fast tokenizer's pipeline is changed so that a coordinate pair is always cut into its characters.

A pipeline is the content of a `tokenizer.json`. Only its pre-tokenizer changes, and where the pipeline writes a space
in front of each text, that space is left out before a pair. The model, its vocabulary and its merges stay.

Regular expressions are Oniguruma's, in which `\A` is the start of the piece that is split, and a look-behind has a
fixed length.

Whether a pipeline writes coordinate pairs as it must, found out by writing some.
"""

import re
from collections.abc import Callable
from typing import Any

__all__ = [
    "check_characters",
    "check_surroundings",
    "close_gaps",
    "decode_word_ends",
    "pair_ids",
    "pair_of",
    "pair_pattern",
    "split_pairs",
]


Component = dict[str, Any]

# A code point that Unicode reserves for use inside programs: it marks the start of a text for one step.
_MARK = "\ufdd0"
_BLANK = "\t"


def _symbols(digits: int) -> list[str]:
    """Return the patterns of a pair's characters, in order."""
    code = ["[0-9]"] * digits
    return [r"\(", *code, ",", *code, r"\)"]


def pair_pattern(digits: int) -> str:
    """Return the regular expression of a pair `(ddd,ddd)` of codes with the given number of digits."""
    return rf"\([0-9]{{{digits}}},[0-9]{{{digits}}}\)"


def _character_pattern(digits: int) -> str:
    """Return the regular expression of one character of a pair where it stands."""
    symbols = _symbols(digits)
    places: dict[str, list[str]] = {}
    for index, symbol in enumerate(symbols):
        before, after = "".join(symbols[: index + 1]), "".join(symbols[index + 1 :])
        # The character itself comes first, so that most places of a text are left at once.
        places.setdefault(symbol, []).append(f"(?<={before})(?={after})")
    return "|".join(f"{symbol}(?:{'|'.join(around)})" for symbol, around in places.items())


def _split(pattern: str, behavior: str) -> Component:
    """Return a pre-tokenizer that splits at a regular expression."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}


def _metaspace(replacement: str, prepend_scheme: str) -> Component:
    """Return a pre-tokenizer that replaces spaces and may prepend one, without splitting."""
    return {"type": "Metaspace", "replacement": replacement, "prepend_scheme": prepend_scheme, "split": False}


def _flatten(component: Component | None, name: str) -> list[Component]:
    """Return the steps of a sequence, however nested; `name` is the key of its steps."""
    if component is None:
        return []
    if component["type"] != "Sequence":
        return [component]
    return [step for child in component[name] for step in _flatten(child, name)]


def _join(steps: list[Component], name: str) -> Component:
    """Return one component that takes the steps in order."""
    return steps[0] if len(steps) == 1 else {"type": "Sequence", name: steps}


def _prepends(step: Component) -> bool:
    """Tell whether the pre-tokenizer writes a space in front of pieces that begin without one."""
    if step["type"] == "Metaspace":
        return step.get("prepend_scheme", "always") != "never"
    return step["type"] == "ByteLevel" and step.get("add_prefix_space", True)


def _pieces_of(step: Component) -> tuple[str, Component, list[Component]]:
    """Take a pre-tokenizer that prepends apart: the character, prepending alone, and what it does afterwards."""
    if step["type"] == "ByteLevel":
        return " ", _metaspace(" ", "always"), [{**step, "add_prefix_space": False}]
    space = step["replacement"]
    alone = _metaspace(space, step.get("prepend_scheme", "always"))
    return space, alone, [_split(re.escape(space), "MergedWithNext")] if step.get("split", True) else []


def _split_after_prepending(steps: list[Component], place: int, digits: int) -> list[Component]:
    """Return the steps with pairs cut after the step at `place`, which prepends a space.

    Cutting before it would give every character a space of its own; cutting after it has to tell a prepended space
    from one of the text.
    """
    pair = pair_pattern(digits)
    before, after = steps[:place], steps[place + 1 :]
    space, prepend, rest = _pieces_of(steps[place])
    cut = _split(_character_pattern(digits), "Isolated")
    remove = _split(rf"\A{re.escape(space)}(?={pair})", "Removed")
    if prepend["prepend_scheme"] == "first":
        # Nothing is prepended after the first piece, so pairs can be set apart before.
        return [_split(pair, "Isolated"), *before, prepend, remove, cut, *rest, *after]
    if not before:
        real = _split(rf"\A[ {re.escape(space)}]+(?={pair})", "Isolated")
        return [real, prepend, remove, cut, *rest, *after]
    if [step["type"] for step in before] == ["WhitespaceSplit"] and steps[place]["type"] == "Metaspace":
        # Spaces are lost before they are written again, so the start of the text is marked beforehand.
        mark = [_metaspace(_BLANK, "never"), _metaspace(_MARK, "always"), _split(rf"\A{_MARK}(?!{pair})", "Removed")]
        remove = _split(rf"\A{re.escape(space)}{_MARK}", "Removed")
        return [*mark, *before, prepend, remove, cut, *rest, *after]
    kinds = [step["type"] for step in steps]
    raise ValueError(f"`tokenizer` has the pre-tokenizers {kinds}, in which no place for splitting pairs is known.")


def _leave_prefix_out(normalizer: Component | None, digits: int) -> Component | None:
    """Return the normalizer without the space that it writes in front of a text, where a pair begins the text."""
    steps: list[Component] = []
    for step in _flatten(normalizer, "normalizers"):
        steps.append(step)
        if step["type"] == "Prepend":
            pattern = rf"\A{re.escape(step['prepend'])}(?={pair_pattern(digits)})"
            steps.append({"type": "Replace", "pattern": {"Regex": pattern}, "content": ""})
    return _join(steps, "normalizers") if steps else None


def split_pairs(pipeline: Component, digits: int) -> Component:
    """Return the pipeline in which every pair of codes is cut into its characters, and nothing else changes.

    The text is normalized as before, as a whole. In the result each character of a pair is a piece of its own; the
    text between two pairs goes on through the pipeline like a text that begins and ends there, except that a space
    which the pipeline writes in front of a text is not written in front of it.

    Args:
        pipeline: Content of a `tokenizer.json`. It is not changed.
        digits: Digits of a code.

    Raises:
        ValueError: If the pre-tokenizers leave no place to cut.
    """
    steps = _flatten(pipeline.get("pre_tokenizer"), "pretokenizers")
    place = next((index for index, step in enumerate(steps) if _prepends(step)), None)
    if place is None:
        steps = [_split(_character_pattern(digits), "Isolated"), *steps]
    else:
        steps = _split_after_prepending(steps, place, digits)
    normalizer = _leave_prefix_out(pipeline.get("normalizer"), digits)
    return {**pipeline, "normalizer": normalizer, "pre_tokenizer": _join(steps, "pretokenizers")}


def _replace(pattern: str, content: str) -> Component:
    """Return a decoder that replaces a regular expression."""
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def decode_word_ends(pipeline: Component) -> Component:
    """Return the pipeline whose decoder writes a space for a word's end, if the model marks ends of words in bytes.

    CLIP's tokenizer does this in Python, in a wrapped method that is not part of its file.
    """
    decoder, suffix = pipeline.get("decoder"), pipeline["model"].get("end_of_word_suffix")
    if not suffix or decoder is None or decoder["type"] != "ByteLevel":
        return pipeline
    steps = [decoder, _replace(re.escape(suffix), " "), _replace(r"\A\s+|\s+\z", "")]
    return {**pipeline, "decoder": {"type": "Sequence", "decoders": steps}}


def close_gaps(pipeline: Component, written: str, digits: int) -> Component:
    """Return the pipeline whose decoder writes pairs without spaces, where tokens are words and spaces join them.

    Args:
        pipeline: Content of a `tokenizer.json`. It is not changed.
        written: How its decoder writes one pair, with spaces, for example `( 1 2 3, 4 5 6 )`.
        digits: Digits of a code.
    """
    symbols = ["[0-9]" if one.isdigit() else rf"\{one}" if one in "()" else one for one in written]
    gaps = [
        f"(?<={''.join(symbols[:index])}) (?={''.join(symbols[index + 1 :])})"
        for index, one in enumerate(symbols)
        if one == " "
    ]
    pair = "".join(_symbols(digits))
    # Without a decoder, tokens are joined by spaces: so does this one, with a prefix that no token has.
    joined = {"type": "WordPiece", "prefix": _MARK, "cleanup": False}
    steps = _flatten(pipeline.get("decoder"), "decoders") or [joined]
    closing = [{"type": "Fuse"}, _replace("|".join(gaps), ""), _replace(f"(?<={pair}) ?, ?(?={pair})", ",")]
    return {**pipeline, "decoder": {"type": "Sequence", "decoders": [*steps, *closing]}}


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
