"""Vision encoders of published Qwen-VL folders against the native towers, in both layouts of names."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.checkpoints.qwen_vl.files import MODELS, change_config, native_model, save
from tests.parts.qwen_towers import native_features
from tests.tiny import packed_images, picture
from vlparts import WindowFreeViTModel
from vlparts.checkpoints.qwen_vl import encoder_from_qwen_vl, image_processor_from_qwen_vl, merger_from_qwen_vl
from vlparts.parts.vlm_projectors import Projector

GRIDS = [(1, 4, 6), (3, 6, 2), (1, 2, 2), (1, 8, 12)]
CLOSE = {"atol": 1e-6, "rtol": 1e-6}
every_kind = pytest.mark.parametrize("kind", MODELS)
PROCESSOR = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 64, "longest_edge": 8 * 8 * 40}}


def features(encoder: WindowFreeViTModel, pixels: Tensor, grids: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(encoder(pixels, grids).feature_maps)


@every_kind
@pytest.mark.parametrize("nested", [None, False, True], ids=["as saved", "visual", "model.visual"])
def test_encoders_equal_the_native_towers(tmp_path: Path, kind: str, nested: bool | None) -> None:
    native = native_model(kind)
    encoder = encoder_from_qwen_vl(save(native, tmp_path, nested))
    assert encoder.dtype == encoder.config.dtype == torch.float64
    assert not encoder.training
    pixels, grids = packed_images(GRIDS, 96, dtype=torch.float64)
    with torch.no_grad():
        expected = native_features(kind, native.model.visual, pixels, grids)
    assert len(expected) == (3 if kind.startswith("qwen3") else 1)
    torch.testing.assert_close(features(encoder, pixels, grids), expected, **CLOSE)


@every_kind
def test_what_is_not_read_is_named(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    native = native_model(kind, torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        encoder = encoder_from_qwen_vl(save(native, tmp_path, False))
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.bfloat16}
    stored = load_file(tmp_path / "model.safetensors")
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("vlparts")]
    for name in stored:
        assert (name in message) == ("merger" in name), name
    texts = sum(not name.startswith("visual.") for name in stored)
    assert message.endswith(f"; {texts} tensors of the text model.")
    assert len(stored) == texts + sum("merger" in name for name in stored) + len(encoder.state_dict())
    assert encoder_from_qwen_vl(tmp_path, dtype=torch.float32).dtype == torch.float32


@every_kind
def test_mergers_fit_our_projectors(tmp_path: Path, kind: str) -> None:
    native = native_model(kind)
    save(native, tmp_path)
    projector = Projector("patch_merger" if kind == "qwen2_5_vl" else "points_merger", 32, 24, 2).double()
    projector.projection.load_state_dict(merger_from_qwen_vl(tmp_path))
    rows = torch.randn(12, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(projector(rows), native.model.visual.merger(rows), **CLOSE)
    assert merger_from_qwen_vl(tmp_path, dtype=torch.bfloat16)["fc1.weight"].dtype == torch.bfloat16


def test_a_merger_that_is_missing(tmp_path: Path) -> None:
    save(native_model("qwen2_vl"), tmp_path, False)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if name != "visual.merger.mlp.2.bias"}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"Missing: visual.merger.mlp.2.bias\."):
        merger_from_qwen_vl(tmp_path)


def test_fields_of_the_first_published_files(tmp_path: Path) -> None:
    """Qwen2-VL's have no activation and no type of the tower, and name the channels `in_chans`."""
    native = native_model("qwen2_vl")
    save(native, tmp_path, False)
    old = dict.fromkeys(("hidden_act", "model_type", "in_channels", "initializer_range", "rope_parameters"))
    change_config(tmp_path, **old, in_chans=3, spatial_patch_size=4)
    pixels, grids = packed_images(GRIDS, 96, dtype=torch.float64)
    with torch.no_grad():
        expected = native_features("qwen2_vl", native.model.visual, pixels, grids)
    encoder = encoder_from_qwen_vl(tmp_path)
    assert encoder.config.hidden_act == "quick_gelu"
    torch.testing.assert_close(features(encoder, pixels, grids), expected, **CLOSE)


def test_rotary_buffers_of_old_exports_are_left(tmp_path: Path) -> None:
    save(native_model("qwen2_vl"), tmp_path, False)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["visual.rotary_pos_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert isinstance(encoder_from_qwen_vl(tmp_path), WindowFreeViTModel)


@pytest.mark.parametrize("full", [[0, 1, 2, 3], []], ids=["everywhere", "nowhere"])
def test_windows_follow_from_the_full_layers(tmp_path: Path, full: list[int]) -> None:
    save(native_model("qwen2_5_vl"), tmp_path)
    change_config(tmp_path, fullatt_block_indexes=full)
    pattern = encoder_from_qwen_vl(tmp_path).config.attention_pattern
    assert pattern == ("full" if full else {"window_size": 16, "full_attention_layers": []})


@every_kind
@pytest.mark.parametrize("size", [(16, 24), (40, 56), (7, 90), (3, 5), (300, 200)], ids=str)
def test_pixels_of_the_native_processor_and_of_ours(tmp_path: Path, kind: str, size: tuple[int, int]) -> None:
    """The order of patches is the same: merge block after merge block, in and out."""
    statistics = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.5, 0.4, 0.3]}
    native = native_model(kind)
    processor = Qwen2VLImageProcessorPil(**PROCESSOR, **statistics)
    processor.save_pretrained(save(native, tmp_path))
    images = [picture(*size), picture(16, 16)]
    theirs = processor(images, return_tensors="pt")
    ours = image_processor_from_qwen_vl(tmp_path)(images, return_tensors="pt")
    assert torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])
    assert (ours["pixel_values"].dtype, ours["pixel_values"].shape[1]) == (torch.uint8, 48)
    encoder = encoder_from_qwen_vl(tmp_path)
    assert (encoder.config.image_mean, encoder.config.image_std) == (*statistics.values(),)
    with torch.no_grad():
        expected = native_features(
            kind, native.model.visual, theirs["pixel_values"].double(), theirs["image_grid_thw"]
        )
    for inputs in (ours, theirs):
        torch.testing.assert_close(features(encoder, **inputs_of(inputs)), expected, atol=1e-4, rtol=1e-4)


def inputs_of(batch: Any) -> dict[str, Tensor]:
    return {"pixels": batch["pixel_values"], "grids": batch["image_grid_thw"]}


@pytest.mark.parametrize(
    "areas",
    [
        {"min_pixels": 3136, "max_pixels": 12845056},
        {"size": {"shortest_edge": 3136, "longest_edge": 12845056}},
        {"min_pixels": 3136, "max_pixels": 12845056, "size": {"min_pixels": 1, "max_pixels": 2}},
        {"min_pixels": 3136, "max_pixels": 12845056, "size": {"shortest_edge": 1, "longest_edge": 2}},
    ],
    ids=["of their own", "edges", "pixels", "both"],
)
def test_published_fields_of_image_processors(tmp_path: Path, areas: dict[str, Any]) -> None:
    published = {
        **areas,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(published), encoding="utf-8")
    ours, theirs = image_processor_from_qwen_vl(tmp_path), Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    image = np.asarray(picture(120, 77))
    expected = theirs(image, return_tensors="np")
    found = ours(image, return_tensors="np", do_rescale=True, do_normalize=True)
    assert (found["image_grid_thw"] == expected["image_grid_thw"]).all()
    rows = expected["pixel_values"].reshape(-1, 3, 2, 196)[:, :, 0].reshape(-1, 588)
    np.testing.assert_allclose(found["pixel_values"], rows, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"patch_size": None, "min_pixels": None},
            "must have min_pixels, patch_size for its image processor",
        ),
        ({"do_normalize": False}, "`folder` must have an image processor with do_normalize = True, got False"),
        ({"rescale_factor": 1.0}, "`folder` must have an image processor with rescale_factor = 1/255, got 1.0"),
        ({"size": 5}, "`folder` must have an image processor whose size is an object, got 5"),
    ],
    ids=str,
)
def test_image_processors_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    fields = {"min_pixels": 64, "max_pixels": 640, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "merge_size": 2}
    fields = {**fields, "patch_size": 4, **changes}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        image_processor_from_qwen_vl(tmp_path)


def test_a_folder_without_an_image_processor(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`folder` must have one of preprocessor_config.json, processor_config.json"):
        image_processor_from_qwen_vl(tmp_path)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("qwen2_vl", {"model_type": "qwen3_vl"}, "a vision_config of the model_type 'qwen2_vl', got 'qwen3_vl'"),
        ("qwen2_vl", {"embed_dim": "wide"}, "whose vision_config do not fit"),
        ("qwen2_vl", {"hidden_act": "swoosh"}, "whose hidden_act is a known one in vision_config, got 'swoosh'"),
        ("qwen2_vl", {"patch_size": [4, 4]}, "whose patch_size is an integer in vision_config"),
        ("qwen2_vl", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "do not fit: .*factor"),
        (
            "qwen2_vl",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "rope_parameters are axial",
        ),
        ("qwen2_5_vl", {"window_size": 9}, "must be a positive multiple of 8 pixels"),
        ("qwen3_vl", {"num_position_embeddings": 26}, "num_position_embeddings is a square in vision_config, got 26"),
        ("qwen3_vl", {"deepstack_visual_indexes": [7]}, "`feature_layers` must name layers from -4 to 3"),
        ("qwen2_vl", {"depth": 3}, "Unexpected: visual.blocks.3.attn"),
        ("qwen2_vl", {"embed_dim": 16}, r"Wrong shape: visual.blocks.0.attn.proj.bias \(32,\) instead of \(16,\)"),
    ],
    ids=str,
)
def test_folders_that_do_not_fit(tmp_path: Path, kind: str, changes: dict[str, Any], message: str) -> None:
    save(native_model(kind), tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        encoder_from_qwen_vl(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "`folder` must be a local folder with a config.json"),
        ({"model_type": "llama"}, "`folder` must have one of the model_types qwen2_vl, qwen2_5_vl, .*, got 'llama'"),
        ({"model_type": ["qwen2_vl"]}, "`folder` must have one of the model_types"),
        ({"model_type": "qwen2_vl", "architectures": ["Qwen3VLModel"]}, "must have the architectures Qwen2VL"),
        ({"model_type": "qwen2_vl", "quantization_config": {}}, "weights that are not quantized"),
        ({"model_type": "qwen2_vl"}, "a config.json with a 'vision_config'"),
    ],
    ids=["none", "other", "list", "architectures", "quantized", "no vision_config"],
)
def test_folders_of_other_models(tmp_path: Path, config: dict[str, Any] | None, message: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        encoder_from_qwen_vl(tmp_path)


def test_a_dtype_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`dtype` must be a floating-point torch.dtype or None, got torch.int8"):
        encoder_from_qwen_vl(tmp_path, dtype=torch.int8)
