"""Examples from the documentation of the models, with regions computed by hand.

Text and numbers are published unless the comment says otherwise. "The form": only the text around the numbers is
published.
"""

import numpy as np
import pytest

from vlparts.coordinates.codec import decode, encode
from vlparts.coordinates.formats import published as table  # noqa: F401
from vlparts.coordinates.formats.registry import FORMATS
from vlparts.coordinates.regions import Region

Box = tuple[float, float, float, float]
SQUARE = (1000, 1000)  # a pixel for each thousandth
NINES = (999, 999)
MORE = 1e-9


def box(values: Box, label: str | None = None) -> Region:
    return Region.box(*values, label)


# Format, text as published, size of the image, regions, and whether the same text is written.
GOLDEN: list[tuple[str, str, tuple[int, int], list[Region], bool]] = [
    # openPangu-VL design card and tokenizer, (ddd,ddd): the form; the label and what joins a box are assumed
    ("openpangu", "cat (012,345),(400,678)", NINES, [box((12, 345, 400, 678), "cat")], True),
    # QwenLM/Qwen-VL README.md
    ("qwen_vl", "<ref>击掌</ref><box>(536,509),(588,602)</box>", SQUARE, [box((536, 509, 588, 602), "击掌")], True),
    # QwenLM/Qwen-VL TUTORIAL.md
    (
        "qwen_vl",
        "<ref> Two apples</ref><box>(302,257),(582,671)</box><box>(603,252),(878,642)</box> and<ref> a bowl</ref>"
        "<box>(2,269),(304,674)</box>",
        SQUARE,
        [
            box((302, 257, 582, 671), "Two apples"),
            box((603, 252, 878, 642), "Two apples"),
            box((2, 269, 304, 674), "a bowl"),
        ],
        False,
    ),
    # OpenGVLab/InternVL issue 844: the form; numbers are ours
    (
        "internvl",
        "<ref>a cat</ref><box>[[100, 200, 300, 400]]</box>",
        (500, 250),
        [box((50, 50, 150, 100), "a cat")],
        True,
    ),
    # THUDM/CogVLM README.md
    ("cogvlm", "[[086,540,400,760]]", SQUARE, [box((86, 540, 400, 760))], True),
    (
        "cogvlm",
        "CogVLM at the box [[212,498,787,564]]",
        SQUARE,
        [box((212, 498, 787, 564), "CogVLM at the box")],
        True,
    ),
    # GLM-4.6V's answer in a guide to running it with vLLM
    (
        "glm_4_5v",
        "The coordinates of the second bottle of beer from the right on the table are "
        "<|begin_of_box|>[[94,598,177,991]]<|end_of_box|>.",
        (2000, 500),
        [box((188, 299, 354, 495.5))],
        False,
    ),
    # GLM-4.5V's answer in a benchmark of grounding
    (
        "glm_4_5v",
        "The bounding box for the 'wall_95' entry is <|begin_of_box|>[816, 162, 838, 172]<|end_of_box|>.",
        SQUARE,
        [box((816, 162, 838, 172))],
        False,
    ),
    # deepseek-ai/DeepSeek-VL2 README.md
    (
        "deepseek_vl2",
        "<|ref|>The giraffe at the back.<|/ref|><|det|>[[580, 270, 999, 900]]<|/det|>",
        NINES,
        [box((580, 270, 999, 900), "The giraffe at the back.")],
        True,
    ),
    # transformers docs/source/en/model_doc/deepseek_ocr2.md
    (
        "deepseek_ocr",
        "<|ref|>title<|/ref|><|det|>[[330, 198, 558, 230]]<|/det|>\n# R&D QUALITY",
        (1998, 999),
        [box((660, 198, 1116, 230), "title")],
        False,
    ),
    # opendatalab/mineru-vl-utils mineru_client.py: the form; numbers are ours
    (
        "mineru2",
        "<|box_start|>100 50 900 80<|box_end|><|ref_start|>title<|ref_end|><|rotate_up|>",
        (2000, 1000),
        [box((200, 50, 1800, 80), "title")],
        False,
    ),
    # the answer of paligemma-3b-mix-224 to "detect cat" in modelscope/ms-swift's tests
    ("paligemma", "<loc0000><loc0000><loc1022><loc1022> cat", (1023, 2046), [box((0, 0, 1022, 2044), "cat")], True),
    # google-research/big_vision: y first, 1023 for the far edge: the form
    ("paligemma", "<loc0256><loc0000><loc1023><loc0512> cat", (1023, 1023), [box((0, 256, 512, 1023), "cat")], True),
    # apple/ml-ferret: 1000 x 1000 whatever the image: the form
    ("ferret", "a dog [100, 200, 300, 400]", (2000, 500), [box((200, 100, 600, 200), "a dog")], True),
    # shikras/shikra: padded to a square, (w - h) // 2 above: y 0.5 * 400 - 100: the form
    ("shikra", "a dog [0.100,0.250,0.500,0.500]", (400, 200), [box((40, 0, 200, 100), "a dog")], True),
    # haotian-liu/LLaVA issue 623; the size of the image is ours, and the label is assumed
    (
        "llava",
        "a man bent over behind the cigarette [0.61, 0.36, 0.92, 0.83]",
        (400, 300),
        [box((244, 94, 368, 282), "a man bent over behind the cigarette")],
        True,
    ),
    # OpenBMB/MiniCPM-V issues 185, 772 and 982: the form
    (
        "minicpm_v",
        "<ref>book</ref><box>100 200 300 400</box>",
        (500, 2000),
        [box((50, 400, 150, 800), "book")],
        True,
    ),
    ("minicpm_v", "<point>247 691</point>", SQUARE, [Region.point(247, 691)], True),
    (
        "minicpm_v",
        "<quad>10 20 110 25 105 60 5 55</quad>",
        SQUARE,
        [Region.quad([(10, 20), (110, 25), (105, 60), (5, 55)])],
        True,
    ),
    # transformers models/fuyu/processing_fuyu.py: half pixels, y first in boxes alone: the form
    ("fuyu", "<box>25, 50, 100, 200</box>", (1000, 500), [box((100, 50, 400, 200))], True),
    ("fuyu", "<point>50, 25</point>", (1000, 500), [Region.point(100, 50)], True),
    # bytedance/UI-TARS README_v1.md: the form; numbers are ours
    (
        "ui_tars",
        "click(start_box='<|box_start|>(235,512)<|box_end|>')",
        SQUARE,
        [Region.point(235, 512)],
        False,
    ),
    # bytedance/UI-TARS README_coordinates.md, on an image whose sides smart_resize keeps
    (
        "ui_tars_1_5",
        "Thought: xxx\nAction: click(start_box='(197,525)')",
        (1120, 1120),
        [Region.point(197, 525)],
        False,
    ),
    # prompt of @ui-tars/sdk 1.2.3: the form
    ("ui_tars", "click(start_box='[100, 200, 300, 400]')", SQUARE, [box((100, 200, 300, 400))], False),
    # bytedance/UI-TARS codes/ui_tars/action_parser.py: the form
    (
        "ui_tars_1_5_tags",
        "click(start_box='<bbox>100 200 300 400</bbox>')",
        (1120, 1120),
        [box((100, 200, 300, 400))],
        False,
    ),
    # rednote-hilab/dots.ocr prompts: the form, on an image whose sides smart_resize keeps
    (
        "dots_ocr",
        '[{"bbox": [84, 56, 560, 112], "category": "Title"}]',
        (1120, 1120),
        [box((84, 56, 560, 112), "Title")],
        True,
    ),
    # QwenLM/Qwen3-VL cookbooks/ocr.ipynb: the form, on an image whose sides smart_resize keeps
    (
        "qwen2_5_vl_ocr",
        '```json\n[\n\t{"bbox_2d": [84, 56, 560, 112], "text_content": "EXIT"}\n]\n```',
        (1120, 560),
        [box((84, 56, 560, 112), "EXIT")],
        True,
    ),
    (
        "qwen3_vl_ocr",
        '```json\n[\n\t{"bbox_2d": [84, 56, 560, 112], "text_content": "EXIT"}\n]\n```',
        SQUARE,
        [box((84, 56, 560, 112), "EXIT")],
        True,
    ),
    # VGG Image Annotator 2, shape_attributes of a rectangle: the form
    ("xywh", '{"x": 84, "y": 56, "width": 476, "height": 56}', SQUARE, [box((84, 56, 560, 112))], False),
    (
        "xywh_relative",
        '{"x": 0.25, "y": 0.5, "width": 0.5, "height": 0.125}',
        (100, 80),
        [box((25, 40, 75, 50))],
        False,
    ),
    # bytedance/UI-TARS codes/README.md
    ("ui_tars_1_5_tags", "click(point='<point>200 300</point>')", (1120, 1120), [Region.point(200, 300)], False),
    # showlab/ShowUI QUICK_START.md
    ("showui", "[0.73, 0.21]", (100, 100), [Region.point(73, 21)], True),
    (
        "showui",
        "{'action': 'CLICK', 'value': None, 'position': [0.49, 0.42]}",
        (1000, 200),
        [Region.point(490, 84)],
        False,
    ),
    # OS-Copilot/OS-Atlas README.md says that 0 to 1000 are relative and that the model comes from InternVL2: the form
    (
        "os_atlas_4b",
        "<ref>language switch</ref><box>[[576, 12, 592, 42]]</box>",
        (2000, 500),
        [box((1152, 6, 1184, 21), "language switch")],
        True,
    ),
    # OS-Copilot/OS-Atlas README.md
    (
        "os_atlas_7b",
        "<|object_ref_start|>language switch<|object_ref_end|><|box_start|>(576,12),(592,42)<|box_end|><|im_end|>",
        SQUARE,
        [box((576, 12, 592, 42), "language switch")],
        False,
    ),
    # IDEA-Research/Rex-Omni rex_omni/parser.py
    (
        "rex_omni",
        "<|object_ref_start|>person<|object_ref_end|><|box_start|><0><35><980><987>, <646><0><999><940><|box_end|>",
        NINES,
        [box((0, 35, 980, 987), "person"), box((646, 0, 999, 940), "person")],
        False,
    ),
    # IDEA-Research/Rex-Omni finetuning/dataset/task_fns/grounding_task.py: an absent label
    (
        "rex_omni",
        "<|object_ref_start|>dog<|object_ref_end|><|box_start|><0><35><980><987><|box_end|>, "
        "<|object_ref_start|>cat<|object_ref_end|><|box_start|>None<|box_end|>",
        NINES,
        [box((0, 35, 980, 987), "dog")],
        False,
    ),
    # transformers models/got_ocr2/processing_got_ocr2.py, the box of a prompt: the form
    ("got_ocr2", "[100, 200, 300, 400]", (2000, 500), [box((200, 100, 600, 200))], True),
    # InternLM/InternLM-XComposer issue 319
    ("internlm_xcomposer", "[729, 0, 810, 25]", SQUARE, [box((729, 0, 810, 25))], True),
    # QwenLM/Qwen3-VL cookbooks/spatial_understanding.ipynb
    (
        "qwen3_vl",
        '```json\n[\n\t{"point_2d": [925, 618], "label": "point_1"}\n]\n```',
        SQUARE,
        [Region.point(925, 618, "point_1")],
        True,
    ),
    # QwenLM/Qwen3-VL cookbooks/think_with_images.ipynb
    (
        "qwen3_vl",
        '{"label": "main hanging sign for Hop Inn", "bbox_2d": [574, 301, 660, 468], "img_idx": 0}',
        SQUARE,
        [box((574, 301, 660, 468), "main hanging sign for Hop Inn")],
        False,
    ),
    # google-gemini/cookbook quickstarts/Spatial_understanding.ipynb: y first
    (
        "gemini",
        '[\n  {"box_2d": [393, 67, 574, 206], "label": "red sprinkle topping"},\n'
        '  {"box_2d": [379, 248, 539, 370], "label": "pink swirl topping with sprinkles"}\n]',
        (2000, 1000),
        [
            box((134, 393, 412, 574), "red sprinkle topping"),
            box((496, 379, 740, 539), "pink swirl topping with sprinkles"),
        ],
        True,
    ),
    # platform.claude.com docs build-with-claude/vision-coordinates, [x1, y1, x2, y2] in pixels: the form; our keys
    (
        "claude",
        '[\n  {"bbox": [124, 56, 812, 640], "label": "table"}\n]',
        (1456, 819),
        [box((124, 56, 812, 640), "table")],
        True,
    ),
    # vikhyat/moondream moondream/torch/sample.py: sides times numbers: the form
    (
        "moondream",
        '{"objects": [{"x_min": 0.25, "y_min": 0.5, "x_max": 0.75, "y_max": 1.0}]}',
        (400, 300),
        [box((100, 150, 300, 300))],
        True,
    ),
    # allenai/molmo olmo/data/data_formatter.py: the form; numbers are ours
    (
        "molmo",
        '<point x="12.3" y="4.5" alt="mug">mug</point>',
        (1000, 2000),
        [Region.point(123, 90, "mug")],
        True,
    ),
    # transformers' example of Kosmos-2: cells 44 = (12, 1), 863 = (31, 26), read at their middles
    (
        "kosmos2",
        "<phrase>a snowman</phrase><object><patch_index_0044><patch_index_0863></object>",
        (320, 320),
        [box((125, 15, 315, 265), "a snowman")],
        True,
    ),
    # transformers tests/models/florence2/test_processing_florence2.py, which cuts the middles of bins to whole pixels
    ("florence2", "car<loc_53><loc_334><loc_933><loc_775>", SQUARE, [box((53.5, 334.5, 933.5, 775.5), "car")], True),
    (
        "florence2",
        "red car<loc_53><loc_334><loc_933><loc_775><loc_711><loc_203><loc_906><loc_546>",
        SQUARE,
        [box((53.5, 334.5, 933.5, 775.5), "red car"), box((711.5, 203.5, 906.5, 546.5), "red car")],
        True,
    ),
    (
        "florence2_ocr",
        "Hello<loc_100><loc_100><loc_200><loc_100><loc_200><loc_200><loc_100><loc_200>"
        "World<loc_300><loc_300><loc_400><loc_300><loc_400><loc_400><loc_300><loc_400>",
        SQUARE,
        [
            Region.quad([(100.5, 100.5), (200.5, 100.5), (200.5, 200.5), (100.5, 200.5)], "Hello"),
            Region.quad([(300.5, 300.5), (400.5, 300.5), (400.5, 400.5), (300.5, 400.5)], "World"),
        ],
        True,
    ),
]


@pytest.mark.parametrize(("name", "text", "size", "regions", "same"), GOLDEN)
def test_published_text(name: str, text: str, size: tuple[int, int], regions: list[Region], same: bool) -> None:
    read = decode(text, size, name).regions
    assert [(region.kind, region.label) for region in read] == [(region.kind, region.label) for region in regions]
    for got, wanted in zip(read, regions, strict=True):
        np.testing.assert_allclose(got.points, wanted.points, rtol=0, atol=MORE)
    written = encode(read, size, name)
    assert (written == text) == same
    assert decode(written, size, name).regions == read


def test_every_format_has_an_example() -> None:
    elsewhere = {"qwen2_vl", "qwen2_5_vl", "molmo2"}
    published = {name for name, fmt in FORMATS.items() if fmt.source}  # other tests may register some of their own
    assert {name for name, *_ in GOLDEN} | elsewhere == published


# QwenLM/Qwen3-VL qwen-vl-finetune/tools/process_bbox.ipynb: the same box for two models, with the notebook's outputs.
@pytest.mark.parametrize(
    ("name", "text"),
    [("qwen2_vl", "(228,320),(961,970)"), ("qwen2_5_vl", '"bbox_2d": [147, 134, 619, 407]')],
)
def test_qwen_notebook(name: str, text: str) -> None:
    bowl = box((146, 137, 615, 415), "bowl of carrots")
    written = encode([bowl], (640, 428), name)
    assert text in written
    bound = np.array(FORMATS[name].numbers.error_bound((640, 428))) + 0.5
    (read,) = decode(written, (640, 428), name).regions
    assert (np.abs(np.subtract(read.points, bowl.points)) <= bound).all()


# allenai/molmo2 tests/preprocessing/test_point_formatter.py
@pytest.mark.parametrize(
    "text",
    [
        'Counting the <points coords="1 1 990 800">label</points> shows a total of 1.',
        'Counting the <points coords="1 1 900 400 2 911 800">aasdf</points> shows a total of 2.',
        '<points coords="0.1 1 900 400 2 911 800;0.2 3 911 600">aasdf</points>',
        '<tracks coords="0.0 1 259 340\t1.0 1 138 427\t2.0 1 248 335">debug</tracks>',
        '<tracks coords="0.0 1 010 020 2 010 030\t5.0 1 100 100 2 200 200">debug</tracks>',
        '<tracks coords="2.0 1 300 300\t3.0 1 300 300 2 400 400\t6.0 3 400 100\t7.0 1 300 300 2 400 400 3 400 400">'
        "debug</tracks>",
    ],
)
def test_molmo2(text: str) -> None:
    read = decode(text, SQUARE, "molmo2").regions
    assert {region.kind for region in read} == {"track" if "0." in text or "tracks" in text else "point"}
    if "tracks" in text or '"1 ' in text:
        assert encode(read, SQUARE, "molmo2") in text.replace("\t", ";")
    assert [(region.identity, region.times) for region in read][-1][0] == len(read)
