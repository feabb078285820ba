"""Every published format whose rule is known; importing this file registers them.

`assumed` of each says what its source leaves open. Models whose rule is not known are in `ABSENT`, with the reason.
"""

from collections.abc import Mapping
from types import MappingProxyType

from ..frames.rules import SmartResize
from ..grammars.json_fields import NamedJsonGrammar
from ..grammars.json_objects import JsonGrammar
from ..grammars.kosmos2 import CellNumbers, KosmosGrammar
from ..grammars.molmo import MolmoGrammar
from ..grammars.molmo2 import Molmo2Grammar
from ..grammars.openpangu import PADDED
from ..quantization import NumberRule
from .published_tagged import TAGGED
from .published_tasks import TASKS
from .registry import CoordinateFormat, register_format

__all__ = ["ABSENT"]

_DATE = "2026-11-22"
_THOUSAND = NumberRule(denominator=1000, levels=1001)
_OPEN, _NEXT, _CLOSE = "[\n  ", ",\n  ", "\n]"

_OTHERS = (
    CoordinateFormat(
        name="qwen2_5_vl",
        numbers=NumberRule(denominator=None, levels=None, far_edge=False),
        grammar=JsonGrammar(),
        frame=SmartResize(28, 56 * 56, 14 * 14 * 4 * 1280),
        source="QwenLM/Qwen3-VL qwen-vl-finetune/tools/process_bbox.ipynb; issue 676",
        date=_DATE,
        assumed=(
            "layout: that of Qwen3-VL's cookbooks",
            "max_pixels: that of the notebook; others may be set",
        ),
    ),
    CoordinateFormat(
        name="qwen3_vl",
        numbers=_THOUSAND,
        grammar=JsonGrammar(image_key="img_idx"),
        source="QwenLM/Qwen3-VL cookbooks/spatial_understanding.ipynb, think_with_images.ipynb; issue 1486",
        date=_DATE,
        assumed=("rounding: nearest, as for Qwen2-VL", "img_idx: written for images after the first"),
    ),
    CoordinateFormat(
        name="gemini",
        numbers=_THOUSAND,
        grammar=JsonGrammar(
            keys=(("box", "box_2d"), ("point", "point")), opening=_OPEN, separator=_NEXT, closing=_CLOSE
        ),
        y_first=("box", "point"),
        source="google-gemini/cookbook quickstarts/Spatial_understanding.ipynb",
        date=_DATE,
        assumed=("rounding: nearest", "truncation: not to whole pixels when reading"),
    ),
    CoordinateFormat(
        name="claude",
        numbers=NumberRule(denominator=None, levels=None),
        grammar=JsonGrammar(
            keys=(("box", "bbox"), ("point", "point")), opening=_OPEN, separator=_NEXT, closing=_CLOSE
        ),
        source="platform.claude.com docs build-with-claude/vision-coordinates",
        date=_DATE,
        assumed=(
            "frame: the image as sent, which must be small enough that it is not resized",
            "keys: any that the prompt asks for; bbox, point and label here",
            "rounding: nearest",
            "far edge: has a code",
        ),
    ),
    CoordinateFormat(
        name="moondream",
        numbers=NumberRule(denominator=10**6, levels=10**6 + 1),
        grammar=NamedJsonGrammar(),
        source="vikhyat/moondream moondream/torch/moondream.py, sample.py",
        date=_DATE,
        assumed=("decimals: 6 at most", "rounding: nearest"),
    ),
    CoordinateFormat(
        name="molmo",
        numbers=_THOUSAND,
        grammar=MolmoGrammar(),
        source="allenai/molmo olmo/data/data_formatter.py",
        date=_DATE,
        assumed=(
            "rounding: half up, where the source rounds half to even",
            "order: as given; the model was trained on points sorted by x, then y",
            "entities: in labels, for &, <, > and quotes",
        ),
    ),
    CoordinateFormat(
        name="molmo2",
        numbers=_THOUSAND,
        grammar=Molmo2Grammar(),
        source="allenai/molmo2 olmo/preprocessing/point_formatter.py",
        date=_DATE,
        assumed=(
            "rounding: half up, where the source rounds half to even",
            "order: as given; the model was trained on points sorted by x, then y",
            "image separator: a semicolon (html-v2); a tab (html-v1) is read as well",
            "entities: in labels, for &, <, > and quotes",
        ),
    ),
    CoordinateFormat(
        name="kosmos2",
        numbers=CellNumbers(32),
        grammar=KosmosGrammar(),
        source="transformers 5.23 models/kosmos2/processing_kosmos2.py",
        date=_DATE,
        assumed=("separator: a space", "thin boxes: the cells that they lie in, where the source refuses them"),
    ),
)

ABSENT: Mapping[str, str] = MappingProxyType(
    {
        "ovis2_5": "no public statement of its coordinates was found",
        "kimi_vl": "0-1 with three decimals was observed (MoonshotAI/Kimi-VL issue 56, unanswered); rule unknown",
        "molmo_point": "points are indices of image tokens, not numbers in the text",
        "glm_4_1v": "its documents name two rules: 0-999 on phones, 0-1000 on the web",
        "gpt_computer_use": "pixels of the screenshot within tool calls, from secondary sources only",
    }
)
"""Models without a format, each with the reason."""

for _format in (PADDED, *TAGGED, *TASKS, *_OTHERS):
    register_format(_format, overwrite=True)
