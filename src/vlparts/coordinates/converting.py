"""From the coordinate text of one family of models to that of another."""

import dataclasses
from collections.abc import Iterator, Sequence

from .codec import ImageSizes, check_choice, encode
from .formats.registry import CoordinateFormat, get_format
from .grammars.base import Found
from .grammars.openpangu import PairGrammar
from .grammars.tagged import TaggedGrammar
from .regions import Region
from .resolving import CoordinateError, check_sizes, resolve

__all__ = ["convert"]


def convert(
    text: str,
    source: CoordinateFormat | str | None,
    target: CoordinateFormat | str | None,
    image_size: ImageSizes,
    *,
    on_error: str = "raise",
) -> str:
    """Write the regions of a text in another format; the text around them stays.

    Regions that follow each other with no more than the source's separator in between are written together, with the
    target's separator. Identities of objects are left out where the target has no place for them; anything else that
    it cannot say is an error.

    Args:
        text: Any text in the source's format.
        source: The format to read, or its name; openPangu's where None.
        target: The format to write, or its name; openPangu's where None.
        image_size: (width, height) of the original image in pixels, or a sequence of them where there are several.
        on_error: What to do with what cannot be read: "raise" or "keep", which leaves its text as it is.

    Returns:
        The text with its regions in the target's format.

    Raises:
        CoordinateError: With `.position` in `text`, at the first thing that cannot be read under "raise", or at the
            first region that the target cannot write.
        ValueError: For an unknown format or policy.
    """
    read, write, sizes = get_format(source), get_format(target), check_sizes(image_size)
    check_choice(on_error, "on_error", ("raise", "keep"))
    if not isinstance(text, str):
        raise CoordinateError(f"text must be a str, got {type(text).__name__}")
    found, errors = read.grammar.scan(text)
    kept, regions, errors = resolve(text, found, errors, sizes, read)
    if errors and on_error == "raise":
        raise CoordinateError(f"position {errors[0].position}: {errors[0].reason}", errors[0].position)
    pieces, end = [], 0
    for start, stop, run in _runs(text, kept, regions, read):
        try:
            piece = _written(run, image_size, write)
        except CoordinateError as error:
            raise CoordinateError(f"position {start}: {error}", start) from None
        pieces += [text[end:start], piece]
        end = stop
    return "".join([*pieces, text[end:]])


def _written(run: list[Region], image_size: ImageSizes, fmt: CoordinateFormat) -> str:
    """Write regions, without their identities where the format has no place for these."""
    try:
        return encode(run, image_size, fmt)
    except CoordinateError:
        if all(region.identity is None for region in run):
            raise
        return encode([dataclasses.replace(region, identity=None) for region in run], image_size, fmt)


def _runs(
    text: str, found: Sequence[Found], regions: Sequence[Region], fmt: CoordinateFormat
) -> Iterator[tuple[int, int, list[Region]]]:
    """Yield where each run of regions starts and ends in the text, and the regions."""
    run: list[Region] = []
    start = end = 0
    unclosed = False
    for item, region in zip(found, regions, strict=True):
        first, last = item.outer
        if run and ((unclosed and first == item.start) or _together(text[end:first], fmt.separator)):
            run.append(region)
        else:
            if run:
                yield start, end, run
            start, run = first, [region]
        # Several regions within the same marks: the first has no closing ones, those that follow no opening ones.
        unclosed = last == item.end and not isinstance(fmt.grammar, (PairGrammar, TaggedGrammar))
        end = max(last, end)
    if run:
        yield start, end, run


def _together(gap: str, separator: str) -> bool:
    """Whether what stands between two regions is no more than the separator."""
    if not gap.strip(" "):
        return True
    return gap.strip() == separator.strip() and gap.count("\n") <= separator.count("\n")
