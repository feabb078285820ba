"""How many files a reader has to open to follow `pixel_values` from the processor's output to the logits."""

import sys
from pathlib import Path
from types import FrameType

import pytest
from tests.parts.test_vlm import GROUPS, batch, composed

from vlparts.parts import modeling_vlm

PARTS = Path(modeling_vlm.__file__).parent
MAX_FILES = 18


@pytest.fixture(scope="module")
def files() -> set[str]:
    """The files of parts/ whose functions run in one forward pass of a NaViT with a native text model."""
    model, processor = composed("navit", "qwen3")
    inputs = batch(processor, GROUPS)
    found = set()

    def record(frame: FrameType, event: str, argument: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.parent == PARTS:
            found.add(path.stem)

    previous = sys.getprofile()
    sys.setprofile(record)
    try:
        model(**inputs)
    finally:
        sys.setprofile(previous)
    return found


def test_the_recording_sees_both_ends(files: set[str]) -> None:
    assert {"modeling_vlm", "modeling_navit", "vlm_inputs", "vlm_projectors"} <= files


def test_a_forward_pass_goes_through_few_files(files: set[str]) -> None:
    assert len(files) <= MAX_FILES, sorted(files)
