"""openPangu-VL folders to models and back: bit-exact tensors and the published computation."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.checkpoints.files import assert_same_bytes, draw, read_folder, write_json
from tests.checkpoints.openpangu_vl.files import (
    GENERATION,
    PREPROCESSOR,
    PUBLISHED,
    TINY,
    all_tensors,
    changed,
    encoder_shapes,
    merger_shapes,
    nested,
    text_shapes,
    write_folder,
)
from tests.checkpoints.openpangu_vl.oracle import VisualStack
from tests.tiny import assert_initialised, packed_images
from vlparts import (
    PanguEmbeddedConfig,
    VisionLanguageForConditionalGeneration,
    WindowFreeViTConfig,
    WindowFreeViTModel,
)
from vlparts.checkpoints.openpangu_vl import encoder_from_openpangu_vl, model_from_openpangu_vl, to_openpangu_vl
from vlparts.checkpoints.openpangu_vl.config import get_composed_config
from vlparts.checkpoints.openpangu_vl.names import get_slices

PATCH_WIDTH = 48


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of four files."""
    return write_folder(tmp_path_factory.mktemp("published") / "in", all_tensors())


@pytest.mark.parametrize("split_in", [False, True], ids=["fused", "split"])
@pytest.mark.parametrize("split_out", [False, True], ids=["to fused", "to split"])
@pytest.mark.parametrize("prefix", [dict, nested], ids=["flat", "nested"])
def test_reading_and_writing_keeps_every_bit(tmp_path: Path, split_in: bool, split_out: bool, prefix: Any) -> None:
    tensors = all_tensors(split=split_in)
    model = model_from_openpangu_vl(write_folder(tmp_path / "in", prefix(tensors)))
    to_openpangu_vl(model, tmp_path / "out", max_shard_size="60KB", split_qkv=split_out)
    written = read_folder(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) >= 3
    if split_in == split_out:
        assert_same_bytes(written, tensors)
    else:
        assert_same_bytes(*(all_fused(one) for one in (written, tensors)))


def all_fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with queries, keys and values concatenated."""
    fused = dict(tensors)
    for name in tensors:
        if ".attn.q." in name:
            parts = [fused.pop(name.replace(".q.", f".{part}.")) for part in "qkv"]
            fused[name.replace(".q.", ".qkv.")] = torch.cat(parts)
    return fused


def test_dtype_of_each_tensor_is_kept(tmp_path: Path) -> None:
    tensors = all_tensors()
    tensors["visual.blocks.1.norm1.weight"] = tensors["visual.blocks.1.norm1.weight"].float()
    tensors["model.norm.weight"] = tensors["model.norm.weight"].half()
    to_openpangu_vl(model_from_openpangu_vl(write_folder(tmp_path / "in", tensors)), tmp_path / "out")
    assert_same_bytes(read_folder(tmp_path / "out"), tensors)
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_configuration_is_written_as_it_was_published(tmp_path: Path, checkpoint: Path) -> None:
    to_openpangu_vl(model_from_openpangu_vl(checkpoint), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert written["vision_config"].pop("mm_unit_vision_select_layer") == [-1, -3]
    assert written == {name: value for name, value in TINY.items() if name not in ("auto_map", "transformers_version")}


def test_padding_is_kept(tmp_path: Path) -> None:
    """Also None, which is not the default for a config.json without the field."""
    for pad_token_id in (None, 3):
        config = {**TINY, "pad_token_id": pad_token_id}
        folder = write_folder(tmp_path / f"in {pad_token_id}", all_tensors(), config)
        to_openpangu_vl(model_from_openpangu_vl(folder), tmp_path / f"out {pad_token_id}")
        again = model_from_openpangu_vl(tmp_path / f"out {pad_token_id}")
        assert again.config.text_config.pad_token_id == pad_token_id
        assert again.get_input_embeddings().padding_idx == pad_token_id


@pytest.mark.parametrize(("head_dim", "section"), [(8, [1, 1, 2]), (24, [2, 5, 5])])
def test_heads_of_another_width_are_read_and_written(tmp_path: Path, head_dim: int, section: list[int]) -> None:
    config = {**TINY, "head_dim": head_dim, "rope_scaling": {**TINY["rope_scaling"], "mrope_section": section}}
    tensors = all_tensors(config)
    model = model_from_openpangu_vl(write_folder(tmp_path / "in", tensors, config))
    assert model.model.language_model.layers[0].self_attn.q_proj.weight.shape == (3 * head_dim, 48)
    to_openpangu_vl(model, tmp_path / "out")
    assert_same_bytes(read_folder(tmp_path / "out"), tensors)
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["head_dim"] == head_dim
    again = model_from_openpangu_vl(tmp_path / "out")
    assert again.config.to_dict() == model.config.to_dict()


def test_text_fields_under_text_config(tmp_path: Path) -> None:
    own = ("vision_config", "model_type", "architectures", "image_token_id", "video_token_id")
    text = {name: value for name, value in TINY.items() if name not in own and "vision" not in name}
    config = {name: value for name, value in TINY.items() if name not in text}
    rope = {**text.pop("rope_scaling"), "rope_theta": text.pop("rope_theta")}
    tensors = all_tensors()
    flat = model_from_openpangu_vl(write_folder(tmp_path / "flat", tensors))
    config["text_config"] = {**text, "rope_parameters": rope}
    under = model_from_openpangu_vl(write_folder(tmp_path / "under", tensors, config))
    assert under.config.to_dict() == flat.config.to_dict()


def test_composed_model_has_weights_token_ids_and_generation_options(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", all_tensors())
    write_json(folder / "generation_config.json", GENERATION)
    write_json(folder / "preprocessor_config.json", {**PREPROCESSOR, "image_mean": [0.1, 0.2, 0.3]})
    model = model_from_openpangu_vl(folder)
    assert type(model) is VisionLanguageForConditionalGeneration
    assert not model.training
    assert model.dtype == model.config.dtype == model.config.vision_config.dtype == torch.bfloat16
    assert (model.config.image_token_id, model.config.video_token_id) == (10, 11)
    assert model.generation_config.temperature == 1e-6
    assert model.config.vision_config.image_mean == [0.1, 0.2, 0.3]
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    to_openpangu_vl(model, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text(encoding="utf-8"))
    assert {name: written[name] for name in GENERATION} == GENERATION
    assert encoder_from_openpangu_vl(tmp_path / "out").config.image_mean == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("options", [None, {}, {"suppress_tokens": [3, 11]}])
def test_placeholders_are_not_generated(tmp_path: Path, options: dict[str, Any] | None) -> None:
    """As `compose_processor` does; the ids are those of config.json."""
    folder = write_folder(tmp_path / "in", all_tensors())
    (folder / "generation_config.json").unlink(missing_ok=True)
    if options is not None:
        write_json(folder / "generation_config.json", options)
    model = model_from_openpangu_vl(folder)
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    placeholders = {getattr(model.config, name) for name in names}
    assert len(placeholders) == 4
    assert model.generation_config.suppress_tokens == sorted(
        placeholders | set((options or {}).get("suppress_tokens", ()))
    )
    bias = torch.zeros(model.config.text_config.vocab_size, dtype=model.dtype)
    bias[list(placeholders)] = 1e4
    model.lm_head.register_forward_hook(lambda module, args, logits: logits + bias)
    generated = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert not placeholders & set(generated[0, 3:].tolist())


@pytest.mark.usefixtures("poisoned_empty")
def test_buffers_are_computed(checkpoint: Path) -> None:
    """Rotary frequencies and axes equal those of a model that was not built on the meta device."""
    model = model_from_openpangu_vl(checkpoint, dtype=torch.float32)
    fresh = VisionLanguageForConditionalGeneration(model.config)
    buffers, expected = dict(model.named_buffers()), dict(fresh.named_buffers())
    assert buffers.keys() == expected.keys() != set()
    for name, buffer in buffers.items():
        assert buffer.dtype == expected[name].dtype
        assert torch.equal(buffer, expected[name]), name
    fresh.load_state_dict(model.state_dict())
    tokens = torch.tensor([[1, 5, 30, 2, 4]])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, fresh.eval()(tokens).logits)


def test_encoder_alone(tmp_path: Path, checkpoint: Path) -> None:
    encoder = encoder_from_openpangu_vl(checkpoint)
    assert type(encoder) is WindowFreeViTModel
    assert encoder.config.attention_pattern == {"window_size": 16, "full_attention_layers": [1, 4]}
    assert encoder.config.feature_layers == [-1, -3]
    to_openpangu_vl(encoder, tmp_path / "out", max_shard_size="20KB", split_qkv=True)
    shapes = encoder_shapes(TINY)
    published = {name: tensor for name, tensor in all_tensors().items() if name in shapes}
    assert_same_bytes(all_fused(read_folder(tmp_path / "out")), published)
    again = encoder_from_openpangu_vl(tmp_path / "out")
    assert again.config.to_dict() == encoder.config.to_dict()
    assert_same_bytes(again.state_dict(), encoder.state_dict())


def test_round_trip_through_save_pretrained(tmp_path: Path, checkpoint: Path) -> None:
    """save_pretrained keeps everything that openPangu-VL's files need."""
    model_from_openpangu_vl(checkpoint).save_pretrained(tmp_path / "ours")
    model = VisionLanguageForConditionalGeneration.from_pretrained(tmp_path / "ours", dtype="auto")
    to_openpangu_vl(model, tmp_path / "out")
    assert_same_bytes(read_folder(tmp_path / "out"), all_tensors())
    to_openpangu_vl(model_from_openpangu_vl(checkpoint), tmp_path / "direct")
    written, direct = (
        json.loads((tmp_path / name / "config.json").read_text(encoding="utf-8")) for name in ("out", "direct")
    )
    assert written == direct


def test_round_trip_of_an_encoder_without_windows(tmp_path: Path) -> None:
    encoder = WindowFreeViTModel(WindowFreeViTConfig.from_preset("window_free_tiny"))
    to_openpangu_vl(encoder, tmp_path / "out")
    again = encoder_from_openpangu_vl(tmp_path / "out")
    assert again.config.attention_pattern == "full"
    assert_same_bytes(again.state_dict(), encoder.state_dict())


def test_tied_head_is_not_written(tmp_path: Path) -> None:
    tensors = all_tensors()
    del tensors["lm_head.weight"]
    model = model_from_openpangu_vl(write_folder(tmp_path / "in", tensors, changed(tie_word_embeddings=True)))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    to_openpangu_vl(model, tmp_path / "out")
    assert_same_bytes(read_folder(tmp_path / "out"), tensors)


@pytest.mark.parametrize(("hidden_act", "eps"), [("gelu", 1e-6), ("silu", 0.1)])
@pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
def test_visual_stack_computes_what_is_published(tmp_path: Path, hidden_act: str, eps: float, split: bool) -> None:
    """Images of several sizes in one pack, smaller and larger than a window, and a video of two frames."""
    config = changed(vision={"hidden_act": hidden_act, "rms_norm_eps": eps})
    tensors = all_tensors(config, split)
    model = model_from_openpangu_vl(write_folder(tmp_path / "in", tensors, config), dtype=torch.float64)
    oracle = VisualStack(
        {name: tensor for name, tensor in all_fused(tensors).items() if name.startswith("visual.")},
        config["vision_config"],
    )
    pixels, grid_thw = packed_images([(6, 10), (2, 4), (8, 8)], PATCH_WIDTH, dtype=torch.float64)
    frames, video_grid_thw = packed_images([(2, 6, 4)], PATCH_WIDTH, seed=1, dtype=torch.float64)
    with torch.no_grad():
        images = model.get_image_features(pixels, grid_thw).pooler_output
        videos = model.model.get_video_features(frames, video_grid_thw).pooler_output
    expected = oracle(pixels, [(1, 6, 10), (1, 2, 4), (1, 8, 8)])
    assert 0.3 < float(expected.std()) < 5
    torch.testing.assert_close(torch.cat(tuple(images)), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(torch.cat(tuple(videos)), oracle(frames, [(2, 6, 4)]), atol=1e-6, rtol=1e-6)
    to_openpangu_vl(model.bfloat16(), tmp_path / "out", split_qkv=split)
    assert_same_bytes(read_folder(tmp_path / "out"), tensors)


def test_loaded_model_trains_and_generates(checkpoint: Path) -> None:
    model = model_from_openpangu_vl(checkpoint, dtype=torch.float32)
    start, end = model.config.vision_start_token_id, model.config.vision_end_token_id
    frame = [start, *[model.config.video_token_id] * 2, end]
    image = [start, *[model.config.image_token_id] * 6, end]
    ids = torch.tensor([[1, *image, *frame, *frame, 17, 18, 19]])
    inputs = {
        "input_ids": ids,
        "pixel_values": torch.randint(0, 256, (24, PATCH_WIDTH), dtype=torch.uint8),
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
        "pixel_values_videos": torch.randn(16, PATCH_WIDTH),
        "video_grid_thw": torch.tensor([[2, 2, 4]]),
    }
    before = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert before.shape[1] > ids.shape[1]
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(4):
        loss = model.train()(**inputs, labels=ids).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert_initialised(model)


def test_encoder_computes_the_features_of_the_composed_model(checkpoint: Path) -> None:
    encoder = encoder_from_openpangu_vl(checkpoint, dtype=torch.float64)
    model = model_from_openpangu_vl(checkpoint, dtype=torch.float64)
    pixels, grid_thw = packed_images([(6, 10), (2, 4)], PATCH_WIDTH, dtype=torch.float64)
    with torch.no_grad():
        maps = encoder(pixels, grid_thw).feature_maps
        tokens = model.model.projector(*maps)
        torch.testing.assert_close(tokens, torch.cat(tuple(model.get_image_features(pixels, grid_thw).pooler_output)))


@pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
def test_names_and_shapes_of_the_published_model(split: bool) -> None:
    """openPangu-VL-7B on the meta device: the tensors of the presets and the published ones correspond one to one."""
    config = get_composed_config(PUBLISHED)
    vision = WindowFreeViTConfig.from_preset("openpangu_vl_vit", pooling=config.vision_config.pooling)
    assert config.vision_config.to_dict() == vision.to_dict()
    text = PanguEmbeddedConfig.from_preset("openpangu_vl_7b")
    assert config.text_config.to_dict() == text.to_dict()
    with torch.device("meta"):
        model = VisionLanguageForConditionalGeneration(config)
    own, slices = model.state_dict(), get_slices(model, lambda name: split)
    encoder = encoder_shapes(PUBLISHED, split)
    published = {**encoder, **merger_shapes(PUBLISHED), **text_shapes(PUBLISHED)}
    assert {name: tuple(part.of(own).shape) for name, part in slices.items()} == published
    assert {part.name for part in slices.values()} == own.keys()

    def count(part: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in part.parameters())

    # As counted from the published sizes.
    assert count(model.model.vision_tower) == 615_624_192
    assert [count(one) for one in model.model.projector.projection.merger.mergers] == [59_780_096] * 2
    assert count(model.model.projector.projection.output) == 14_684_160
    embeddings = 153376 * 4096
    assert count(model.model.language_model.embed_tokens) == count(model.lm_head) == embeddings
    assert round(count(model.model.language_model) - embeddings, -6) == 6_774_000_000


def test_encoder_ignores_other_tensors(tmp_path: Path) -> None:
    """Mergers and text model may be of any shape, or missing."""
    tensors = draw(encoder_shapes(TINY))
    encoder = encoder_from_openpangu_vl(write_folder(tmp_path / "alone", tensors))
    tensors |= {"visual.merger.7.mlp.0.weight": torch.ones(2), "model.norm.weight": torch.ones(3)}
    assert_same_bytes(
        encoder_from_openpangu_vl(write_folder(tmp_path / "others", tensors)).state_dict(), encoder.state_dict()
    )


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_weights_in_the_dtype_of_the_files_are_mapped(tmp_path: Path, dtype: torch.dtype | None) -> None:
    """So that memory holds them once: a change of the file shows in the model. Others are copies."""
    folder = tmp_path / "in"
    folder.mkdir()
    write_json(folder / "config.json", TINY)
    save_file(all_tensors(), folder / "model.safetensors")
    model = model_from_openpangu_vl(folder, dtype=dtype)
    assert bool(model.lm_head.weight.any())
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(bytes((folder / "model.safetensors").stat().st_size))
    assert bool(model.lm_head.weight.any()) == (dtype is not None)
