"""Packed encoders in ONNX against PyTorch; run by the nox session `onnx`, which installs the converter."""

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch.export import Dim

from tests.parts.test_export import ENCODERS, FIRST, SECOND, VECTORS, Bare, packed
from tests.parts.test_navit_dual_encoder import dual_encoder, images, texts


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_compute_the_same_for_images_of_any_number_and_size(name: str, tmp_path: Path) -> None:
    bare = Bare(ENCODERS[name](), ("pixel_values", "image_grid_thw"), VECTORS)
    bare.model.set_attn_implementation("eager")
    first = tuple(packed(FIRST).values())
    check(bare, [first, tuple(packed(SECOND).values())], tmp_path, (({0: Dim.DYNAMIC}, {0: Dim.DYNAMIC}),))


def test_the_dual_encoder_computes_the_same(tmp_path: Path) -> None:
    given = images() | texts()
    bare = Bare(dual_encoder(), tuple(given), ("logits_per_image",))
    bare.model.set_attn_implementation("eager")
    check(bare, [tuple(given.values())], tmp_path)


def check(
    bare: Bare, examples: list[tuple[torch.Tensor, ...]], folder: Path, dynamic_shapes: tuple | None = None
) -> None:
    program = torch.onnx.export(bare.eval(), examples[0], dynamo=True, verbose=False, dynamic_shapes=dynamic_shapes)
    program.save(folder / "model.onnx")
    running = onnxruntime.InferenceSession(folder / "model.onnx")
    names = [one.name for one in running.get_inputs()]
    for tensors in examples:
        found = running.run(None, {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)})
        with torch.no_grad():
            expected = bare(*tensors)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(mine), theirs, atol=1e-5, rtol=1e-5)
