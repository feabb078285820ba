"""Pages of images and PDF files: order, sizes, broken pages and files."""

from pathlib import Path

import pytest
from PIL import Image

from tests.documents.made import encrypted_pdf, pdf
from vlparts.documents.pages import Document, find_documents, open_page, parse_page_numbers


def test_a_folder_in_the_order_of_names(tmp_path: Path) -> None:
    pdf(tmp_path / "b.pdf")
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    Image.new("RGB", (30, 20)).save(tmp_path / "c.JPG")
    (tmp_path / "notes.txt").write_text("no document")
    (tmp_path / "inner").mkdir()
    found = list(find_documents([tmp_path]))
    assert [document.path.name for document in found] == ["a.png", "b.pdf", "c.JPG"]
    assert [document.num_pages for document in found] == [1, 3, 1]
    assert [page.number for page in found[1].pages([2, 3, 9])] == [2, 3]


def test_pages_of_a_pdf_at_a_resolution(tmp_path: Path) -> None:
    (document,) = find_documents([pdf(tmp_path / "a.pdf")])
    page = document.pages()[1]
    assert page.open().size == (240, 160)
    assert page.open(dpi=72).size == (120, 80)
    assert page.open().mode == "RGB"
    with pytest.raises(ValueError, match=r"a\.pdf, page 2: The page has 240 x 160 pixels, more than 100; pass"):
        page.open(max_image_pixels=100)


def test_broken_pages_name_file_and_page(tmp_path: Path) -> None:
    (document,) = find_documents([pdf(tmp_path / "a.pdf", 5, broken=(2, 4))])
    assert document.num_pages == 5
    for page in document.pages():
        if page.number in (2, 4):
            with pytest.raises(ValueError, match=rf"a\.pdf, page {page.number} cannot be read"):
                page.open()
        else:
            assert page.open().size == (240, 160)


def test_files_that_cannot_be_opened_do_not_stop_the_others(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.4 nothing")
    encrypted_pdf(tmp_path / "b.pdf")
    pdf(tmp_path / "c.pdf")
    first, second, third = find_documents([tmp_path])
    assert isinstance(first, ValueError)
    assert "a.pdf cannot be opened" in str(first)
    assert isinstance(second, ValueError)
    assert "password" in str(second).lower()
    assert third == Document(tmp_path / "c.pdf", 3)


def test_frames_of_an_image_are_pages(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (30, 20), color) for color in ("red", "green", "blue")]
    frames[0].save(tmp_path / "a.tiff", save_all=True, append_images=frames[1:])
    (document,) = find_documents([tmp_path / "a.tiff"])
    assert document.num_pages == 3
    opened = [page.open().getpixel((5, 5)) for page in document.pages()]
    assert opened == [frame.getpixel((5, 5)) for frame in frames]
    assert [str(page) for page in document.pages([3])] == [f"{tmp_path / 'a.tiff'}, page 3"]
    data = (tmp_path / "a.tiff").read_bytes()
    (tmp_path / "a.tiff").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"a\.tiff"):
        document.pages()[2].open()


def test_inputs_that_are_no_documents(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        list(find_documents([tmp_path / "missing.pdf"]))
    with pytest.raises(ValueError, match="has no images or PDF files"):
        list(find_documents([tmp_path]))


def test_page_numbers() -> None:
    assert parse_page_numbers("1-3, 2,7") == [1, 2, 3, 7]
    for text in ("", "0", "3-1", "1-", "a", "1;2", "-3", "1-99999999"):
        with pytest.raises(ValueError, match="Page numbers must be like"):
            parse_page_numbers(text)


def test_one_page_of_a_file(tmp_path: Path) -> None:
    three = pdf(tmp_path / "a.pdf")
    assert open_page(three, 2).tobytes() == find(three).pages()[1].open().tobytes()
    assert open_page(three, 3, dpi=72).size == (120, 80)
    assert open_page(pdf(tmp_path / "one.pdf", 1)).size == (240, 160)
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    assert open_page(tmp_path / "a.png").getpixel((0, 0)) == open_page(tmp_path / "a.png", 1).getpixel((0, 0))
    Image.new("RGB", (30, 20), "red").save(
        tmp_path / "a.tiff", save_all=True, append_images=[Image.new("RGB", (30, 20), "blue")]
    )
    assert open_page(tmp_path / "a.tiff", 2).getpixel((0, 0)) == (0, 0, 255)


def find(path: Path) -> Document:
    (document,) = find_documents([path])
    assert isinstance(document, Document)
    return document


def test_pages_that_a_file_does_not_have(tmp_path: Path) -> None:
    three = pdf(tmp_path / "a.pdf", broken=(2,))
    with pytest.raises(ValueError, match=r"a\.pdf has 3 pages; expected the number of one"):
        open_page(three)
    for number in (0, 4):
        with pytest.raises(ValueError, match=rf"a\.pdf has 3 pages, got page number {number}"):
            open_page(three, number)
    with pytest.raises(ValueError, match=r"a\.pdf, page 2 cannot be read"):
        open_page(three, 2)
    with pytest.raises(ValueError, match=r"none\.pdf cannot be opened"):
        open_page(tmp_path / "none.pdf")
    with pytest.raises(ValueError, match=r"none\.png does not exist"):
        open_page(tmp_path / "none.png")
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png has more than 100 pixels"):
        open_page(tmp_path / "a.png", max_image_pixels=100)
    with pytest.raises(ValueError, match=r"page 1: The page has 240 x 160 pixels, more than 100"):
        open_page(three, 1, max_image_pixels=100)
