"""Grammars of every form that tagged text takes, for tests."""

from vlparts.coordinates.formats.registry import CoordinateFormat
from vlparts.coordinates.grammars.tagged import Shape, TaggedGrammar
from vlparts.coordinates.quantization import NumberRule

PAIR, TOKEN = "({},{})", "<loc_{}><loc_{}>"
REF = {"label_open": "<ref>", "label_close": "</ref>"}

GRAMMARS = {
    "marks": TaggedGrammar(
        shapes=(
            Shape("box", PAIR, open="<box>", close="</box>"),
            Shape("quad", PAIR, open="<quad>", close="</quad>"),
        ),
        group_join="",
        **REF,
    ),
    "count": TaggedGrammar(
        shapes=(
            Shape("box", PAIR, open="<|box|>", close="<|/box|>"),
            Shape("point", PAIR, open="<|box|>", close="<|/box|>"),
        ),
        **REF,
    ),
    "list": TaggedGrammar(
        shapes=(Shape("box", "{}, {}", ", ", "[", "]"),),
        group_open="<det>[",
        group_join=", ",
        group_close="]</det>",
        **REF,
    ),
    "either": TaggedGrammar(
        shapes=(Shape("box", "{},{}", ",", "[", "]"), Shape("point", "{},{}", ",", "[", "]")),
        group_open="<|a|>[",
        group_join=", ",
        group_close="]<|/a|>",
        other_groups=(("<|a|>", "<|/a|>"),),
        **REF,
    ),
    "double": TaggedGrammar(
        shapes=(Shape("box"), Shape("point")),
        digits=3,
        group_open="[[",
        group_join=";",
        group_close="]]",
        label_close=" ",
    ),
    "behind": TaggedGrammar(shapes=(Shape("box", "{} {}", " ", "<box>", "</box>"),), label_place="after", **REF),
    "behind_plain": TaggedGrammar(
        shapes=(Shape("box", "<loc{}><loc{}>", ""),),
        digits=4,
        label_place="after",
        label_open=" ",
        separator=" ; ",
        trailing="<seg{}>",
    ),
    "tokens": TaggedGrammar(
        shapes=(Shape("polygon", TOKEN, "", "<poly>", "</poly>"), Shape("box", TOKEN, "")), separator="", group_join=""
    ),
    "bare": TaggedGrammar(shapes=(Shape("box", "{}, {}", ", ", "[", "]"),), label_close=" ", separator=", "),
    "decimals": TaggedGrammar(
        shapes=(Shape("box"), Shape("point")),
        decimals=3,
        group_open="[",
        group_join=";",
        group_close="]",
        label_close=" ",
    ),
    "growing": TaggedGrammar(
        shapes=(Shape("polygon", "<{}><{}>", ""), Shape("box", "<{}><{}>", ""), Shape("point", "<{}><{}>", "")),
        group_open="<|box_start|>",
        group_join=",",
        group_close="<|box_end|>",
        empty="None",
        separator=", ",
        **REF,
    ),
    "call": TaggedGrammar(
        shapes=(Shape("point", PAIR, open="click(start_box='<|box|>", close="<|/box|>')"),), label_place="none"
    ),
    "strict": TaggedGrammar(
        shapes=(Shape("box", "{}, {}", ", ", "<b>[", "]</b>"), Shape("line", "{} {}", " ", "<l>", "</l>")),
        loose=False,
        **REF,
    ),
}
FORMATS = {
    name: CoordinateFormat(name=name, numbers=NumberRule(), grammar=grammar) for name, grammar in GRAMMARS.items()
}
