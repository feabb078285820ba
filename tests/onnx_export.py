"""Vision encoders in ONNX against PyTorch; run by the nox session `onnx`, which installs the converter."""

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor

from tests.parts.exported import (
    PACKED,
    PACKED_SHAPES,
    VIEWS,
    Bare,
    deepencoder,
    dropped_patches,
    fused_inputs,
    fused_vision,
)
from tests.parts.test_navit_dual_encoder import dual_encoder, images, texts
from tests.tiny import navit


@pytest.mark.parametrize("name", PACKED)
def test_one_program_serves_images_of_any_number_and_size(name: str, tmp_path: Path) -> None:
    case = PACKED[name]
    bare = Bare(case.build(), tuple(PACKED_SHAPES), case.results)
    check(bare, [tuple(case.inputs(index).values()) for index in range(2)], tmp_path, *PACKED_SHAPES.values())


def test_dropped_patches(tmp_path: Path) -> None:
    bare = Bare(navit(), ("pixel_values", "image_grid_thw", "keep_index"), ("pooler_output",))
    check(bare, [dropped_patches(index) for index in range(2)], tmp_path, *[{0: torch.export.Dim.DYNAMIC}] * 3)


def test_two_encoders_of_any_number_of_images(tmp_path: Path) -> None:
    check(fused_vision(), [fused_inputs(0), fused_inputs(1)], tmp_path, {0: torch.export.Dim.DYNAMIC})


@pytest.mark.parametrize("name", VIEWS)
def test_views_of_given_sizes(name: str, tmp_path: Path) -> None:
    bare, *sets = deepencoder(name)
    check(bare, sets, tmp_path, by=1e-4)


def test_the_dual_encoder(tmp_path: Path) -> None:
    given = images() | texts()
    check(Bare(dual_encoder(), tuple(given), ("logits_per_image",)), [tuple(given.values())], tmp_path)


def check(bare: Bare, sets: list[tuple[Tensor, ...]], folder: Path, *shapes: dict[int, Any], by: float = 1e-5) -> None:
    bare.model.set_attn_implementation("eager")
    options = {"dynamic_shapes": (shapes,)} if shapes else {}
    program = torch.onnx.export(bare.eval(), sets[0], dynamo=True, verbose=False, **options)
    program.save(folder / "model.onnx")
    running = onnxruntime.InferenceSession(folder / "model.onnx")
    names = [one.name for one in running.get_inputs()]
    for tensors in sets:
        given = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        with torch.no_grad():
            expected = bare(*tensors)
        for mine, theirs in zip(running.run(None, given), expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(mine), theirs, atol=by, rtol=by)
            if theirs.is_floating_point():
                print(f"largest difference {(torch.from_numpy(mine) - theirs).abs().max():.1e}")
