"""Generate the tables in `docs/coordinate_formats.md`: `python docs/make_tables.py`."""

import re
from pathlib import Path

from vlparts.coordinates import ABSENT, FORMATS, CoordinateFormat, NumberRule, Region, decode, encode
from vlparts.coordinates.frames.rules import FitWithin, PaddedSquare, SmartResize

PAGE = Path(__file__).parent / "coordinate_formats.md"
BEGIN, END = "<!-- begin: {} -->\n", "<!-- end: {} -->"
SIZE = (1000, 500)
NUMBER = re.compile(r"\d+(?:\.\d+)?")
MODELS = {
    "openpangu": "openPangu-VL; the default",
    "qwen_vl": "Qwen-VL",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen2_5_vl_ocr": "Qwen2.5-VL: lines of text",
    "qwen3_vl": "Qwen3-VL",
    "qwen3_vl_ocr": "Qwen3-VL: lines of text",
    "internvl": "InternVL 1 to 3.5",
    "deepseek_vl2": "DeepSeek-VL2",
    "deepseek_ocr": "DeepSeek-OCR, DeepSeek-OCR-2",
    "glm_4_5v": "GLM-4.5V, GLM-4.6V",
    "cogvlm": "CogVLM, CogAgent",
    "minicpm_v": "MiniCPM-V 2 to 4.5",
    "internlm_xcomposer": "InternLM-XComposer",
    "paligemma": "PaliGemma 1 and 2",
    "florence2": "Florence-2: detection, grounding, segments",
    "florence2_ocr": "Florence-2: text with its place",
    "kosmos2": "Kosmos-2",
    "llava": "LLaVA 1.x",
    "shikra": "Shikra",
    "ferret": "Ferret",
    "molmo": "Molmo",
    "molmo2": "Molmo2",
    "moondream": "Moondream",
    "rex_omni": "Rex-Omni",
    "mineru2": "MinerU 2 (VLM)",
    "got_ocr2": "GOT-OCR2",
    "dots_ocr": "dots.ocr",
    "fuyu": "Fuyu",
    "ui_tars": "UI-TARS 1.0",
    "ui_tars_1_5": "UI-TARS 1.5",
    "ui_tars_1_5_tags": "UI-TARS 1.5, with tags",
    "showui": "ShowUI",
    "os_atlas_4b": "OS-Atlas-Base-4B",
    "os_atlas_7b": "OS-Atlas-Base-7B",
    "gemini": "Gemini",
    "claude": "Claude",
    "xywh": "models that are asked for a width and height",
    "xywh_relative": "as `xywh`, in fractions of the sides",
}
"""The models of each format, in the order of the page."""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _last_number(fmt: CoordinateFormat, place: float) -> str:
    """Return the last number in the text of a region at (place, place) in an image of 1000 x 1000 pixels."""
    kind = next(kind for kind in ("point", "box", "quad") if kind in fmt.kinds)
    count = {"point": 1, "box": 2, "quad": 4}[kind]
    text = encode([Region(kind, ((place, place),) * count)], (1000, 1000), fmt)
    start, end = decode(text, (1000, 1000), fmt).spans[0]
    return NUMBER.findall(text[start:end])[-1]


def numbers(fmt: CoordinateFormat) -> tuple[str, str]:
    """Return the range of the numbers, and the number of the full side."""
    rule = fmt.numbers
    if not isinstance(rule, NumberRule):
        return "cells of a 32 x 32 grid", "-"
    if rule.denominator is None:
        unit = "pixels" if rule.step == 1 else f"pixels / {rule.step}"
        return f"{unit} of the frame", "W'" if rule.step == 1 else f"W' / {rule.step}"
    low, high = _last_number(fmt, 0), _last_number(fmt, 1000)
    full = rule.denominator * float(high) / rule.last(1)
    return f"{low} to {high}", f"{full:g}"


def frame(fmt: CoordinateFormat) -> str:
    """Return the frame in words."""
    rule = fmt.frame
    if isinstance(rule, SmartResize):
        return f"resized: `SmartResize({rule.factor}, {rule.min_pixels}, {rule.max_pixels})`"
    if isinstance(rule, PaddedSquare):
        return "padded to a square"
    if isinstance(rule, FitWithin):
        return f"shrunk to fit {rule.size[0]} x {rule.size[1]}"
    return "original"


def rounding(fmt: CoordinateFormat) -> str:
    """Return the rounding in words."""
    rule = fmt.numbers
    names = {"round": "nearest", "floor": "down", "bins": "down, read at the middle"}
    return names[rule.rounding] if isinstance(rule, NumberRule) else "outwards, read at the middle"


def error(fmt: CoordinateFormat) -> str:
    """Return the maximum error of a coordinate on a side of 1000 pixels."""
    frame = fmt.frame((1000, 1000))
    return f"{fmt.numbers.error_bound(frame.size)[0] / float(frame.scale[0]):.2g}"


def table() -> str:
    """Return the table of all formats."""
    head = ["format", "models", "regions", "numbers", "full side", "rounding", "order", "frame", "error"]
    rows = []
    for name, models in MODELS.items():
        fmt = FORMATS[name]
        order = "**y, x**" if set(fmt.y_first) == set(fmt.kinds) else "**y, x** in boxes" if fmt.y_first else "x, y"
        cells = [f"[`{name}`](#{name})", models, ", ".join(fmt.kinds), *numbers(fmt), rounding(fmt), order]
        rows.append([*cells, frame(fmt), error(fmt)])
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(map(_cell, line)) + " |\n" for line in lines)


def example(fmt: CoordinateFormat) -> str:
    """Return the text of a region, a box if the format has boxes, with the label "cat" if it has labels."""
    corners = ((100.0, 200.0), (400.0, 200.0), (400.0, 450.0), (100.0, 450.0))
    kind = next(kind for kind in ("box", "quad", "point") if kind in fmt.kinds)
    points = {"box": corners[::2], "quad": corners, "point": corners[:1]}[kind]
    try:
        return encode([Region(kind, points, "cat")], SIZE, fmt)
    except ValueError:
        return encode([Region(kind, points)], SIZE, fmt)


def examples() -> str:
    """Return a section per format: an example, the source, and the assumptions."""
    parts = []
    for name in MODELS:
        fmt = FORMATS[name]
        lines = [f"### {name}", "", "~~~text", example(fmt), "~~~", "", f"Source: {fmt.source}, read {fmt.date}."]
        if fmt.assumed:
            lines += ["Assumptions:", "", *(f"- {one}" for one in fmt.assumed)]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def absent() -> str:
    """Return the list of models without a format."""
    return "".join(f"- `{name}`: {reason}.\n" for name, reason in ABSENT.items())


def updated(text: str) -> str:
    """Return the page with its generated parts updated."""
    for name, piece in (("formats", table()), ("absent", absent()), ("examples", examples())):
        begin, end = BEGIN.format(name), END.format(name)
        before, rest = text.split(begin)
        text = before + begin + "\n" + piece + "\n" + end + rest.split(end)[1]
    return text


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
