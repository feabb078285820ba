"""POINTS1.5 folders to models and back: every bit in both layouts, the published outputs, refused input."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger, Qwen2VisionTransformerPretrainedModel

from tests.checkpoints.files import assert_same_bytes, draw, read_folder, write_folder, write_json
from tests.checkpoints.points15.files import CUSTOM_LLAMA, QWEN2, TEXTS, VISION, config, points_folder, shapes
from tests.checkpoints.points15.oracle import get_logits
from vlparts import VisionLanguageForConditionalGeneration
from vlparts.checkpoints.points15 import model_from_points15, points15_config, points15_presets, to_points15
from vlparts.checkpoints.points15.names import Fused, get_names

FORMS = [
    ("qwen2", {}),
    ("custom_llama", {}),
    ("custom_llama", {"num_kv_heads": 4}),
    ("custom_llama", {"num_kv_heads": 1, "qkv_proj_bias": False}),
]


@pytest.mark.parametrize(("layout", "changes"), FORMS)
@pytest.mark.usefixtures("poisoned_empty")
def test_reading_and_writing_keeps_every_bit(tmp_path: Path, layout: str, changes: dict[str, Any]) -> None:
    folder = points_folder(tmp_path / "in", layout, **changes)
    model = model_from_points15(folder)
    assert model.dtype == torch.bfloat16
    assert not model.training
    biased = changes.get("qkv_proj_bias", True)
    assert type(model.config.text_config) is (Qwen2Config if biased else LlamaConfig)
    to_points15(model, tmp_path / "out", layout, merger_from=folder, max_shard_size="20KB")
    assert_same_bytes(read_folder(tmp_path / "out"), draw(shapes({**TEXTS[layout], **changes})))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = config(layout, **changes)
    del expected["auto_map"]
    assert written["llm_config"].pop("rope_scaling", None) is None
    expected["llm_config"].pop("rope_scaling", None)
    assert written == expected

    (tmp_path / "out" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    again = model_from_points15(tmp_path / "out")
    assert again.config.to_dict() == model.config.to_dict()
    assert again.generation_config.to_dict() == model.generation_config.to_dict()


def test_one_layout_to_the_other_and_back(tmp_path: Path) -> None:
    folder = points_folder(tmp_path / "in", "custom_llama")
    model = model_from_points15(folder)
    to_points15(model, tmp_path / "qwen2", "qwen2")
    assert read_folder(tmp_path / "qwen2").keys() == shapes(QWEN2, merger=False).keys()
    (tmp_path / "qwen2" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    other = model_from_points15(tmp_path / "qwen2")
    assert_same_bytes(other.state_dict(), model.state_dict())
    to_points15(other, tmp_path / "back", "custom_llama", merger_from=folder)
    assert_same_bytes(read_folder(tmp_path / "back"), read_folder(folder))


@pytest.mark.parametrize("changes", [changes for layout, changes in FORMS if layout == "custom_llama"])
def test_the_text_model_computes_what_the_published_one_does(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = points_folder(tmp_path / "in", "custom_llama", **changes)
    model = model_from_points15(folder, dtype=torch.float64)
    ids = [5, 3, 60, 17, 8, 9, 300]
    with torch.no_grad():
        found = model(input_ids=torch.tensor([ids])).logits[0]
    # The rotary angles of transformers are in float32.
    torch.testing.assert_close(
        found, get_logits(read_folder(folder), {**CUSTOM_LLAMA, **changes}, ids), rtol=1e-5, atol=1e-5
    )


def test_the_image_features_are_those_of_the_native_classes(tmp_path: Path) -> None:
    """The encoder without its merger, then transformers' `PatchMerger` with a layer normalization."""
    folder = points_folder(tmp_path / "in", "qwen2")
    model = model_from_points15(folder, dtype=torch.float64)
    stored = {name: tensor.double() for name, tensor in read_folder(folder).items()}
    encoder = Qwen2VisionTransformerPretrainedModel(Qwen2VLVisionConfig(**VISION)).double().eval()
    encoder.load_state_dict(_without("vision_encoder.", stored))
    projector = PatchMerger(dim=32, context_dim=32).double()
    projector.load_state_dict(_without("vision_projector.", stored))
    pixels, grid = torch.randn(24 + 16, 3 * 2 * 14 * 14, dtype=torch.float64), torch.tensor([[1, 4, 6], [1, 8, 2]])
    with torch.no_grad():
        expected = projector(encoder(pixels, grid).last_hidden_state)
        found = model.get_image_features(pixels, image_grid_thw=grid).pooler_output
    torch.testing.assert_close(torch.cat(tuple(found)), expected, rtol=1e-5, atol=1e-5)


def _without(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def test_rows_of_fused_tensors() -> None:
    """For each head its rows of every part: names of rows by head, part and row."""
    fused = Fused(("k", "v"), 3)
    keys, values = torch.arange(6.0).reshape(6, 1), 10 + torch.arange(6.0).reshape(6, 1)
    joined = fused.join({"k": keys, "v": values})
    assert joined[:, 0].tolist() == [0, 1, 10, 11, 2, 3, 12, 13, 4, 5, 14, 15]
    assert torch.equal(fused.split(joined, 0), keys)
    assert torch.equal(fused.split(joined, 1), values)
    with pytest.raises(ValueError, match="k and v in one dtype"):
        fused.join({"k": keys, "v": values.half()})


def test_the_unused_merger_is_named_and_can_be_copied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = points_folder(tmp_path / "in", "qwen2")
    with caplog.at_level(logging.WARNING):
        model = model_from_points15(folder)
    assert "Not read, since the model does not use them: vision_encoder.merger.ln_q.bias" in caplog.text
    assert not any("merger.ln_q" in name for name in model.state_dict())
    to_points15(model, tmp_path / "out", "qwen2")
    assert read_folder(tmp_path / "out").keys() == shapes(QWEN2, merger=False).keys()
    with pytest.raises(ValueError, match=r"`merger_from` must have the merger .* Missing: vision_encoder\.merger"):
        to_points15(model, tmp_path / "other", "qwen2", merger_from=tmp_path / "out")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("stored_head", [False, True])
def test_a_tied_head(tmp_path: Path, caplog: pytest.LogCaptureFixture, stored_head: bool) -> None:
    fields = config("qwen2", tie_word_embeddings=True)
    tensors = draw(shapes(fields["llm_config"]))
    if stored_head:
        tensors["llm.lm_head.weight"] = tensors["llm.model.embed_tokens.weight"].clone()
    folder = points_folder(tmp_path / "in", "qwen2", tie_word_embeddings=True)
    write_folder(folder, tensors, fields)
    with caplog.at_level(logging.WARNING):
        model = model_from_points15(folder)
    assert ("to which it is tied: llm.lm_head.weight" in caplog.text) == stored_head
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    to_points15(model, tmp_path / "out", "qwen2", merger_from=folder, write_tied_head=stored_head)
    assert_same_bytes(read_folder(tmp_path / "out"), tensors)
    if stored_head:
        tensors["llm.lm_head.weight"][3, 1] += 1
        write_folder(folder, tensors, fields)
        with pytest.raises(ValueError, match=r"llm\.lm_head\.weight that equals llm\.model\.embed_tokens\.weight"):
            model_from_points15(folder)


def test_rotary_buffers_are_ignored_and_other_tensors_are_not(tmp_path: Path) -> None:
    tensors = draw(shapes(CUSTOM_LLAMA))
    for layer in range(2):
        tensors[f"llm.lm.layers.{layer}.attention.rotary_emb.inv_freq"] = torch.ones(4)
    folder = points_folder(tmp_path / "in", "custom_llama")
    write_folder(folder, tensors, config("custom_llama"))
    model_from_points15(folder)
    tensors["llm.lm.layers.0.attention.key_value_dense.weight"] = torch.ones(30, 32)
    tensors["llm.other"] = tensors.pop("llm.embed_out.weight")
    write_folder(folder, tensors, config("custom_llama"))
    message = r"Missing: llm\.embed_out\.weight\. Unexpected: llm\.other\. Wrong shape: .*key_value_dense.weight \(30,"
    with pytest.raises(ValueError, match=message):
        model_from_points15(folder)


def test_generation_ends_with_a_turn_and_never_gives_image_tokens(tmp_path: Path) -> None:
    folder = points_folder(tmp_path / "in", "qwen2")
    write_json(folder / "generation_config.json", {"eos_token_id": [7], "temperature": 0.7, "do_sample": True})
    options = model_from_points15(folder).generation_config
    ids = {
        token["content"]: token["id"] for token in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    }
    assert options.eos_token_id == [ids["<|im_end|>"], 7]
    assert options.temperature == 0.7
    images = ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>")
    assert options.suppress_tokens == sorted(ids[token] for token in images)


@pytest.mark.parametrize("layout", TEXTS)
def test_every_missing_field_is_named(tmp_path: Path, layout: str) -> None:
    free = {"model_type", "initializer_range", "bos_token_id", "eos_token_id", "rope_scaling", "use_sliding_window"}
    folder = points_folder(tmp_path / "in", layout)
    for name in TEXTS[layout].keys() - free:
        write_json(folder / "config.json", config(layout, **{name: None}))
        with pytest.raises(ValueError, match=f"must have a config.json with {name} in llm_config, got none"):
            model_from_points15(folder)


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        ("custom_llama", {"norm_type": "layer_norm"}, "RMS normalization, got norm_type 'layer_norm'"),
        ("custom_llama", {"rms_norm": False}, "RMS normalization, got rms_norm False"),
        ("custom_llama", {"rotary_pct": 0.25}, "rotary_pct 1 in llm_config, got 0.25"),
        ("custom_llama", {"rotary_compress": 0.5}, "rotary_compress 1 in llm_config, got 0.5"),
        ("custom_llama", {"out_proj_bias": True}, "out_proj_bias False in llm_config, got True"),
        ("custom_llama", {"mlp_fc1_bias": True}, "mlp_fc1_bias False in llm_config, got True"),
        ("custom_llama", {"mlp_fc2_bias": True}, "mlp_fc2_bias False in llm_config, got True"),
        ("custom_llama", {"hidden_act": "gelu"}, "hidden_act 'swiglu' in llm_config, got 'gelu'"),
        ("custom_llama", {"qkv_proj_bias": 2}, "qkv_proj_bias is true or false in llm_config, got 2"),
        ("custom_llama", {"num_kv_heads": 3}, "divides that of the queries in llm_config, got 3 and 4"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window False in llm_config, got True"),
        ("qwen2", {"rope_scaling": {"type": "yarn"}}, "rope_scaling None in llm_config, got"),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters are the default ones"),
        ("qwen2", {"hidden_size": "32"}, "hidden_size is an integer in llm_config, got '32'"),
        ("qwen2", {"model_type": "qwen3"}, "model_type is a known one in llm_config, got 'qwen3'"),
    ],
)
def test_bad_configurations(tmp_path: Path, layout: str, changes: dict[str, Any], message: str) -> None:
    folder = points_folder(tmp_path / "in", layout)
    write_json(folder / "config.json", config(layout, **changes))
    with pytest.raises(ValueError, match=message):
        model_from_points15(folder)


def test_rms_norm_takes_precedence(tmp_path: Path) -> None:
    folder = points_folder(tmp_path / "in", "custom_llama")
    write_json(folder / "config.json", config("custom_llama", rms_norm=True, norm_type="layer_norm"))
    assert model_from_points15(folder).config.text_config.rms_norm_eps == 1e-5


def test_models_that_cannot_be_written(tmp_path: Path) -> None:
    model = model_from_points15(points_folder(tmp_path / "in", "custom_llama", qkv_proj_bias=False))
    with pytest.raises(ValueError, match="must be a VisionLanguageForConditionalGeneration"):
        to_points15(model.model, tmp_path / "out", "qwen2")
    with pytest.raises(ValueError, match="`layout` must be one of qwen2, custom_llama, got 'llama'"):
        to_points15(model, tmp_path / "out", "llama")
    with pytest.raises(ValueError, match="`layout` must be 'custom_llama' for a text model without biases"):
        to_points15(model, tmp_path / "out", "qwen2")
    model.config.vision_config.final_norm = True
    with pytest.raises(ValueError, match="final_norm"):
        to_points15(model, tmp_path / "out", "custom_llama")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "text", "total"),
    [("points_1_5_7b", 7_615_616_512, 8_291_375_616), ("points_reader", 3_085_938_688, 3_753_831_936)],
)
def test_presets_have_the_published_sizes(name: str, text: int, total: int) -> None:
    """The text models' counts are those of Qwen2.5's model cards: 7.61 and 3.09 billion."""
    with torch.device("meta"):
        model = VisionLanguageForConditionalGeneration(points15_config(name))
    assert sum(one.numel() for one in model.parameters()) == total
    vision = sum(one.numel() for one in model.model.vision_tower.parameters())
    projector = 2 * 1280 + (5120 + 1) * (5120 + model.config.text_config.hidden_size)
    assert (vision, total - vision - projector) == (631_183_360, text)


def test_real_shapes_of_the_chat_model() -> None:
    with torch.device("meta"):
        model = VisionLanguageForConditionalGeneration(points15_config("points_1_5_7b"))
    found = {name: tuple(one.shape) for name, one in get_names(model, "custom_llama").meta(model.state_dict()).items()}
    block = "llm.lm.layers.27."
    assert found[f"{block}attention.query_dense.weight"] == (3584, 3584)
    assert found[f"{block}attention.key_value_dense.weight"] == (1024, 3584)
    assert found[f"{block}attention.key_value_dense.bias"] == (1024,)
    assert found[f"{block}mlp.dense_h_to_4h.weight"] == (37888, 3584)
    assert found["llm.embed_out.weight"] == (152064, 3584)
    assert found["vision_projector.mlp.2.weight"] == (3584, 5120)
    assert points15_presets() == ("points_1_5_7b", "points_reader")
    with pytest.raises(ValueError, match="`name` must be one of points_1_5_7b, points_reader, got 'points'"):
        points15_config("points")


@pytest.mark.parametrize(("rows", "width", "groups", "parts"), [(1024, 3584, 4, 2), (37888, 3584, 1, 2)])
@pytest.mark.slow
def test_fused_tensors_of_real_size(rows: int, width: int, groups: int, parts: int) -> None:
    fused = Fused(tuple("kv"[:parts]), groups)
    published = torch.randn(rows, width).bfloat16()
    split = {name: fused.split(published, index) for index, name in enumerate(fused.names)}
    assert {one.shape for one in split.values()} == {(rows // parts, width)}
    assert torch.equal(fused.join(split), published)
