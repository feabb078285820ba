"""Plans: parameters, FLOPs against PyTorch's counter, kept memory against autograd, sharding, and bad input."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks.bench_plan import CASES, batch_of, predict, prepare
from tests.tiny import text_config, tokenizer, vision_config
from vlparts import MoGEForCausalLM, compose
from vlparts.parts import ops_attention_reference
from vlparts.training.scaling.activations import count_kept
from vlparts.training.scaling.flops import ATTENTION_BACKWARD, count_flops
from vlparts.training.scaling.memory import Strategy, count_memory, count_parameters, gathered_bytes, optimizer_states
from vlparts.training.scaling.packs import make_pack, patch_grid, tokens_of_image
from vlparts.training.scaling.planning import COMPOSED_PRESETS, Run, build_model, estimate, plan
from vlparts.training.scaling.units import experts_share, get_units

TINY = {"vision": "navit:tiny", "text": "moge:tiny"}
SMALL: Any = {"samples": 2, "length": 96, "grid": (8, 8)}
RUN = Run(devices=4, memory=1e9, capacity=1024, samples=1000, sample_tokens=256, image_size=(128, 96))


@pytest.fixture
def on_reference_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention as matrix products that the counter of FLOPs sees; the counter knows no fused kernel of the CPU."""
    monkeypatch.setattr("vlparts.kernels.cpu.attention._attend", attend_plainly)
    monkeypatch.setattr(ops_attention_reference, "attend", attend_plainly)


def attend_plainly(query: Tensor, key: Tensor, value: Tensor, scale: float | None, causal: bool) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = (one.repeat_interleave(groups, 1) for one in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        scores = scores + torch.full(scores.shape[-2:], -torch.inf).triu(1)
    return scores.softmax(-1) @ value


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", list(CASES))
def test_flops_are_those_that_pytorch_counts(name: str, checkpointing: bool, on_reference_kernels: None) -> None:
    model = prepare(name, checkpointing)
    if name == "experts":
        model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        loss = model(**batch_of(model, **SMALL)).loss
        forward = counter.get_total_flops()
        loss.backward()
    found = predict(model, checkpointing, "float32", **SMALL).flops
    units = get_units(model, predict(model, checkpointing, "float32", **SMALL).pack)
    # Plain attention takes 4 products backward, not 5.
    attention = sum(4 * one.pairs * attention_of(one.module) for one in units if one.trains or checkpointing)
    assert found.forward == pytest.approx(forward, rel=1e-9)
    assert found.total - (ATTENTION_BACKWARD - 2) * attention == pytest.approx(counter.get_total_flops(), rel=0.005)


def attention_of(layer: nn.Module) -> int:
    attention = layer.get_submodule("self_attn") if hasattr(layer, "self_attn") else None
    return 0 if attention is None else attention.o_proj.in_features


def kept_bytes(model: Any, batch: dict[str, Any]) -> int:
    """Bytes of all storages that autograd saves in a forward pass, without parameters."""
    known = {one.untyped_storage().data_ptr() for one in model.parameters()}
    storages: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch)
    return sum(one.nbytes() for one in storages.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", list(CASES))
def test_kept_memory_is_near_what_autograd_saves(name: str, checkpointing: bool) -> None:
    model = prepare(name, checkpointing)
    pack = predict(model, checkpointing, "float32", **SMALL).pack
    kept = count_kept(get_units(model, pack), "float32", checkpointing)
    found = kept.units + kept.loss / 3  # of the loss the forward pass keeps the logarithms of the probabilities
    assert found == pytest.approx(kept_bytes(model, batch_of(model, **SMALL)), rel=0.15)


def test_parameters_are_those_of_the_published_models() -> None:
    found = {}
    for name in (*COMPOSED_PRESETS, "points_1_5_7b"):
        model = build_model({"model": name})
        found[name] = count_parameters(model, experts_share(model.config.text_config))
    assert found["points_1_5_7b"]["text"]["all"] == 7_615_616_512  # Qwen2.5-7B-Instruct
    ocr = found["deepseek_ocr"]["text"]
    assert ocr["all"] == pytest.approx(2.93e9, rel=0.01)
    assert ocr["active"] < 0.75e9
    assert found["openpangu_vl_7b"]["total"]["all"] > 8e9


def test_active_parameters_are_those_of_the_part() -> None:
    model = build_model(TINY)
    active = count_parameters(model, experts_share(model.config.text_config))["text"]["active"]
    assert active == MoGEForCausalLM(model.config.text_config).num_activated_parameters()


def test_frozen_parts_have_no_gradients_states_or_backward_pass() -> None:
    full, frozen = build_model(TINY), build_model({**TINY, "train": ["projector"]})
    trained = sum(one.numel() for one in frozen.model.projector.parameters())
    assert optimizer_states(frozen, "adamw") == 2 * trained
    pack = make_pack(full, 1024, 256, 1, (128, 96))
    all_units, units = get_units(full, pack), get_units(frozen, pack)
    vision = [count_flops([one for one in part if one.part == "vision"]) for part in (all_units, units)]
    assert vision[0].backward > 0
    assert vision[1].backward == 0
    above = [one for one in units if one.part != "vision"]
    projector = [one for one in units if one.part == "projector"]
    inputs = sum(
        2 * one.rows * weight.numel() * share
        for one in above
        if one.part == "text"
        for _, weight, share in one.products()
    )
    attention = sum(4 * one.pairs * attention_of(one.module) for one in above)
    text = count_flops(above).backward - count_flops(projector).backward
    assert text == pytest.approx(inputs + ATTENTION_BACKWARD * attention)


def test_fsdp2_divides_states_and_ddp_does_not() -> None:
    model = build_model(TINY)
    pack = make_pack(model, 1024, 256, 1, (128, 96))
    kept = count_kept(get_units(model, pack), "mixed")
    ddp, one, four = (
        count_memory(model, kept, Strategy(kind, devices), "mixed", "adamw", False)  # type: ignore[arg-type]
        for kind, devices in (("ddp", 4), ("none", 1), ("fsdp2", 4))
    )
    total = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert one.parameters == ddp.parameters == total
    assert four.parameters == total / 4
    assert four.optimizer == 2 * total / 4
    assert ddp.gradients == 2 * one.gradients == 2 * total
    assert one.gathered == ddp.gathered == 0 < four.gathered
    accumulated = count_memory(model, kept, Strategy("none"), "mixed", "adamw", True)
    assert accumulated.peak > one.peak
    muon = count_memory(model, kept, Strategy("none"), "mixed", "muon", False)
    assert total < muon.optimizer < one.optimizer


def test_expert_parallelism_gathers_a_share_of_the_experts() -> None:
    model = build_model({"vision": "navit:tiny", "text": "moge:deepseek_ocr"})
    whole, halves = (gathered_bytes(model, Strategy("fsdp2", 2, False, ways), "mixed") for ways in (1, 2))
    experts = sum(one.numel() for one in model.model.language_model.layers[1].mlp.experts.parameters())
    # Two gathered layers have half of the experts; the largest gradient is then that of the head.
    assert 2 * 2 * experts / 2 < whole - halves < 2 * 3 * experts / 2


def test_the_first_strategy_that_fits_is_chosen() -> None:
    model = build_model(TINY)
    generous = plan(model, RUN)
    assert generous.chosen is not None
    assert str(generous.chosen.strategy) == "DDP"
    tried = [estimate(model, RUN, Strategy("ddp", 4)), estimate(model, RUN, Strategy("fsdp2", 4))]
    assert tried[1].memory.peak < tried[0].memory.peak
    tight = plan(model, replace(RUN, memory=tried[1].memory.peak / 0.9 + 1))
    assert [str(one.strategy) for one in tight.estimates] == ["DDP", "FSDP2"]
    assert "FSDP2 is the first that fits" in tight.reason
    nothing = plan(model, replace(RUN, memory=1e5))
    assert nothing.chosen is None
    assert nothing.reason.startswith("Nothing fits")
    assert "missing" in nothing.reason
    assert any(one.strategy.expert_parallel > 1 for one in nothing.estimates)
    assert min(one.pack.tokens for one in nothing.estimates) == 256


def test_time_is_flops_over_what_a_device_reaches() -> None:
    model = build_model(TINY)
    found = estimate(model, replace(RUN, flops=1e12, mfu=0.5, gradient_accumulation_steps=2), Strategy("ddp", 4))
    assert found.seconds_per_step == pytest.approx(2 * found.flops.total / 0.5e12)
    assert found.steps_per_epoch == 32  # 1000 samples, 4 in a pack, 8 packs in a step
    assert found.flops_per_epoch == pytest.approx(250 * found.flops.total)


def test_images_have_the_patches_of_their_encoder() -> None:
    ocr = build_model({"model": "deepseek_ocr"})
    assert patch_grid(ocr, (1024, 1024)) == (64, 64)
    assert tokens_of_image(ocr, (64, 64)) == 273  # the mode "base"
    model = compose_tiny("clip")
    assert patch_grid(model, (640, 480)) == (4, 4)
    pack = make_pack(model, 64, 32, 1, (640, 480))
    rows = {one.name: one.rows for one in get_units(model, pack) if one.part == "vision" and one.is_layer}
    assert set(rows.values()) == {2 * 17}  # with class tokens


def test_fewer_tokens_are_planned_where_the_model_reduces_them() -> None:
    few = build_model({**TINY, "token_reduction": "merge_similar", "token_ratio": 0.25})
    assert tokens_of_image(few, (8, 8)) == 16
    assert tokens_of_image(build_model(TINY), (8, 8)) == 64
    ocr = {"vision": "deepencoder:deepencoder_tiny", "text": "qwen3:tiny", "projector": "deepseek_ocr"}
    assert tokens_of_image(build_model(ocr), (16, 16)) == 16 + 4 + 1
    half = build_model({**ocr, "token_reduction": "prune_diverse", "token_ratio": 0.5})
    assert tokens_of_image(half, (16, 16)) == 8 + 4 + 1
    resampled = build_model({**TINY, "token_reduction": "resampler", "token_count": 4})
    found, plain = (count_parameters(one, 1.0)["projector"]["all"] for one in (resampled, build_model(TINY)))
    assert found - plain == sum(one.numel() for one in resampled.model.token_reducer.parameters())


def test_windows_have_fewer_pairs() -> None:
    model = build_model({"model": "openpangu_vl_7b"})
    pack = make_pack(model, 4096, 1024, 1, (448, 448))
    layers = [one for one in get_units(model, pack) if one.part == "vision" and one.is_layer]
    assert layers[5].pairs == 4 * 1024**2  # a layer without windows, 32 x 32 patches in each of four images
    assert layers[0].pairs == 4 * 16 * 64**2  # windows of 8 x 8 patches


def compose_tiny(kind: str) -> Any:
    return compose(vision_config(kind), text_config("qwen3", tokenizer()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_tokens": 2000}, "`sample_tokens` must be at most `capacity`, 1024, got 2000"),
        ({"sample_tokens": 4}, "`sample_tokens` must be at least the .* image tokens of a sample"),
        ({"devices": 0}, "`devices` must be positive, got 0"),
        ({"mfu": 1.5}, "`mfu` must be above 0 and at most 1, got 1.5"),
        ({"margin": 1.0}, "`margin` must be at least 0 and below 1"),
        ({"images_per_sample": -1}, "`images_per_sample` must be at least 0"),
    ],
)
def test_bad_runs_are_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(build_model(TINY), replace(RUN, **changes))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "points_9"}, "`model` must be one of .*points_1_5_7b.*, or a folder, got points_9"),
        ({"model": "points_1_5_7b", "text": "moge:tiny"}, "`model` replaces `text`"),
        ({"vision": "navit:huge"}, "`vision` must be one of navit:tiny"),
        ({**TINY, "train": ["v.*"]}, "`train` 'v.\\*' matches no parameter"),
    ],
)
def test_bad_models_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(settings)
