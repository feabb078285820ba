"""What tables of formats share: rules of numbers, marks and shapes."""

from typing import TypedDict

from ..grammars.tagged import Shape, TaggedGrammar
from ..quantization import NumberRule

__all__ = [
    "BELOW",
    "DATE",
    "DET",
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
    """The marks around labels."""

    label_open: str
    label_close: str


DATE = "2026-11-22"
"""When the sources were read."""
NEAREST = "rounding: nearest"
SEPARATOR = "separator: between regions, taken as {!r}"
PAIR = "({},{})"

THOUSAND = NumberRule(denominator=1000, levels=1001)
"""0 to 1000."""
BELOW = NumberRule(denominator=1000, levels=1000)
"""1000 stands for the full side and is not written."""
NINES = NumberRule(denominator=999, levels=1000)
"""999 stands for the full side."""
PIXELS = NumberRule(denominator=None, levels=None)
"""Pixels of the frame, the far edge among them."""

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
    """Shapes between Qwen2-VL's box marks, told apart by their count of numbers."""
    return tuple(Shape(kind, pair, ",", "<|box_start|>", "<|box_end|>") for kind in kinds)


def listed(*kinds: str) -> tuple[Shape, ...]:
    """Shapes such as [1, 2, 3, 4]."""
    return tuple(Shape(kind, "{}, {}", ", ", "[", "]") for kind in kinds)
