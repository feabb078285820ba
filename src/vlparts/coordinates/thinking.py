"""Reasoning in answers of models, replaced by line breaks, in a whole text or in one that arrives in chunks."""

import re

__all__ = ["THINKING_MARKERS", "ThinkingFilter", "without_thinking"]

THINKING_MARKERS = (("<think>", "</think>"), ("[unused16]", "[unused17]"))

_ENDS = dict(THINKING_MARKERS)
_MARKERS = [marker for pair in THINKING_MARKERS for marker in pair]
_PATTERN = re.compile("|".join(map(re.escape, _MARKERS)))
_LONGEST = max(map(len, _MARKERS))


def without_thinking(text: str) -> str:
    """Return a text of the same length with line breaks in place of reasoning and its markers.

    The rules are those of `split_thinking`, with the markers of all of `THINKING_MARKERS`. A block ends with the end
    of its own pair.
    """
    if not any(marker in text for marker in _MARKERS):
        return text
    thinking = ThinkingFilter()
    return thinking.feed(text) + thinking.close()


class ThinkingFilter:
    """[`without_thinking`] of a text that arrives in chunks.

    Text before the first marker is held back until that marker or the end of the text: if the marker is an end, that
    text is reasoning, which the prompt opened.
    """

    def __init__(self) -> None:
        self._held = ""  # text whose reading depends on what follows
        self._searched = 0  # characters at its start that begin no marker
        self._closing: str | None = None  # the marker that ends the current block
        self._is_first = True

    def feed(self, chunk: str) -> str:
        """Add a chunk and return the text that is now certain; all of it together is that of the whole text."""
        self._held += chunk
        pieces: list[str] = []
        position = 0
        for match in _PATTERN.finditer(self._held, self._searched):
            piece = self._held[position : match.start()]
            opened_by_prompt = self._is_first and match[0] not in _ENDS
            pieces += [_blank(piece) if self._closing or opened_by_prompt else piece, _blank(match[0])]
            if self._closing is None:
                self._closing = _ENDS.get(match[0])
            elif match[0] == self._closing:
                self._closing = None
            position, self._is_first = match.end(), False
        end = max(position, _marker_start(self._held))
        if self._is_first:
            self._searched = end
            return ""
        rest = self._held[position:end]
        self._held, self._searched = self._held[end:], 0
        return "".join([*pieces, _blank(rest) if self._closing else rest])

    def close(self) -> str:
        """End the text and return the rest of it."""
        rest, self._held, self._searched = self._held, "", 0
        return _blank(rest) if self._closing else rest


def _blank(text: str) -> str:
    return "\n" * len(text)


def _marker_start(text: str) -> int:
    """Return where the end of a text may be the beginning of a marker; its length if nowhere."""
    for start in range(max(0, len(text) - _LONGEST + 1), len(text)):
        if any(marker.startswith(text[start:]) for marker in _MARKERS):
            return start
    return len(text)
