"""Errors of reading and writing openPangu-VL folders."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.checkpoints.files import assert_same_bytes, write_json
from tests.checkpoints.openpangu_vl.files import TINY, all_tensors, changed, write_folder
from vlparts import NaViTConfig, VisionLanguageConfig, WindowFreeViTConfig, WindowFreeViTModel
from vlparts.checkpoints.openpangu_vl import encoder_from_openpangu_vl, model_from_openpangu_vl, to_openpangu_vl
from vlparts.parts.modeling_vlm import VisionLanguageForConditionalGeneration

READERS = [encoder_from_openpangu_vl, model_from_openpangu_vl]
both = pytest.mark.parametrize("read", READERS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A valid checkpoint."""
    return write_folder(tmp_path / "in", all_tensors())


@both
def test_folders_without_a_configuration(read: Callable[..., nn.Module], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`folder` must be a local folder with a config.json, got 'openpangu/VL'"):
        read("openpangu/VL")
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="`folder` has a config.json that is no JSON"):
        read(tmp_path)
    write_json(tmp_path / "config.json", [1])
    with pytest.raises(ValueError, match="config.json with one JSON object, got list"):
        read(tmp_path)


@both
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "qwen2_5_vl"}, "`folder` must have the model_type 'openpangu_vl', got 'qwen2_5_vl'"),
        ({"model_type": None}, "model_type 'openpangu_vl', got None"),
        (
            {"architectures": ["Qwen2_5_VLForConditionalGeneration"]},
            "architectures OpenPanguVLForConditionalGeneration or OpenPanguVL, got .*Qwen2_5_VLFor",
        ),
        (
            {"quantization_config": {"quant_method": "awq"}},
            "not quantized, got .*quantization_config",
        ),
        ({"vision_config": None}, "config.json with a 'vision_config'"),
    ],
)
def test_other_models(read: Callable[..., nn.Module], folder: Path, fields: dict[str, Any], message: str) -> None:
    write_json(folder / "config.json", {**TINY, **fields})
    with pytest.raises(ValueError, match=message):
        read(folder)


@both
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": None}, "config.json with depth in vision_config"),
        (
            {"window_size": None, "fullatt_block_indexes": None},
            "with window_size, fullatt_block_indexes in vision_config",
        ),
        ({"in_chans": None}, "with in_channels in vision_config"),
        ({"fullatt_block_indexes": 3}, "a list of integers as fullatt_block_indexes, got 3"),
        ({"depth": "5"}, "whose depth is an integer in vision_config, got '5'"),
        ({"fullatt_block_indexes": [5]}, "vision_config do not fit: .*from 0 to 4, got .5"),
        ({"num_heads": 3}, "vision_config do not fit: .*`num_attention_heads`"),
        ({"hidden_size": "wide"}, "vision_config do not fit: .*hidden_size"),
        ({"window_size": 20}, "vision_config do not fit: .*window_size.* multiple of 8 pixels"),
        ({"mm_unit_vision_select_layer": [-3, -1]}, r"negative, unique and in descending order, got \[-3, -1\]"),
        ({"mm_unit_vision_select_layer": [4, 2]}, r"negative, unique and in descending order, got \[4, 2\]"),
        ({"mm_unit_vision_select_layer": [-1, -1]}, r"unique .* got \[-1, -1\]"),
        ({"mm_unit_vision_select_layer": -1}, "unique .* got -1"),
        ({"mm_unit_vision_select_layer": [-1, -6]}, "vision_config do not fit: .*`feature_layers`"),
    ],
)
def test_fields_of_the_encoder(
    read: Callable[..., nn.Module], folder: Path, fields: dict[str, Any], message: str
) -> None:
    write_json(folder / "config.json", changed(vision=fields))
    with pytest.raises(ValueError, match=message):
        read(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed(hidden_size=None, bias=None), "config.json with hidden_size, bias in text_config, got none"),
        (changed(rope_theta=None), "with rope_theta in text_config"),
        (changed(rope_scaling=None), "with rope_scaling in text_config"),
        (changed(rope_scaling={"mrope_section": [2, 3, 4]}), "text_config do not fit: .*mrope_section"),
        (changed(num_key_value_heads=2), "text_config do not fit: .*num_key_value_heads"),
        (changed(text_config=[1]), "whose text_config is an object, got .1."),
        (changed(num_attention_heads=5), "num_attention_heads divides hidden_size in text_config, got 5 and 48"),
        (changed(num_attention_heads=0), "divides hidden_size in text_config, got 0 and 48"),
        (changed(use_sliding_window=True), "without `use_sliding_window`, got true"),
        (changed(image_token_id=None, vision_end_token_id=None), "with image_token_id, vision_end_token_id, got none"),
        (changed(video_token_id=600), "fields do not fit: .*`video_token_id` must lie in the vocabulary"),
        (changed(vision={"out_hidden_size": None}), "with out_hidden_size in vision_config"),
        (changed(vision={"out_hidden_size": 0}), "`hidden_size` must be at least 1"),
    ],
)
def test_fields_of_the_whole_model(folder: Path, config: dict[str, Any], message: str) -> None:
    write_json(folder / "config.json", config)
    with pytest.raises(ValueError, match=message):
        model_from_openpangu_vl(folder)


@both
def test_only_safetensors_are_read(read: Callable[..., nn.Module], tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", TINY)
    with pytest.raises(ValueError, match="must have safetensors .*with none"):
        read(tmp_path)
    torch.save(all_tensors(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="must have safetensors .*with pytorch_model.bin. Pickled weights are not"):
        read(tmp_path)


@both
def test_files_that_the_index_names(read: Callable[..., nn.Module], folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    (folder / "model-00003-of-00004.safetensors").write_bytes(b"abc")
    with pytest.raises(ValueError, match="model-00003-of-00004.safetensors that is no safetensors file"):
        read(folder)
    (folder / "model-00003-of-00004.safetensors").unlink()
    with pytest.raises(ValueError, match=r"its .*index.json names, but lacks model-00003-of-00004.safetensors\."):
        read(folder)
    write_json(index, {"weight_map": {"lm_head.weight": "../in/model-00001-of-00004.safetensors"}})
    with pytest.raises(ValueError, match=r"lacks \.\./in/model-00001"):
        read(folder)
    for malformed in ({}, {"weight_map": ["a"]}, {"weight_map": {"a": 1}}):
        write_json(index, malformed)
        with pytest.raises(ValueError, match="index.json with file names by tensor under 'weight_map'"):
            read(folder)


def test_tensors_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    tensors = all_tensors()
    del tensors["visual.blocks.0.norm1.weight"], tensors["visual.merger.1.mlp.2.bias"]
    tensors["visual.blocks.9.norm1.weight"] = tensors["visual.pos_embed"] = torch.ones(2)
    tensors["visual.patch_embed.proj.weight"] = tensors["visual.patch_embed.proj.weight"][:, :, :1].contiguous()
    tensors["model.norm.weight"] = torch.ones(3)
    tensors["visual.final_layernorm.weight"] = torch.ones(32, dtype=torch.int8)
    folder = write_folder(tmp_path / "in", tensors)
    with pytest.raises(ValueError, match="`folder` must have the tensors that its config.json describes") as caught:
        model_from_openpangu_vl(folder)
    said = (
        "Missing: visual.blocks.0.norm1.weight, visual.merger.1.mlp.2.bias. "
        "Unexpected: visual.blocks.9.norm1.weight, visual.pos_embed. "
        "Wrong shape: model.norm.weight (3,) instead of (48,), visual.patch_embed.proj.weight (32, 3, 1, 4, 4) "
        "instead of (32, 3, 2, 4, 4). "
        "Not floating-point: visual.final_layernorm.weight I8."
    )
    assert str(caught.value).endswith(said)
    encoder_alone = said.replace(", visual.merger.1.mlp.2.bias", "").replace(
        "model.norm.weight (3,) instead of (48,), ", ""
    )
    with pytest.raises(ValueError, match="describes and no others") as caught:
        encoder_from_openpangu_vl(folder)
    assert str(caught.value).endswith(encoder_alone)


@both
def test_configuration_of_another_depth(read: Callable[..., nn.Module], folder: Path) -> None:
    write_json(folder / "config.json", changed(vision={"depth": 6}))
    with pytest.raises(ValueError, match=r"Missing: visual\.blocks\.5\.attn\.proj\.bias, .* Unexpected: none"):
        read(folder)
    write_json(folder / "config.json", changed(vision={"depth": 4, "fullatt_block_indexes": [1, 3]}))
    with pytest.raises(ValueError, match=r"Missing: none\. Unexpected: visual\.blocks\.4\.attn\.proj\.bias"):
        read(folder)


@both
def test_tensors_of_the_index_that_no_file_holds(read: Callable[..., nn.Module], folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text(encoding="utf-8"))
    listed["weight_map"]["visual.extra"] = "model-00001-of-00004.safetensors"
    write_json(index, listed)
    with pytest.raises(ValueError, match=r"Missing: visual\.extra\. Unexpected: none"):
        read(folder)


@both
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "model.language_model.rotary_emb.inv_freq",
        "visual.rotary_pos_emb.inv_freq",
        "model.visual.rotary_pos_emb.inv_freq",
    ],
)
def test_rotary_buffers_of_old_exports_are_not_read(
    read: Callable[..., nn.Module], folder: Path, tmp_path: Path, name: str
) -> None:
    expected = read(folder).state_dict()
    model = read(write_folder(tmp_path / "old", all_tensors() | {name: torch.full((4,), torch.nan)}))
    assert_same_bytes(model.state_dict(), expected)
    assert all(bool(buffer.isfinite().all()) for buffer in model.buffers())


@both
@pytest.mark.parametrize("name", ["visual.rotary_pos_emb.weight", "visual.blocks.0.attn.rotary_emb.inv_freq"])
def test_other_tensors_than_rotary_buffers_are_unexpected(
    read: Callable[..., nn.Module], tmp_path: Path, name: str
) -> None:
    with pytest.raises(ValueError, match=rf"Unexpected: {name}\. Wrong shape: none"):
        read(write_folder(tmp_path / "in", all_tensors() | {name: torch.ones(4)}))


@both
def test_split_beside_fused(read: Callable[..., nn.Module], tmp_path: Path) -> None:
    tensors = all_tensors() | {"visual.blocks.0.attn.k.weight": torch.ones(32, 32)}
    with pytest.raises(ValueError, match=r"Missing: none\. Unexpected: visual\.blocks\.0\.attn\.k\.weight\."):
        read(write_folder(tmp_path / "in", tensors))
    del tensors["visual.blocks.0.attn.qkv.weight"]
    with pytest.raises(ValueError, match=r"Missing: visual\.blocks\.0\.attn\.q\.weight, visual\.blocks\.0\.attn\.v\."):
        read(write_folder(tmp_path / "in", tensors))


@both
def test_queries_keys_and_values_of_several_dtypes_need_dtype(read: Callable[..., nn.Module], tmp_path: Path) -> None:
    tensors = all_tensors(split=True)
    tensors["visual.blocks.1.attn.k.bias"] = tensors["visual.blocks.1.attn.k.bias"].float()
    folder = write_folder(tmp_path / "in", tensors)
    with pytest.raises(ValueError, match=r"`dtype` must be given .*layers\.1\.self_attn\.qkv\.bias of BF16, F32\."):
        read(folder)
    assert read(folder, dtype=torch.float32).dtype == torch.float32


@both
def test_tensors_that_are_stored_twice(read: Callable[..., nn.Module], tmp_path: Path) -> None:
    tensors = all_tensors() | {"model.visual.final_layernorm.weight": torch.ones(32)}
    with pytest.raises(ValueError, match=r"each tensor once, got .*visual\.final_layernorm\.weight"):
        read(write_folder(tmp_path / "prefixes", tensors))
    folder = write_folder(tmp_path / "files", all_tensors())
    save_file(all_tensors(), folder / "model-00002-of-00004.safetensors")
    with pytest.raises(ValueError, match=r"twice, in model-00001-of-00004.safetensors and model-00002"):
        read(folder)


@both
@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8])
def test_invalid_dtypes(read: Callable[..., nn.Module], folder: Path, dtype: Any) -> None:
    with pytest.raises(ValueError, match=f"`dtype` must be a floating-point torch.dtype or None, got '?{dtype}'?"):
        read(folder, dtype=dtype)


def test_head_beside_tied_embeddings(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", all_tensors(), changed(tie_word_embeddings=True))
    with pytest.raises(ValueError, match=r"Unexpected: lm_head\.weight\."):
        model_from_openpangu_vl(folder)


def test_folders_with_files_are_not_written_to(folder: Path, tmp_path: Path) -> None:
    model = model_from_openpangu_vl(folder)
    with pytest.raises(ValueError, match="`folder` must be new or empty, got"):
        to_openpangu_vl(model, folder)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="`folder` must be new or empty, got"):
        to_openpangu_vl(model, tmp_path / "file")


def test_other_models_are_not_written(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match="`model` must be a VisionLanguage.*, got Linear"):
        to_openpangu_vl(nn.Linear(2, 2), tmp_path / "out")  # type: ignore[arg-type]
    config = model_from_openpangu_vl(folder).config
    navit = NaViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    other = VisionLanguageConfig(vision_config=navit, text_config=config.text_config)
    with pytest.raises(
        ValueError, match="composed of a WindowFreeViTModel and a PanguEmbeddedModel, got .* NaViTConfig"
    ):
        to_openpangu_vl(VisionLanguageForConditionalGeneration(other), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"qkv_bias": False}, "`model` must have `qkv_bias` = True for openPangu-VL, got False"),
        ({"mlp_bias": False}, "`mlp_bias` = True"),
        ({"rotary_theta": 100.0}, "`rotary_theta` = 10000.0 for openPangu-VL, got 100.0"),
        ({"gated_mlp": True}, "`gated_mlp` = False"),
        ({"hidden_act": "silu"}, "`gated_mlp` = True"),
        ({"feature_layers": [-3, -1]}, r"`model` must have merger layers .* got \[-3, -1\]"),
    ],
)
def test_encoders_without_a_published_form(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    encoder = WindowFreeViTModel(WindowFreeViTConfig.from_preset("hybrid_tiny", **fields))
    with pytest.raises(ValueError, match=message):
        to_openpangu_vl(encoder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("", "projector_type", "mlp2_gelu", "`projector_type` = 'multi_tap_merger' for openPangu-VL, got 'mlp2_gelu'"),
        ("", "projector_options", None, "`projector_options` with a hidden_size"),
        ("", "projector_options", {"hidden_size": 24, "eps": 1e-5}, "rms_norm_eps 1e-06 as eps"),
        ("", "vision_feature_layer", -2, "`vision_feature_layer` = -1 for openPangu-VL, got -2"),
        ("", "video_token_id", None, "must have video_token_id in its configuration"),
        ("", "vision_start_token_id", None, "must have vision_start_token_id in its configuration"),
        ("text_config", "mlp_bias", True, "`mlp_bias` = False for openPangu-VL, got True"),
    ],
)
def test_models_without_a_published_form(
    folder: Path, tmp_path: Path, part: str, name: str, value: Any, message: str
) -> None:
    model = model_from_openpangu_vl(folder)
    setattr(getattr(model.config, part) if part else model.config, name, value)
    with pytest.raises(ValueError, match=message):
        to_openpangu_vl(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
