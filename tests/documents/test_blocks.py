"""Answers of document models to blocks, tables and Markdown: nothing lost, damaged marks reported."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlparts.coordinates import Region
from vlparts.documents import Block, page_data, parse_page, table_cells, to_markdown, write_page

SIZE = (1000, 2000)
ANSWER = (
    "<|ref|>title<|/ref|><|det|>[[0, 0, 999, 100]]<|/det|>\n# Report\n\n"
    "<|ref|>text<|/ref|><|det|>[[0, 200, 400, 300], [500, 200, 999, 300]]<|/det|>\nTwo columns, a < b.\n\n"
    "<|ref|>image<|/ref|><|det|>[[100, 400, 500, 900]]<|/det|>\n\n"
    "<|ref|>equation<|/ref|><|det|>[[0, 910, 999, 950]]<|/det|>\n\\[ x \\coloneqq y \\eqqcolon z \\]\n"
)


def test_blocks_with_boxes_in_pixels_of_the_page() -> None:
    page = parse_page(ANSWER, SIZE)
    assert [block.type for block in page.blocks] == ["title", "text", "image", "equation"]
    assert [len(block.regions) for block in page.blocks] == [1, 2, 1, 1]
    assert page.blocks[0].regions[0].xyxy == pytest.approx((0, 0, 1000, 200.2), abs=0.01)
    assert page.blocks[1].text == "\nTwo columns, a < b.\n\n"
    assert page.errors == ()
    assert page.answer == ANSWER


def test_markdown_links_figures_and_replaces_two_commands() -> None:
    text = to_markdown(parse_page(ANSWER, SIZE), {2: ["figures/page1_1.png"]})
    assert text == (
        "\n# Report\n\n\nTwo columns, a < b.\n\n![image](figures/page1_1.png)\n\n\n\n\\[ x := y =: z \\]\n"
    )


def test_plain_answers_are_one_block() -> None:
    page = parse_page("Just text.\n", SIZE)
    assert [(block.type, block.text, block.regions) for block in page.blocks] == [(None, "Just text.\n", ())]
    assert [block.text for block in parse_page("", SIZE).blocks] == [""]


@pytest.mark.parametrize(
    "damaged",
    [
        "<|ref|>table<|/ref|><|det|>[[1, 2, 3]]<|/det|>",
        "<|ref|>table<|/ref|><|det|>[[1, 2, 3, 4]]",
        "<|ref|>table<|/ref|>[[1, 2, 3, 4]]<|/det|>",
        "<|ref|>table<|det|>[[1, 2, 3, 4]]<|/det|>",
        "<|ref|>table<|/ref|><|det|>[[500, 2, 3, 4]]<|/det|>",
        "<|ref|>table<|/ref|><|det|>[[1, 2, 3, 4], [5]]<|/det|>",
        "<|ref|>table<|/ref|><|det|>__import__('os')<|/det|>",
        "<|/det|>",
        "<|ref|>",
    ],
)
def test_a_damaged_mark_is_an_error_with_its_position_and_stays_in_the_text(damaged: str) -> None:
    answer = f"{ANSWER}before {damaged} after\n{ANSWER}"
    page = parse_page(answer, SIZE)
    assert [block.type for block in page.blocks] == ["title", "text", "image", "equation"] * 2
    assert f"before {damaged} after\n" in page.blocks[3].text
    assert len(page.errors) >= 1
    for position, reason in page.errors:
        assert len(ANSWER) <= position <= len(ANSWER) + len(damaged) + 7
        assert reason


MARK = re.compile(r"<\|ref\|>.*?<\|/ref\|><\|det\|>.*?<\|/det\|>", re.DOTALL)
PIECES = [
    "<|ref|>",
    "<|/ref|>",
    "<|det|>",
    "<|/det|>",
    "[[1, 2, 3, 4]]",
    "[[1,2]]",
    "text",
    "\n",
    "<",
    "|>",
    ANSWER[:54],
]


@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
def test_nothing_is_lost(answer: str) -> None:
    page = parse_page(answer, SIZE)
    end = 0
    for block in page.blocks:
        assert block.position == end
        mark = "" if block.type is None else MARK.match(answer, end)[0]
        end += len(mark) + len(block.text)
        assert answer[:end].endswith(mark + block.text)
    assert end == len(answer)
    if any(token in block.text for block in page.blocks for token in PIECES[:4]):
        assert page.errors
    json.dumps(page_data(page))


def test_tables_are_read_cell_by_cell() -> None:
    text = (
        "<table><tr><td rowspan=\"2\">a</td><td colspan='2'>b &amp; c</td></tr><tr><td>d</td><td></td></tr></table>"
        " and <table><tr><th>x<br>y<td>z</table>"
    )
    first, second = table_cells(text)
    assert [(cell.row, cell.column, cell.row_span, cell.column_span, cell.text) for cell in first] == [
        (0, 0, 2, 1, "a"),
        (0, 1, 1, 2, "b & c"),
        (1, 1, 1, 1, "d"),
        (1, 2, 1, 1, ""),
    ]
    assert [(cell.row, cell.column, cell.text) for cell in second] == [(0, 0, "x\ny"), (0, 1, "z")]
    page = parse_page(f"<|ref|>table<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>\n{text}", SIZE)
    assert [len(cells) for cells in page_data(page)["blocks"][0]["tables"]] == [4, 2]
    assert text in to_markdown(page)


@pytest.mark.parametrize("span", ["0", "-1", "x", "", "99999999999999999999", "²"])
def test_spans_that_are_no_counts(span: str) -> None:
    ((cell, *_),) = table_cells(f'<table><tr><td colspan="{span}">a</td></tr></table>')
    assert 1 <= cell.column_span <= 1000


PAGE = Block("title", (Region.box(0, 0, 1000, 200),), "\n# Report\n\n", 0)
TYPES = st.text(alphabet="abcxyz_ -é", min_size=1, max_size=8).filter(lambda kind: kind == kind.strip())
TEXTS = st.lists(st.sampled_from(["[[1, 2, 3, 4]]", "text", "\n", "<", "|>", "é", "<td>"]), max_size=6).map("".join)
MARKED = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)


@st.composite
def codes(draw: st.DrawFn) -> tuple[int, ...]:
    (left, right), (top, bottom) = (sorted(draw(st.tuples(*[st.integers(0, 999)] * 2))) for _ in "xy")
    return left, top, right, bottom


@given(
    st.lists(st.tuples(TYPES, st.lists(codes(), min_size=1, max_size=3), TEXTS), max_size=5),
    TEXTS,
    st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
)
def test_written_blocks_are_read_back(given: list[tuple], before: str, size: tuple[int, int]) -> None:
    """Boxes whose edges are on codes come back as they were."""
    scale = (size[0] / 999, size[1] / 999) * 2
    blocks = [
        Block(kind, tuple(Region.box(*map(lambda a, b: a * b, box, scale)) for box in boxes), text, 0)
        for kind, boxes, text in given
    ]
    if before:
        blocks.insert(0, Block(None, (), before, 0))
    answer = write_page(blocks, size)
    read = [block for block in parse_page(answer, size).blocks if block.type is not None or block.text]
    assert [(block.type, block.text) for block in read] == [(block.type, block.text) for block in blocks]
    for ours, theirs in zip(read, blocks, strict=True):
        assert [region.xyxy for region in ours.regions] == [pytest.approx(region.xyxy) for region in theirs.regions]
    assert write_page(read, size) == answer


@given(st.lists(st.floats(0, 1000), min_size=4, max_size=4))
def test_boxes_come_back_within_half_a_code(edges: list[float]) -> None:
    (left, right), (top, bottom) = sorted(edges[:2]), sorted(edges[2:])
    box = (left, 2 * top, right, 2 * bottom)
    ((region,),) = [
        block.regions for block in parse_page(write_page([Block("a", (Region.box(*box),), "", 0)], SIZE), SIZE).blocks
    ]
    for ours, theirs, side in zip(region.xyxy, box, SIZE * 2, strict=True):
        assert abs(ours - theirs) <= side / 999 / 2 + 1e-9


@given(st.lists(MARKED, min_size=1, max_size=3))
def test_text_with_marks_is_read_back_or_refused(texts: list[str]) -> None:
    blocks = [Block("text", (Region.box(0, 0, 10, 10),), text, 0) for text in texts]
    try:
        answer = write_page(blocks, SIZE)
    except ValueError:
        with pytest.raises(ValueError, match="must have no marks"):
            write_page(blocks, SIZE)
        return
    assert [(block.type, block.text) for block in parse_page(answer, SIZE).blocks] == [("text", one) for one in texts]


def test_the_layout_of_an_answer() -> None:
    blocks = [PAGE, Block("image", (Region.box(100, 300, 500, 900), Region.box(600, 300, 1000, 900)), "\n", 0)]
    assert write_page(blocks, SIZE) == (
        "<|ref|>title<|/ref|><|det|>[[0, 0, 999, 100]]<|/det|>\n# Report\n\n"
        "<|ref|>image<|/ref|><|det|>[[100, 150, 500, 450], [599, 150, 999, 450]]<|/det|>\n"
    )
    assert write_page([], SIZE) == ""


def test_boxes_outside_the_page() -> None:
    block = Block("text", (Region.box(900, 0, 1001, 10), Region.box(0, 0, 10, 10)), "text", 0)
    with pytest.raises(ValueError, match=r"`blocks\[1\]`: .*leaves the image of size \(1000, 2000\)"):
        write_page([PAGE, block], SIZE)
    assert "[[899, 0, 999, 5], [0, 0, 10, 5]]" in write_page([block], SIZE, on_outside="clamp")
    assert write_page([block], SIZE, on_outside="skip") == "<|ref|>text<|/ref|><|det|>[[0, 0, 10, 5]]<|/det|>text"
    alone = Block("text", block.regions[:1], "text", 0)
    assert write_page([alone, PAGE], SIZE, on_outside="skip") == write_page([PAGE], SIZE)


REFUSED = {
    "no boxes": ([Block("text", (), "a", 0)], "Expected a type and boxes, or neither, got 'text' and 0 boxes"),
    "no type": ([Block(None, PAGE.regions, "a", 0)], "Expected a type and boxes, or neither, got None and 1 boxes"),
    "a second text without a mark": (
        [PAGE, Block(None, (), "a", 0)],
        "would not be read back; .*but the first a type",
    ),
    "marks in a text": ([Block("a", PAGE.regions, ANSWER, 0)], r"`blocks\[0\]` of type 'a' and text .*no marks"),
    "a mark in a type": (
        [Block("a<|/ref|>", PAGE.regions, "", 0)],
        r"`blocks\[0\]`: Label 'a<\|/ref\|>' cannot be read",
    ),
    "an empty type": ([Block("", PAGE.regions, "", 0)], r"`blocks\[0\]`: Label ''"),
    "a point": ([Block("a", (Region.point(1, 1),), "", 0)], r"`blocks\[0\]`: .*is a point"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_blocks_that_cannot_be_written(name: str) -> None:
    blocks, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        write_page(blocks, SIZE)
