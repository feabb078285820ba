r"""Edits of a fast tokenizer's pipeline that split coordinate pairs into characters, and checks of the result.

A pipeline is the content of a `tokenizer.json`. Only its pre-tokenizer changes; if the pipeline prepends a space to
each text, none is prepended to a pair. The model, its vocabulary and its merges do not change.

Regular expressions are Oniguruma's, in which `\A` is the start of the piece that is split, and a look-behind has a
fixed length.
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

# A Unicode noncharacter, which marks the start of a text during one step.
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
    """Return the regular expression of one character inside a pair."""
    symbols = _symbols(digits)
    contexts: dict[str, list[str]] = {}
    for index, symbol in enumerate(symbols):
        before, after = "".join(symbols[: index + 1]), "".join(symbols[index + 1 :])
        # The character itself comes first, so that matching fails early at most positions of a text.
        contexts.setdefault(symbol, []).append(f"(?<={before})(?={after})")
    return "|".join(f"{symbol}(?:{'|'.join(around)})" for symbol, around in contexts.items())


def _split(pattern: str, behavior: str) -> Component:
    """Return a pre-tokenizer that splits at a regular expression."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}


def _metaspace(replacement: str, prepend_scheme: str) -> Component:
    """Return a pre-tokenizer that replaces spaces and may prepend one, without splitting."""
    return {"type": "Metaspace", "replacement": replacement, "prepend_scheme": prepend_scheme, "split": False}


def _flatten(component: Component | None, name: str) -> list[Component]:
    """Return the steps of a possibly nested sequence; `name` is the key of its steps."""
    if component is None:
        return []
    if component["type"] != "Sequence":
        return [component]
    return [step for child in component[name] for step in _flatten(child, name)]


def _join(steps: list[Component], name: str) -> Component:
    """Return one component that applies the steps in order."""
    return steps[0] if len(steps) == 1 else {"type": "Sequence", name: steps}


def _prepends(step: Component) -> bool:
    """Return whether the pre-tokenizer prepends a space to pieces that begin without one."""
    if step["type"] == "Metaspace":
        return step.get("prepend_scheme", "always") != "never"
    return step["type"] == "ByteLevel" and step.get("add_prefix_space", True)


def _pieces_of(step: Component) -> tuple[str, Component, list[Component]]:
    """Split a pre-tokenizer that prepends into the character, the prepending step, and the steps after it."""
    if step["type"] == "ByteLevel":
        return " ", _metaspace(" ", "always"), [{**step, "add_prefix_space": False}]
    space = step["replacement"]
    alone = _metaspace(space, step.get("prepend_scheme", "always"))
    return space, alone, [_split(re.escape(space), "MergedWithNext")] if step.get("split", True) else []


def _split_after_prepending(steps: list[Component], index: int, digits: int) -> list[Component]:
    """Return the steps with pairs split after step `index`, which prepends a space.

    Splitting before it would prepend a space to every character. Splitting after it has to distinguish a prepended
    space from one of the text.
    """
    pair = pair_pattern(digits)
    before, after = steps[:index], steps[index + 1 :]
    space, prepend, rest = _pieces_of(steps[index])
    cut = _split(_character_pattern(digits), "Isolated")
    remove = _split(rf"\A{re.escape(space)}(?={pair})", "Removed")
    if prepend["prepend_scheme"] == "first":
        # Only the first piece gets a space, so pairs can be isolated before.
        return [_split(pair, "Isolated"), *before, prepend, remove, cut, *rest, *after]
    if not before:
        real = _split(rf"\A[ {re.escape(space)}]+(?={pair})", "Isolated")
        return [real, prepend, remove, cut, *rest, *after]
    if [step["type"] for step in before] == ["WhitespaceSplit"] and steps[index]["type"] == "Metaspace":
        # Spaces are removed before they are prepended again, so the start of the text is marked beforehand.
        mark = [_metaspace(_BLANK, "never"), _metaspace(_MARK, "always"), _split(rf"\A{_MARK}(?!{pair})", "Removed")]
        remove = _split(rf"\A{re.escape(space)}{_MARK}", "Removed")
        return [*mark, *before, prepend, remove, cut, *rest, *after]
    kinds = [step["type"] for step in steps]
    raise ValueError(f"`tokenizer` has the pre-tokenizers {kinds}, for which splitting pairs is not implemented.")


def _leave_prefix_out(normalizer: Component | None, digits: int) -> Component | None:
    """Return the normalizer that prepends no space to a text which begins with a pair."""
    steps: list[Component] = []
    for step in _flatten(normalizer, "normalizers"):
        steps.append(step)
        if step["type"] == "Prepend":
            pattern = rf"\A{re.escape(step['prepend'])}(?={pair_pattern(digits)})"
            steps.append({"type": "Replace", "pattern": {"Regex": pattern}, "content": ""})
    return _join(steps, "normalizers") if steps else None


def split_pairs(pipeline: Component, digits: int) -> Component:
    """Return the pipeline in which every pair of codes is split into characters, and nothing else changes.

    The text is normalized as a whole, as before. Each character of a pair becomes a piece of its own; the text between
    two pairs passes through the pipeline like a separate text, except that no space is prepended to it.

    Args:
        pipeline: Content of a `tokenizer.json`; not modified.
        digits: Digits of a code.

    Raises:
        ValueError: If splitting is not implemented for the pre-tokenizers.
    """
    steps = _flatten(pipeline.get("pre_tokenizer"), "pretokenizers")
    prepending = next((index for index, step in enumerate(steps) if _prepends(step)), None)
    if prepending is None:
        steps = [_split(_character_pattern(digits), "Isolated"), *steps]
    else:
        steps = _split_after_prepending(steps, prepending, digits)
    normalizer = _leave_prefix_out(pipeline.get("normalizer"), digits)
    return {**pipeline, "normalizer": normalizer, "pre_tokenizer": _join(steps, "pretokenizers")}


def _replace(pattern: str, content: str) -> Component:
    """Return a decoder that replaces a regular expression."""
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def decode_word_ends(pipeline: Component) -> Component:
    """Return the pipeline whose decoder replaces the end-of-word suffix of a byte-level model by a space.

    CLIP's tokenizer does this in Python, in a method that is not part of its file.
    """
    decoder, suffix = pipeline.get("decoder"), pipeline["model"].get("end_of_word_suffix")
    if not suffix or decoder is None or decoder["type"] != "ByteLevel":
        return pipeline
    steps = [decoder, _replace(re.escape(suffix), " "), _replace(r"\A\s+|\s+\z", "")]
    return {**pipeline, "decoder": {"type": "Sequence", "decoders": steps}}


def close_gaps(pipeline: Component, written: str, digits: int) -> Component:
    """Return the pipeline whose decoder removes the spaces of pairs, for decoders that join tokens by spaces.

    Args:
        pipeline: Content of a `tokenizer.json`; not modified.
        written: One pair as its decoder writes it, with spaces, for example `( 1 2 3, 4 5 6 )`.
        digits: Digits of a code.
    """
    symbols = ["[0-9]" if one.isdigit() else rf"\{one}" if one in "()" else one for one in written]
    gaps = [
        f"(?<={''.join(symbols[:index])}) (?={''.join(symbols[index + 1 :])})"
        for index, one in enumerate(symbols)
        if one == " "
    ]
    pair = "".join(_symbols(digits))
    # Without a decoder, tokens are joined by spaces; this decoder does the same, with a prefix that no token has.
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
            f"`tokenizer` has no token for the single characters {missing}, which pairs are written with."
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
        raise ValueError(f"The tokenizer writes two pairs with {sorted(lengths)} tokens, expected {4 * digits + 7}.")
    opening, comma, closing = (found["0"][index] for index in (0, digits + 1, 2 * digits + 2))
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
    """Raise ValueError if a pair's tokens depend on the adjacent text."""
    pair = pair_of("0", digits)
    expected = encode(pair)
    for text in ("a", "1", "(", ",", ".", "\n", "\u6f22", "\u0301"):
        before, after = encode(text + pair), encode(pair + text)
        if before[-len(expected) :] != expected or after[: len(expected)] != expected:
            raise ValueError(f"The tokenizer writes {text + pair!r} as {before}, but the pair alone as {expected}.")
