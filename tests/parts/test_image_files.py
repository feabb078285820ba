"""Image files and Pillow images: broken files, EXIF orientation, colour modes, the pixel limit."""

import io
import math
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.tiny import picture, save_turned
from vlparts.parts.image_files import image_size, open_image, read_image, to_rgb, upright_size


def encoded(kind: str) -> bytes:
    """A small image file."""
    file = io.BytesIO()
    picture(40, 40).save(file, kind)
    return file.getvalue()


def replaced(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_are_turned_upright(tmp_path: Path, orientation: int, suffix: str) -> None:
    """Pillow turns TIFF files itself, others not."""
    upright = picture(24, 12)
    path = save_turned(upright, tmp_path / f"a.{suffix}", orientation)
    assert image_size(path) == open_image(path).size == upright.size
    if suffix != "jpg":  # which is lossy
        np.testing.assert_array_equal(np.asarray(open_image(path)), np.asarray(upright))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pillow_images_are_turned_upright_once(tmp_path: Path, orientation: int) -> None:
    path = save_turned(picture(24, 12), tmp_path / "a.png", orientation)
    for opened in (Image.open(path), Image.open(path).convert("RGB")):
        once = read_image(opened)
        np.testing.assert_array_equal(np.asarray(once), np.asarray(picture(24, 12)))
        np.testing.assert_array_equal(np.asarray(read_image(once)), np.asarray(once))


def test_files_are_converted_to_rgb_on_request(tmp_path: Path) -> None:
    Image.new("LA", (3, 2), (0, 51)).save(tmp_path / "a.png")
    assert open_image(str(tmp_path / "a.png")).getpixel((0, 0)) == (204, 204, 204)
    assert open_image(tmp_path / "a.png", convert_rgb=False).getpixel((0, 0)) == (0, 51)


def test_an_opened_image_does_not_need_its_file(tmp_path: Path) -> None:
    picture(24, 12).save(tmp_path / "a.png")
    image = open_image(tmp_path / "a.png")
    (tmp_path / "a.png").unlink()
    np.testing.assert_array_equal(np.asarray(image), np.asarray(picture(24, 12)))


BROKEN_FILES: dict[str, Callable[[], bytes]] = {
    "no bytes": lambda: b"",
    "not an image": lambda: b"<html>no</html>" * 20,
    "JPEG cut at half": lambda: encoded("JPEG")[: len(encoded("JPEG")) // 2],
    "JPEG without its last bytes": lambda: encoded("JPEG")[:-4],
    "PNG cut at half": lambda: encoded("PNG")[: len(encoded("PNG")) // 2],
    "PNG cut in its header": lambda: encoded("PNG")[:20],
    "PNG with a wrong checksum": lambda: replaced(encoded("PNG"), 60, b"abc"),
    "DDS cut at half": lambda: encoded("DDS")[: len(encoded("DDS")) // 2],
    "DDS of an unknown pixel format": lambda: replaced(encoded("DDS"), 80, b"\x00\x10\x00\x00"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_broken_file_is_a_value_error_with_its_path(tmp_path: Path, name: str) -> None:
    path = tmp_path / "bad.img"
    path.write_bytes(BROKEN_FILES[name]())
    with pytest.raises(ValueError, match=r"^Image .*bad\.img cannot be read: .") as caught:
        open_image(path)
    assert type(caught.value) is ValueError


def test_a_missing_file_and_a_folder_are_value_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^Image .*none\.png does not exist\.$"):
        open_image(tmp_path / "none.png")
    with pytest.raises(ValueError, match=r"^Image .* cannot be read: .*Is a directory"):
        open_image(tmp_path)


def test_a_file_beyond_pillows_pixel_limit_is_a_value_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(40, 40).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 799)
    message = r"large\.png has more than 1598 pixels; pass a larger `max_image_pixels` if the file is trusted\."
    for opened in (open_image, image_size):
        with pytest.raises(ValueError, match=message):
            opened(tmp_path / "large.png")
        opened(tmp_path / "large.png", max_image_pixels=1600)
    assert Image.MAX_IMAGE_PIXELS == 799


@pytest.mark.parametrize("opened", [open_image, image_size])
def test_the_pixel_limit_is_an_argument(tmp_path: Path, opened: Callable) -> None:
    picture(40, 41).save(tmp_path / "a.png")
    opened(tmp_path / "a.png", max_image_pixels=1640)
    with pytest.raises(ValueError, match=r"a\.png has more than 1639 pixels; pass a larger `max_image_pixels`"):
        opened(tmp_path / "a.png", max_image_pixels=1639)
    with pytest.raises(ValueError, match="`max_image_pixels` must be an integer of at least 1 or None, got 0"):
        opened(tmp_path / "a.png", max_image_pixels=0)


def test_a_file_of_unknown_range_is_a_value_error(tmp_path: Path) -> None:
    Image.fromarray(np.full((9, 9), 255, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif cannot be read: .*values of 255\.\.255 in float32"):
        open_image(tmp_path / "a.tif")


def test_a_broken_image_that_is_open_already_is_a_value_error() -> None:
    for data in (BROKEN_FILES["JPEG cut at half"](), BROKEN_FILES["DDS cut at half"]()):
        with pytest.raises(ValueError, match=r"^The image cannot be read: ."):
            read_image(Image.open(io.BytesIO(data)))


def gradient() -> np.ndarray:
    return np.linspace(0, 65535, 12).reshape(3, 4)


def test_sixteen_bits_are_scaled_and_not_cut_off() -> None:
    levels = gradient().astype(np.uint16)
    rgb = np.asarray(to_rgb(Image.fromarray(levels)))
    np.testing.assert_array_equal(rgb[..., 0], np.rint(levels / 257).astype(np.uint8))
    np.testing.assert_array_equal(rgb[..., 0], rgb[..., 2])
    np.testing.assert_array_equal(np.asarray(to_rgb(Image.fromarray(levels.astype(np.int32)))), rgb)


def test_transparency_is_composited_onto_white() -> None:
    pixels = np.zeros((1, 3, 4), dtype=np.uint8)
    pixels[0, :, 0], pixels[0, :, 3] = 200, [255, 0, 51]
    rgb = np.asarray(to_rgb(Image.fromarray(pixels)))
    np.testing.assert_array_equal(rgb[0, 0], [200, 0, 0])
    np.testing.assert_array_equal(rgb[0, 1], [255, 255, 255])
    np.testing.assert_array_equal(rgb[0, 2], [244, 204, 204])


def test_transparent_palette_entries_become_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    np.testing.assert_array_equal(np.asarray(to_rgb(image))[0], [[10, 20, 30], [200, 100, 50]])
    image.info["transparency"] = 0
    np.testing.assert_array_equal(np.asarray(to_rgb(image))[0], [[255, 255, 255], [200, 100, 50]])


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I;16", "I"]
)
def test_every_mode_becomes_rgb(mode: str) -> None:
    assert to_rgb(Image.new(mode, (5, 3))).mode == "RGB"


def test_transparent_sixteen_bit_levels_become_white(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 514, 257]], np.uint16)).save(tmp_path / "a.png", transparency=514)
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "a.png"))[0, :, 0], [0, 255, 1])


def test_cmyk_white_is_white() -> None:
    assert to_rgb(Image.new("CMYK", (1, 1), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("F", (2, 2), 1.1), r"values of 1\.1\.\.1\.1 in float32; expected floats from 0 to 1"),
        (Image.new("F", (2, 2), math.nan), "not finite"),
        (Image.fromarray(np.array([[70000]], dtype=np.int32)), "70000.*expected 0..65535"),
        (Image.fromarray(np.array([[-1]], dtype=np.int32)), r"levels -1\.\.-1; expected 0\.\.65535"),
    ],
)
def test_unknown_ranges_are_refused(image: Image.Image, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_rgb(image)


@pytest.mark.parametrize("orientation", [1, 6])
def test_exif_data_behind_the_pixels_of_a_png_counts(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = b"eXIf" + content
    chunk = len(content).to_bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4)
    file = io.BytesIO()
    picture(24, 12).save(file, "PNG")
    data = file.getvalue()
    late = data[:-12] + chunk + data[-12:]
    assert image_size(io.BytesIO(late)) == open_image(io.BytesIO(late)).size == ((12, 24), (24, 12))[orientation == 1]
    with Image.open(io.BytesIO(data)) as image:
        assert upright_size(image) == (24, 12)
        np.testing.assert_array_equal(np.asarray(image), np.asarray(picture(24, 12)))  # its file is where it was
