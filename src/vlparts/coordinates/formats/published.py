"""The table of published formats. Importing this file registers them.

A format's `assumed` lists what its source does not say. Models whose rule is unknown are in `ABSENT`, with the reason.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TypedDict

from ..frames.rules import SmartResize
from ..grammars.json_fields import NamedJsonGrammar
from ..grammars.json_objects import JsonGrammar
from ..grammars.kosmos2 import CellNumbers, KosmosGrammar
from ..grammars.molmo import MolmoGrammar
from ..grammars.molmo2 import Molmo2Grammar
from ..quantization import NumberRule
from .openpangu import PADDED
from .published_common import DATE, FAR_EDGE, HALF_UP, NEAREST, PIXELS, SEPARATOR, THOUSAND
from .published_tagged import TAGGED
from .published_tasks import TASKS
from .registry import CoordinateFormat, register_format

__all__ = ["ABSENT", "PUBLISHED"]

_OPEN, _NEXT, _CLOSE = "[\n  ", ",\n  ", "\n]"
_OCR_LABEL = "label: the text of the line"


class _CornerAndSize(TypedDict):
    """Arguments of [`NamedJsonGrammar`] for boxes with a width and a height."""

    keys: tuple[tuple[str, tuple[str, ...]], ...]
    sizes: bool
    aliases: tuple[tuple[str, str], ...]
    label_key: str
    opening: str
    names: tuple[str, ...]
    separator: str
    closing: str


_CORNER_AND_SIZE: _CornerAndSize = {
    "keys": (("box", ("x", "y", "width", "height")),),
    "sizes": True,
    "aliases": (("w", "width"), ("h", "height")),
    "label_key": "label",
    "opening": _OPEN,
    "names": (),
    "separator": _NEXT,
    "closing": _CLOSE,
}

_UNTAGGED = (
    CoordinateFormat(
        name="qwen2_5_vl",
        numbers=NumberRule(denominator=None, levels=None, far_edge=False),
        grammar=JsonGrammar(),
        frame=SmartResize(28, 56 * 56, 14 * 14 * 4 * 1280),
        source="QwenLM/Qwen3-VL qwen-vl-finetune/tools/process_bbox.ipynb; issue 676",
        date=DATE,
        assumed=(
            "layout: as in Qwen3-VL's cookbooks",
            "max_pixels: as in the notebook; can be set",
        ),
    ),
    CoordinateFormat(
        name="qwen2_5_vl_ocr",
        numbers=NumberRule(denominator=None, levels=None, far_edge=False),
        grammar=JsonGrammar(keys=(("box", "bbox_2d"),), label_key="text_content"),
        frame=SmartResize(28, 56 * 56, 14 * 14 * 4 * 1280),
        source="QwenLM/Qwen3-VL cookbooks/ocr.ipynb; numbers as qwen2_5_vl",
        date=DATE,
        assumed=(_OCR_LABEL, "max_pixels: as in the notebook of qwen2_5_vl; can be set"),
    ),
    CoordinateFormat(
        name="qwen3_vl_ocr",
        numbers=THOUSAND,
        grammar=JsonGrammar(keys=(("box", "bbox_2d"),), label_key="text_content", image_key="img_idx"),
        source="QwenLM/Qwen3-VL cookbooks/ocr.ipynb; numbers as qwen3_vl",
        date=DATE,
        assumed=(_OCR_LABEL, "rounding: nearest, as for Qwen2-VL"),
    ),
    CoordinateFormat(
        name="dots_ocr",
        numbers=PIXELS,
        grammar=JsonGrammar(keys=(("box", "bbox"),), label_key="category", opening="[", separator=", ", closing="]"),
        frame=SmartResize(28, 3136, 11289600),
        source="rednote-hilab/dots.ocr dots_ocr/utils/consts.py, dots_ocr/utils/layout_utils.py",
        date=DATE,
        assumed=("label: the category; the text is an attribute", NEAREST, FAR_EDGE),
    ),
    CoordinateFormat(
        name="xywh",
        numbers=PIXELS,
        grammar=NamedJsonGrammar(decimals=0, **_CORNER_AND_SIZE),
        source="VGG Image Annotator 2 (via-2.x.y/CodeDoc.md), shape_attributes of rect; many other programs",
        date=DATE,
        assumed=("label: under the key label", NEAREST, FAR_EDGE),
    ),
    CoordinateFormat(
        name="xywh_relative",
        numbers=NumberRule(denominator=10**6, levels=10**6 + 1),
        grammar=NamedJsonGrammar(**_CORNER_AND_SIZE),
        source="as xywh, with fractions of the sides of the image; no publisher",
        date=DATE,
        assumed=("label: under the key label", "decimals: 6 at most", NEAREST),
    ),
    CoordinateFormat(
        name="qwen3_vl",
        numbers=THOUSAND,
        grammar=JsonGrammar(image_key="img_idx"),
        source="QwenLM/Qwen3-VL cookbooks/spatial_understanding.ipynb, think_with_images.ipynb; issue 1486",
        date=DATE,
        assumed=("rounding: nearest, as for Qwen2-VL", "img_idx: written for images after the first"),
    ),
    CoordinateFormat(
        name="gemini",
        numbers=THOUSAND,
        grammar=JsonGrammar(
            keys=(("box", "box_2d"), ("point", "point")), opening=_OPEN, separator=_NEXT, closing=_CLOSE
        ),
        y_first=("box", "point"),
        source="google-gemini/cookbook quickstarts/Spatial_understanding.ipynb",
        date=DATE,
        assumed=(NEAREST, "truncation: none when reading"),
    ),
    CoordinateFormat(
        name="claude",
        numbers=PIXELS,
        grammar=JsonGrammar(
            keys=(("box", "bbox"), ("point", "point")), opening=_OPEN, separator=_NEXT, closing=_CLOSE
        ),
        source="platform.claude.com docs build-with-claude/vision-coordinates",
        date=DATE,
        assumed=(
            "frame: the image as sent, which must be too small to be resized",
            "keys: bbox, point and label; the prompt can ask for others",
            NEAREST,
            FAR_EDGE,
        ),
    ),
    CoordinateFormat(
        name="moondream",
        numbers=NumberRule(denominator=10**6, levels=10**6 + 1),
        grammar=NamedJsonGrammar(),
        source="vikhyat/moondream moondream/torch/moondream.py, sample.py",
        date=DATE,
        assumed=("decimals: 6 at most", NEAREST),
    ),
    CoordinateFormat(
        name="molmo",
        numbers=THOUSAND,
        grammar=MolmoGrammar(),
        source="allenai/molmo olmo/data/data_formatter.py",
        date=DATE,
        assumed=(
            HALF_UP,
            "order: as given; the training data has points sorted by x, then y",
            "entities: in labels, for &, <, > and quotes",
        ),
    ),
    CoordinateFormat(
        name="molmo2",
        numbers=THOUSAND,
        grammar=Molmo2Grammar(),
        source="allenai/molmo2 olmo/preprocessing/point_formatter.py",
        date=DATE,
        assumed=(
            HALF_UP,
            "order: as given; the training data has points sorted by x, then y",
            "image separator: a semicolon (html-v2); a tab (html-v1) is also read",
            "entities: in labels, for &, <, > and quotes",
        ),
    ),
    CoordinateFormat(
        name="kosmos2",
        numbers=CellNumbers(32),
        grammar=KosmosGrammar(),
        source="transformers 5.23 models/kosmos2/processing_kosmos2.py",
        date=DATE,
        assumed=(SEPARATOR.format(" "), "thin boxes: the cells that contain them; the source rejects them"),
    ),
)

ABSENT: Mapping[str, str] = MappingProxyType(
    {
        "ovis2_5": "no public description of its coordinates was found",
        "kimi_vl": "0-1 with three decimals was observed (MoonshotAI/Kimi-VL issue 56, unanswered); rule unknown",
        "molmo_point": "points are indices of image tokens, not numbers in the text",
        "glm_4_1v": "its documents have two rules: 0-999 on phones, 0-1000 on the web",
        "gpt_computer_use": "pixels of the screenshot within tool calls, from secondary sources only",
    }
)
"""Models without a format, with the reason."""

PUBLISHED = (PADDED, *TAGGED, *TASKS, *_UNTAGGED)
"""The published formats."""

for _format in PUBLISHED:
    register_format(_format, overwrite=True)
