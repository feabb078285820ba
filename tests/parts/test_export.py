"""`torch.export` of packed encoders and the models that hold them, from pixels and grids alone."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from tests.parts.test_navit_dual_encoder import dual_encoder, images, texts
from tests.parts.test_vlm import GROUPS, batch, composed
from tests.tiny import WINDOWED, navit, packed_images, windowfree
from vlparts import NaViTModel

Inputs = dict[str, Tensor]
FIRST, SECOND = [(4, 6), (2, 2), (6, 2)], [(2, 6), (8, 2), (6, 4), (2, 2)]
VECTORS = ("last_hidden_state", "pooler_output")
ENCODERS = {
    "navit": navit,
    "navit with prefix tokens": lambda: navit(
        pooling="class_token", num_register_tokens=2, rotary_theta=100.0, max_frames=3
    ),
    "navit of clips": lambda: navit(video_attention="clip"),
    "windowfree": lambda: windowfree(pooling="mean"),
    "windowed": lambda: windowfree(**WINDOWED, pooling="mean"),
}
both_implementations = pytest.mark.parametrize(
    "implementation", ["eager", pytest.param("sdpa", marks=pytest.mark.slow)]
)


class Bare(nn.Module):
    """A model with tensors as positional arguments and results."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], results: tuple[str, ...], **options: Any) -> None:
        super().__init__()
        self.model, self.names, self.results, self.options = model, names, results, options

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(**dict(zip(self.names, tensors, strict=True)), **self.options)
        return tuple(outputs[name] for name in self.results)


def packed(grids: list[tuple[int, int]]) -> Inputs:
    return dict(zip(("pixel_values", "image_grid_thw"), packed_images(grids), strict=True))


def names_of_operations(program: torch.export.ExportedProgram) -> str:
    return " ".join(str(node.target) for node in program.graph.nodes if node.op == "call_function")


SLOW = ("navit of clips", "windowfree")


@both_implementations
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in ENCODERS])
def test_one_program_serves_images_of_any_number_and_size(name: str, implementation: str) -> None:
    bare = Bare(ENCODERS[name](), ("pixel_values", "image_grid_thw"), VECTORS)
    bare.model.set_attn_implementation(implementation)
    first = tuple(packed(FIRST).values())
    program = torch.export.export(bare, first, dynamic_shapes=(({0: Dim("patches")}, {0: Dim("images")}),))
    for tensors in (first, tuple(packed(SECOND).values())):
        torch.testing.assert_close(program.module()(*tensors), bare(*tensors), atol=1e-5, rtol=1e-5)
    operations = names_of_operations(program)
    assert "searchsorted" not in operations  # ONNX has none
    assert ("vlparts." in operations) == (implementation == "sdpa")


@both_implementations
def test_dropped_patches(implementation: str) -> None:
    model: NaViTModel = navit()
    model.set_attn_implementation(implementation)
    inputs = packed(FIRST)
    keep_index = torch.tensor([0, 3, 5, 23, 24, 25, 30, 39, -1, -1])
    tensors = inputs["pixel_values"][keep_index], inputs["image_grid_thw"], keep_index
    bare = Bare(model, (*inputs, "keep_index"), ("pooler_output",), **model.precompute(tensors[1], keep_index))
    program = torch.export.export(bare, tensors)
    torch.testing.assert_close(program.module()(*tensors), bare(*tensors), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(bare(*tensors)[0], model(*tensors[:2], keep_index=keep_index).pooler_output)
    assert "searchsorted" not in names_of_operations(program)


@both_implementations
def test_models_that_hold_a_packed_encoder(implementation: str) -> None:
    model, processor = composed()
    cases = [
        Bare(dual_encoder(), ("pixel_values", "image_grid_thw", "input_ids", "attention_mask"), ("logits_per_image",)),
        Bare(model, ("input_ids", "attention_mask", "pixel_values", "image_grid_thw"), ("logits",), use_cache=False),
    ]
    for bare, given in zip(cases, (images() | texts(), batch(processor, GROUPS)), strict=True):
        bare.model.set_attn_implementation(implementation)
        tensors = tuple(given[name] for name in bare.names)
        program = torch.export.export(bare, tensors)
        torch.testing.assert_close(program.module()(*tensors), bare(*tensors), atol=1e-4, rtol=1e-4)
        assert "searchsorted" not in names_of_operations(program)
