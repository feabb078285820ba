"""Pages of documents: images, folders of images, and PDF files, opened one page at a time."""

import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..parts.image_files import image_size, open_image, opened_image

__all__ = ["Document", "Page", "find_documents", "open_page", "page_size", "parse_page_numbers"]

DPI = 144
"""Resolution at which the published programs of DeepSeek-OCR draw the pages of PDF files."""
POINTS_PER_INCH = 72
MAX_IMAGE_PIXELS = 178_956_970
"""Pillow's limit: the largest number of pixels of a page, against files that are small on disk and huge in memory."""
PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Page:
    """A page that has not been opened.

    Attributes:
        document: The document.
        number: Its number in the document, from 1.
    """

    document: "Document"
    number: int

    def open(self, dpi: float = DPI, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
        """Return the page as an RGB image, upright as its EXIF orientation or its rotation in the PDF says.

        Args:
            dpi: Dots per inch, for PDF pages.
            max_image_pixels: Largest number of pixels.

        Raises:
            ValueError: If the page cannot be read or is too large; names the file and the page.
        """
        path = self.document.path
        with self._named_errors():
            if not self.document.is_pdf:
                return open_image(path, max_image_pixels=max_image_pixels, frame=self.number - 1)
            with _open_pdf(path) as pdf:
                return _draw(pdf[self.number - 1], dpi / POINTS_PER_INCH, max_image_pixels)

    def size(self, dpi: float = DPI, max_image_pixels: int = MAX_IMAGE_PIXELS) -> tuple[int, int]:
        """Return the width and height that the page has when it is opened, without decoding or drawing it.

        Args:
            dpi: As for `open`.
            max_image_pixels: As for `open`.

        Raises:
            ValueError: If the page cannot be found or is too large; names the file and the page.
        """
        path = self.document.path
        with self._named_errors():
            if not self.document.is_pdf:
                return image_size(path, max_image_pixels=max_image_pixels, frame=self.number - 1)
            with _open_pdf(path) as pdf:
                return _drawn_size(pdf[self.number - 1], dpi / POINTS_PER_INCH, max_image_pixels)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            if self.document.num_pages == 1 and not self.document.is_pdf:
                raise  # which names the file
            raise ValueError(f"{self}: {error}") from None
        except Exception as error:  # pypdfium2 raises its own and others, such as TypeError
            raise ValueError(f"{self} cannot be read: {error}") from None

    def __str__(self) -> str:
        numbered = self.document.is_pdf or self.document.num_pages > 1
        return f"{self.document.path}, page {self.number}" if numbered else str(self.document.path)


@dataclass(frozen=True)
class Document:
    """A file with pages.

    Attributes:
        path: The file.
        num_pages: Number of its pages; for an image that of its frames, such as the pages of a TIFF file, up to the
            first one that is damaged. Further pictures of a photograph (MPO), such as its preview, do not count.
    """

    path: Path
    num_pages: int

    @property
    def is_pdf(self) -> bool:
        """Whether the file is a PDF."""
        return _is_pdf(self.path)

    def pages(self, numbers: Sequence[int] | None = None) -> list[Page]:
        """Return its pages.

        Args:
            numbers: Numbers of the pages, from 1; those that it does not have are left out. None for all.
        """
        chosen = range(1, self.num_pages + 1) if numbers is None else numbers
        return [Page(self, number) for number in chosen if number <= self.num_pages]


def find_documents(inputs: Iterable[PathLike]) -> Iterator[Document | ValueError]:
    """Find documents among files and folders, in the order given; the files of a folder by name, without subfolders.

    Args:
        inputs: Images, PDF files, and folders of them. Other files of a folder are skipped; a file that is given twice
            is found once.

    Yields:
        Each document; or, in its place, the error of a file that cannot be opened.

    Raises:
        ValueError: If an input does not exist, or a folder cannot be read or has no document.
        ImportError: If there is a PDF and pypdfium2 is not installed.
    """
    found: dict[str, Path] = {}
    for file in _find_files(inputs):
        found.setdefault(os.path.abspath(file), file)
    yield from map(_document_or_error, found.values())


def _find_files(inputs: Iterable[PathLike]) -> Iterator[Path]:
    for given in inputs:
        path = Path(given)
        if not path.exists():
            raise ValueError(f"Input {path} does not exist.")
        if not path.is_dir():
            yield path
            continue
        known = {".pdf", *Image.registered_extensions()}
        try:
            files = [file for file in sorted(path.iterdir()) if file.is_file() and file.suffix.lower() in known]
        except OSError as error:
            raise ValueError(f"Folder {path} cannot be read: {error}") from None
        if not files:
            raise ValueError(f"Folder {path} has no images or PDF files.")
        yield from files


def open_page(
    path: PathLike, number: int | None = None, *, dpi: float = DPI, max_image_pixels: int = MAX_IMAGE_PIXELS
) -> Image.Image:
    """Open a page of a file as an RGB image.

    Args:
        path: An image or a PDF file.
        number: Number of the page, from 1; None if the file has only one.
        dpi: Dots per inch at which the page of a PDF file is drawn.
        max_image_pixels: Largest number of pixels.

    Raises:
        ValueError: If the file or the page cannot be read, or is too large, or the file has no page of this number, or
            several and there is no number.
        ImportError: If it is a PDF and pypdfium2 is not installed.
    """
    return _find_page(Path(path), number).open(dpi, max_image_pixels)


def page_size(
    path: PathLike, number: int | None = None, *, dpi: float = DPI, max_image_pixels: int = MAX_IMAGE_PIXELS
) -> tuple[int, int]:
    """Return the width and height of the image that [`open_page`] gives for the same arguments, without its pixels.

    Raises:
        ValueError: If the file or the page cannot be found, or is too large, or the number is missing.
        ImportError: If it is a PDF and pypdfium2 is not installed.
    """
    return _find_page(Path(path), number).size(dpi, max_image_pixels)


def _find_page(path: Path, number: int | None) -> Page:
    document = _open_document(path)
    if number is None and document.num_pages != 1:
        raise ValueError(f"{path} has {document.num_pages} pages; expected the number of one.")
    if number is not None and not 1 <= number <= document.num_pages:
        raise ValueError(f"{path} has {document.num_pages} pages, got page number {number}.")
    return Page(document, number or 1)


def _document_or_error(path: Path) -> Document | ValueError:
    try:
        return _open_document(path)
    except ValueError as error:
        return error


def _open_document(path: Path) -> Document:
    if not _is_pdf(path):
        return Document(path, _count_frames(path))
    try:
        with _open_pdf(path) as pdf:
            return Document(path, len(pdf))
    except ImportError:
        raise
    except Exception as error:  # as in `Page.open`
        raise ValueError(f"{path} cannot be opened: {error}") from None


def _count_frames(path: Path) -> int:
    """Number of frames of an image, up to the first that is damaged, which is an error when its page is opened."""
    try:
        with opened_image(path, max_image_pixels=sys.maxsize) as image:
            return 1 if image.format == "MPO" else _last_frame(image) + 1
    except ValueError:
        return 1


def _last_frame(image: Image.Image) -> int:
    """Index of the last frame, or of the first one that cannot be found."""
    try:
        return getattr(image, "n_frames", 1) - 1
    except Exception:  # Pillow's decoders raise many types
        frame = 0
    while True:
        try:
            image.seek(frame + 1)
        except EOFError:
            return frame
        except Exception:
            return frame + 1
        frame += 1


def _is_pdf(path: Path) -> bool:
    return path.suffix.lower() == ".pdf"


def _open_pdf(path: Path) -> Any:
    try:
        import pypdfium2
    except ImportError:
        raise ImportError("PDF files need pypdfium2: pip install 'vlparts[ocr]'.") from None
    pdf = pypdfium2.PdfDocument(path)
    pdf.init_forms()  # without it, filled fields are not drawn
    return pdf


def _draw(page: Any, scale: float, max_image_pixels: int) -> Image.Image:
    _drawn_size(page, scale, max_image_pixels)
    return page.render(scale=scale).to_pil().convert("RGB")


def _drawn_size(page: Any, scale: float, max_image_pixels: int) -> tuple[int, int]:
    width, height = (math.ceil(side * scale) for side in page.get_size())
    if width * height > max_image_pixels:
        raise ValueError(
            f"The page has {width} x {height} pixels, more than {max_image_pixels}; pass a larger `max_image_pixels` "
            "or a smaller `dpi`."
        )
    return width, height


def parse_page_numbers(text: str) -> list[int]:
    """Read page numbers such as "1-5" or "1,3,8-9".

    Raises:
        ValueError: If it is another text, a number is 0, or a range descends.
    """
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,6})(?:\s*-\s*([0-9]{1,6}))?\s*", part)
        first = int(match[1]) if match else 0
        last = int(match[2] or match[1]) if match else 0
        if first < 1 or last < first:
            raise ValueError(f"Page numbers must be like '1-5' or '1,3,8-9', from 1 and ascending, got {text!r}.")
        numbers.extend(range(first, last + 1))
    return sorted(set(numbers))
