"""Image files, colour modes, and image sizes that are multiples of a patch."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as native_smart_resize

from tests.tiny import picture
from vlparts.parts.image_transforms import fit_to_grid, open_image, read_image, smart_resize, to_rgb


def encoded(kind: str) -> bytes:
    """A small image file."""
    file = io.BytesIO()
    picture(40, 40).save(file, kind)
    return file.getvalue()


def replaced(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_are_turned_upright(tmp_path: Path, orientation: int) -> None:
    """The file holds the upright image, transformed by the inverse of its EXIF orientation."""
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    upright = picture(24, 12)
    stored = upright.transpose(Image.Transpose(inverse[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "a.png")), np.asarray(upright))


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
    with pytest.raises(ValueError, match=r"large\.png cannot be read: .*1600 pixels"):
        open_image(tmp_path / "large.png")


def test_a_file_of_unknown_range_is_a_value_error(tmp_path: Path) -> None:
    Image.fromarray(np.ones((9, 9), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif cannot be read: .*mode 'F'"):
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


def test_cmyk_white_is_white() -> None:
    assert to_rgb(Image.new("CMYK", (1, 1), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("F", (2, 2)), "mode 'F'"),
        (Image.fromarray(np.array([[70000]], dtype=np.int32)), "70000.*expected 0..65535"),
        (Image.fromarray(np.array([[-1]], dtype=np.int32)), r"levels -1\.\.-1; expected 0\.\.65535"),
    ],
)
def test_unknown_ranges_are_refused(image: Image.Image, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_rgb(image)


@given(
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.integers(1, 40),
    st.integers(1, 3_000_000),
    st.integers(1, 3_000_000),
)
def test_sizes_are_multiples_within_the_limits(height: int, width: int, factor: int, low: int, high: int) -> None:
    low, high = min(low, high), max(low, high, factor**2)
    new_height, new_width = fit_to_grid(height, width, factor, low, high, max_aspect_ratio=1e9)
    assert new_height % factor == new_width % factor == 0
    assert min(new_height, new_width) >= factor
    assert new_height * new_width <= high
    # Below the smallest area only where whole blocks within the largest one, or a single row of them, cannot reach it.
    if new_height * new_width < low:
        assert (new_height + factor) * (new_width + factor) > min(low, high)


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(1, 32))
def test_an_image_that_fits_is_only_rounded(height: int, width: int, factor: int) -> None:
    assume(min(height, width) >= factor)
    new_height, new_width = fit_to_grid(height, width, factor, 1, 10**9, max_aspect_ratio=1e9)
    assert abs(new_height - height) <= factor / 2
    assert abs(new_width - width) <= factor / 2


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 30))
def test_the_sides_may_be_swapped(height: int, width: int, factor: int) -> None:
    sizes = fit_to_grid(height, width, factor, 100, 10**6, 1e9)
    swapped = fit_to_grid(width, height, factor, 100, 10**6, 1e9)
    assert sizes[0] * sizes[1] <= 10**6
    assert swapped == sizes[::-1] or swapped[0] * swapped[1] <= 10**6


def test_sides_that_fit_a_limit_exactly_are_kept() -> None:
    """Though 75 * sqrt(196 / 75**2) is 13.999999999999998."""
    assert fit_to_grid(75, 75, 1, 196, 196) == (14, 14)


def test_large_images_keep_their_aspect_ratio() -> None:
    assert fit_to_grid(4000, 2000, 16, 256, 512 * 1024) == (1024, 512)
    assert fit_to_grid(10, 20, 16, 128 * 256, 1024**2) == (128, 256)


def test_one_pixel_is_enlarged_to_one_patch() -> None:
    assert fit_to_grid(1, 1, 16, 256, 1024**2) == (16, 16)


def test_extreme_aspect_ratios_are_refused_or_stretched() -> None:
    with pytest.raises(ValueError, match=r"5000 x 10 pixels has an aspect ratio of 500.0; expected at most 200"):
        fit_to_grid(10, 5000, 4, 16, 10**6)
    height, width = fit_to_grid(10, 5000, 4, 16, 10**6, on_extreme_aspect="clamp")
    assert width / height == pytest.approx(200, rel=0.1)
    assert height * width == pytest.approx(50000, rel=0.1)
    width, height = fit_to_grid(5000, 10, 4, 16, 10**6, on_extreme_aspect="clamp")
    assert width / height == pytest.approx(200, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 5, 16, 1, 10**6), "5 x 0 pixels"),
        ((5, 5, 16, 1, 255), r"`max_pixels` must be at least 16\*\*2 .*, got 255"),
        ((5, 5, 16, 2000, 1000), "`max_pixels` must .* got 1000 with `min_pixels`=2000"),
    ],
)
def test_impossible_sizes_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_to_grid(*arguments)


@given(st.integers(1, 6000), st.integers(1, 6000), st.integers(1, 40), st.integers(1, 10**6), st.integers(1, 10**7))
def test_smart_resize_equals_the_native_one(height: int, width: int, factor: int, low: int, high: int) -> None:
    assume(max(height, width) <= 200 * min(height, width))
    low, high = min(low, high), max(low, high, factor**2)
    assert smart_resize(height, width, factor, low, high) == native_smart_resize(height, width, factor, low, high)


@given(st.integers(1, 150), st.integers(1, 150))
def test_smart_resize_rounds_halves_to_even_blocks(rows: int, columns: int) -> None:
    height, width = 28 * rows + 14, 28 * columns + 14
    expected = tuple(28 * (blocks + blocks % 2) for blocks in (rows, columns))
    assert smart_resize(height, width, 28, 1, 10**9) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 5, 28, 1, 10**6), "5 x 0 pixels"),
        ((10, 2001, 28, 1, 10**6), "2001 x 10 pixels has an aspect ratio of 200.1; expected at most 200"),
        ((50, 50, 28, 1, 783), r"`max_pixels` must be at least 28\*\*2 .*, got 783"),
        ((50, 50, 28, 2000, 1000), "`max_pixels` must .* got 1000 with `min_pixels`=2000"),
    ],
)
def test_smart_resize_refuses_impossible_sizes(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        smart_resize(*arguments)
