"""Images of training records: paths, `data:` URIs, and images in memory."""

import base64
import binascii
import io
import reprlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from PIL import Image

from ..parts.image_files import ImageSource, image_size, open_image, read_image, upright_size

__all__ = ["ImageBytes", "RecordImage", "image_of", "open_record_image", "record_image_size", "shown_image"]


@dataclass(frozen=True)
class ImageBytes:
    """The content of an image file in memory.

    Args:
        data: The bytes.
        name: Name in messages.
    """

    data: bytes = field(repr=False)
    name: str = "in memory"


RecordImage = str | ImageBytes | Image.Image
"""An image of a record: a path or `data:` URI, the content of a file, or a Pillow image."""


def image_of(value: Any) -> RecordImage:
    """Return the image of a record.

    Args:
        value: A path, `file://` URL or `data:` URI, bytes, a Pillow image, or `{"bytes": bytes or None, "path": str or
            None}`, as in the columns of `datasets`.

    Raises:
        ValueError: If it is none of these, or neither a local file nor a `data:` URI.
    """
    if isinstance(value, str):
        return _local_path(value)
    if isinstance(value, bytes):
        return ImageBytes(value)
    if isinstance(value, dict) and value and value.keys() <= {"bytes", "path"}:
        data, path = value.get("bytes"), value.get("path")
        if isinstance(data, bytes):
            return ImageBytes(data, path or ImageBytes.name)
        if data is None and isinstance(path, str):
            return _local_path(path)
    if isinstance(value, (ImageBytes, Image.Image)):
        return value
    raise ValueError(
        f"Input should be a valid string (a path or a data: URI) or an image in memory, got {reprlib.repr(value)}."
    )


def _local_path(image: str) -> str:
    """Return the path of an image, or a `data:` URI."""
    if image.startswith("data:") or "://" not in image:
        return image
    parts = urlsplit(image)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return unquote(parts.path)
    raise ValueError(f"Image {image:.100} is neither a local file nor a data: URI; download it first.")


def open_record_image(image: RecordImage, root: Path, max_image_pixels: int | None = None) -> Image.Image:
    """Decode an image, turn it upright and convert it to RGB.

    Args:
        image: The image.
        root: Folder that a relative path is resolved against.
        max_image_pixels: As for `open_image`; not for Pillow images, which their owner opened.

    Raises:
        ValueError: If it cannot be read; names the image.
    """
    if isinstance(image, Image.Image):
        return read_image(image)
    return open_image(_source(image, root), max_image_pixels=max_image_pixels)


def record_image_size(image: RecordImage, root: Path, max_image_pixels: int | None = None) -> tuple[int, int]:
    """Return (width, height) of the upright image without decoding its pixels; arguments of [`open_record_image`].

    Raises:
        ValueError: If there is no image, or it has more pixels than the limit.
    """
    if isinstance(image, Image.Image):
        return upright_size(image)
    return image_size(_source(image, root), max_image_pixels=max_image_pixels)


def shown_image(image: RecordImage, root: Path) -> str:
    """The name of an image in messages."""
    if isinstance(image, Image.Image):
        return ImageBytes.name
    source = _source(image, root)
    return source.name if isinstance(source, _NamedBytes) else str(source)


def _source(image: str | ImageBytes, root: Path) -> ImageSource:
    if isinstance(image, ImageBytes):
        return _NamedBytes(image.data, image.name)
    return _decode_uri(image) if image.startswith("data:") else root / image


class _NamedBytes(io.BytesIO):
    """The content of a file, with a name in messages."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self.name = name


def _decode_uri(uri: str) -> _NamedBytes:
    """The content of a base64 `data:` URI; in messages it has the name of its start."""
    name = f"{uri[:30]}..."
    head, comma, payload = uri.partition(",")
    try:
        if not comma or not head.endswith(";base64"):
            raise ValueError("expected ';base64,' after the type")
        return _NamedBytes(base64.b64decode(payload, validate=True), name)
    except (ValueError, binascii.Error) as error:
        raise ValueError(f"Image {name} is not a base64 data: URI: {error}.") from None
