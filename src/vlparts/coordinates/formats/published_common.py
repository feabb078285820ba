"""Values that several published formats share: number rules, marks, shapes and assumptions."""

from typing import TypedDict

from ..grammars.tagged import Shape, TaggedGrammar
from ..quantization import NumberRule

__all__ = [
    "BELOW",
    "DATE",
    "DET",
    "FAR_EDGE",
    "HALF_UP",
    "LABEL_BEFORE",
    "LINE_BREAK",
    "NEAREST",
    "NINES",
    "OBJECT_REF",
    "PAIR",
    "PIXELS",
    "REF",
    "SEPARATOR",
    "THOUSAND",
    "boxed",
    "listed",
]


class Labels(TypedDict):
    """The marks around labels, as arguments of [`TaggedGrammar`]."""

    label_open: str
    label_close: str


DATE = "2026-11-22"
"""When the sources were read."""

NEAREST = "rounding: nearest"
HALF_UP = "rounding: half up; the source rounds half to even"
LABEL_BEFORE = "label: before the coordinates and a space"
LINE_BREAK = "separator: line break"
SEPARATOR = "separator: {!r} between regions"
FAR_EDGE = "far edge: has a code"

PAIR = "({},{})"

THOUSAND = NumberRule(denominator=1000, levels=1001)
"""0 to 1000."""
BELOW = NumberRule(denominator=1000, levels=1000)
"""1000 is the full side and is not written."""
NINES = NumberRule(denominator=999, levels=1000)
"""999 is the full side."""
PIXELS = NumberRule(denominator=None, levels=None)
"""Pixels of the frame, with a code for the far edge."""

REF: Labels = {"label_open": "<ref>", "label_close": "</ref>"}
OBJECT_REF: Labels = {"label_open": "<|object_ref_start|>", "label_close": "<|object_ref_end|>"}
DET = TaggedGrammar(
    shapes=(Shape("box", "{}, {}", ", ", "[", "]"),),
    label_open="<|ref|>",
    label_close="<|/ref|>",
    group_open="<|det|>[",
    group_join=", ",
    group_close="]<|/det|>",
)
"""The text of DeepSeek's models."""


def boxed(pair: str, *kinds: str) -> tuple[Shape, ...]:
    """Return shapes between Qwen2-VL's box marks, which are distinguished by their count of numbers."""
    return tuple(Shape(kind, pair, ",", "<|box_start|>", "<|box_end|>") for kind in kinds)


def listed(*kinds: str) -> tuple[Shape, ...]:
    """Return shapes such as [1, 2, 3, 4]."""
    return tuple(Shape(kind, "{}, {}", ", ", "[", "]") for kind in kinds)
