"""A matcher of regular expressions that counts its steps.

`re` does not report how much work a match takes. [`StepCounter`] interprets the parse tree of a compiled pattern with
the same backtracking as `re`, and counts every node that it tries. Tests compare the counts of texts of two lengths,
and the spans of the matches with those of `re`.
"""

import re
from collections.abc import Iterator, Sequence
from re import _constants as ops  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

__all__ = ["StepCounter", "count_steps"]

CATEGORIES = {
    ops.CATEGORY_DIGIT: str.isdecimal,
    ops.CATEGORY_SPACE: str.isspace,
    ops.CATEGORY_WORD: lambda char: char.isalnum() or char == "_",
}


def count_steps(pattern: re.Pattern[str], prefix: str, piece: str) -> list[int]:
    """Return the steps of searching the prefix with one, two and three times the same number of pieces.

    The number of pieces is a multiple of the numbers of a box, so that regions end where a multiple ends.
    """
    repeats = 12 * max(1, 4 // len(piece))
    counts = []
    for times in (1, 2, 3):
        counter, text = StepCounter(pattern), prefix + piece * (repeats * times)
        assert counter.spans(text) == [match.span() for match in pattern.finditer(text)]
        counts.append(counter.steps)
    return counts


class StepCounter:
    """Finds the matches of a pattern and counts the steps of the search.

    Supports what the coordinate grammars use. A repetition without an upper limit must be possessive: this is an
    AssertionError otherwise, because it could backtrack into any number of characters.

    Args:
        pattern: A compiled pattern without references to groups.
    """

    def __init__(self, pattern: re.Pattern[str]) -> None:
        self.tree = list(parser.parse(pattern.pattern, pattern.flags))
        self.steps = 0

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Return the spans of all matches, as `finditer` does."""
        result, start = [], 0
        while start <= len(text):
            end = self._first(self.tree, text, start)
            if end is None:
                start += 1
            else:
                result.append((start, end))
                start = max(end, start + 1)
        return result

    def _first(self, nodes: Sequence[Any], text: str, start: int, ignore_case: bool = False) -> int | None:
        """Return where the first match of `nodes` at `start` ends."""
        return next(self._sequence(nodes, 0, text, start, ignore_case), None)

    def _sequence(self, nodes: Sequence[Any], index: int, text: str, at: int, ignore_case: bool) -> Iterator[int]:
        """Yield where the matches of the nodes from `index` on end, in the order in which `re` tries them."""
        while index < len(nodes):
            operator, argument = nodes[index]
            self.steps += 1
            if operator in (ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN):
                if at == len(text) or not _accepts(operator, argument, text[at], ignore_case):
                    return
                at += 1
            elif operator is ops.AT:
                if not _is_at(argument, text, at):
                    return
            elif operator in (ops.ASSERT, ops.ASSERT_NOT):
                direction, inner = argument
                start = at - inner.getwidth()[0] if direction < 0 else at
                found = start >= 0 and self._first(list(inner), text, start, ignore_case) is not None
                if found != (operator is ops.ASSERT):
                    return
            elif operator in (ops.POSSESSIVE_REPEAT, ops.ATOMIC_GROUP):
                end = self._possessive(operator, argument, text, at, ignore_case)
                if end is None:
                    return
                at = end
            else:
                for end in self._choices(operator, argument, text, at, ignore_case):
                    yield from self._sequence(nodes, index + 1, text, end, ignore_case)
                return
            index += 1
        yield at

    def _possessive(self, operator: Any, argument: Any, text: str, at: int, ignore_case: bool) -> int | None:
        """Return where a node without backtracking ends."""
        if operator is ops.ATOMIC_GROUP:
            return self._first(list(argument), text, at, ignore_case)
        least, most, inner = argument
        nodes, count = list(inner), 0
        while most is ops.MAXREPEAT or count < most:
            end = self._first(nodes, text, at, ignore_case)
            if end is None or end == at:
                break
            at, count = end, count + 1
        return at if count >= least else None

    def _choices(self, operator: Any, argument: Any, text: str, at: int, ignore_case: bool) -> Iterator[int]:
        """Yield where a node that can backtrack ends."""
        if operator is ops.SUBPATTERN:
            _, added, _, inner = argument
            yield from self._sequence(list(inner), 0, text, at, ignore_case or bool(added & re.IGNORECASE))
        elif operator is ops.BRANCH:
            for branch in argument[1]:
                yield from self._sequence(list(branch), 0, text, at, ignore_case)
        else:
            assert operator is ops.MAX_REPEAT, f"{operator} is not supported"
            least, most, inner = argument
            assert most is not ops.MAXREPEAT, "a repetition without an upper limit must be possessive"
            yield from self._repeat(list(inner), least, most, text, at, ignore_case)

    def _repeat(
        self, nodes: Sequence[Any], least: int, most: int, text: str, at: int, ignore_case: bool
    ) -> Iterator[int]:
        """Yield where a greedy repetition ends, longest first."""
        if most > 0:
            for end in self._sequence(nodes, 0, text, at, ignore_case):
                if end > at:
                    yield from self._repeat(nodes, max(least - 1, 0), most - 1, text, end, ignore_case)
        if least == 0:
            yield at


def _accepts(operator: Any, argument: Any, char: str, ignore_case: bool) -> bool:
    """Whether a node of one character matches `char`."""
    if operator is ops.LITERAL:
        return ord(char) == argument or (ignore_case and char.lower() == chr(argument).lower())
    if operator is ops.NOT_LITERAL:
        return ord(char) != argument
    if operator is ops.ANY:
        return char != "\n"
    negated = argument[0][0] is ops.NEGATE
    return negated != any(_in_item(item, value, char) for item, value in argument[negated:])


def _in_item(item: Any, value: Any, char: str) -> bool:
    """Whether an item of a set contains `char`."""
    if item is ops.LITERAL:
        return ord(char) == value
    if item is ops.RANGE:
        return value[0] <= ord(char) <= value[1]
    assert item is ops.CATEGORY, f"{item} is not supported"
    return bool(CATEGORIES[value](char))


def _is_at(where: Any, text: str, at: int) -> bool:
    """Whether `at` is a position of this kind."""
    if where is ops.AT_END_STRING:
        return at == len(text)
    assert where is ops.AT_BOUNDARY, f"{where} is not supported"
    before, after = text[max(at - 1, 0) : at], text[at : at + 1]
    is_word = CATEGORIES[ops.CATEGORY_WORD]
    return bool(before and is_word(before)) != bool(after and is_word(after))
