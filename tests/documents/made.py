"""PDF files that tests make: good, with broken pages, and encrypted."""

import hashlib
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


PADDING = bytes.fromhex("28bf4e5e4e758a4164004e56fffa01082e2e00b6d0683e802f0ca9fe6453697a")  # of passwords


def encrypted_pdf(path: Path, password: str = "secret") -> Path:
    """Write a PDF with a blank page of 36 x 72 points that opens with a password, or without one if it is empty."""
    objects = [
        "<</Type /Catalog /Pages 2 0 R>>",
        "<</Type /Pages /Kids [3 0 R] /Count 1>>",
        "<</Type /Page /Parent 2 0 R /MediaBox [0 0 36 72]>>",
    ]
    # PDF 1.7, 7.6.3: RC4 with 40 bits (V 1, R 2). Such a file has neither strings nor streams to encrypt.
    owner, permissions, name = bytes(32), -4, bytes(16)
    padded = (password.encode() + PADDING)[:32]
    key = hashlib.md5(padded + owner + permissions.to_bytes(4, "little", signed=True) + name).digest()[:5]
    lock = f"<</Filter /Standard /V 1 /R 2 /P {permissions} /O <{owner.hex()}> /U <{_rc4(key, PADDING).hex()}>>>"
    data, starts = b"%PDF-1.4\n", []
    for number, value in enumerate([*objects, lock], 1):
        starts.append(len(data))
        data += f"{number} 0 obj\n{value}\nendobj\n".encode()
    table = "".join(f"{start:010} 00000 n \n" for start in starts)
    trailer = f"<</Size 5 /Root 1 0 R /Encrypt 4 0 R /ID [<{name.hex()}> <{name.hex()}>]>>"
    end = f"xref\n0 5\n0000000000 65535 f \n{table}trailer\n{trailer}\nstartxref\n{len(data)}\n%%EOF\n"
    path.write_bytes(data + end.encode())
    return path


def _rc4(key: bytes, data: bytes) -> bytes:
    state, j = list(range(256)), 0
    for i in range(256):
        j = (j + state[i] + key[i % len(key)]) % 256
        state[i], state[j] = state[j], state[i]
    i = j = 0
    out = []
    for byte in data:
        i = (i + 1) % 256
        j = (j + state[i]) % 256
        state[i], state[j] = state[j], state[i]
        out.append(byte ^ state[(state[i] + state[j]) % 256])
    return bytes(out)
