"""Records of pages for document models: prompts and answers in the published form, and what is refused."""

import base64
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.documents.made import encrypted_pdf, pdf
from tests.tiny import picture
from tests.training.making import save, write_records
from vlparts import DeepEncoderConfig, DeepEncoderImageProcessor, MoGEConfig, compose, compose_processor
from vlparts.documents import DEEPSEEK_OCR_PROMPTS, parse_page
from vlparts.parts.chat_templates import DEEPSEEK_OCR_CHAT_TEMPLATE
from vlparts.training.building import conversation_texts
from vlparts.training.config import TrainConfig
from vlparts.training.encoding import Sample, SampleEncoder
from vlparts.training.records import PageRecord, RecordError, read_records
from vlparts.training.sources import open_source
from vlparts.training.tokenizer import train_tokenizer

TITLE = {"type": "title", "box": [0, 0, 30, 10], "text": "# Report"}
TEXT = {"type": "text", "boxes": [[0, 10, 15, 20], [15, 10, 30, 20]], "text": "Two columns."}
FIGURE = {"type": "image", "box": [3, 12, 27, 18]}
ANSWER = (
    "<|ref|>title<|/ref|><|det|>[[0, 0, 999, 500]]<|/det|>\n# Report\n\n"
    "<|ref|>image<|/ref|><|det|>[[100, 599, 899, 899]]<|/det|>\n\n"
    "<|ref|>text<|/ref|><|det|>[[0, 500, 500, 999], [500, 500, 999, 999]]<|/det|>\nTwo columns."
)
PAGE = {"page": "a.png", "markdown": "# Report\n\nTwo columns.\n"}


@pytest.fixture(scope="module")
def processor() -> Any:
    """The processor of a small DeepSeek-OCR."""
    words = train_tokenizer(["Free OCR."])
    words.bos_token = "<|im_start|>"
    model = compose(
        DeepEncoderConfig.from_preset("deepencoder_tiny"),
        MoGEConfig.from_preset("tiny", vocab_size=len(words)),
        "deepseek_ocr",
    )
    image_processor = DeepEncoderImageProcessor(base_size=64, tile_size=64, untiled_size=64)
    return compose_processor(model, words, image_processor, chat_template=DEEPSEEK_OCR_CHAT_TEMPLATE)


def encoded(folder: Path, record: dict[str, Any], processor: Any, **options: Any) -> Sample:
    (line,) = read_records(write_records(folder / "train.jsonl", [record])).lines
    return SampleEncoder(processor, folder, **options)(line.record)


def texts(sample: Sample, processor: Any) -> tuple[str, str]:
    """Prompt, with one placeholder, and answer of a sample."""
    in_loss = sample.labels != -100
    assert sample.input_ids[in_loss].equal(sample.labels[in_loss])
    prompt, answer = (processor.tokenizer.decode(sample.input_ids[mask]) for mask in (~in_loss, in_loss))
    counted = prompt.count("<image>")
    assert counted == processor.count_image_tokens(sample.images, 0) > 1
    return prompt.replace("<image>" * counted, "<image>"), answer


def test_markdown_becomes_prompt_and_answer(tmp_path: Path, processor: Any) -> None:
    save(tmp_path, "a.png", picture(30, 20))
    sample = encoded(tmp_path, PAGE, processor)
    assert texts(sample, processor) == ("<|im_start|><image>\nFree OCR.", "# Report\n\nTwo columns.\n<|im_end|>")
    wanted = processor.image_processor(Image.open(tmp_path / "a.png"), return_tensors="pt")
    assert sample.images.keys() == wanted.keys() == {"pixel_values", "image_grid_thw", "image_tile_grid"}
    assert all(torch.equal(sample.images[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("breaks", ["", "\n", "\n\n"])
def test_blocks_become_the_published_answer(tmp_path: Path, processor: Any, breaks: str) -> None:
    """Line breaks around texts are those of the answer, whatever the record has."""
    save(tmp_path, "a.png", picture(30, 20))
    blocks = [{**block, "text": breaks + block.get("text", "") + breaks} for block in (TITLE, FIGURE, TEXT)]
    prompt, answer = texts(encoded(tmp_path, {"page": "a.png", "blocks": blocks}, processor), processor)
    assert prompt == "<|im_start|>" + DEEPSEEK_OCR_PROMPTS["markdown"]
    assert answer == ANSWER + "<|im_end|>"
    assert [block.type for block in parse_page(answer, (30, 20)).blocks] == ["title", "image", "text"]


def test_markdown_beside_blocks_must_be_their_text(tmp_path: Path, processor: Any) -> None:
    save(tmp_path, "a.png", picture(30, 20))
    record = {**PAGE, "blocks": [TITLE, FIGURE, TEXT]}
    assert texts(encoded(tmp_path, record, processor), processor)[1] == ANSWER + "<|im_end|>"
    with pytest.raises(
        RecordError, match=r"must be the same apart from whitespace, got 's' and '' after 18 characters"
    ):
        encoded(tmp_path, {**record, "markdown": PAGE["markdown"] + "s"}, processor)


def test_a_prompt_in_the_record_wins(tmp_path: Path, processor: Any) -> None:
    save(tmp_path, "a.png", picture(30, 20))
    for record in ({**PAGE}, {"page": "a.png", "blocks": [TITLE]}):
        prompt, _ = texts(encoded(tmp_path, {**record, "prompt": "Read <image> aloud."}, processor), processor)
        assert prompt == "<|im_start|>Read <image> aloud."


def test_other_formats_of_coordinates_do_not_matter(tmp_path: Path, processor: Any) -> None:
    save(tmp_path, "a.png", picture(30, 20))
    sample = encoded(tmp_path, {"page": "a.png", "blocks": [TITLE]}, processor, coordinate_format="qwen2_vl")
    assert texts(sample, processor)[1].startswith("<|ref|>title<|/ref|><|det|>[[0, 0, 999, 500]]")


def test_pages_of_a_pdf(tmp_path: Path, processor: Any) -> None:
    """Boxes are in pixels of the page at the resolution at which it is drawn."""
    pdf(tmp_path / "a.pdf", size=(60, 40))
    title = {**TITLE, "box": [0, 0, 120, 40]}
    samples = {
        (number, dpi): encoded(
            tmp_path, {"page": "a.pdf", "page_number": number, "blocks": [title]}, processor, dpi=dpi
        )
        for number, dpi in ((1, 144), (2, 144), (2, 288))
    }
    assert "[[0, 0, 999, 500]]" in texts(samples[2, 144], processor)[1]
    assert "[[0, 0, 500, 250]]" in texts(samples[2, 288], processor)[1]
    assert not samples[1, 144].images["pixel_values"].equal(samples[2, 144].images["pixel_values"])
    pdf(tmp_path / "one.pdf", 1)
    assert len(encoded(tmp_path, {**PAGE, "page": "one.pdf"}, processor)) > 0
    with pytest.raises(ValueError, match=r"one\.pdf, page 1: The page has 240 x 160 pixels, more than"):
        encoded(tmp_path, {**PAGE, "page": "one.pdf"}, processor, max_image_pixels=1000)


@pytest.mark.parametrize("kind", ["file", "data"])
def test_a_page_as_uri(tmp_path: Path, processor: Any, kind: str) -> None:
    save(tmp_path, "a.png", picture(30, 20))
    data = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    uri = (tmp_path / "a.png").as_uri() if kind == "file" else f"data:image/png;base64,{data}"
    found, wanted = (encoded(tmp_path, {**PAGE, "page": page}, processor) for page in (uri, "a.png"))
    assert found.images["pixel_values"].equal(wanted.images["pixel_values"])


BOXED = {"page": "a.png", "blocks": [TITLE, {**TEXT, "boxes": [[0, 10, 31, 20]]}]}
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no Markdown": ({"page": "a.png"}, "must have 'markdown' or 'blocks', got neither"),
    "empty Markdown": ({**PAGE, "markdown": " \n"}, "markdown: The Markdown is empty"),
    "no blocks": ({"page": "a.png", "blocks": []}, "blocks: .*at least 1 item"),
    "a block without a box": ({"page": "a.png", "blocks": [{"type": "a"}]}, "blocks.0: .*either 'box' or 'boxes'"),
    "box and boxes": ({"page": "a.png", "blocks": [{**TITLE, **TEXT}]}, "blocks.0: .*either 'box' or 'boxes'"),
    "a crossed box": ({"page": "a.png", "blocks": [{**TITLE, "box": [5, 0, 4, 1]}]}, r"blocks.0: `x2` \(4\) is less"),
    "a box of text": ({"page": "a.png", "blocks": [{**TITLE, "box": ["1", 0, 4, 1]}]}, r"blocks.0.box.0: "),
    "a box that is not finite": (
        {"page": "a.png", "blocks": [{**TITLE, "box": [0, 0, float("inf"), 1]}]},
        "Infinity is not a valid number",
    ),
    "an unknown key in a block": (
        {"page": "a.png", "blocks": [{**TITLE, "score": 1}]},
        "blocks.0.score: Extra inputs",
    ),
    "an unknown key": ({**PAGE, "messages": []}, "with 'page': Expected the keys .*; unknown: 'messages'"),
    "a prompt without an image": (
        {**PAGE, "prompt": "Free OCR."},
        "`prompt` must have one '<image>', or be one of",
    ),
    "page 0": ({**PAGE, "page_number": 0}, "page_number: .*greater than or equal to 1"),
    "a page number of a URI": ({**PAGE, "page": "data:,", "page_number": 1}, "requires the path of a file as 'page'"),
    "a URL": (
        {**PAGE, "page": "https://example.com/a.pdf"},
        "Image https://example.com/a.pdf is neither a local file",
    ),
    "a missing image": ({**PAGE, "page": "none.png"}, r"none\.png does not exist"),
    "a missing PDF": ({**PAGE, "page": "none.pdf"}, r"none\.pdf cannot be opened"),
    "a file that is no image": ({**PAGE, "page": "words.png"}, r"words\.png cannot be read"),
    "a truncated image": ({**PAGE, "page": "cut.png"}, r"cut\.png cannot be read"),
    "an encrypted PDF": ({**PAGE, "page": "locked.pdf"}, r"locked\.pdf cannot be opened: .*[Pp]assword"),
    "a broken page": ({**PAGE, "page": "b.pdf", "page_number": 2}, r"b\.pdf, page 2 cannot be read"),
    "a page that does not exist": (
        {**PAGE, "page": "b.pdf", "page_number": 4},
        r"b\.pdf has 3 pages, got page number 4",
    ),
    "one of several pages": ({**PAGE, "page": "b.pdf"}, r"b\.pdf has 3 pages; expected the number of one"),
    "a page number of an image": ({**PAGE, "page_number": 2}, r"a\.png has 1 pages, got page number 2"),
    "a box outside the page": (BOXED, r"`blocks\[1\]`: .*leaves the image of size \(30, 20\)"),
    "marks in a text": ({"page": "a.png", "blocks": [{**TITLE, "text": ANSWER}]}, "must have no marks"),
    "a placeholder in a text": ({**PAGE, "markdown": "<image>"}, "has 2 <image> tokens for 1 images"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_records_are_named(tmp_path: Path, processor: Any, name: str) -> None:
    from vlparts.training.dataset import SampleDataset

    record, message = BROKEN[name]
    save(tmp_path, "a.png", picture(30, 20))
    (tmp_path / "words.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    pdf(tmp_path / "b.pdf", broken=(2,))
    encrypted_pdf(tmp_path / "locked.pdf")
    path = write_records(tmp_path / "train.jsonl", [PAGE, record, PAGE])
    options = {"check_pixels": True, "progress": False}  # the pixels of one image are damaged, and not its header
    with pytest.raises(RecordError, match=rf"train\.jsonl, line 2: .*{message}"):
        SampleDataset(open_source(path), SampleEncoder(processor, tmp_path), **options)
    data = SampleDataset(open_source(path), SampleEncoder(processor, tmp_path), on_error="skip", **options)
    assert len(data) == 2
    assert len(data.skipped) == 1


def test_policies_for_boxes_outside_the_page(tmp_path: Path, processor: Any) -> None:
    save(tmp_path, "a.png", picture(30, 20))
    _, answer = texts(encoded(tmp_path, BOXED, processor, on_outside="clamp"), processor)
    assert "[[0, 500, 999, 999]]<|/det|>\nTwo columns." in answer
    _, answer = texts(encoded(tmp_path, BOXED, processor, on_outside="skip"), processor)
    assert answer == "<|ref|>title<|/ref|><|det|>[[0, 0, 999, 500]]<|/det|>\n# Report<|im_end|>"
    with pytest.raises(ValueError, match="No block has a box inside the page"):
        encoded(tmp_path, {"page": "a.png", "blocks": BOXED["blocks"][1:]}, processor, on_outside="skip")


def test_texts_for_a_tokenizer(tmp_path: Path) -> None:
    rows = [PAGE, BOXED, {**BOXED, "blocks": [{**TITLE, "text": ANSWER}]}]
    found = list(conversation_texts(open_source(write_records(tmp_path / "train.jsonl", rows)).lines()))
    assert found[:3] == ["\nFree OCR.", PAGE["markdown"], "\n<|grounding|>Convert the document to markdown."]
    assert found[3].endswith("Two columns.")
    assert len(found) == 5  # a text that cannot be written is reported when it is encoded


def test_fields_of_pages_are_no_weights() -> None:
    for name in ("page", "page_number", "markdown", "blocks", "prompt"):
        with pytest.raises(ValueError, match="must not be a field that records have already"):
            TrainConfig(data="a", output="b", sample_weight_field=name)


def test_boxes_of_a_block_are_regions() -> None:
    record = PageRecord.model_validate({"page": "a.png", "blocks": [TITLE, TEXT]})
    assert [region.xyxy for block in record.blocks or () for region in block.regions()] == [
        (0, 0, 30, 10),
        (0, 10, 15, 20),
        (15, 10, 30, 20),
    ]
