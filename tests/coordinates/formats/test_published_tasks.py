"""Codes of formats, compared with the functions of transformers."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from transformers.models.florence2.processing_florence2 import Florence2PostProcessor
from transformers.models.fuyu.processing_fuyu import scale_bbox_to_transformed_image, scale_point_to_transformed_image
from transformers.models.got_ocr2.processing_got_ocr2 import preprocess_box_annotation

from vlparts.coordinates.codec import decode, encode
from vlparts.coordinates.formats import published as table  # noqa: F401
from vlparts.coordinates.regions import Region


def test_florence2_quantises_as_transformers() -> None:
    processor = Florence2PostProcessor.__new__(Florence2PostProcessor)
    processor.quantize_bins = (1000, 1000)
    boxes = torch.tensor([[3.0, 5.0, 630.0, 479.0], [0.0, 0.0, 640.0, 480.0], [100.0, 7.0, 101.0, 8.0]])
    codes = processor.quantize(boxes.double(), (640, 480)).tolist()
    regions = [Region.box(*row) for row in boxes.tolist()]
    assert encode(regions, (640, 480), "florence2") == "".join(
        "".join(f"<loc_{code}>" for code in row) for row in codes
    )
    read = decode(encode(regions, (640, 480), "florence2"), (640, 480), "florence2").regions
    whole = processor.dequantize(torch.tensor(codes), (640, 480)).tolist()
    assert [np.trunc(np.ravel(region.points)).tolist() for region in read] == whole


def test_got_ocr2_quantises_as_transformers() -> None:
    # Their int() of a float quotient may fall one below an exact thousandth; these values have none.
    for values in ((3, 5, 629, 479), (0, 0, 640, 480), (101, 7, 103, 11)):
        wanted = preprocess_box_annotation(deepcopy(list(values)), (640, 480))
        assert encode([Region.box(*values)], (640, 480), "got_ocr2") == str(wanted)


@pytest.mark.parametrize(("size", "scale"), [((1000, 800), 1.0), ((3840, 2160), 0.5)])
def test_fuyu_quantises_as_transformers(size: tuple[int, int], scale: float) -> None:
    left, top, right, bottom = 123, 45, 677, 799
    y1, x1, y2, x2 = scale_bbox_to_transformed_image(top, left, bottom, right, scale)
    x, y = scale_point_to_transformed_image(left, top, scale)
    text = encode([Region.box(left, top, right, bottom), Region.point(left, top)], size, "fuyu")
    codes = [
        int(part) for part in text.replace("<", " ").replace(">", " ").replace(",", " ").split() if part.isdigit()
    ]
    # They round halves to even, we round them up.
    assert np.abs(np.subtract(codes, [y1, x1, y2, x2, x, y])).max() <= 1
    assert text.count("<box>") == text.count("<point>") == 1
