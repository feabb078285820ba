"""Published formats of general models with regions between marks."""

from ..frames.rules import FitWithin, PaddedSquare
from ..grammars.tagged import Shape, TaggedGrammar
from ..quantization import NumberRule
from .published_common import (
    BELOW,
    DATE,
    DET,
    FAR_EDGE,
    HALF_UP,
    LABEL_BEFORE,
    LINE_BREAK,
    NEAREST,
    NINES,
    OBJECT_REF,
    PAIR,
    REF,
    SEPARATOR,
    THOUSAND,
    boxed,
    listed,
)
from .registry import CoordinateFormat

__all__ = ["TAGGED"]


TAGGED = (
    CoordinateFormat(
        name="qwen_vl",
        numbers=BELOW,
        grammar=TaggedGrammar(
            shapes=(
                Shape("box", PAIR, ",", "<box>", "</box>"),
                Shape("quad", PAIR, ",", "<quad>", "</quad>"),
            ),
            group_join="",
            separator=" ",
            **REF,
        ),
        source="QwenLM/Qwen-VL README.md, TUTORIAL.md",
        date=DATE,
        assumed=(
            NEAREST,
            "denominator: 1000, as the maintainers state; their evaluation divides by 999",
            SEPARATOR.format(" "),
        ),
    ),
    CoordinateFormat(
        name="qwen2_vl",
        numbers=THOUSAND,
        grammar=TaggedGrammar(
            shapes=(*boxed(PAIR, "box", "point"), Shape("quad", PAIR, ",", "<|quad_start|>", "<|quad_end|>")),
            group_join="",
            separator=" ",
            **OBJECT_REF,
        ),
        source="QwenLM/Qwen3-VL qwen-vl-finetune/tools/process_bbox.ipynb",
        date=DATE,
        assumed=("point and quad: as the box", SEPARATOR.format(" ")),
    ),
    CoordinateFormat(
        name="internvl",
        numbers=THOUSAND,
        grammar=TaggedGrammar(
            shapes=listed("box"), group_open="<box>[", group_join=", ", group_close="]</box>", separator=" ", **REF
        ),
        source="OpenGVLab/InternVL issue 844, streamlit_demo/app.py",
        date=DATE,
        assumed=(NEAREST, SEPARATOR.format(" ")),
    ),
    CoordinateFormat(
        name="cogvlm",
        numbers=BELOW,
        grammar=TaggedGrammar(
            shapes=(Shape("box"), Shape("point")),
            digits=3,
            group_open="[[",
            group_join=";",
            group_close="]]",
            label_close=" ",
        ),
        source="THUDM/CogVLM README.md, utils/utils/grounding_parser.py",
        date=DATE,
        assumed=(NEAREST, LABEL_BEFORE, LINE_BREAK),
    ),
    CoordinateFormat(
        name="glm_4_5v",
        numbers=THOUSAND,
        grammar=TaggedGrammar(
            shapes=(Shape("box", "{},{}", ",", "[", "]"), Shape("point", "{},{}", ",", "[", "]")),
            label_place="none",
            group_open="<|begin_of_box|>[",
            group_join=", ",
            group_close="]<|end_of_box|>",
            other_groups=(("<|begin_of_box|>", "<|end_of_box|>"),),
        ),
        source="zai-org/GLM-V README.md",
        date=DATE,
        assumed=(
            NEAREST,
            "largest code: 1000 (the GUI documents say 999)",
            "brackets: [[...]] is written, [...] is read too; the README states that they vary",
            "label: none",
            LINE_BREAK,
        ),
    ),
    CoordinateFormat(
        name="deepseek_vl2",
        numbers=NINES,
        grammar=DET,
        source="deepseek-ai/DeepSeek-VL2 README.md, deepseek_vl2/serve/app_modules/utils.py",
        date=DATE,
        assumed=(NEAREST, LINE_BREAK),
    ),
    CoordinateFormat(
        name="paligemma",
        numbers=NumberRule(denominator=1023, levels=1024),
        grammar=TaggedGrammar(
            shapes=(Shape("box", "<loc{}><loc{}>", ""),),
            digits=4,
            label_place="after",
            label_open=" ",
            separator=" ; ",
            trailing="<seg{}>",
        ),
        y_first=("box",),
        source="google-research/big_vision big_vision/pp/proj/paligemma/segmentation.py",
        date=DATE,
        assumed=(HALF_UP, "masks: ignored, not written"),
    ),
    CoordinateFormat(
        name="ferret",
        numbers=NumberRule(denominator=1000, levels=1001, rounding="floor"),
        grammar=TaggedGrammar(shapes=listed("box"), label_close=" ", separator=" . "),
        source="apple/ml-ferret ferret/eval/model_refcoco.py",
        date=DATE,
        assumed=("truncation: none when reading", SEPARATOR.format(" . ")),
    ),
    CoordinateFormat(
        name="shikra",
        numbers=THOUSAND,
        grammar=TaggedGrammar(
            shapes=(Shape("box"), Shape("point")),
            decimals=3,
            group_open="[",
            group_join=";",
            group_close="]",
            label_close=" ",
        ),
        frame=PaddedSquare("centre"),
        source="shikras/shikra mllm/dataset/utils/transform.py, process_function/box_process_function.py",
        date=DATE,
        assumed=(HALF_UP, LINE_BREAK),
    ),
    CoordinateFormat(
        name="llava",
        numbers=NumberRule(denominator=100, levels=101),
        grammar=TaggedGrammar(shapes=listed("box"), decimals=2, label_close=" "),
        frame=PaddedSquare("centre"),
        source="haotian-liu/LLaVA issue 606",
        date=DATE,
        assumed=("decimals: 2", NEAREST, LABEL_BEFORE, LINE_BREAK),
    ),
    CoordinateFormat(
        name="minicpm_v",
        numbers=THOUSAND,
        grammar=TaggedGrammar(
            shapes=(
                Shape("box", "{} {}", " ", "<box>", "</box>"),
                Shape("point", "{} {}", " ", "<point>", "</point>"),
                Shape("quad", "{} {}", " ", "<quad>", "</quad>"),
            ),
            group_join="",
            separator=" ",
            **REF,
        ),
        source="OpenBMB/MiniCPM-V issues 185 and 772",
        date=DATE,
        assumed=(NEAREST, SEPARATOR.format(" ")),
    ),
    CoordinateFormat(
        name="fuyu",
        numbers=NumberRule(denominator=None, levels=None, step=2),
        grammar=TaggedGrammar(
            shapes=(
                Shape("box", "{}, {}", ", ", "<box>", "</box>"),
                Shape("point", "{}, {}", ", ", "<point>", "</point>"),
            ),
            label_place="none",
        ),
        frame=FitWithin((1920, 1080)),
        y_first=("box",),
        source="transformers 5.23 models/fuyu/processing_fuyu.py",
        date=DATE,
        assumed=(HALF_UP, FAR_EDGE),
    ),
    CoordinateFormat(
        name="internlm_xcomposer",
        numbers=THOUSAND,
        grammar=TaggedGrammar(shapes=listed("box"), label_close=" "),
        source="InternLM/InternLM-XComposer issue 319",
        date=DATE,
        assumed=(NEAREST, LABEL_BEFORE, LINE_BREAK),
    ),
)
"""The formats, grouped by family in the order of its models."""
