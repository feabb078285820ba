"""PDF files that tests make: good, with broken pages, and encrypted."""

import re
from pathlib import Path

from PIL import Image, ImageDraw


def pdf(path: Path, pages: int = 3, broken: tuple[int, ...] = (), size: tuple[int, int] = (120, 80)) -> Path:
    """Write a PDF with a number on each page; the pages `broken`, from 1, refer to objects that do not exist."""
    images = []
    for number in range(1, pages + 1):
        image = Image.new("RGB", size, "white")
        ImageDraw.Draw(image).text((10, 10), str(number), fill="black")
        images.append(image)
    images[0].save(path, save_all=True, append_images=images[1:])
    data = path.read_bytes()
    start = data.index(b"/Kids [") + len(b"/Kids [")
    end = data.index(b"]", start)
    kids = re.findall(rb"(\d+) 0 R", data[start:end])
    # Object 0 never exists.
    references = [b"0" * len(kid) if number in broken else kid for number, kid in enumerate(kids, 1)]
    path.write_bytes(data[:start] + b"".join(b" %s 0 R" % kid for kid in references) + b" " + data[end:])
    return path


def encrypted_pdf(path: Path) -> Path:
    """Write a PDF whose password is unknown."""
    pdf(path, 1)
    data = path.read_bytes()
    lock = b"/Encrypt <</Filter /Standard /V 1 /R 2 /P -4 /O <" + b"11" * 32 + b"> /U <" + b"22" * 32 + b">>>"
    identity = b" /ID [<" + b"00" * 16 + b"> <" + b"00" * 16 + b">]"
    place = data.rindex(b"trailer")
    inside = data.index(b"<<", place) + 2
    path.write_bytes(data[:inside] + b"\n" + lock + identity + data[inside:])
    return path
