"""Pangu Pro MoE folders to models and back: bit-exact tensors, computed outputs and refused input."""

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from tests.checkpoints.files import assert_same_bytes, draw, read_folder, write_folder, write_json
from tests.checkpoints.pangu_pro_moe.files import (
    GENERATION,
    PUBLISHED,
    TINY,
    all_shapes,
    all_tensors,
    changed,
    mlp_shapes,
)
from vlparts import MoGEConfig, MoGEForCausalLM, MoGEModel
from vlparts.checkpoints._safetensors import StoredTensors
from vlparts.checkpoints.pangu_pro_moe import model_from_pangu_pro_moe, to_pangu_pro_moe
from vlparts.checkpoints.pangu_pro_moe.conversion import get_slices


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint in several files."""
    return write_folder(tmp_path / "in", all_tensors(), TINY)


@pytest.mark.usefixtures("poisoned_empty")
def test_every_tensor_is_loaded_bit_exactly(folder: Path) -> None:
    model, published = model_from_pangu_pro_moe(folder), all_tensors()
    expected = {}
    for name, tensor in published.items():
        if ".experts." not in name:
            expected[name.replace("mlp.router_scale", "mlp.gate.router_scale")] = tensor
    for layer in (0, 2):
        prefix = f"model.layers.{layer}.mlp.experts."
        gates, ups, downs = (
            [published[f"{prefix}{expert}.{name}_proj.weight"] for expert in range(12)]
            for name in ("gate", "up", "down")
        )
        pairs = [torch.cat(pair) for pair in zip(gates, ups, strict=True)]
        expected[f"{prefix}gate_up_proj"], expected[f"{prefix}down_proj"] = torch.stack(pairs), torch.stack(downs)
    assert_same_bytes(model.state_dict(), expected)
    assert not model.training
    assert model.config.dtype == torch.bfloat16
    rotary = MoGEForCausalLM(model.config).model.rotary_emb
    for name in ("inv_freq", "original_inv_freq"):
        assert torch.equal(getattr(model.model.rotary_emb, name), getattr(rotary, name))


def test_the_block_computes_what_the_published_names_say(folder: Path) -> None:
    """One token through the last layer's block, from the published tensors."""
    tensors = {name: tensor.double() for name, tensor in all_tensors().items()}
    block = model_from_pangu_pro_moe(folder, dtype=torch.float64)
    block.set_experts_implementation("eager")
    token, prefix = torch.randn(32, dtype=torch.float64), "model.layers.2.mlp."

    def mlp(name: str) -> Tensor:
        gate, up, down = (tensors[f"{prefix}{name}.{one}_proj.weight"] for one in ("gate", "up", "down"))
        return down @ (F.silu(gate @ token) * (up @ token))

    scores = (tensors[f"{prefix}gate.weight"] @ token).softmax(-1)
    expected = mlp("shared_expert")
    for group in range(4):
        best = max(range(3 * group, 3 * group + 3), key=lambda expert: float(scores[expert]))
        expected = expected + scores[best] * tensors[f"{prefix}router_scale"][0, best] * mlp(f"experts.{best}")
    torch.testing.assert_close(block.model.layers[2].mlp(token[None, None])[0, 0], expected)


@pytest.mark.parametrize("max_shard_size", ["5GB", "4KB", 1])
@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True}, {"shared_expert_intermediate_size": 0}])
def test_round_trip(tmp_path: Path, fields: dict[str, Any], max_shard_size: int | str) -> None:
    config = changed(**fields)
    source = write_folder(tmp_path / "in", all_tensors(config), config)
    write_json(source / "generation_config.json", GENERATION)
    model = model_from_pangu_pro_moe(source)
    to_pangu_pro_moe(model, tmp_path / "out", max_shard_size=max_shard_size)
    assert_same_bytes(read_folder(tmp_path / "out"), read_folder(source))
    written = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert {name: value for name, value in config.items() if written.get(name) != value}.keys() == {"auto_map"}
    assert model.generation_config.temperature == 0.6
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text(encoding="utf-8"))
    assert generation.items() >= GENERATION.items()
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == {"5GB": 1, 1: len(all_shapes(config))}.get(max_shard_size, len(files))
    again = model_from_pangu_pro_moe(tmp_path / "out")
    assert_same_bytes(again.state_dict(), model.state_dict())
    assert again.config.to_dict() == model.config.to_dict()


def test_round_trip_of_a_model_that_was_not_published(tmp_path: Path) -> None:
    """With mixed dtypes."""
    config = MoGEConfig.from_preset("tiny", head_dim=16, mlp_only_layers=[0])
    model = MoGEForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "gate.weight" not in name:
            parameter.data = parameter.data.half()
    to_pangu_pro_moe(model, tmp_path / "out", max_shard_size="50KB")
    again = model_from_pangu_pro_moe(tmp_path / "out")
    assert_same_bytes(again.state_dict(), model.state_dict())
    assert again.config.num_expert_groups == 4
    input_ids = torch.randint(0, 512, (2, 5))
    torch.testing.assert_close(again.float()(input_ids).logits, model.float()(input_ids).logits)


def test_names_and_shapes_of_the_published_model() -> None:
    fields = {name: PUBLISHED[name] for name in ("vocab_size", "hidden_size", "num_experts", "num_hidden_layers")}
    with torch.device("meta"):
        model = MoGEForCausalLM(MoGEConfig())
    assert fields == {name: getattr(model.config, name) for name in fields}
    own, slices = model.state_dict(), get_slices(model)
    assert {name: tuple(part.of(own).shape) for name, part in slices.items()} == all_shapes(PUBLISHED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dtype(folder: Path, dtype: torch.dtype) -> None:
    expected = model_from_pangu_pro_moe(folder).to(dtype).state_dict()
    found = model_from_pangu_pro_moe(folder, dtype=dtype).state_dict()
    for name, tensor in expected.items():
        assert found[name].dtype == dtype
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_single_file(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_json(tmp_path / "in" / "config.json", TINY)
    save_file(all_tensors(), tmp_path / "in" / "model.safetensors")
    model = model_from_pangu_pro_moe(tmp_path / "in")
    assert torch.equal(model.lm_head.weight, all_tensors()["lm_head.weight"])


def test_memory_holds_the_model_and_the_tensor_that_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, seen = StoredTensors.read, []

    def watched(*arguments: Any) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in read(*arguments):
            assert sum(reference() is not None for reference in seen) <= 1
            seen.append(weakref.ref(tensor))
            yield name, tensor

    monkeypatch.setattr(StoredTensors, "read", watched)
    model = model_from_pangu_pro_moe(folder)
    assert len(seen) == len(all_shapes(TINY))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for path in folder.glob("*.safetensors"):
        path.write_bytes(bytes(path.stat().st_size))
    assert_same_bytes(model.state_dict(), before)


def test_loaded_weights_are_trainable(folder: Path) -> None:
    model = model_from_pangu_pro_moe(folder, dtype=torch.float32)
    model.model.layers[0].mlp.experts.gate_up_proj.data.nan_to_num_()
    input_ids = torch.randint(0, 60, (2, 5))
    model(input_ids, labels=input_ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_optional_fields(tmp_path: Path) -> None:
    removed = dict.fromkeys(("architectures", "max_position_embeddings", "tie_word_embeddings", "eos_token_id"))
    model = model_from_pangu_pro_moe(write_folder(tmp_path / "in", all_tensors(), changed(**removed)))
    assert model.config.max_position_embeddings == MoGEConfig.max_position_embeddings
    assert model.config.eos_token_id is None


def test_folders_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`folder` must be a local folder with a config.json, got 'pangu/MoE'"):
        model_from_pangu_pro_moe("pangu/MoE")
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="`folder` has a config.json that is no JSON"):
        model_from_pangu_pro_moe(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "qwen3_moe"}, "`folder` must have the model_type 'PanguProMoE', got 'qwen3_moe'"),
        ({"model_type": None}, "the model_type 'PanguProMoE', got None"),
        (
            {"architectures": ["PanguProMoEV2ForCausalLM"]},
            "the architectures PanguProMoEForCausalLM, got .'PanguProMoEV2ForCausalLM'.",
        ),
        ({"quantization_config": {"quant_method": "w8a8"}}, "not quantized, got .*quantization_config"),
        ({"norm_topk_prob": True}, "with norm_topk_prob False or without norm_topk_prob, got True"),
        ({"routed_scaling_factor": 2.5}, "with routed_scaling_factor 1.0 or without .*, got 2.5"),
        ({"attention_bias": False}, "with attention_bias True or without"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "with rope_scaling None or without .*, got .*yarn"),
        ({"num_experts": None, "rope_theta": None}, "a config.json with num_experts, rope_theta, got none"),
        ({"num_attention_heads": 5}, "num_attention_heads divides hidden_size, got 5 and 32"),
        ({"num_attention_heads": "4"}, "num_attention_heads divides hidden_size, got '4' and 32"),
        ({"num_experts": 10}, "fields do not fit: .*`num_expert_groups` must divide `num_experts`=10, got 4"),
        ({"vocab_size": "large"}, "fields do not fit: .*vocab_size"),
        ({"mlp_only_layers": [3]}, "fields do not fit: .*`mlp_only_layers`"),
    ],
)
def test_other_configurations(folder: Path, fields: dict[str, Any], message: str) -> None:
    write_json(folder / "config.json", changed(**fields))
    with pytest.raises(ValueError, match=message):
        model_from_pangu_pro_moe(folder)


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    """All at once."""
    tensors, prefix = all_tensors(), "model.layers.2.mlp."
    del tensors[f"{prefix}experts.11.up_proj.weight"], tensors["model.layers.0.mlp.router_scale"]
    tensors |= draw(mlp_shapes(f"{prefix}experts.12", 32, 8))
    tensors[f"{prefix}router_scale"] = torch.ones(12, dtype=torch.bfloat16)
    tensors[f"{prefix}gate.weight"] = torch.zeros(12, 32, dtype=torch.int8)
    with pytest.raises(ValueError) as caught:
        model_from_pangu_pro_moe(write_folder(tmp_path / "in", tensors, TINY))
    extra = ", ".join(f"{prefix}experts.12.{name}_proj.weight" for name in ("down", "gate", "up"))
    assert str(caught.value) == (
        "`folder` must have the tensors that its config.json describes and no others. "
        f"Missing: model.layers.0.mlp.router_scale, {prefix}experts.11.up_proj.weight. Unexpected: {extra}. "
        f"Wrong shape: {prefix}router_scale (12,) instead of (1, 12). Not floating-point: {prefix}gate.weight I8."
    )


def test_tensors_of_the_index_that_no_file_holds(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    index["weight_map"]["model.extra"] = "model-00001-of-00004.safetensors"
    write_json(folder / "model.safetensors.index.json", index)
    with pytest.raises(ValueError, match=r"Missing: model\.extra\. Unexpected: none"):
        model_from_pangu_pro_moe(folder)


def test_experts_of_several_dtypes_need_dtype(tmp_path: Path) -> None:
    tensors = all_tensors()
    tensors["model.layers.2.mlp.experts.4.down_proj.weight"] = torch.ones(32, 8)
    source = write_folder(tmp_path / "in", tensors, TINY)
    message = r"`dtype` must be given .*, got None and model\.layers\.2\.mlp\.experts\.down_proj of BF16, F32\."
    with pytest.raises(ValueError, match=message):
        model_from_pangu_pro_moe(source)
    model = model_from_pangu_pro_moe(source, dtype=torch.float32)
    assert torch.equal(model.model.layers[2].mlp.experts.down_proj[4], torch.ones(32, 8))


@pytest.mark.parametrize("name", ["layers.0.self_attn.rotary_emb.", "layers.12.self_attn.rotary_emb.", "rotary_emb."])
@pytest.mark.parametrize("buffer", ["inv_freq", "cos_cached", "sin_cached"])
def test_rotary_buffers_of_old_exports_are_not_read(tmp_path: Path, name: str, buffer: str) -> None:
    stored = {f"model.{name}{buffer}": torch.full((4,), torch.nan)}
    model = model_from_pangu_pro_moe(write_folder(tmp_path / "in", all_tensors() | stored, TINY))
    assert_same_bytes(
        model.state_dict(),
        model_from_pangu_pro_moe(write_folder(tmp_path / "other", all_tensors(), TINY)).state_dict(),
    )
    assert torch.equal(model.model.rotary_emb.inv_freq, MoGEForCausalLM(model.config).model.rotary_emb.inv_freq)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freqs",
        "model.layers.0.mlp.rotary_emb.inv_freq",
        "model.layers.0.self_attn.rotary_emb.weight",
        "rotary_emb.inv_freq",
        "visual.rotary_pos_emb.inv_freq",
    ],
)
def test_other_tensors_than_rotary_buffers_are_unexpected(tmp_path: Path, name: str) -> None:
    tensors = all_tensors() | {name: torch.ones(4)}
    with pytest.raises(ValueError, match=rf"Unexpected: {name}\. Wrong shape: none"):
        model_from_pangu_pro_moe(write_folder(tmp_path / "in", tensors, TINY))


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", TINY)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"got .* with pytorch_model\.bin\. Pickled weights are not read"):
        model_from_pangu_pro_moe(tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8])
def test_invalid_dtypes(folder: Path, dtype: Any) -> None:
    with pytest.raises(ValueError, match=f"`dtype` must be a floating-point torch.dtype or None, got '?{dtype}'?"):
        model_from_pangu_pro_moe(folder, dtype=dtype)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_expert_groups": 2}, "`model` must have `num_expert_groups` = 4 for Pangu Pro MoE, got 2"),
        ({"renormalize": True}, "`renormalize` = False"),
        ({"scoring": "sigmoid"}, "`scoring` = 'softmax'"),
        ({"router_scale": False}, "`router_scale` = True"),
        ({"routed_scaling_factor": 2.5}, "`routed_scaling_factor` = 1.0"),
        ({"attention_bias": False}, "`attention_bias` = True"),
        ({"head_dim": 8}, "`head_dim` = 16 for Pangu Pro MoE, got 8"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "`rope_parameters` with 'rope_theta' only .*, got .*linear",
        ),
    ],
)
def test_models_without_a_published_form(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    model = MoGEForCausalLM(MoGEConfig.from_preset("tiny", **fields))
    with pytest.raises(ValueError, match=message):
        to_pangu_pro_moe(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", [nn.Linear(2, 2), MoGEModel(MoGEConfig.from_preset("tiny", num_hidden_layers=0))])
def test_other_models_are_not_written(tmp_path: Path, model: Any) -> None:
    with pytest.raises(ValueError, match=f"`model` must be a MoGEForCausalLM, got {type(model).__name__}"):
        to_pangu_pro_moe(model, tmp_path / "out")


def test_folders_with_files_are_not_written_to(folder: Path) -> None:
    model, before = model_from_pangu_pro_moe(folder), load_file(folder / "model-00001-of-00004.safetensors")
    with pytest.raises(ValueError, match="`folder` must be new or empty, got"):
        to_pangu_pro_moe(model, folder)
    assert_same_bytes(load_file(folder / "model-00001-of-00004.safetensors"), before)
