"""Grammars of regions between marks, as data: `<ref>cat</ref><box>(1,2),(3,4)</box>` and similar text."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .base import Coded, DecodeError, Found, Grammar, check_writable
from .tagged_fields import Shape, TaggedFields
from .tagged_reading import scan

__all__ = ["Shape", "TaggedGrammar"]


@dataclass(frozen=True, kw_only=True)
class TaggedGrammar(TaggedFields):
    """A grammar of the form `label group_open region (group_join region)* group_close`, or with the label last.

    A label is written `label_open label label_close`. Consecutive regions with the same label are written as one group
    if `group_join` is not None; the regions of a group share the label before it (or after it). With empty
    `group_open` and `group_close`, a region that follows another with exactly `group_join` in between belongs to the
    same group. The arguments are those of [`TaggedFields`].
    """

    def write(self, regions: Sequence[Coded]) -> str:
        """See [`Grammar`]."""
        templates: dict[tuple[str, int], str] = {}
        shapes = {shape.kind: shape for shape in reversed(self.shapes)}
        number = f"%0{self.digits}d" if self.digits else f"%d.%0{self.decimals}d" if self.decimals else "%d"
        texts, kinds = [], self.kinds
        for region in regions:
            check_writable(region, kinds)
            kind, codes = region.kind, region.codes
            template = templates.get((kind, len(codes)))
            if template is None:
                template = templates[kind, len(codes)] = shapes[kind].text(number, len(codes) // 2)
            if self.decimals:
                codes = [part for code in codes for part in divmod(code, 10**self.decimals)]
            texts.append(template % tuple(codes))
        return self.separator.join(self._groups(regions, texts))

    def _groups(self, regions: Sequence[Coded], texts: Sequence[str]) -> Iterator[str]:
        """Yield each group: the texts of its regions with the label and the marks around them."""
        marks = [mark for mark in (self.label_open.strip(), self.label_close.strip()) if mark]
        start = 0
        while start < len(regions):
            label = regions[start].label
            if label is not None and self.label_place == "none":
                raise ValueError(f"The format has no labels, got label {label!r}.")
            if label is not None and any(mark in label for mark in marks):
                raise ValueError(f"Label {label!r} cannot be read back: it contains one of the label marks {marks}.")
            end = start + 1
            while self.group_join is not None and end < len(regions) and regions[end].label == label:
                end += 1
            body = self.group_open + (self.group_join or "").join(texts[start:end]) + self.group_close
            name = "" if label is None else self.label_open + label + self.label_close
            yield name + body if self.label_place == "before" else body + name
            start = end

    def scan(self, text: str) -> tuple[list[Found], list[DecodeError]]:
        """See [`Grammar`]."""
        return scan(self, text)

    def lost(self, text: str, target: Grammar) -> list[DecodeError]:
        """See [`ReportsLoss`]."""
        if not self.trailing:
            return []
        errors, token = [], re.compile("[0-9]{1,9}".join(map(re.escape, self.trailing.split("{}"))))
        for item in self.scan(text)[0]:
            for match in token.finditer(text, item.end, item.outer[1]):
                errors.append(DecodeError(match.start(), f"{match[0]!r} would be lost"))
        return errors
