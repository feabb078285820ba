"""Options of a request to a server, and the logits processors that they ask for.

A server applies a logits processor to the tokens that a request has generated, without its prompt. Options are what a
client sent: they are checked before the request is accepted, and nothing that a client sends may stop the server.
"""

from collections.abc import Mapping
from typing import Any

from ..generation import CoordinateLogitsProcessor, WindowedNGramLogitsProcessor
from ..generation.constrained_coordinates import MODES, PAIRS_OF_KIND
from ..parts.coordinate_tokens import CoordinateTokenIds

__all__ = [
    "COORDINATE_OPTIONS",
    "NGRAM_OPTIONS",
    "coordinate_processor",
    "ngram_processor",
    "read_coordinate_options",
]

NGRAM_OPTIONS = ("no_repeat_ngram_size", "no_repeat_ngram_window_size", "no_repeat_ngram_allowed_ids")
COORDINATE_OPTIONS = (
    "coordinate_mode",
    "coordinate_kinds",
    "coordinate_levels",
    "coordinate_ordered",
    "coordinate_max_label_tokens",
    "coordinate_forbidden_ids",
)

# Numbers are put into tensors and slices, which refuse larger ones.
_LARGEST = 2**31 - 1


def ngram_processor(options: Mapping[str, Any] | None) -> WindowedNGramLogitsProcessor | None:
    """Return the ban on repeated n-grams that a request asks for.

    Args:
        options: Options of the request by name; those of other extensions are ignored. `no_repeat_ngram_size`, the
            length n, 0 for no ban; `no_repeat_ngram_window_size`, the number of tokens at the end of the answer in
            which n-grams are compared; `no_repeat_ngram_allowed_ids`, a list of tokens that are never banned.

    Returns:
        The processor, or None if no ban is asked for.

    Raises:
        ValueError: If an option is unknown or out of range, or only one of the two numbers is given.
    """
    given = _take(options, "no_repeat_ngram_", NGRAM_OPTIONS)
    if not given:
        return None
    size, window, allowed = (given.get(name) for name in NGRAM_OPTIONS)
    if size is None:
        name = next(iter(given))
        raise ValueError(f"`{name}` needs `{NGRAM_OPTIONS[0]}`, got {given[name]!r} without it.")
    if size == 0 and _is_integer(size):
        return None
    _check_integer(NGRAM_OPTIONS[0], size, 2)
    if window is None:
        raise ValueError(f"`{NGRAM_OPTIONS[0]}` needs `{NGRAM_OPTIONS[1]}`, got {size!r} without it.")
    _check_integer(NGRAM_OPTIONS[1], window, size)
    return WindowedNGramLogitsProcessor(size, window, _check_ids(NGRAM_OPTIONS[2], allowed))


def read_coordinate_options(options: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the arguments of a [`CoordinateLogitsProcessor`] that a request asks for, without a tokenizer.

    Args:
        options: Options of the request by name; those of other extensions are ignored. `coordinate_mode`, "free" or
            "answer"; and the others of `COORDINATE_OPTIONS`, which are the arguments of that name. Kinds and ids are
            lists, `coordinate_ordered` is true, false, 1 or 0.

    Returns:
        The keyword arguments, or None if no constraint is asked for.

    Raises:
        ValueError: If an option is unknown or out of range, or others are given without `coordinate_mode`.
    """
    given = _take(options, "coordinate_", COORDINATE_OPTIONS)
    if not given:
        return None
    if "coordinate_mode" not in given:
        name = next(iter(given))
        raise ValueError(f"`{name}` needs `coordinate_mode`, got {given[name]!r} without it.")
    mode, kinds = given["coordinate_mode"], given.get("coordinate_kinds")
    if mode not in MODES:
        raise ValueError(f"`coordinate_mode` must be one of {MODES}, got {mode!r}.")
    if kinds is not None and not _are_kinds(kinds):
        raise ValueError(
            f"`coordinate_kinds` must be a list of distinct names of {list(PAIRS_OF_KIND)}, got {kinds!r}."
        )
    levels, ordered = given.get("coordinate_levels"), given.get("coordinate_ordered", True)
    if levels is not None:
        _check_integer("coordinate_levels", levels, 1)
    if not isinstance(ordered, int) or ordered not in (0, 1):
        raise ValueError(f"`coordinate_ordered` must be true, false, 1 or 0, got {ordered!r}.")
    return {
        "mode": mode,
        "kinds": kinds,
        "levels": levels,
        "ordered": bool(ordered),
        "max_label_tokens": _check_integer(
            "coordinate_max_label_tokens", given.get("coordinate_max_label_tokens", 0), 0
        ),
        "forbidden": _check_ids("coordinate_forbidden_ids", given.get("coordinate_forbidden_ids")),
    }


def coordinate_processor(
    options: Mapping[str, Any] | None,
    ids: CoordinateTokenIds,
    eos_token_id: list[int],
    vocab_size: int,
    max_tokens: int | None = None,
) -> CoordinateLogitsProcessor | None:
    """Return the constraint on coordinates that a request asks for.

    Args:
        options: Options of the request, as of [`read_coordinate_options`].
        ids: The tokens of coordinates of the served tokenizer.
        eos_token_id: Ids that end an answer.
        vocab_size: Number of ids that the scores cover.
        max_tokens: Number of tokens after which the server stops. Regions that would not fit are not started.

    Raises:
        ValueError: As [`read_coordinate_options`], and if an option does not fit the tokenizer: kinds without markers,
            more levels than codes, ids that the vocabulary does not have, or an answer longer than `max_tokens`.
    """
    arguments = read_coordinate_options(options)
    if arguments is None:
        return None
    largest = max(arguments["forbidden"], default=0)
    if largest >= vocab_size:
        raise ValueError(f"`coordinate_forbidden_ids` must be below {vocab_size}, got {largest}.")
    return CoordinateLogitsProcessor(ids, 0, eos_token_id, max_length=max_tokens, **arguments)


def _take(options: Mapping[str, Any] | None, prefix: str, known: tuple[str, ...]) -> dict[str, Any]:
    """Return the options whose name has the prefix, without those that are None."""
    given = {name: value for name, value in (options or {}).items() if name.startswith(prefix) and value is not None}
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(f"`{unknown[0]}` is unknown; options of this kind are {', '.join(known)}.")
    return given


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_integer(name: str, value: Any, lowest: int) -> int:
    if not _is_integer(value) or not lowest <= value <= _LARGEST:
        raise ValueError(f"`{name}` must be an integer from {lowest} to {_LARGEST}, got {value!r}.")
    return value


def _check_ids(name: str, value: Any) -> tuple[int, ...]:
    """Return a list of token ids as a tuple; () for None."""
    ids = [] if value is None else value
    if not isinstance(ids, list | tuple) or not all(_is_integer(one) and 0 <= one <= _LARGEST for one in ids):
        raise ValueError(f"`{name}` must be a list of token ids, got {value!r}.")
    return tuple(ids)


def _are_kinds(kinds: Any) -> bool:
    if not isinstance(kinds, list | tuple) or not kinds or not all(isinstance(kind, str) for kind in kinds):
        return False
    return set(kinds) <= PAIRS_OF_KIND.keys() and len(set(kinds)) == len(kinds)
