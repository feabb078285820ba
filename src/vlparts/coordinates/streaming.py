"""Decoding coordinates while they are generated."""

from collections.abc import Sequence

from .codec import ImageSizes
from .formats.registry import CoordinateFormat, get_format
from .grammars.base import DecodeError, Found
from .grammars.openpangu import PairGrammar
from .grammars.tagged import TaggedGrammar
from .regions import Region
from .resolving import CoordinateError, check_sizes, resolve
from .suspicion import can_be_suspicious, find_suspicions
from .thinking import ThinkingFilter
from .validation import check_choice

__all__ = ["StreamDecoder"]

SHORT_TEXT = 4096  # a text of up to this many characters is scanned again with every chunk
DROPPED = 256  # characters before the last final region that are dropped, at least
GROWTH = 8  # a longer text is scanned again after it has grown by 1 / GROWTH, so that the total work is linear


class StreamDecoder:
    """Decodes a text that arrives in chunks of any size.

    All regions together are those that `decode` returns for the whole text, in the same order, and so are the errors.
    A region is returned once no following text can change it: in most formats, after the first letter or digit,
    separator or region that follows it. If more than a few thousand characters have come since the last region, they
    are scanned again only after they have grown by an eighth, so that the work is linear in the length of the text.
    Suspicions (see [`decode`]) are added to the errors when the stream is closed.

    Args:
        image_size: (width, height) of the original image in pixels, or a sequence of them for several images.
        format: A format or its name; None for openPangu's.
        on_outside: See [`decode`].
        skip_thinking: See [`decode`]. Text before a first marker of reasoning may be reasoning that the prompt opened,
            so its regions are returned with that marker, or when the stream is closed.

    Raises:
        CoordinateError: If `image_size` is invalid.
        ValueError: If the format or `on_outside` is unknown.
    """

    def __init__(
        self,
        image_size: ImageSizes,
        format: CoordinateFormat | str | None = None,
        *,
        on_outside: str = "error",
        skip_thinking: bool = False,
    ) -> None:
        self._format, self._sizes = get_format(format), check_sizes(image_size)
        check_choice(on_outside, "on_outside", ("error", "clamp"))
        self._clamp = on_outside == "clamp"
        grammar = self._format.grammar
        # In these grammars a region depends on no earlier text but its label, so earlier text can be dropped.
        self._local = isinstance(grammar, (PairGrammar, TaggedGrammar))
        self._ends_late = isinstance(grammar, TaggedGrammar) and grammar.ends_late
        self._has_groups = isinstance(grammar, TaggedGrammar) and grammar.group_join is not None
        self._label_after: tuple[str, str] | None = None  # the marks of labels that follow their regions
        if isinstance(grammar, TaggedGrammar) and grammar.label_place == "after":
            self._label_after = grammar.label_open.strip(), grammar.label_close.strip()
        self._can_nest = isinstance(grammar, TaggedGrammar) and grammar.can_nest
        self._thinking = ThinkingFilter() if skip_thinking else None
        self._text, self._offset = "", 0  # the text that is kept, and its position in the whole text
        self._chunks: list[str] = []
        self._whole: list[str] | None = [] if can_be_suspicious(self._format) else None
        self._pending = 0  # characters in `_chunks`
        self._returned = [0, 0]  # numbers of regions and errors of the kept text that have been returned
        self._errors: list[DecodeError] = []
        self._closed = False

    @property
    def errors(self) -> tuple[DecodeError, ...]:
        """The errors so far, with positions in the whole text; once the stream is closed, also the suspicions."""
        return tuple(self._errors)

    def feed(self, chunk: str) -> list[Region]:
        """Add a chunk of text.

        Args:
            chunk: The text that follows the previous chunk.

        Returns:
            The regions that became final, in order.

        Raises:
            CoordinateError: If `chunk` is not a str, the stream is closed, or the format has no frame for the image of
                a region.
        """
        if not isinstance(chunk, str):
            raise CoordinateError(f"`chunk` must be a str, got {type(chunk).__name__}.")
        if self._closed:
            raise CoordinateError("The stream is closed; create another StreamDecoder for another text.")
        if self._thinking is not None:
            chunk = self._thinking.feed(chunk)
        self._add(chunk)
        if len(self._text) > SHORT_TEXT and self._pending * GROWTH < len(self._text):
            return []
        return self._scan(False)

    def close(self) -> list[Region]:
        """End the text.

        Returns:
            The remaining regions.
        """
        if self._closed:
            return []
        self._closed = True
        if self._thinking is not None:
            self._add(self._thinking.close())
        regions = self._scan(True)
        if self._whole is not None:
            text = "".join(self._whole)
            self._errors += find_suspicions(text, *self._format.grammar.scan(text), self._sizes, self._format)
        self._errors.sort(key=lambda error: error.position)
        return regions

    def _add(self, chunk: str) -> None:
        self._chunks.append(chunk)
        if self._whole is not None:
            self._whole.append(chunk)
        self._pending += len(chunk)

    def _scan(self, final: bool) -> list[Region]:
        """Scan the text and return the regions that are final and new."""
        self._text += "".join(self._chunks)
        self._chunks, self._pending = [], 0
        found, errors = self._format.grammar.scan(self._text)
        count = len(found) if final else max(self._final_count(found, errors), self._returned[0])
        limit = len(self._text) + 1 if final else self._error_limit(found, errors, count)
        final_errors = [item for item in errors if item.position < limit]
        new, new_errors = found[self._returned[0] : count], final_errors[self._returned[1] :]
        _, regions, new_errors = resolve(self._text, new, new_errors, self._sizes, self._format, self._clamp)
        self._errors += [DecodeError(item.position + self._offset, item.reason) for item in new_errors]
        self._returned = [count, max(len(final_errors), self._returned[1])]
        if self._local and count and not final:
            self._drop_text(found, final_errors, count)
        return list(regions)

    def _final_count(self, found: Sequence[Found], errors: Sequence[DecodeError]) -> int:
        """Return how many of the regions found cannot change any more."""
        if not found:
            return 0
        last = len(found) - 1
        if errors and errors[-1].position > found[last].start and not self._ends_late:
            return len(found)
        tail = self._text[found[last].outer[1] :]
        separator = self._format.separator
        separated = bool(separator) and separator in tail and not (self._can_nest and tail.isspace())
        if self._label_after is not None and found[last].label is None and self._awaits_label(tail):
            separated = False
        if self._local and (separated or (not self._ends_late and any(map(str.isalnum, tail)))):
            return len(found)
        while self._ends_late and self._has_groups and last and found[last].outer[0] == found[last - 1].outer[1]:
            last -= 1
        return last

    def _awaits_label(self, tail: str) -> bool:
        """Whether the text after a region without a label may become its label, which can be on a further line."""
        opening, closing = self._label_after or ("", "")
        text = tail.lstrip()
        if len(text) < max(len(opening), 1):
            return opening.startswith(text)
        return text.startswith(opening) and closing not in text[len(opening) :]

    def _error_limit(self, found: Sequence[Found], errors: Sequence[DecodeError], count: int) -> int:
        """Return the position before which errors cannot change any more; `count` regions are final.

        Text that ends within a region or mark says nothing about the text before it, which may end there.
        """
        begun = [item.position for item in errors if item.reason.startswith("unfinished")]
        limit = found[count - 1].outer[0] if count else 0
        if self._local:
            ended = [item.position for item in errors if not item.reason.startswith("unfinished")]
            limit = max([limit] + [item.start for item in found[-1:]] + ended[-1:])
        return min([limit] + begun[:1] + [item.start for item in found[count : count + 1]])

    def _drop_text(self, found: Sequence[Found], errors: Sequence[DecodeError], count: int) -> None:
        """Drop the text before the last final region, or before the first of its group."""
        first = count - 1
        if found[first].outer[0] < DROPPED:
            return
        if not self._is_read_alone(found[first]):
            while first and found[first].outer[0] == found[first - 1].outer[1]:
                first -= 1
        cut = found[first].outer[0]
        self._text, self._offset = self._text[cut:], self._offset + cut
        self._returned = [count - first, sum(item.position >= cut for item in errors)]

    def _is_read_alone(self, region: Found) -> bool:
        """Whether a region is read in the same way without the text before it, such as the label of its group."""
        start, end = region.outer
        found, _ = self._format.grammar.scan(self._text[start:end])
        return bool(found) and found[0][3:] == region[3:] and found[0].outer == (0, end - start)
