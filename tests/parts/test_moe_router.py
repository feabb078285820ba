"""The router against loops in float64, and against the routers of transformers with the same weights."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV2Config, DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from tests.parts.router_oracle import looped
from vlparts.parts.moe_options import SCORINGS, RoutingOptions
from vlparts.parts.moe_router import GroupedTopKRouter
from vlparts.parts.moe_routing import route

EXPERTS, TOKENS, WIDTH = 12, 7, 5
EQUAL = dict(grouping="equal", num_expert_groups=2)
LIMITED = dict(grouping="limited", num_expert_groups=4, num_limited_groups=2)
GROUPS: dict[str, dict[str, Any]] = {
    "none": {},
    "equal": EQUAL,
    "equal, all groups": dict(grouping="equal", num_expert_groups=4),
    "voted": dict(grouping="equal", num_expert_groups=4, num_voted_experts=2),
    **{
        f"limited {score} {mask}": dict(LIMITED, group_score=score, group_mask=mask)
        for score, mask in itertools.product(("max", "top2_sum", "topm_sum"), ("exclude", "zero"))
    },
}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Numbers of order one."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def combinations() -> list[Any]:
    """Every combination of options that fits together."""
    found = []
    for scoring, groups, bias, renormalize in itertools.product(SCORINGS, GROUPS, (False, True), (False, True)):
        chosen = scoring == "softmax_over_chosen"
        if chosen and (bias or renormalize or GROUPS[groups].get("group_mask") == "zero"):
            continue
        options = dict(scoring=scoring, selection_bias=bias, renormalize=renormalize, **GROUPS[groups])
        name = f"{scoring}-{groups}{'-bias' * bias}{'-renormalize' * renormalize}"
        found.append(pytest.param(options, id=name))
    return found


@pytest.mark.parametrize("changes", combinations())
def test_equals_loops(changes: dict[str, Any]) -> None:
    options = RoutingOptions(EXPERTS, 4, routed_scaling_factor=1.7, renormalize_eps=1e-3, **changes)
    logits, scale = (2 * drawn(TOKENS, EXPERTS)).requires_grad_(), drawn(1, EXPERTS, seed=1).requires_grad_()
    bias = drawn(EXPERTS, seed=2) if options.selection_bias else None
    mask, vote = torch.arange(TOKENS) != 3, options.num_voted_experts is not None
    weights, indices = route(logits, options, selection_bias=bias, expert_scale=scale, token_mask=mask, vote=vote)
    wanted, places = looped(logits, options, bias, scale, mask, vote)
    assert indices.dtype == torch.int64
    assert torch.equal(indices, places)
    torch.testing.assert_close(weights, wanted, atol=1e-12, rtol=1e-12)
    upstream = drawn(TOKENS, 4, seed=3)
    for got, expected in zip(
        torch.autograd.grad(weights, (logits, scale), upstream),
        torch.autograd.grad(wanted, (logits, scale), upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("groups", GROUPS)
def test_of_equals_the_lowest_index_is_chosen(groups: str) -> None:
    options = RoutingOptions(EXPERTS, 4, **GROUPS[groups])
    logits = torch.randint(0, 2, (20, EXPERTS), generator=torch.Generator().manual_seed(0)).double()
    vote = options.num_voted_experts is not None
    _, indices = route(logits, options, vote=vote)
    assert torch.equal(indices, looped(logits, options, vote=vote)[1])


def test_votes_take_effect_in_inference_only() -> None:
    router = GroupedTopKRouter(WIDTH, EXPERTS, 4, **GROUPS["voted"])
    hidden = drawn(50, WIDTH).float()
    logits, _, exact = router(hidden)
    assert torch.equal(exact, looped(logits.double(), router.options)[1])
    assert len(exact.unique()) == EXPERTS
    _, _, voted = router.eval()(hidden)
    assert torch.equal(voted, looped(logits.double(), router.options, vote=True)[1])
    assert len(voted.unique()) == 8


def test_the_module_is_linear_then_route() -> None:
    router = GroupedTopKRouter(
        WIDTH, EXPERTS, 4, scoring="sigmoid", selection_bias=True, router_scale=True, router_dtype="float64", **EQUAL
    )
    assert router.router_scale is not None
    assert router.e_score_correction_bias is not None
    with torch.no_grad():
        router.router_scale.copy_(drawn(1, EXPERTS))
        router.e_score_correction_bias.copy_(drawn(EXPERTS))
    hidden = drawn(2, 3, WIDTH)
    logits, weights, indices = router(hidden)
    torch.testing.assert_close(logits, hidden.flatten(0, 1) @ router.weight.double().T)
    wanted, places = looped(logits, router.options, router.e_score_correction_bias, router.router_scale.double())
    torch.testing.assert_close(weights, wanted)
    assert torch.equal(indices, places)
    weights.sum().backward()
    assert router.weight.grad is not None
    assert router.router_scale.grad is not None


def native_and_ours() -> list[Any]:
    """Routers of transformers, and the settings that give the same."""
    sizes = dict(hidden_size=WIDTH, num_attention_heads=1, num_experts_per_tok=4)
    v3 = dict(n_routed_experts=16, n_group=4, topk_group=2, routed_scaling_factor=2.5)
    v2 = dict(n_routed_experts=16, n_group=4, topk_group=2, routed_scaling_factor=16.0)
    limits = dict(num_expert_groups=4, num_limited_groups=2)
    greedy = dict(grouping="none", num_expert_groups=None, num_limited_groups=None, group_score=None, group_mask=None)
    return [
        pytest.param(MixtralTopKRouter(MixtralConfig(**sizes, num_local_experts=16)), "mixtral", {}, id="mixtral"),
        *(
            pytest.param(
                Qwen3MoeTopKRouter(Qwen3MoeConfig(**sizes, num_experts=16, norm_topk_prob=norm)),
                "qwen3_moe",
                dict(renormalize=norm),
                id=f"qwen3_moe {norm}",
            )
            for norm in (True, False)
        ),
        pytest.param(
            DeepseekV2TopkRouter(DeepseekV2Config(**sizes, **v2, topk_method="group_limited_greedy")),
            "deepseek_v2",
            limits,
            id="deepseek_v2",
        ),
        pytest.param(
            DeepseekV2TopkRouter(DeepseekV2Config(**sizes, **v2, topk_method="greedy")),
            "deepseek_v2",
            greedy,
            id="deepseek_v2 greedy",
        ),
        *(
            pytest.param(
                DeepseekV3TopkRouter(DeepseekV3Config(**sizes, **v3, norm_topk_prob=norm)),
                "deepseek_v3",
                dict(limits, renormalize=norm),
                id=f"deepseek_v3 {norm}",
            )
            for norm in (True, False)
        ),
    ]


def spread(weights: Tensor, indices: Tensor, experts: int) -> Tensor:
    """Weights by expert, whatever the order of choices."""
    return weights.new_zeros(len(weights), experts).scatter(1, indices, weights)


@pytest.mark.parametrize(("native", "preset", "changes"), native_and_ours())
def test_equals_the_native_router(native: nn.Module, preset: str, changes: dict[str, Any]) -> None:
    router = GroupedTopKRouter.from_preset(preset, WIDTH, 16, num_experts_per_tok=4, **changes)
    state = {name: drawn(*value.shape, seed=4).float() for name, value in native.state_dict().items()}
    native.load_state_dict(state)
    router.load_state_dict(state)
    found = []
    for module in (native, router):
        hidden = drawn(2, 30, WIDTH).float().requires_grad_()
        logits, weights, indices = module(hidden)
        dense = spread(weights, indices, 16)
        gradients = torch.autograd.grad((dense * drawn(60, 16, seed=5)).sum(), (hidden, module.weight))
        found.append((logits, dense, *gradients))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_masked_tokens_are_nothing_to_native_experts(implementation: str) -> None:
    config = MixtralConfig(hidden_size=16, intermediate_size=16, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = implementation
    experts = MixtralExperts(config)
    router = GroupedTopKRouter.from_preset("mixtral", 16, 4)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(drawn(*parameter.shape))
    hidden, mask = drawn(9, 16).float(), torch.arange(9) % 3 != 1
    _, weights, indices = router(hidden, mask)
    output = experts(hidden, indices, weights)
    _, weights, indices = router(hidden[mask])
    torch.testing.assert_close(output[mask], experts(hidden[mask], indices, weights))
    assert output[mask].any()
    assert not output[~mask].any()


def test_padding_may_hold_anything() -> None:
    router = GroupedTopKRouter.from_preset("pangu_pro_moe", WIDTH, 16)
    hidden, mask = drawn(2, 3, WIDTH).float(), torch.tensor([[True, False, True], [False, True, True]])
    poisoned = hidden.masked_fill(~mask[..., None], torch.nan).requires_grad_()
    logits, weights, indices = router(poisoned, mask)
    assert not logits[~mask.flatten()].any()
    assert not weights[~mask.flatten()].any()
    assert 0 <= int(indices.min()) <= int(indices.max()) < 16
    (weights.sum() + logits.square().sum()).backward()
    assert poisoned.grad is not None
    assert not poisoned.grad[~mask].any()
    assert poisoned.grad[mask].any()
    alone = router.weight.grad
    assert alone is not None
    wanted, expected, _ = GroupedTopKRouter.forward(router, hidden[mask])
    (gradient,) = torch.autograd.grad(expected.sum() + wanted.square().sum(), router.weight)
    torch.testing.assert_close(alone, gradient)


def test_the_bias_changes_the_choice_and_not_the_weights() -> None:
    router = GroupedTopKRouter(WIDTH, 8, 2, scoring="sigmoid", selection_bias=True)
    assert router.e_score_correction_bias is not None
    router.e_score_correction_bias[5] = 10.0
    logits, weights, indices = router(drawn(TOKENS, WIDTH).float())
    assert (indices[:, 0] == 5).all()
    torch.testing.assert_close(weights, logits.sigmoid().gather(1, indices))
    assert "e_score_correction_bias" in router.state_dict()


@pytest.mark.parametrize("rule", ["sign", "mean_free_sign"])
def test_bias_update(rule: str) -> None:
    router = GroupedTopKRouter(WIDTH, 4, 1, selection_bias=True)
    router.update_selection_bias(torch.tensor([0, 5, 1, 2]), 0.5, rule)
    step = torch.tensor([0.5, -0.5, 0.5, 0.0])
    torch.testing.assert_close(router.e_score_correction_bias, step - (rule != "sign") * step.mean())


def test_bias_updates_balance_the_load() -> None:
    router = GroupedTopKRouter(WIDTH, 8, 2, scoring="sigmoid", selection_bias=True)
    with torch.no_grad():
        router.weight[0] += 1.0
    hidden = drawn(400, WIDTH).float() + 1
    loads = []
    for _ in range(150):
        counts = router(hidden)[2].flatten().bincount(minlength=8)
        loads.append(int(counts.max()))
        router.update_selection_bias(counts, 0.01)
    assert loads[0] > 250
    assert loads[-1] < 125


def test_jitter_is_noise_in_training() -> None:
    router = GroupedTopKRouter(WIDTH, 8, 2, jitter=0.1)
    hidden = torch.ones(4000, WIDTH)
    with torch.no_grad():
        router.weight.copy_(torch.eye(8, WIDTH))
    torch.manual_seed(0)
    noise = router(hidden)[0][:, :WIDTH]
    assert 0.9 <= noise.min().item() < 0.901
    assert 1.099 < noise.max().item() <= 1.1
    assert torch.equal(router.eval()(hidden)[0], hidden @ router.weight.T)
    assert torch.equal(hidden, torch.ones_like(hidden))


@pytest.mark.parametrize("dtype", ["float32", torch.float64])
def test_half_precision_and_autocast_compute_in_the_routers_type(dtype: Any) -> None:
    router = GroupedTopKRouter(WIDTH, 8, 2, router_dtype=dtype).to(torch.bfloat16)
    wanted = getattr(torch, str(dtype).removeprefix("torch."))
    hidden = drawn(TOKENS, WIDTH).bfloat16()
    expected = hidden.to(wanted) @ router.weight.to(wanted).T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, weights, _ = router(hidden)
    assert logits.dtype == weights.dtype == wanted
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("preset", GroupedTopKRouter.presets())
def test_presets_are_built_and_compile(preset: str) -> None:
    router = GroupedTopKRouter.from_preset(preset, WIDTH, 32)
    hidden, mask = drawn(2, 3, WIDTH).float(), torch.arange(6) < 5
    compiled = torch.compile(router, backend="aot_eager", fullgraph=True)
    for got, wanted in zip(compiled(hidden, mask), router(hidden, mask), strict=True):
        torch.testing.assert_close(got, wanted)


def test_pangu_state_keys() -> None:
    router = GroupedTopKRouter.from_preset("pangu_pro_moe", WIDTH, 64)
    assert {name: tuple(value.shape) for name, value in router.state_dict().items()} == {
        "weight": (64, WIDTH),
        "router_scale": (1, 64),
    }
    assert "equal" in repr(router)


def test_no_tokens() -> None:
    router = GroupedTopKRouter(WIDTH, EXPERTS, 4, **GROUPS["voted"]).eval()
    logits, weights, indices = router(torch.zeros(0, WIDTH), torch.zeros(0, dtype=torch.bool))
    assert (logits.shape, weights.shape, indices.shape) == ((0, EXPERTS), (0, 4), (0, 4))


def test_sqrtsoftplus_of_very_negative_logits_has_finite_gradients() -> None:
    logits = torch.full((1, 4), -200.0, requires_grad=True)
    weights, _ = route(logits, RoutingOptions(4, 2, scoring="sqrtsoftplus"))
    weights.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
