"""Recognition of documents with a small model: files written, resumed runs, broken pages, the command."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from tests.checkpoints.deepseek_ocr.files import CONFIG, tensors
from tests.checkpoints.files import write_folder
from tests.documents.made import encrypted_pdf, pdf
from tests.tiny import order_one, tokenizer
from vlparts import DeepEncoderConfig, DeepEncoderImageProcessor, MoGEConfig, compose, compose_processor
from vlparts.cli.main import app
from vlparts.documents import recognize, recognize_documents
from vlparts.documents.pages import find_documents
from vlparts.parts.chat_templates import DEEPSEEK_OCR_CHAT_TEMPLATE
from vlparts.show import boxes

PROMPT = "<image>\nFree OCR."


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    torch.manual_seed(0)
    text = MoGEConfig.from_preset("tiny", vocab_size=600, num_expert_groups=1)
    model = compose(DeepEncoderConfig.from_preset("deepencoder_tiny"), text, "deepseek_ocr")
    processor = compose_processor(model, tokenizer(), chat_template=DEEPSEEK_OCR_CHAT_TEMPLATE)
    processor.image_processor = DeepEncoderImageProcessor(mode="tiny", base_size=64)
    return order_one(model).eval(), processor


def run(parts: tuple[Any, Any], inputs: list[Path], output: Path, **options: Any) -> Any:
    return recognize_documents(inputs, output, *parts, **{"prompt": PROMPT, "max_new_tokens": 6, **options})


def test_one_markdown_and_one_json_file_for_each_document(parts: tuple[Any, Any], tmp_path: Path) -> None:
    inputs = [pdf(tmp_path / "report.pdf", 3), tmp_path / "scan.png"]
    Image.new("RGB", (40, 30), "white").save(inputs[1])
    seen: list[str] = []
    summary = run(parts, inputs, tmp_path / "out", batch_size=2, on_page=seen.append)
    assert (summary.done, summary.skipped, summary.errors) == (4, 0, [])
    assert len(summary.unfinished) + sum(page["finished"] for page in pages_of(tmp_path / "out")) == 4
    assert [name.rsplit("/", 1)[-1] for name in seen] == [
        "report.pdf, page 1", "report.pdf, page 2", "report.pdf, page 3", "scan.png",
    ]  # fmt: skip
    text = (tmp_path / "out" / "report.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("<!-- page")] == [
        f"<!-- page {page['page']}{'' if page['finished'] else ', unfinished'} -->"
        for page in pages_of(tmp_path / "out", "report")
    ]
    assert [page["size"] for page in pages_of(tmp_path / "out", "report")] == [[240, 160]] * 3


def pages_of(folder: Path, name: str = "*") -> list[dict[str, Any]]:
    files = sorted(folder.glob(f"{name}.json"))
    return [page for file in files for page in json.loads(file.read_text())["pages"]]


def test_batches_answer_as_single_pages(parts: tuple[Any, Any], tmp_path: Path) -> None:
    (document,) = find_documents([pdf(tmp_path / "a.pdf", 3)])
    alone, together = (
        [result.text.answer for result in recognize(*parts, document.pages(), prompt=PROMPT, batch_size=size,
                                                    max_new_tokens=6)]
        for size in (1, 3)
    )  # fmt: skip
    assert alone == together


def test_finished_pages_are_not_done_again(parts: tuple[Any, Any], tmp_path: Path) -> None:
    document, output = pdf(tmp_path / "a.pdf", 4), tmp_path / "out"
    run(parts, [document], output)
    expected = (output / "a.json").read_text()
    journal = output / ".vlparts_ocr.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    # As after a kill: two pages are done, a third is half written, and the documents are not written.
    journal.write_bytes(b"".join(lines[:4]) + lines[4][:20])
    (output / "a.json").unlink()
    summary = run(parts, [document], output)
    assert (summary.done, summary.skipped) == (2, 2)
    assert (output / "a.json").read_text() == expected
    again = run(parts, [document], output)
    assert (again.done, again.skipped) == (0, 4)


def test_other_settings_and_other_files_are_refused(parts: tuple[Any, Any], tmp_path: Path) -> None:
    document = pdf(tmp_path / "a.pdf", 1)
    run(parts, [document], tmp_path / "out")
    with pytest.raises(ValueError, match="has results with other settings"):
        run(parts, [document], tmp_path / "out", prompt="<image>\nOther.")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("not ours")
    with pytest.raises(ValueError, match="`output` must be a new or empty folder, or that of an earlier run"):
        run(parts, [document], tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match="`output` must be a folder"):
        run(parts, [document], document)
    with pytest.raises(ValueError, match="`prompt` must have one '<image>'"):
        run(parts, [document], tmp_path / "new", prompt="no image")


def test_broken_pages_and_files_are_named_and_the_others_done(parts: tuple[Any, Any], tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    pdf(folder / "a.pdf", 4, broken=(2, 3))
    encrypted_pdf(folder / "b.pdf")
    (folder / "c.png").write_bytes(b"no image")
    Image.new("RGB", (1, 1)).save(folder / "d.png")
    summary = run(parts, [folder], tmp_path / "out", batch_size=3)
    assert summary.done == 3
    assert [error for error in summary.errors if "b.pdf cannot be opened" in error]
    assert [error for error in summary.errors if "a.pdf, page 2" in error]
    assert [error for error in summary.errors if "c.png" in error]
    assert len(summary.errors) == 4
    pages = pages_of(tmp_path / "out", "a")
    assert ["error" in page for page in pages] == [False, True, True, False]
    assert "<!-- page 2: " in (tmp_path / "out" / "a.md").read_text()


def test_documents_with_the_same_stem_keep_their_suffix(parts: tuple[Any, Any], tmp_path: Path) -> None:
    pdf(tmp_path / "a.pdf", 1)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    run(parts, [tmp_path / "a.pdf", tmp_path / "a.png"], tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.md")) == ["a.pdf.md", "a.png.md"]


def test_figures_are_cut_out_and_layouts_drawn(tmp_path: Path) -> None:
    from vlparts.documents import parse_page
    from vlparts.documents.recognition import PageResult
    from vlparts.documents.writing import OutputFolder

    (document,) = find_documents([pdf(tmp_path / "a.pdf", 2)])
    answer = (
        "<|ref|>image<|/ref|><|det|>[[0, 0, 499, 999]]<|/det|>\n"
        "<|ref|>text<|/ref|><|det|>[[500, 0, 999, 999]]<|/det|>\nb"
    )
    page = document.pages()[1]
    image = page.open()
    folder = OutputFolder(tmp_path / "out", [document], {})
    folder.add([PageResult(page, image, parse_page(answer, image.size), True, 20)])
    folder.write_document(document, [1, 2], {1: "broken -- here"})
    folder.close()
    assert Image.open(tmp_path / "out" / "a_figures" / "page2_1.png").size == (120, 160)
    assert (tmp_path / "out" / "a_layout_2.png").stat().st_size > 1000
    text = (tmp_path / "out" / "a.md").read_text()
    assert text == "<!-- page 1: broken - - here -->\n\n<!-- page 2 -->\n![image](a_figures/page2_1.png)\n\n\nb\n"


@pytest.mark.parametrize("size", [(6000, 300), (300, 6000), (3000, 3000)])
def test_layouts_of_large_pages_are_drawn_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    """Boxes are where they are on the page, and the picture takes no more memory than that of a small page."""
    from vlparts.documents import parse_page, writing
    from vlparts.documents.recognition import PageResult

    drawn: list[Any] = []
    monkeypatch.setattr(
        writing, "boxes", lambda image, regions: drawn.append((image, regions)) or boxes(image, regions)
    )
    image = Image.new("RGB", size, "white")
    image.paste("black", (0, 0, size[0] // 2, size[1] // 4))
    image.save(tmp_path / "a.png")
    (document,) = find_documents([tmp_path / "a.png"])
    text = parse_page("<|ref|>text<|/ref|><|det|>[[0, 0, 500, 250]]<|/det|>\nb", size)
    folder = writing.OutputFolder(tmp_path / "out", [document], {})
    folder.add([PageResult(document.pages()[0], image, text, True, 20)])
    folder.close()
    ((small, (region,)),) = drawn
    assert small.width <= 1050
    assert small.height <= 2100
    assert small.width / small.height == pytest.approx(size[0] / size[1], rel=0.03)
    black = ImageOps.invert(small.convert("L")).point(lambda level: 255 * (level > 127)).getbbox()
    assert region.xyxy == pytest.approx(black, abs=2)
    assert (tmp_path / "out" / "a_layout.png").stat().st_size > 1000


def test_the_command(parts: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = parts
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    pdf(tmp_path / "a.pdf", 3, broken=(2,))
    options = ["ocr", str(tmp_path / "a.pdf"), "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    options += ["--prompt", "free", "--max-new-tokens", "4", "--device", "cpu"]
    first = CliRunner().invoke(app, [*options, "--pages", "1-2"])
    assert first.exit_code == 1
    assert "a.pdf, page 2" in first.output
    second = CliRunner().invoke(app, [*options, "--pages", "1,3"])
    assert second.exit_code == 0
    assert "1 page of 1 document recognized in " in second.output
    assert " pages per minute), 1 done before" in second.output
    assert "<!-- page 1" in (tmp_path / "out" / "a.md").read_text()
    for changed, message in (
        (["--pages", "x"], "Page numbers must be like"),
        (["--dtype", "int8"], "`dtype` must be 'auto' or the name of a floating-point dtype"),
        (["--mode", "huge"], "`mode` must be one of"),
        (["--model", str(tmp_path)], "`model` must be a folder with a config.json"),
        (["--device", "abacus"], "`device` must be a device of this machine, got 'abacus'"),
        (["--pages", "9"], "`pages` must have a page of one of the documents"),
        (["--prompt", "markdwon"], "`prompt` must have one '<image>', or be one of markdown"),
    ):
        result = CliRunner().invoke(app, [*options[:-4], *changed, "--output", str(tmp_path / "new")])
        assert result.exit_code == 2, result.output
        assert message in result.output


@pytest.mark.parametrize("architectures", [["DeepseekOCRForCausalLM"], None])
def test_the_command_with_published_files(tmp_path: Path, architectures: list[str] | None) -> None:
    """The published folder has no chat template, no processor, and code that is not run."""
    words = {f"w{index}": index for index in range(64)}
    special = {"<s>": 0, "</s>": 1, "<unk>": 2, "<image>": 7, "<td>": 8, "</td>": 9}
    vocabulary = {word: index for word, index in words.items() if index not in special.values()} | special
    words_of = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words_of.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = write_folder(tmp_path / "model", tensors(), {**CONFIG, "architectures": architectures})
    PreTrainedTokenizerFast(
        tokenizer_object=words_of,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=["<image>", "<td>", "</td>"],
    ).save_pretrained(folder)
    Image.new("RGB", (40, 30)).save(tmp_path / "scan.png")
    options = ["--model", str(folder), "--output", str(tmp_path / "out"), "--mode", "tiny", "--max-new-tokens", "4"]
    options += ["--dtype", "float32", "--device", "cpu"]
    result = CliRunner().invoke(app, ["ocr", str(tmp_path / "scan.png"), *options])
    assert result.exit_code == 0, result.output
    (page,) = pages_of(tmp_path / "out")
    assert set(page["answer"].split()) <= vocabulary.keys()
    assert page["num_tokens"] <= 4
