"""Documents that are unusual, damaged, huge or named alike: what becomes of each, and of the others."""

import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from tests.documents.made import encrypted_pdf, pdf
from tests.documents.stub import StubModel, StubProcessor
from tests.tiny import save_turned
from vlparts.documents import RunSummary, recognize_documents

GREY = (200, 100, 50)


def run(inputs: list[Path], output: Path, **options: Any) -> RunSummary:
    model, processor = options.pop("model", None) or StubModel(), options.pop("processor", None) or StubProcessor()
    return recognize_documents(inputs, output, model, processor, **options)


def answers(folder: Path, name: str) -> list[Any]:
    """For each page of a document, what the stub read (width, height, three levels), or the error."""
    pages = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["pages"]
    return [page["error"] if "error" in page else json.loads(page["answer"].rsplit("\n")[-1]) for page in pages]


def image(mode: str = "RGB", size: tuple[int, int] = (60, 40), color: Any = GREY) -> Image.Image:
    return Image.new(mode, size, color)


def truncated_jpeg(path: Path) -> None:
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(data, "JPEG")
    path.write_bytes(data.getvalue()[: len(data.getvalue()) // 2])


def palette(path: Path) -> None:
    turned = image("P", color=0)
    turned.putpalette([10, 20, 30, *GREY])
    turned.paste(1, (30, 0, 60, 40))
    turned.save(path, transparency=0)


def tiff(path: Path, keep: float = 1.0) -> None:
    """Three frames, of which a part of the bytes is kept."""
    frames = [image(color=color) for color in ("red", "lime", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])


def damaged_tiff(path: Path) -> None:
    """Three frames, the second of which has data that are not compressed as the file says."""
    frames = [image(color=color) for color in ("red", "lime", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:], compression="tiff_adobe_deflate")
    with Image.open(path) as saved:
        saved.seek(1)
        ((start,), (count,)) = saved.tag_v2[273], saved.tag_v2[279]  # offsets and sizes of strips
    data = path.read_bytes()
    path.write_bytes(data[:start] + b"\xff" * count + data[start + count :])


def photograph(path: Path) -> None:
    """A picture and its preview, as cameras write them."""
    image().save(path, "MPO", save_all=True, append_images=[image(size=(6, 4))])


# Name, maker, and for each page what the stub reads, or a part of the error.
KINDS: list[tuple[str, Callable[[Path], Any], list[Any]]] = [
    ("blank.png", lambda path: image(color="white").save(path), [[60, 40, 255, 255, 255]]),
    ("dot.png", lambda path: image(size=(1, 1)).save(path), [[1, 1, *GREY]]),
    ("receipt.png", lambda path: image(size=(60, 20_000)).save(path), [[60, 20_000, *GREY]]),
    ("cmyk.tif", lambda path: image("CMYK", color=(0, 255, 255, 0)).save(path), [[60, 40, 255, 0, 0]]),
    ("deep.png", lambda path: image("I;16", color=257 * 100).save(path), [[60, 40, 100, 100, 100]]),
    ("palette.png", palette, [[60, 40, 228, 178, 152]]),
    ("frames.tif", tiff, [[60, 40, 255, 0, 0], [60, 40, 0, 255, 0], [60, 40, 0, 0, 255]]),
    ("cut.tif", lambda path: tiff(path, 0.6), [[60, 40, 255, 0, 0], "cut.tif, page 2", "cut.tif, page 3"]),
    ("damaged.tif", damaged_tiff, [[60, 40, 255, 0, 0], "damaged.tif, page 2", [60, 40, 0, 0, 255]]),
    ("photo.jpg", photograph, [[60, 40, *GREY]]),
    ("half.jpg", truncated_jpeg, ["half.jpg cannot be read: .*truncated"]),
    ("empty.png", Path.touch, ["empty.png cannot be read: cannot identify image file"]),
    ("text.png", lambda path: path.write_text("no image"), ["text.png cannot be read: cannot identify image file"]),
    ("void.pdf", Path.touch, "void.pdf cannot be opened"),
    ("words.pdf", lambda path: path.write_text("no PDF"), "words.pdf cannot be opened"),
    ("locked.pdf", encrypted_pdf, "locked.pdf cannot be opened: .*password"),
    ("open.pdf", lambda path: encrypted_pdf(path, password=""), [[72, 144, 255, 255, 255]]),
    ("my scan (1), ü 文.png", lambda path: image().save(path), [[60, 40, *GREY]]),
]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_folder_of_unusual_and_damaged_files(tmp_path: Path, batch_size: int) -> None:
    (tmp_path / "in").mkdir()
    for name, make, _ in KINDS:
        make(tmp_path / "in" / name)
    output = tmp_path / "out"
    summary = run([tmp_path / "in"], output, batch_size=batch_size)
    for name, _, expected in KINDS:
        if isinstance(expected, str):
            assert [error for error in summary.errors if re.search(expected, error)], name
            continue
        found = answers(output, Path(name).stem)
        assert len(found) == len(expected), name
        for got, wanted in zip(found, expected, strict=True):
            if isinstance(wanted, str):
                assert re.search(wanted, got), name
                assert got in summary.errors
            else:
                assert got[:2] == wanted[:2], name
                assert got[2:] == pytest.approx(wanted[2:], abs=4), name
    pages = [page for *_, expected in KINDS if isinstance(expected, list) for page in expected]
    assert summary.done == sum(isinstance(page, list) for page in pages)
    assert len(summary.errors) == sum(isinstance(item, str) for item in [*pages, *(kind[2] for kind in KINDS)])


def test_every_orientation_is_turned_upright(tmp_path: Path) -> None:
    upright = image(size=(64, 32))
    paths = [save_turned(upright, tmp_path / f"{number}.jpg", number) for number in range(1, 9)]
    run(paths, tmp_path / "out")
    assert [answers(tmp_path / "out", path.stem)[0][:2] for path in paths] == [[64, 32]] * 8


def test_a_pdf_of_500_pages_with_three_broken_ones(tmp_path: Path) -> None:
    document = pdf(tmp_path / "long.pdf", 500, broken=(7, 250, 500), size=(36, 24))
    processor = StubProcessor()
    summary = run([document], tmp_path / "out", processor=processor, batch_size=4)
    assert (summary.documents, summary.done) == (1, 497)
    assert [re.search(r"long\.pdf, page (\d+) cannot be read", error)[1] for error in summary.errors] == [
        "7", "250", "500",
    ]  # fmt: skip
    assert len(answers(tmp_path / "out", "long")) == 500
    # Pages are drawn when their batch begins: those of one batch exist, and of the one before until it is written.
    assert processor.most_alive <= 8


def test_filled_fields_are_drawn(tmp_path: Path) -> None:
    """Programs that fill forms write the text into the appearance of a field."""
    form = b"0 0 1 rg 0 0 72 72 re f"
    objects = [
        b"<</Type /Catalog /Pages 2 0 R /AcroForm <</Fields [4 0 R]>>>>",
        b"<</Type /Pages /Kids [3 0 R] /Count 1>>",
        b"<</Type /Page /Parent 2 0 R /MediaBox [0 0 72 72] /Annots [4 0 R]>>",
        b"<</Type /Annot /Subtype /Widget /FT /Tx /T (a) /V (b) /F 4 /Rect [0 0 72 72] /P 3 0 R /AP <</N 5 0 R>>>>",
        b"<</Type /XObject /Subtype /Form /BBox [0 0 72 72] /Length %d>>\nstream\n%s\nendstream" % (len(form), form),
    ]
    data = b"%PDF-1.4\n" + b"".join(b"%d 0 obj\n%s\nendobj\n" % pair for pair in enumerate(objects, 1))
    (tmp_path / "form.pdf").write_bytes(data + b"trailer\n<</Size 6 /Root 1 0 R>>\n%%EOF\n")
    run([tmp_path / "form.pdf"], tmp_path / "out")
    assert answers(tmp_path / "out", "form")[0][:2] == [144, 144]
    assert answers(tmp_path / "out", "form")[0][2] < 200  # not white


def test_the_limit_of_pixels(tmp_path: Path) -> None:
    image(size=(60, 40)).save(tmp_path / "a.png")
    pdf(tmp_path / "b.pdf", 1, size=(30, 20))
    summary = run([tmp_path], tmp_path / "out", max_image_pixels=2399)
    assert [error.split(";")[0] for error in summary.errors] == [
        f"Image {tmp_path / 'a.png'} has more than 2399 pixels",
        f"{tmp_path / 'b.pdf'}, page 1: The page has 60 x 40 pixels, more than 2399",
    ]
    # A limit does not change results: the same folder continues.
    assert run([tmp_path], tmp_path / "out", max_image_pixels=2400).done == 2


def test_names_alike_in_several_folders(tmp_path: Path) -> None:
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
    image(color="red").save(tmp_path / "a" / "x.png")
    pdf(tmp_path / "b" / "x.pdf", 1)
    image(color="lime").save(tmp_path / "b" / "x.png")
    image(color="blue").save(tmp_path / "c" / "X.PNG")
    inputs = [tmp_path / folder for folder in ("a", "b", "c")]
    run(inputs, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.md")) == [
        "a_x.png.md", "b_x.png.md", "c_X.PNG.md", "x.pdf.md",
    ]  # fmt: skip
    assert [answers(tmp_path / "out", f"{name}")[0][2:] for name in ("a_x.png", "b_x.png", "c_X.PNG")] == [
        [255, 0, 0], [0, 255, 0], [0, 0, 255],
    ]  # fmt: skip
    # A later run with another document of the same name keeps the results of the first.
    run([tmp_path / "a" / "x.png"], tmp_path / "alone")
    summary = run([tmp_path / "b" / "x.png"], tmp_path / "alone")
    assert (summary.done, summary.skipped) == (1, 0)
    assert [answers(tmp_path / "alone", name)[0][2:] for name in ("x", "x.png")] == [[255, 0, 0], [0, 255, 0]]
    again = run(inputs, tmp_path / "alone")
    assert (again.done, again.skipped) == (2, 2)


def test_a_file_given_twice_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image().save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    assert run([Path("a.png"), tmp_path, tmp_path / "a.png"], tmp_path / "out").done == 1


def test_figures_of_files_whose_names_have_spaces_are_linked(tmp_path: Path) -> None:
    name = "my scan (1), 100% ü 文.png"
    image().save(tmp_path / name)
    run([tmp_path / name], tmp_path / "out", model=StubModel(marks=True))
    text = (tmp_path / "out" / f"{Path(name).stem}.md").read_text(encoding="utf-8")
    (link,) = re.findall(r"!\[image\]\((\S+)\)\n", text)
    assert not set(link) & set(" ()")
    assert (tmp_path / "out" / unquote(link)).is_file()


@pytest.mark.skipif(os.name != "posix", reason="names of files are text elsewhere")
def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
    try:
        image().save(path)
    except OSError:
        pytest.skip("this file system has names of text only")
    assert run([path], tmp_path / "out", model=StubModel(marks=True)).done == 1
    assert run([path], tmp_path / "out", model=StubModel(marks=True)).skipped == 1
    content = json.loads((tmp_path / "out" / f"{path.stem}.json").read_text(encoding="utf-8"))
    assert content["document"] == str(path)


def test_folders_that_cannot_be_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image().save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="`output` must not be a folder of inputs"):
        run([tmp_path], tmp_path)
    run([tmp_path], tmp_path / "out")  # a folder inside that of the inputs is none of them
    assert run([tmp_path], tmp_path / "out").skipped == 1
    with pytest.raises(ValueError, match="`output` must be a folder, got the file"):
        run([tmp_path], tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"`output` .*out2 cannot be written: .*"):
        run([tmp_path], tmp_path / "a.png" / "out2")

    def refuse(*arguments: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ValueError, match=r"`output` .*new cannot be written: .*Permission denied"):
        run([tmp_path], tmp_path / "new")


def test_a_page_that_the_processor_refuses_is_named_and_the_others_done(tmp_path: Path) -> None:
    for name, width in (("a.png", 60), ("b.png", 7), ("c.png", 61)):
        image(size=(width, 40)).save(tmp_path / name)
    for batch_size in (1, 3):
        output = tmp_path / f"out{batch_size}"
        summary = run([tmp_path], output, processor=StubProcessor(refused=7), batch_size=batch_size)
        assert (summary.done, summary.errors) == (2, [f"{tmp_path / 'b.png'}: an image of 7 pixels is refused"])
        assert answers(output, "c")[0][0] == 61


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"dpi": 0.0}, "`dpi` must be positive, got 0.0"),
        ({"pages": [2]}, r"`pages` must have a page of one of the documents, got \[2\]"),
        ({"prompt": "markdwon"}, "`prompt` must have one '<image>', or be one of markdown, ocr, .*; got 'markdwon'"),
        ({"prompt": "locate"}, "`prompt` must name what to find in place of '{text}'"),
        ({"processor": StubProcessor(refused=64)}, "an image of 64 pixels is refused"),
    ],
)
def test_invalid_arguments_leave_no_output(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    image().save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=message):
        run([tmp_path / "a.png"], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
