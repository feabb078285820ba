"""Image sizes as arguments."""

import pytest

from vlparts.coordinates import (
    FORMATS,
    CoordinateError,
    Frame,
    ImageRegions,
    SmartResize,
    StreamDecoder,
    check_region,
    convert,
    decode,
    decode_array,
    encode,
    encode_array,
    guess_format,
    report,
)


@pytest.mark.parametrize("side", [10**9 + 1, 10**400, 10**5000], ids=["code", "float", "printed"])
def test_sides_that_overflow_are_the_documented_error_everywhere(side: int) -> None:
    size, names = (
        (side, side),
        r"`(image_size|\(width, height\)|size)` must have sides of at most 1000000000, got one of about 10\*\*",
    )
    for fmt in FORMATS.values():
        with pytest.raises(CoordinateError, match=names):
            encode([], size, fmt)
        with pytest.raises(CoordinateError, match=names):
            decode("(001,002)", size, fmt, on_error="skip")
    for call in (
        lambda: convert("(001,002)", None, "claude", size),
        lambda: guess_format("(001,002)", size),
        lambda: StreamDecoder(size),
        lambda: encode_array([[0, 0, 1, 1]], size),
        lambda: decode_array(["(000,000),(001,001)"], size),
        lambda: check_region({"point": [1, 2]}, size),
        lambda: report(["(001,002)"], [[]], [size]),
        lambda: Frame.padded_square(size),
        lambda: SmartResize()(size),
        lambda: ImageRegions("a", *size),
    ):
        with pytest.raises(ValueError, match=names):
            call()
