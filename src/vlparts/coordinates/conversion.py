"""From the coordinate text of one family of models to that of another."""

import dataclasses
from collections.abc import Iterator, Sequence

from .codec import ImageSizes, encode
from .formats.registry import CoordinateFormat, get_format
from .grammars.base import Found
from .grammars.openpangu import PairGrammar
from .grammars.tagged import TaggedGrammar
from .regions import Region
from .resolving import CoordinateError, check_sizes, position_error, resolve
from .validation import check_choice

__all__ = ["convert"]


def convert(
    text: str,
    source: CoordinateFormat | str | None,
    target: CoordinateFormat | str | None,
    image_size: ImageSizes,
    *,
    on_error: str = "raise",
) -> str:
    """Write the regions of a text in another format. The text around them does not change.

    Consecutive regions with no more than the source's separator in between are written together, with the target's
    separator. Identities of objects are omitted if the target cannot express them; anything else that it cannot
    express is an error.

    Args:
        text: Any text in the source's format.
        source: The format to read, or its name; None for openPangu's.
        target: The format to write, or its name; None for openPangu's.
        image_size: (width, height) of the original image in pixels, or a sequence of them for several images.
        on_error: What to do with coordinates that cannot be read: "raise", or "keep" to leave their text unchanged.

    Returns:
        The text with its regions in the target's format.

    Raises:
        CoordinateError: With `.position` in `text`, at the first error under "raise", or at the first region that the
            target cannot express.
        ValueError: If a format or `on_error` is unknown.
    """
    source_format, target_format, sizes = get_format(source), get_format(target), check_sizes(image_size)
    check_choice(on_error, "on_error", ("raise", "keep"))
    if not isinstance(text, str):
        raise CoordinateError(f"`text` must be a str, got {type(text).__name__}.")
    found, errors = source_format.grammar.scan(text)
    kept, regions, errors = resolve(text, found, errors, sizes, source_format)
    if errors and on_error == "raise":
        raise position_error(errors[0])
    pieces, end = [], 0
    for start, stop, run in _runs(text, kept, regions, source_format):
        try:
            piece = _encode_run(run, image_size, target_format)
        except CoordinateError as error:
            raise CoordinateError(f"Position {start}: {error}", start) from None
        pieces += [text[end:start], piece]
        end = stop
    return "".join([*pieces, text[end:]])


def _encode_run(run: list[Region], image_size: ImageSizes, fmt: CoordinateFormat) -> str:
    """Write regions, without their identities if the format cannot express them."""
    try:
        return encode(run, image_size, fmt)
    except CoordinateError:
        if all(region.identity is None for region in run):
            raise
        return encode([dataclasses.replace(region, identity=None) for region in run], image_size, fmt)


def _runs(
    text: str, found: Sequence[Found], regions: Sequence[Region], fmt: CoordinateFormat
) -> Iterator[tuple[int, int, list[Region]]]:
    """Yield start and end in the text, and the regions, of each run of consecutive regions."""
    run: list[Region] = []
    start = end = 0
    unclosed = False
    for item, region in zip(found, regions, strict=True):
        first, last = item.outer
        if run and ((unclosed and first == item.start) or _is_separator(text[end:first], fmt.separator)):
            run.append(region)
        else:
            if run:
                yield start, end, run
            start, run = first, [region]
        # Of several regions within the same marks, the first has no closing marks and the others no opening ones.
        unclosed = last == item.end and not isinstance(fmt.grammar, (PairGrammar, TaggedGrammar))
        end = max(last, end)
    if run:
        yield start, end, run


def _is_separator(gap: str, separator: str) -> bool:
    """Whether the text between two regions is no more than the separator."""
    if not gap.strip(" "):
        return True
    return gap.strip() == separator.strip() and gap.count("\n") <= separator.count("\n")
