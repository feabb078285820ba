"""Published formats of models for screens, documents and detection with regions between marks."""

from ..frames.rules import SmartResize
from ..grammars.tagged import Shape, TaggedGrammar
from ..quantization import NumberRule
from .published_common import (
    DATE,
    DET,
    FAR_EDGE,
    LINE_BREAK,
    NEAREST,
    NINES,
    OBJECT_REF,
    PAIR,
    PIXELS,
    REF,
    SEPARATOR,
    THOUSAND,
    boxed,
    listed,
)
from .registry import CoordinateFormat

__all__ = ["TASKS"]

_TOKEN = "<loc_{}><loc_{}>"
_NO_TRUNCATION = "truncation: none; the source truncates the middle of a bin to whole pixels"
_UI_TARS = SmartResize(28, 100 * 28 * 28, 16384 * 28 * 28)
_BOX_TAG = Shape("box", "{} {}", " ", "<bbox>", "</bbox>")
_POINT_TAG = Shape("point", "{} {}", " ", "<point>", "</point>")

TASKS = (
    CoordinateFormat(
        name="deepseek_ocr",
        numbers=NINES,
        grammar=DET,
        source="deepseek-ai/DeepSeek-OCR DeepSeek-OCR-vllm/run_dpsk_ocr_image.py",
        date=DATE,
        assumed=(NEAREST, LINE_BREAK),
    ),
    CoordinateFormat(
        name="mineru2",
        numbers=THOUSAND,
        grammar=TaggedGrammar(
            shapes=(Shape("box", "{} {}", " ", "<|box_start|>", "<|box_end|>"),),
            label_place="after",
            label_open="<|ref_start|>",
            label_close="<|ref_end|>",
        ),
        source="opendatalab/mineru-vl-utils mineru_vl_utils/mineru_client.py",
        date=DATE,
        assumed=(NEAREST, "rotation: neither read nor written", LINE_BREAK),
    ),
    CoordinateFormat(
        name="florence2",
        numbers=NumberRule(denominator=1000, levels=1000, rounding="bins"),
        grammar=TaggedGrammar(
            shapes=(Shape("polygon", _TOKEN, "", "<poly>", "</poly>"), Shape("box", _TOKEN, "")),
            separator="",
            group_join="",
        ),
        source="transformers 5.23 models/florence2/processing_florence2.py",
        date=DATE,
        assumed=(_NO_TRUNCATION, "polygons: one per <poly>"),
    ),
    CoordinateFormat(
        name="florence2_ocr",
        numbers=NumberRule(denominator=1000, levels=1000, rounding="bins"),
        grammar=TaggedGrammar(shapes=(Shape("quad", _TOKEN, ""),), separator="", group_join=""),
        source="transformers 5.23 models/florence2/processing_florence2.py (OCR with regions)",
        date=DATE,
        assumed=(_NO_TRUNCATION,),
    ),
    CoordinateFormat(
        name="ui_tars",
        numbers=THOUSAND,
        grammar=TaggedGrammar(
            shapes=(*boxed(PAIR, "box", "point"), _BOX_TAG, _POINT_TAG, *listed("box", "point")), label_place="none"
        ),
        source="bytedance/UI-TARS README_v1.md, codes/ui_tars/action_parser.py; prompt of @ui-tars/sdk 1.2.3",
        date=DATE,
        assumed=(NEAREST, LINE_BREAK, "tags and lists: read, not written"),
    ),
    CoordinateFormat(
        name="ui_tars_1_5",
        numbers=PIXELS,
        grammar=TaggedGrammar(shapes=(*listed("box"), Shape("point", PAIR), *listed("point")), label_place="none"),
        frame=_UI_TARS,
        source="bytedance/UI-TARS README_coordinates.md; prompt of @ui-tars/sdk 1.2.3",
        date=DATE,
        assumed=(NEAREST, FAR_EDGE, LINE_BREAK),
    ),
    CoordinateFormat(
        name="ui_tars_1_5_tags",
        numbers=PIXELS,
        grammar=TaggedGrammar(shapes=(_BOX_TAG, _POINT_TAG), label_place="none"),
        frame=_UI_TARS,
        source="bytedance/UI-TARS codes/ui_tars/action_parser.py",
        date=DATE,
        assumed=(NEAREST, FAR_EDGE, LINE_BREAK),
    ),
    CoordinateFormat(
        name="showui",
        numbers=NumberRule(denominator=100, levels=101),
        grammar=TaggedGrammar(shapes=listed("point"), decimals=2, label_place="none"),
        source="showlab/ShowUI QUICK_START.md, data/dset_shared_grounding.py",
        date=DATE,
        assumed=(LINE_BREAK,),
    ),
    CoordinateFormat(
        name="os_atlas_4b",
        numbers=THOUSAND,
        grammar=TaggedGrammar(
            shapes=listed("box", "point"),
            group_open="<box>[",
            group_join=", ",
            group_close="]</box>",
            separator=" ",
            **REF,
        ),
        source="OS-Copilot/OS-Atlas README.md (InternVL2's text)",
        date=DATE,
        assumed=(NEAREST, SEPARATOR.format(" ")),
    ),
    CoordinateFormat(
        name="os_atlas_7b",
        numbers=THOUSAND,
        grammar=TaggedGrammar(shapes=boxed(PAIR, "box", "point"), group_join="", separator=" ", **OBJECT_REF),
        source="OS-Copilot/OS-Atlas README.md (Qwen2-VL's text)",
        date=DATE,
        assumed=(NEAREST, SEPARATOR.format(" ")),
    ),
    CoordinateFormat(
        name="rex_omni",
        numbers=NumberRule(denominator=999, levels=1000, rounding="floor"),
        grammar=TaggedGrammar(
            shapes=(Shape("polygon", "<{}><{}>", ""), Shape("box", "<{}><{}>", ""), Shape("point", "<{}><{}>", "")),
            group_open="<|box_start|>",
            group_join=",",
            group_close="<|box_end|>",
            empty="None",
            separator=", ",
            **OBJECT_REF,
        ),
        source="IDEA-Research/Rex-Omni rex_omni/parser.py, finetuning/dataset/task_fns/grounding_task.py",
        date=DATE,
        assumed=(
            "keypoints: their JSON is not read",
            "order: as given; the source sorts the boxes and points of a label by x0",
            "None for an absent label: read as no region, not written",
        ),
    ),
    CoordinateFormat(
        name="got_ocr2",
        numbers=NumberRule(denominator=1000, levels=1001, rounding="floor"),
        grammar=TaggedGrammar(shapes=listed("box"), label_place="none"),
        source="transformers 5.23 models/got_ocr2/processing_got_ocr2.py",
        date=DATE,
        assumed=("reading: supported, although the model reads boxes and writes none",),
    ),
)
"""The formats, grouped by family in the order of its models."""
