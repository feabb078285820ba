"""`torch.export` of vision encoders and the models that hold them, from pixels and grids."""

from typing import Any

import pytest
import torch
from torch.export import Dim

from tests.parts import test_fused_vision, test_vlm_views
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
from tests.parts.test_vlm import GROUPS, batch, composed
from tests.tiny import navit, picture

FAST = ("navit", "navit with prefix tokens", "windowed", "classifier", "qwen3_vl")
both_implementations = pytest.mark.parametrize(
    "implementation", ["eager", pytest.param("sdpa", marks=pytest.mark.slow)]
)


def export(bare: Bare, tensors: tuple[torch.Tensor, ...], *shapes: dict[int, Any]) -> torch.export.ExportedProgram:
    program = torch.export.export(bare, tensors, dynamic_shapes=(shapes,) if shapes else None)
    names = " ".join(str(node.target) for node in program.graph.nodes if node.op == "call_function")
    assert "searchsorted" not in names  # ONNX has none
    if bare.model.config._attn_implementation == "eager":
        assert "vlparts." not in names
    return program


def agree(program: Any, bare: Bare, *sets: tuple[torch.Tensor, ...], by: float = 1e-5) -> None:
    for tensors in sets:
        torch.testing.assert_close(program.module()(*tensors), bare(*tensors), atol=by, rtol=by)


@both_implementations
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in PACKED]
)
def test_one_program_serves_images_of_any_number_and_size(name: str, implementation: str) -> None:
    case = PACKED[name]
    bare = Bare(case.build(), tuple(PACKED_SHAPES), case.results)
    bare.model.set_attn_implementation(implementation)
    first, second = (tuple(case.inputs(index).values()) for index in range(2))
    agree(export(bare, first, *PACKED_SHAPES.values()), bare, first, second)


@both_implementations
@pytest.mark.parametrize("video_attention", ["frame", "clip"])
def test_dropped_patches(video_attention: str, implementation: str) -> None:
    model = navit(video_attention=video_attention)
    model.set_attn_implementation(implementation)
    bare = Bare(model, ("pixel_values", "image_grid_thw", "keep_index"), ("pooler_output",))
    sets = [dropped_patches(index) for index in range(2)]
    agree(export(bare, sets[0], *[{0: Dim.DYNAMIC}] * 3), bare, *sets)


@both_implementations
def test_two_encoders_of_any_number_of_images(implementation: str) -> None:
    bare = fused_vision()
    bare.model.set_attn_implementation(implementation)
    agree(export(bare, fused_inputs(0), {0: Dim.DYNAMIC}), bare, fused_inputs(0), fused_inputs(1))


@both_implementations
@pytest.mark.parametrize("name", VIEWS)
def test_views_of_given_sizes(name: str, implementation: str) -> None:
    bare, first, second = deepencoder(name)
    bare.model.set_attn_implementation(implementation)
    agree(export(bare, first), bare, first, second, by=1e-4)


def held(kind: str) -> tuple[Bare, dict[str, torch.Tensor]]:
    """A model that holds an encoder, and its inputs."""
    if kind == "dual encoder":
        given = images() | texts()
        return Bare(dual_encoder(), tuple(given), ("logits_per_image",)), given
    if kind == "navit":
        model, processor = composed()
        given, options = batch(processor, GROUPS), {}
    elif kind == "fused vision":
        model, processor = test_fused_vision.composed()
        given, options = processor(images=[picture(40, 30)], text="what is <image>", return_tensors="pt"), {}
    else:
        model, processor = test_vlm_views.composed("qwen3")
        given = processor(images=[picture(150, 90)], text="what is <image>", return_tensors="pt")
        host = model.model.vision_tower.precompute(given["image_grid_thw"], given["image_tile_grid"])
        options = {f"image_{name}": value for name, value in host.items()}
    names = [name for name in given if name != "mm_token_type_ids"]
    bare = Bare(model, tuple(names), ("logits",), use_cache=False, **options)
    return bare, {name: given[name] for name in names}


@both_implementations
@pytest.mark.parametrize("kind", ["navit", "dual encoder", "fused vision", "deepencoder"])
def test_models_that_hold_an_encoder(kind: str, implementation: str) -> None:
    bare, given = held(kind)
    bare.model.set_attn_implementation(implementation)
    tensors = tuple(given.values())
    other = tuple(x + 0.1 if x.is_floating_point() else x for x in tensors)
    agree(export(bare, tensors), bare, tensors, other, by=1e-4)
