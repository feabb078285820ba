"""Regions between marks."""

import re
from typing import Any

import pytest

from tests.coordinates.grammars.regex_steps import count_steps
from tests.coordinates.grammars.tagged_examples import GRAMMARS
from vlparts.coordinates.grammars.base import Coded
from vlparts.coordinates.grammars.tagged import Shape, TaggedGrammar
from vlparts.coordinates.grammars.tagged_patterns import compiled
from vlparts.coordinates.regions import KINDS

CAT = Coded("box", [1, 2, 30, 400], "a cat")
DOG = Coded("box", [10, 2, 300, 400], "dog")
TEXTS = [
    (
        "marks",
        [CAT, CAT, Coded("quad", [1, 2, 3, 4, 5, 6, 7, 8])],
        "<ref>a cat</ref><box>(1,2),(30,400)</box><box>(1,2),(30,400)</box>\n<quad>(1,2),(3,4),(5,6),(7,8)</quad>",
    ),
    ("count", [CAT, Coded("point", [3, 4])], "<ref>a cat</ref><|box|>(1,2),(30,400)<|/box|>\n<|box|>(3,4)<|/box|>"),
    (
        "list",
        [CAT, CAT, DOG],
        "<ref>a cat</ref><det>[[1, 2, 30, 400], [1, 2, 30, 400]]</det>\n<ref>dog</ref><det>[[10, 2, 300, 400]]</det>",
    ),
    (
        "double",
        [CAT, Coded("point", [3, 4], "a cat"), DOG],
        "a cat [[001,002,030,400;003,004]]\ndog [[010,002,300,400]]",
    ),
    ("behind", [CAT, DOG], "<box>1 2 30 400</box><ref>a cat</ref>\n<box>10 2 300 400</box><ref>dog</ref>"),
    (
        "behind_plain",
        [CAT, Coded("box", [1, 2, 3, 1000])],
        "<loc0001><loc0002><loc0030><loc0400> a cat ; <loc0001><loc0002><loc0003><loc1000>",
    ),
    (
        "tokens",
        [CAT, CAT, Coded("polygon", range(8), "dog")],
        "a cat<loc_1><loc_2><loc_30><loc_400><loc_1><loc_2><loc_30><loc_400>dog"
        "<poly><loc_0><loc_1><loc_2><loc_3><loc_4><loc_5><loc_6><loc_7></poly>",
    ),
    ("bare", [CAT, DOG], "a cat [1, 2, 30, 400], dog [10, 2, 300, 400]"),
    (
        "decimals",
        [Coded("box", [1, 20, 300, 1000], "a cat"), Coded("point", [500, 0], "a cat")],
        "a cat [0.001,0.020,0.300,1.000;0.500,0.000]",
    ),
    (
        "growing",
        [CAT, Coded("point", [5, 6], "a cat"), Coded("polygon", range(10))],
        "<ref>a cat</ref><|box_start|><1><2><30><400>,<5><6><|box_end|>, "
        "<|box_start|><0><1><2><3><4><5><6><7><8><9><|box_end|>",
    ),
    ("call", [Coded("point", [3, 4])], "click(start_box='<|box|>(3,4)<|/box|>')"),
    ("strict", [CAT, Coded("line", range(6))], "<ref>a cat</ref><b>[1, 2, 30, 400]</b>\n<l>0 1 2 3 4 5</l>"),
]


def read(name: str, text: str) -> list[tuple[str, list[int], str | None]]:
    """Scan a text without errors, into kinds, codes and labels."""
    found, errors = GRAMMARS[name].scan(text)
    assert errors == []
    return [(item.kind, list(item.codes), item.label) for item in found]


@pytest.mark.parametrize(("name", "coded", "text"), TEXTS, ids=[name for name, *_ in TEXTS])
def test_text_both_ways(name: str, coded: list[Coded], text: str) -> None:
    assert GRAMMARS[name].write(coded) == text
    assert read(name, text) == [(item.kind, list(item.codes), item.label) for item in coded]
    assert GRAMMARS[name].write([]) == ""
    assert GRAMMARS[name].scan("") == ([], [])


@pytest.mark.parametrize("name", GRAMMARS)
def test_every_kind_comes_back_after_prose(name: str) -> None:
    for kind in GRAMMARS[name].kinds:
        coded = Coded(kind, list(range(2 * KINDS[kind][0])))
        text = GRAMMARS[name].write([coded])
        found, errors = GRAMMARS[name].scan(f"Well (see 2, and 3): {text}\nand so on.")
        assert errors == []
        assert [(item.kind, list(item.codes)) for item in found] == [(kind, list(coded.codes))]


@pytest.mark.parametrize(("name", "coded", "text"), TEXTS, ids=[name for name, *_ in TEXTS])
def test_spans_are_those_of_coordinates_and_of_all(name: str, coded: list[Coded], text: str) -> None:
    found, _ = GRAMMARS[name].scan("So: \n" + text)
    whole = "So: \n" + text
    end = 0
    for item in found:
        assert item.outer[0] >= end
        assert item.outer[0] <= item.start < item.end <= item.outer[1]
        end = item.outer[1]
        shown = whole[item.start : item.end]
        assert "box" not in shown
        assert "ref" not in shown
    assert end == len(whole)
    assert whole[found[0].outer[0] :].startswith(text[: found[0].outer[1] - found[0].outer[0]])


LOOSE = [
    ("marks", "<ref> a cat </ref> <box> ( 1 , 2 ),(30,400) </box>", [("box", [1, 2, 30, 400], "a cat")]),
    (
        "list",
        "<ref>a</ref><det>[[1,2,3,4],\n[5,6,7,8]]</det>",
        [("box", [1, 2, 3, 4], "a"), ("box", [5, 6, 7, 8], "a")],
    ),
    ("double", "it [[ 001, 002,003, 004 ]]", [("box", [1, 2, 3, 4], "it")]),
    (
        "bare",
        "a cat [1,2,3,4] and then a dog [5,6,7,8].",
        [("box", [1, 2, 3, 4], "a cat"), ("box", [5, 6, 7, 8], "and then a dog")],
    ),
    ("behind_plain", "<loc0001><loc0002><loc0003><loc0004><seg001><seg127> cat; x", [("box", [1, 2, 3, 4], "cat")]),
    (
        "behind",
        "<box>1 2 3 4</box> <ref>a</ref> <box>5 6 7 8</box>",
        [("box", [1, 2, 3, 4], "a"), ("box", [5, 6, 7, 8], None)],
    ),
]


@pytest.mark.parametrize(("name", "text", "expected"), LOOSE, ids=lambda value: str(value)[:12])
def test_loose_text_is_read(name: str, text: str, expected: list[Any]) -> None:
    assert read(name, text) == expected


def test_any_number_of_decimals_is_rounded() -> None:
    assert read("decimals", "x [0.5,1] [0.12345,1,1.0,0.9996]") == [
        ("point", [500, 1000], "x"),
        ("box", [123, 1000, 1000, 1000], None),
    ]


def test_strict_text_has_no_other_spaces() -> None:
    for text in ("<b>[1,2,3,4]</b>", "<b> [1, 2, 3, 4]</b>", "<b>[1, 2, 3,  4]</b>", "<l>1  2 3 4</l>"):
        found, errors = GRAMMARS["strict"].scan(text)
        assert found == []
        assert [error.position for error in errors] == [0]


ERRORS = [
    ("marks", "<ref>cat</ref><box>(1,2),(3", 14, "unfinished"),
    ("marks", "<ref>cat</ref><box>(1,2),(3,4)", 14, "unfinished"),
    ("marks", "<ref>cat</ref><box>(1,2),(3,4)</bo", 14, "unfinished"),
    ("marks", "a <box>", 2, "unfinished"),
    ("marks", "a <bo", 2, "the text ends within a mark"),
    ("marks", "<box>(1,2)</box> x", 0, r"malformed .* expected '<box>\(n,n\),\(n,n\)</box>'"),
    ("marks", "<box>(1,2),(3,4,5)</box>", 0, "malformed"),
    ("marks", "<box>((1,2),(3,4))</box>", 0, "malformed"),
    ("marks", "<box>(nan,2),(3,4)</box>", 0, "malformed"),
    ("marks", "<box>(-1,2),(3,4)</box>", 0, "malformed"),
    ("marks", "<box>(1.5,2),(3,4)</box>", 0, "malformed"),
    ("marks", "<box>(12345678901,2),(3,4)</box>", 0, "malformed"),
    ("marks", f"<box>({'9' * 5000},2),(3,4)</box>", 0, "malformed"),
    ("marks", "\uff1cbox\uff1e(1,2),(3,4)</box>", 0, "malformed"),
    ("marks", "<box>\uff081,2\uff09,(3,4)</box>", 0, "malformed"),
    ("marks", "<box>(1\uff0c2),(3,4)</box>", 0, "malformed"),
    ("marks", "<box>(\u0661,2),(3,4)</box>", 0, "malformed"),
    ("marks", "<box><box>(1,2)</box>", 0, "malformed"),
    ("count", "<|box|>(1,2),(3,4),(5,6)<|/box|>", 0, "malformed"),
    ("list", "<ref>c</ref><det>[[1,2,3,4],[5,6,7]]</det>", 12, "malformed"),
    ("list", "<det>[[1,2,3,4], [5,6", 0, "unfinished"),
    ("list", "<det>[1,2,3,4]</det>", 0, "malformed"),
    ("double", "cat [[001,002,003]] x", 4, "malformed"),
    ("double", "cat [[[001,002,003,004]]] x", 4, "malformed"),
    ("double", "cat [001,002,003,004] x", 4, "malformed"),
    ("double", "cat [[1,2,3,4]] x", 4, r"expected '\[\[ddd,ddd,ddd,ddd\]\]' or '\[\[ddd,ddd\]\]' with ASCII digits"),
    ("double", "cat [[001,002,003,004;001,002", 4, "unfinished"),
    ("behind", "<box>1,2,3,4</box>", 0, "malformed"),
    ("behind_plain", "<loc0001><loc0002><loc0003><loc004>", 0, "unfinished"),
    ("behind_plain", "<loc0001><loc0002><loc0003> cat", 0, "malformed"),
    ("tokens", "cat<loc_1><loc_2><loc_3>dog", 3, "malformed"),
    ("tokens", "cat<loc_1><loc_2><loc_3><lo", 3, "unfinished"),
    ("tokens", "<poly><loc_1><loc_2><loc_3><loc_4></poly>", 0, "malformed"),
    ("bare", "[1, 2, 3] x", 0, "malformed"),
    ("bare", "[1, 2, 3, 4, 5]", 0, "malformed"),
    ("bare", "[[1, 2, 3, 4]]", 0, "malformed"),
    ("bare", "[NaN, 1, 2, 3]", 0, "malformed"),
    ("bare", "[1", 0, "unfinished"),
    ("bare", "[1, 2, 3, 4", 0, "unfinished"),
    ("bare", "x [", 2, "unfinished"),
    ("decimals", "[0.1,0.2,0.3]", 0, r"expected '\[n.ddd,n.ddd,n.ddd,n.ddd\]'"),
    ("decimals", "[-0.1,0.2]", 0, "malformed"),
    ("growing", "<|box_start|><1><2><3><4>, <1><2><3><|box_end|> y", 0, "malformed"),
    ("growing", "<|box_start|><1><2><3><4>, <1><2", 0, "unfinished"),
    ("call", "click(start_box='<|box|>(1,2)", 0, "unfinished"),
    ("call", "basic click(st", 6, "the text ends within a mark"),
]


@pytest.mark.parametrize(("name", "text", "position", "reason"), ERRORS, ids=[f"{n}-{t[:40]}" for n, t, *_ in ERRORS])
def test_broken_regions_are_errors(name: str, text: str, position: int, reason: str) -> None:
    found, errors = GRAMMARS[name].scan(text)
    assert found == []
    assert [error.position for error in errors][:1] == [position]
    assert re.search(reason, errors[0].reason)
    assert len(errors[0].reason) < 250
    if text.count("<box>") < 2:
        assert len(errors) == 1


@pytest.mark.parametrize("name", GRAMMARS)
def test_prose_is_no_error(name: str) -> None:
    prose = "See (2), [1], <i> and f(x, y) = 3, [a, b], 12:30; at 5 < 6 > 4 (1, 2), cats & 'dogs'. [12] <p>1 2</p>"
    assert GRAMMARS[name].scan(prose) == ([], [])


def test_good_regions_around_an_error_are_kept() -> None:
    text = "<ref>a</ref><box>(1,2),(3,4)</box><box>(1,2</box><box>(5,6),(7,8)</box>"
    found, errors = GRAMMARS["marks"].scan(text)
    assert [(list(item.codes), item.label) for item in found] == [([1, 2, 3, 4], "a"), ([5, 6, 7, 8], None)]
    assert [error.position for error in errors] == [text.index("<box>(1,2</")]
    found, errors = GRAMMARS["bare"].scan("a [1, 2, 3, 4], b [5, 6], c [7, 8, 9, 10]")
    assert [item.label for item in found] == ["a", "c"]
    assert len(errors) == 1


@pytest.mark.parametrize("name", GRAMMARS)
@pytest.mark.parametrize(
    "coded",
    [
        Coded("track", [1, 2], times=[1.0]),
        Coded("box", [1, 2, 3, 4], image=1),
        Coded("box", [1, 2, 3, 4], identity=0),
        Coded("box", [1, 2, 3, 4], times=[1.0, 2.0]),
    ],
)
def test_what_marks_cannot_express_raises(name: str, coded: Coded) -> None:
    with pytest.raises(
        ValueError, match="cannot be written: the format has|of one image, without identities and times"
    ):
        GRAMMARS[name].write([coded])


def test_labels_with_marks_or_without_a_place_raise() -> None:
    for label in ("<ref>", "a</ref>b"):
        with pytest.raises(ValueError, match="cannot be read back: it contains one of the label marks"):
            GRAMMARS["marks"].write([CAT._replace(label=label)])
    with pytest.raises(ValueError, match=r"^The format has no labels, got label 'x'\.$"):
        GRAMMARS["call"].write([Coded("point", [1, 2], "x")])


# fmt: off
PIECES = [
    "<box>", "<box>(", "(", "[", "[[", "[ ", "<", "<loc_1>", "<loc_", "<loc0001>", "<1>", "[1,", "[1, 2, 3, 4",
    "[1, 2, 3, 4]", "<box>(1,2),(3,4)</box>", "(1,2),", "<|box_start|>", "<|box_start|><1><2>", "<poly><loc_1>",
    "<poly><loc_1><loc_2>", ";", " ", "<det>[[1,2,3,4],", "[1,2,3,4],", "[[001,002;", "<ref>", "</ref>",
    "<seg001>", "click(start_box='", "<box>1 2 3 4</box>", "\n", "[" + " " * 50, "[[[[" + " " * 30, "<l>1 2 ",
    "1 ", "\uff08", "nan,", "[nan", "a",
]
# fmt: on


@pytest.mark.parametrize("name", GRAMMARS)
@pytest.mark.parametrize("prefix", ["", "<det>[", "<|box_start|>"])
def test_steps_of_matching_grow_linearly(name: str, prefix: str) -> None:
    """Every further repetition of a piece takes the same number of steps."""
    pattern = compiled(GRAMMARS[name]).region
    for piece in PIECES:
        once, twice, thrice = count_steps(pattern, prefix, piece)
        assert thrice - twice == twice - once, piece


def test_counted_steps_tell_linear_from_quadratic() -> None:
    for pattern, piece in ((r"\s*+x", " "), (r"\[[\[1,]*+\]", "[1,")):
        once, twice, thrice = count_steps(re.compile(pattern), "", piece)
        assert thrice - twice > 1.5 * (twice - once)
    with pytest.raises(AssertionError, match="must be possessive"):
        count_steps(re.compile(r"\s*x"), "", " ")


@pytest.mark.parametrize("name", GRAMMARS)
def test_long_repetitions_never_raise(name: str) -> None:
    for piece in PIECES:
        for prefix in ("", "<det>[", "<|box_start|>"):
            text = prefix + piece * (6_000 // len(piece))
            found, errors = GRAMMARS[name].scan(text)
            assert all(0 <= item.start < item.end <= len(text) for item in found)
            assert all(0 <= error.position < len(text) for error in errors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "circle"}, "`kind` must be one of .* got 'circle'"),
        ({"pair": "({})"}, r"`pair` must contain '\{\}' 2 times, got '\(\{\}\)'"),
        ({"join": "{}"}, r"`join` must contain '\{\}' 0 times, got '\{\}'"),
        ({"open": "<b1>"}, "`open` must be a str without digits and '%', got '<b1>'"),
        ({"close": None}, "`close` must be a str"),
        ({"pair": "({}{})"}, "`pair` and `join` must separate the numbers"),
        ({"pair": "{},{}", "join": ""}, "`pair` and `join` must separate the numbers"),
    ],
)
def test_bad_shapes_raise(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shape(**{"kind": "box", **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shapes": ()}, "`shapes` must be a tuple of one or more Shape"),
        ({"shapes": ("box",)}, "`shapes` must be a tuple of one or more Shape"),
        ({"shapes": (Shape("box", "({},{})"), Shape("box", "({},{})"))}, "`shapes` must be different, got"),
        ({"shapes": (Shape("box"),)}, "A box must begin with a mark or bracket, got ''"),
        ({"digits": 0}, r"`digits` must be in 1..9 or None, got 0"),
        ({"digits": "3"}, "`digits` must be an integer, got '3'"),
        ({"decimals": 7}, r"`decimals` must be in 0..6, got 7"),
        ({"decimals": 2, "digits": 3}, "`digits` must be None if `decimals` is not 0, got 3"),
        ({"label_place": "over"}, "`label_place` must be 'before', 'after' or 'none', got 'over'"),
        ({"label_open": None}, "`label_open` must be a str, got None"),
        ({"group_join": 3}, "`group_join` must be a str or None, got 3"),
        ({"empty": None}, "`empty` must be a str, got None"),
        ({"empty": "None"}, "`empty` must be '' without `group_open` and `group_close`, got 'None'"),
        ({"other_groups": (("<a>",),)}, "`other_groups` must be pairs of str, got"),
        ({"other_groups": (("<a>", None),)}, "`other_groups` must be pairs of str, got"),
        ({"trailing": "<seg>"}, r"`trailing` must contain '\{\}' once, got '<seg>'"),
    ],
)
def test_bad_grammars_raise(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaggedGrammar(**{"shapes": (Shape("box", "({},{})"),), **changes})


NONE = "<ref>cat</ref><|box_start|>None<|box_end|>"
DOGS = "<ref>dog</ref><|box_start|><1><2><3><4>,<5><6><7><8><|box_end|>"


@pytest.mark.parametrize("none", [NONE, NONE.replace("None", " None ")])
@pytest.mark.parametrize("text", ["{0}", "{0}, {1}", "{1}, {0}", "{1}, {0}, {0}, {1}", "Here: {0}\n{1}, {0}."])
def test_a_group_that_says_that_there_is_no_region_is_no_error(text: str, none: str) -> None:
    """The regions of other groups keep their own labels and places."""
    grammar = GRAMMARS["growing"]
    found, errors = grammar.scan(text.format(none, DOGS))
    assert errors == []
    assert [(item.label, item.codes) for item in found] == [("dog", (1, 2, 3, 4)), ("dog", (5, 6, 7, 8))] * text.count(
        "{1}"
    )
    assert not any("cat" in text.format(none, DOGS)[slice(*item.outer)] for item in found)


@pytest.mark.parametrize("inner", ["none", "Nothing", "None<1><2>", "<1><2>None", "", "None, None"])
def test_other_words_in_place_of_regions_are_errors(inner: str) -> None:
    _, errors = GRAMMARS["growing"].scan(f"<|box_start|>{inner}<|box_end|> there")
    assert [(position, reason.partition(" ")[0]) for position, reason in errors] == [(0, "malformed")]


@pytest.mark.parametrize("end", range(len("<|box_start|>"), len("<|box_start|>None<|box_end|>")))
def test_a_group_without_regions_that_is_cut_off_is_unfinished(end: int) -> None:
    _, errors = GRAMMARS["growing"].scan("<|box_start|>None<|box_end|>"[:end])
    assert [(position, reason.partition(" ")[0]) for position, reason in errors] == [(0, "unfinished")]


def test_other_marks_of_groups_are_read() -> None:
    grammar, inner = GRAMMARS["either"], "[1, 2, 3, 4], [5, 6, 7, 8]"
    for marks in ("<|a|>[{}]<|/a|>", "<|a|>{}<|/a|>"):
        text = f"<ref>cat</ref>{marks.format(inner)} and <ref>dog</ref>{marks.format('[9, 9, 9, 9]')}"
        found, errors = grammar.scan(text)
        assert errors == []
        assert [(item.label, item.codes) for item in found] == [
            ("cat", (1, 2, 3, 4)),
            ("cat", (5, 6, 7, 8)),
            ("dog", (9, 9, 9, 9)),
        ]
        assert [text[item.start : item.end] for item in found] == ["1, 2, 3, 4", "5, 6, 7, 8", "9, 9, 9, 9"]
    for unpaired in ("<|a|>[[1, 2, 3, 4]<|/a|>", "<|a|>[1, 2, 3, 4]]<|/a|>"):
        found, errors = grammar.scan(unpaired)
        assert not found
        assert [position for position, _ in errors] == [0]


def test_of_several_shapes_of_a_kind_the_first_is_written_and_all_are_read() -> None:
    shapes = (Shape("box", open="<b>", close="</b>"), Shape("point", "({},{})"), Shape("box", "{},{}", ",", "[", "]"))
    grammar = TaggedGrammar(shapes=shapes, label_place="none")
    assert grammar.kinds == ("box", "point")
    assert grammar.write([Coded("box", [1, 2, 3, 4])]) == "<b>1,2,3,4</b>"
    found, errors = grammar.scan("[1,2,3,4] <b>5,6,7,8</b> (9,9)")
    assert [(item.kind, list(item.codes)) for item in found] == [
        ("box", [1, 2, 3, 4]),
        ("box", [5, 6, 7, 8]),
        ("point", [9, 9]),
    ]
    assert errors == []
