"""From the coordinate text of one family of models to that of another."""

import dataclasses
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence

from .codec import ImageSizes, encode
from .formats.registry import CoordinateFormat, get_format
from .grammars.base import DecodeError, Found, ReportsLoss
from .grammars.json_fields import NamedJsonGrammar
from .grammars.json_objects import JsonGrammar
from .grammars.openpangu import PairGrammar
from .grammars.tagged import TaggedGrammar
from .regions import Region
from .resolving import CoordinateError, check_sizes, position_error, resolve
from .suspicion import find_suspicions, warn_of_suspicions
from .thinking import without_thinking
from .validation import check_choice

__all__ = ["convert", "lost_parts"]


def convert(
    text: str,
    source: CoordinateFormat | str | None,
    target: CoordinateFormat | str | None,
    image_size: ImageSizes,
    *,
    on_error: str = "raise",
    skip_thinking: bool = False,
) -> str:
    """Write the regions of a text in another format. The text around them does not change.

    Consecutive regions with no more than the source's separator in between are written together, with the target's
    separator. From JSON to JSON, the further keys of an object come along, in order, and their values character for
    character. Identities of objects are omitted if the target cannot express them; anything else that it cannot
    express is an error, and so is text of a region that would be lost: a key of a JSON object if the target has no
    place for it, if its value contains further regions, or if it has numbers under a name for coordinates, such as
    "width", which would not be converted; an attribute of a tag; other items in the list of the regions. Text that
    only looks like coordinates of the source's format (see [`decode`]) does not change; under "raise", a
    `CoordinateWarning` names it.

    Args:
        text: Any text in the source's format.
        source: The format to read, or its name; None for openPangu's.
        target: The format to write, or its name; None for openPangu's.
        image_size: (width, height) of the original image in pixels, or a sequence of them for several images.
        on_error: What to do with coordinates that cannot be read: "raise", or "keep" to leave their text unchanged.
            With "keep", regions with text that would be lost stay unchanged too, and so does their list.
        skip_thinking: Whether to convert only the answer; reasoning (see [`decode`]) stays as it is. Reasoning between
            the regions of one list would be lost, which is an error.

    Returns:
        The text with its regions in the target's format.

    Raises:
        CoordinateError: With `.position` in `text`, at the first error or the first text that would be lost under
            "raise", or at the first region that the target cannot express.
        ValueError: If a format or `on_error` is unknown.
    """
    source_format, target_format, sizes = get_format(source), get_format(target), check_sizes(image_size)
    check_choice(on_error, "on_error", ("raise", "keep"))
    if not isinstance(text, str):
        raise CoordinateError(f"`text` must be a str, got {type(text).__name__}.")
    original, text = text, without_thinking(text) if skip_thinking else text
    found, malformed = source_format.grammar.scan(text)
    kept, regions, errors = resolve(text, found, malformed, sizes, source_format)
    if errors and on_error == "raise":
        raise position_error(errors[0])
    lost = lost_parts(text, source_format, target_format)
    if lost and on_error == "raise":
        raise position_error(lost[0])
    if on_error == "raise":
        warn_of_suspicions(find_suspicions(text, found, malformed, sizes, source_format), 2)
    is_json = isinstance(source_format.grammar, (JsonGrammar, NamedJsonGrammar))
    read = dict(zip((item.start for item in kept), regions, strict=True))
    positions = [part.position for part in lost]
    pieces, end = [], 0
    for start, stop, run in _runs(text, found if is_json else kept, source_format):
        values = [read[item.start] for item in run if item.start in read]
        if len(values) < len(run) or bisect_left(positions, start) < bisect_right(positions, stop):
            continue
        if original[start:stop] != text[start:stop]:
            if on_error == "raise":
                raise CoordinateError(f"Position {start}: reasoning between regions would be lost.", start)
            continue
        try:
            piece = _encode_run(values, image_size, target_format)
        except CoordinateError as error:
            raise CoordinateError(f"Position {start}: {error}", start) from None
        pieces += [original[end:start], piece]
        end = stop
    return "".join([*pieces, original[end:]])


def lost_parts(text: str, fmt: CoordinateFormat, target: CoordinateFormat) -> list[DecodeError]:
    """Return the parts of regions in a text that are lost when the regions are written in another format, in order."""
    return fmt.grammar.lost(text, target.grammar) if isinstance(fmt.grammar, ReportsLoss) else []


def _encode_run(run: list[Region], image_size: ImageSizes, fmt: CoordinateFormat) -> str:
    """Write regions, without their identities if the format cannot express them."""
    try:
        return encode(run, image_size, fmt)
    except CoordinateError:
        if all(region.identity is None for region in run):
            raise
        return encode([dataclasses.replace(region, identity=None) for region in run], image_size, fmt)


def _runs(text: str, found: Sequence[Found], fmt: CoordinateFormat) -> Iterator[tuple[int, int, list[Found]]]:
    """Yield start and end in the text, and the regions, of each run of consecutive regions."""
    run: list[Found] = []
    start = end = 0
    is_open = False
    is_markup = not isinstance(fmt.grammar, (PairGrammar, TaggedGrammar, JsonGrammar, NamedJsonGrammar))
    for item in found:
        first, last = item.outer
        opens, closes = _list_marks(text, item, fmt)
        is_next = (is_open and first == item.start) or _is_separator(text[end:first], fmt)
        if run and is_next and not opens:
            run.append(item)
        else:
            if run:
                yield start, end, run
            start, run = first, [item]
        # Of several regions within the same marks, the first has no closing marks and the others no opening ones.
        is_open = is_markup and last == item.end
        end = max(last, end)
        if closes:
            yield start, end, run
            run = []
    if run:
        yield start, end, run


def _list_marks(text: str, item: Found, fmt: CoordinateFormat) -> tuple[bool, bool]:
    """Whether the span of a region includes the opening and the closing marks of a JSON list."""
    first, last = item.outer
    if isinstance(fmt.grammar, NamedJsonGrammar):
        return first < item.start, last > item.end
    if isinstance(fmt.grammar, JsonGrammar):
        return text[first] != "{", text[last - 1] != "}"
    return False, False


def _is_separator(gap: str, fmt: CoordinateFormat) -> bool:
    """Whether the text between two regions is no more than the separator."""
    if not gap.strip(" "):
        return True
    if gap.strip() != fmt.separator.strip():
        return False
    is_json = isinstance(fmt.grammar, (JsonGrammar, NamedJsonGrammar))
    return is_json or gap.count("\n") <= fmt.separator.count("\n")
