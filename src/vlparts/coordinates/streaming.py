"""Reading coordinates while they are generated."""

from collections.abc import Sequence

from .codec import ImageSizes, check_choice
from .formats.registry import CoordinateFormat, get_format
from .grammars.base import DecodeError, Found
from .grammars.openpangu import PairGrammar
from .grammars.tagged import TaggedGrammar
from .regions import Region
from .resolving import CoordinateError, check_sizes, resolve

__all__ = ["StreamDecoder"]

_SHORT = 4096  # a text of so many characters is read anew at each piece
_SHARE = 8  # a longer one only when it has grown by this share, so that all the work stays linear


class StreamDecoder:
    """Reads a text that arrives in pieces of any size.

    All regions together are those that `decode` finds in the whole text, in the same order, and so are the errors. A
    region is given out once nothing that may follow can change it: in most formats when the first letter or digit, the
    separator or another region follows it. Texts of more than a few thousand characters since the last region are
    looked at only once they have grown by an eighth, so that the work is linear in the text.

    Args:
        image_size: (width, height) of the original image in pixels, or a sequence of them where there are several.
        format: A format or its name; openPangu's where None.
        on_outside: As in `decode`.

    Raises:
        CoordinateError: If the size is none, or the format knows no frame for it.
        ValueError: For an unknown format or policy.
    """

    def __init__(
        self, image_size: ImageSizes, format: CoordinateFormat | str | None = None, *, on_outside: str = "error"
    ) -> None:
        self._format, self._sizes = get_format(format), check_sizes(image_size)
        check_choice(on_outside, "on_outside", ("error", "clamp"))
        self._clamp = on_outside == "clamp"
        grammar = self._format.grammar
        # Grammars whose regions depend on nothing before them but their label: what is done with can be forgotten.
        self._local = isinstance(grammar, (PairGrammar, TaggedGrammar))
        self._late = isinstance(grammar, TaggedGrammar) and grammar.ends_late
        self._text, self._base = "", 0
        self._pieces: list[str] = []
        self._waiting = 0
        self._given = [0, 0]  # of what is found in the present text: regions and errors that are given out
        self._errors: list[DecodeError] = []
        self._closed = False

    @property
    def errors(self) -> tuple[DecodeError, ...]:
        """What could not be read so far, with positions in the whole text."""
        return tuple(self._errors)

    def feed(self, chunk: str) -> list[Region]:
        """Take a further piece of the text.

        Args:
            chunk: The piece.

        Returns:
            The regions that became certain, in order.

        Raises:
            CoordinateError: If `chunk` is no str, or after `close`.
        """
        if not isinstance(chunk, str):
            raise CoordinateError(f"chunk must be a str, got {type(chunk).__name__}")
        if self._closed:
            raise CoordinateError("the stream is closed: begin another for another text")
        self._pieces.append(chunk)
        self._waiting += len(chunk)
        if len(self._text) > _SHORT and self._waiting * _SHARE < len(self._text):
            return []
        return self._read(False)

    def close(self) -> list[Region]:
        """End the text.

        Returns:
            The regions that were not given out yet.
        """
        if self._closed:
            return []
        self._closed = True
        return self._read(True)

    def _read(self, final: bool) -> list[Region]:
        """Read what there is, and return what is certain and new."""
        self._text += "".join(self._pieces)
        self._pieces, self._waiting = [], 0
        found, wrong = self._format.grammar.scan(self._text)
        count = len(found) if final else max(self._certain(found, wrong), self._given[0])
        limit = len(self._text) + 1 if final else self._error_limit(found, wrong, count)
        sure = [item for item in wrong if item.position < limit]
        new, errors = found[self._given[0] : count], sure[self._given[1] :]
        _, regions, errors = resolve(self._text, new, errors, self._sizes, self._format, self._clamp)
        self._errors += [DecodeError(item.position + self._base, item.reason) for item in errors]
        self._given = [count, max(len(sure), self._given[1])]
        if self._local and count and len(self._text) > _SHORT:
            self._forget(found, sure, count)
        return list(regions)

    def _certain(self, found: Sequence[Found], wrong: Sequence[DecodeError]) -> int:
        """Return how many of the regions found cannot change any more."""
        if not found:
            return 0
        last = len(found) - 1
        if wrong and wrong[-1].position > found[last].start and not self._late:
            return len(found)
        tail = self._text[found[last].outer[1] :]
        separator = self._format.separator
        parted = bool(separator) and separator in tail
        if self._local and (parted or (not self._late and any(map(str.isalnum, tail)))):
            return len(found)
        while self._late and last and found[last].outer[0] == found[last - 1].outer[1]:
            last -= 1
        return last

    def _error_limit(self, found: Sequence[Found], wrong: Sequence[DecodeError], count: int) -> int:
        """Return the place before which errors cannot change any more: that of something certain behind them."""
        limit = found[count - 1].outer[0] if count else 0
        if self._local:
            limit = max([limit] + [item.start for item in found[-1:]] + [item.position for item in wrong[-1:]])
        return min(limit, found[count].start) if count < len(found) else limit

    def _forget(self, found: Sequence[Found], errors: Sequence[DecodeError], count: int) -> None:
        """Drop the text before the last region that was given out, or before the first with the same label."""
        first = count - 1
        while first and found[first].outer[0] == found[first - 1].outer[1]:
            first -= 1
        cut = found[first].outer[0]
        self._text, self._base = self._text[cut:], self._base + cut
        self._given = [count - first, sum(item.position >= cut for item in errors)]
