"""What distribution over processes asks of every composition: names of layers, plans, inputs without images."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.distributed import DistributedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from tests.test_text_probe import REFUSED
from tests.tiny import navit, navit_config, text_config, tokenizer, vision_config, windowfree_config
from tests.tiny_texts import KINDS, tiny_text_config
from tests.vision_towers import FAMILIES, MERGE_SIZES, native_config
from vlparts import (
    DeepEncoderConfig,
    FusedVisionConfig,
    MoGEConfig,
    MoGEForCausalLM,
    PanguEmbeddedConfig,
    VisionLanguageConfig,
    VisionLanguageForConditionalGeneration,
)
from vlparts.parts.vlm_distributed import blank_image, must_run

OURS: dict[str, Any] = {
    "navit": lambda: navit_config(pooling="none"),
    "windowfree": lambda: windowfree_config(),
    "deepencoder": lambda: DeepEncoderConfig.from_preset("deepencoder_tiny"),
    "fused": lambda: FusedVisionConfig(
        general_config=vision_config("clip").to_dict(), ocr_config=vision_config("clip").to_dict()
    ),
}
TEXTS = {
    "moge": lambda: MoGEConfig.from_preset("tiny"),
    "pangu": lambda: PanguEmbeddedConfig.from_preset("tiny"),
    "qwen3": lambda: text_config("qwen3", tokenizer()),
}
PROJECTORS = {"deepencoder": "deepseek_ocr", "fused": "fused_mlp2_gelu", "windowfree": "multi_tap_merger"}


def composition(vision: str = "navit", text: str = "qwen3", **changes: Any) -> VisionLanguageForConditionalGeneration:
    """A composed model with new weights."""
    made = OURS[vision]() if vision in OURS else native_config(vision)
    if vision in MERGE_SIZES:
        changes["spatial_merge_size"] = MERGE_SIZES[vision]
    if vision in PROJECTORS:
        changes["projector_type"] = PROJECTORS[vision]
    config = VisionLanguageConfig(
        vision_config=made,
        text_config=TEXTS[text]() if text in TEXTS else tiny_text_config(text),
        image_token_id=5,
        **changes,
    )
    return VisionLanguageForConditionalGeneration(config)


def check_names(model: nn.Module) -> None:
    """accelerate finds every class, and layers are among them."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    plugin.set_auto_wrap_policy(model)  # raises ValueError for a class that is not in the model
    for part in (model.model.vision_tower, model.model.language_model):
        layers = {type(one).__name__ for one in part.modules() if isinstance(one, GradientCheckpointingLayer)}
        assert layers <= model._no_split_modules
    known = {type(one).__name__ for one in model.modules()}
    assert model._no_split_modules <= known
    assert model._no_split_modules & {type(one).__name__ for one in model.model.vision_tower.modules()}


@pytest.mark.parametrize("vision", [*OURS, *FAMILIES])
def test_every_vision_encoder_names_its_layers(vision: str) -> None:
    with torch.device("meta"):
        model = composition(vision)
    check_names(model)
    assert "Qwen3DecoderLayer" in model._no_split_modules


@pytest.mark.parametrize("text", [*TEXTS, *(kind for kind in KINDS if kind not in REFUSED)])
def test_every_text_model_names_its_layers(text: str) -> None:
    with torch.device("meta"):
        check_names(composition(text=text))


@pytest.mark.parametrize("vision", ["navit", "clip_vision_model", "qwen2_5_vl_vision", "deepencoder"])
@pytest.mark.parametrize("text", ["qwen3", "moge"])
def test_the_plan_of_fsdp2_names_layers_and_nothing_else(
    vision: str, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.device("meta"):
        model = composition(vision, text)
    _, _, plan = model._resolve_parallel_plans(DistributedConfig(fsdp_size=2))
    assert "match nothing" not in caplog.text
    for part in (model.model.vision_tower, model.model.language_model):
        layers = [one for one in part.modules() if isinstance(one, GradientCheckpointingLayer)]
        assert set(layers) <= {model.get_submodule(name) for name in plan}
    assert plan["model.language_model.norm"] == "keep_full_weight"
    head = "model.language_model.embed_tokens" if model.config.tie_word_embeddings else "lm_head"
    assert plan[head] == "keep_full_weight"


def test_plans_are_those_of_causal_classes() -> None:
    """Those of the text model, under its name, and of the head."""
    config: PreTrainedConfig = TEXTS["qwen3"]()
    with torch.device("meta"):
        model, alone = composition(), AutoModelForCausalLM.from_config(config)
    for name in ("_fsdp_plan", "_pp_plan", "_tp_plan"):
        wanted = {key.replace("model.", "model.language_model."): rule for key, rule in getattr(alone, name).items()}
        found = getattr(model, name)
        assert wanted.items() <= found.items()
        assert all(key in wanted or ".vision_tower." in key for key in found)
    assert model.supports_pp_plan


def test_pipeline_parallelism_is_refused() -> None:
    """transformers divides text models only."""
    with torch.device("meta"):
        model = composition()
    with pytest.raises(ValueError, match="`pp_size` must be 1 for a composed model, got 2"):
        type(model).maybe_distribute_model(model, DistributedConfig(pp_size=2), None)


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers that a process gets from PyTorch in a group of two."""
    for name, value in (("is_available", True), ("is_initialized", True), ("get_world_size", 2)):
        monkeypatch.setattr(distributed, name, lambda value=value: value)


def test_modules_must_run_where_others_wait_for_them(two_processes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, frozen = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    assert must_run(frozen, trained)
    assert not must_run(frozen)
    with torch.no_grad():
        assert not must_run(trained)
    frozen.weight.ds_id = 1  # as DeepSpeed marks what it divides
    with torch.no_grad():
        assert must_run(frozen)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 1)
    assert not must_run(trained)


@pytest.fixture
def one_process() -> Iterator[None]:
    """A group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_sharded_modules_must_run_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    sharded = fully_shard(nn.Linear(2, 2).requires_grad_(False))
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    with torch.no_grad():
        assert must_run(sharded)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("kind", ["composed", "moge", "navit"])
def test_a_sharded_model_is_saved_as_a_whole_one(kind: str, tmp_path: Path) -> None:
    """With its own code, where transformers saves that of PyTorch's class."""
    makers = {"moge": lambda: MoGEForCausalLM(MoGEConfig.from_preset("tiny")), "navit": navit}
    model = makers.get(kind, composition)().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "whole")
    fully_shard(model)
    assert type(model).__name__.startswith("FSDP")
    model.save_pretrained(tmp_path / "sharded")
    whole, sharded = ({one.name: one for one in (tmp_path / name).iterdir()} for name in ("whole", "sharded"))
    assert whole.keys() == sharded.keys()
    for name in whole.keys() - {"model.safetensors"}:
        assert sharded[name].read_bytes() == whole[name].read_bytes(), name
    found, wanted = (load_file(one["model.safetensors"]) for one in (sharded, whole))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("vision", [*OURS, *FAMILIES])
@pytest.mark.usefixtures("two_processes")
def test_every_encoder_runs_without_images(vision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same loss and gradients of the text model, and a gradient of zero where images have one."""
    model = composition(vision).train()
    ids = torch.arange(6, 14)[None]

    def step() -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
        model.zero_grad()
        torch.manual_seed(1)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.detach(), {name: one.grad for name, one in model.named_parameters()}

    loss, found = step()
    blank = model.get_image_features(**blank_image(model.model.vision_tower, model.config.merge_size, ids.device))
    model.zero_grad()
    torch.cat(tuple(blank.pooler_output)).sum().backward()
    used = {name for name, one in model.named_parameters() if one.grad is not None}
    monkeypatch.setattr(distributed, "get_world_size", lambda: 1)
    wanted_loss, wanted = step()
    assert torch.equal(loss, wanted_loss)
    for name, gradient in found.items():
        if wanted[name] is not None:
            assert torch.equal(gradient, wanted[name]), name
        elif name in used:
            assert gradient is not None, name
            assert not gradient.any(), name
        else:
            assert gradient is None, name
    assert any(name.startswith("model.vision_tower.") for name in used)
    assert {name for name, _ in model.named_parameters() if name.startswith("model.projector.")} <= used


def test_a_cache_is_continued_without_a_blank_image(two_processes: None) -> None:
    model = composition().train()
    ids = torch.arange(6, 14)[None]
    cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
    calls: list[Any] = []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(None))
    model(input_ids=ids[:, 4:], past_key_values=cache)
    assert not calls
    model(input_ids=ids)
    assert len(calls) == 1


def test_an_encoder_without_a_size_is_refused() -> None:
    model = composition("clip_vision_model")
    tower = model.model.vision_tower
    tower.config = SimpleNamespace(model_type="clip_vision_model")
    with pytest.raises(ValueError, match="must have an `image_size`"):
        blank_image(tower, 1, torch.device("cpu"))
