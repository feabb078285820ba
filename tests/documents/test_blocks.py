"""Answers of document models to blocks, tables and Markdown: nothing lost, damaged marks reported."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlparts.documents import page_data, parse_page, table_cells, to_markdown

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
