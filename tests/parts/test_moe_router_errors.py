"""Errors of the router and their messages."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parts.test_moe_router import EQUAL, EXPERTS, GROUPS, LIMITED, WIDTH
from vlparts.parts.moe_options import RoutingOptions
from vlparts.parts.moe_router import GroupedTopKRouter
from vlparts.parts.moe_routing import route


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_experts_per_tok=0), "`num_experts_per_tok` must be an integer of at least 1, got 0"),
        (dict(num_experts=0), "`num_experts` must be an integer of at least 1, got 0"),
        (dict(num_experts_per_tok=13), "`num_experts_per_tok` must be at most `num_experts`=12, got 13"),
        (dict(scoring="tanh"), "`scoring` must be one of 'softmax', .* got 'tanh'"),
        (dict(grouping="some"), "`grouping` must be one of .* got 'some'"),
        (dict(num_expert_groups=4), "`num_expert_groups` must be None if `grouping` is 'none', got 4"),
        (dict(grouping="equal"), "`num_expert_groups` must be an integer of at least 1, got None"),
        (dict(EQUAL, num_expert_groups=5), "`num_expert_groups` must divide `num_experts`=12, got 5"),
        (dict(EQUAL, num_expert_groups=3), "must be a multiple of `num_expert_groups`=3 .* got 4"),
        (dict(EQUAL, num_limited_groups=1), "`num_limited_groups` must be None unless .*, got 1 with 'equal'"),
        (dict(EQUAL, group_score="max"), "`group_score` must be None unless .*, got 'max' with 'equal'"),
        (dict(group_mask="zero"), "`group_mask` must be None unless `grouping` is 'limited', got 'zero' with 'none'"),
        (LIMITED, "`group_score` must be one of .* got None"),
        (dict(LIMITED, group_score="max", group_mask="no"), "`group_mask` must be one of .* got 'no'"),
        (dict(LIMITED, num_limited_groups=5), "`num_limited_groups` must be at most `num_expert_groups`=4, got 5"),
        (
            dict(LIMITED, num_limited_groups=1),
            "`num_experts_per_tok` must be at most 3, the number of experts of 1 groups, got 4",
        ),
        (
            dict(LIMITED, num_limited_groups=3, group_score="topm_sum"),
            "must be a multiple of `num_limited_groups`=3 if `group_score` is 'topm_sum', got 4",
        ),
        (
            dict(grouping="limited", num_expert_groups=12, num_limited_groups=4, group_score="top2_sum"),
            "'top2_sum' needs groups of at least 2 experts",
        ),
        (
            dict(LIMITED, group_score="max", group_mask="zero", scoring="softmax_over_chosen"),
            "`group_mask` 'zero' needs non-negative scores, got `scoring` 'softmax_over_chosen'",
        ),
        (dict(scoring="softmax_over_chosen", selection_bias=True), "`selection_bias` must be False if .* got True"),
        (
            dict(scoring="softmax_over_chosen", renormalize=True),
            "`renormalize` must be False if .* got True",
        ),
        (
            dict(num_voted_experts=2),
            "`num_voted_experts` needs `grouping` 'equal' with one choice per group, got 'none'",
        ),
        (dict(EQUAL, num_voted_experts=2), "needs `grouping` 'equal' with one choice per group, got 'equal' with 4"),
        (dict(GROUPS["voted"], num_voted_experts=4), "`num_voted_experts` must be at most the group size 3, got 4"),
        (dict(renormalize_eps=-1.0), "`renormalize_eps` must be a finite number of at least 0, got -1.0"),
        (dict(routed_scaling_factor=float("nan")), "`routed_scaling_factor` must be a finite number, got nan"),
        (dict(jitter=1.0), "`jitter` must be a finite number of at least 0 and below 1, got 1.0"),
        (dict(router_dtype="bfloat16"), "`router_dtype` must be one of 'float32', 'float64', got 'bfloat16'"),
        (dict(hidden_size=0), "`hidden_size` must be an integer of at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroupedTopKRouter(**{**dict(hidden_size=WIDTH, num_experts=12, num_experts_per_tok=4), **changes})


def test_unknown_presets_are_refused() -> None:
    with pytest.raises(ValueError, match="`name` must be one of 'pangu_pro_moe', .* got 'gpt'"):
        GroupedTopKRouter.from_preset("gpt", 4, 4)


@pytest.mark.parametrize(
    ("hidden", "mask", "message"),
    [
        (torch.zeros(3, 4), None, r"`hidden_states` must be floating .* shape \(tokens, 5\) .* with \(3, 4\)"),
        (torch.zeros(5), None, r"`hidden_states` must be .* with \(5,\)"),
        (torch.zeros(3, 5, dtype=torch.int64), None, "got torch.int64"),
        (torch.zeros(3, 5), torch.ones(4, dtype=torch.bool), r"`token_mask` must be bool with shape \(3,\)"),
        (torch.zeros(2, 3, 5), torch.ones(3, 2, dtype=torch.bool), r"`token_mask` must be .* \(2, 3\) or \(6,\)"),
        (torch.zeros(3, 5), torch.ones(3), "got torch.float32"),
        (torch.full((3, 5), torch.nan), None, "`logits` must not hold NaN, got NaN for 3 tokens"),
    ],
)
def test_bad_input_is_refused(hidden: Tensor, mask: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroupedTopKRouter(WIDTH, EXPERTS, 4)(hidden, mask)


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, dict(logits=torch.zeros(3, 11)), r"`logits` must be floating point with shape \(tokens, 12\)"),
        ({}, dict(selection_bias=torch.zeros(12)), "`selection_bias` must be given if and only if .* got a bias"),
        (dict(selection_bias=True), {}, "`selection_bias` must be given if and only if .* got no bias"),
        (
            dict(selection_bias=True),
            dict(selection_bias=torch.zeros(11)),
            r"`selection_bias` must have shape \(12,\), got \(11,\)",
        ),
        ({}, dict(expert_scale=torch.ones(12)), r"`expert_scale` must have shape \(1, 12\), got \(12,\)"),
        ({}, dict(token_mask=torch.ones(3, 1, dtype=torch.bool)), r"`token_mask` must be bool with shape \(3,\)"),
    ],
)
def test_bad_routes_are_refused(changes: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        route(**{"logits": torch.zeros(3, 12), **arguments}, options=RoutingOptions(12, 4, **changes))


@pytest.mark.parametrize(
    ("bias", "arguments", "message"),
    [
        (False, {}, "`update_selection_bias` needs a router with `selection_bias`"),
        (True, dict(counts=torch.ones(3)), r"`counts` must have shape \(4,\), got \(3,\)"),
        (True, dict(counts=torch.tensor([1, -1, 0, 0])), "`counts` must be finite and not negative"),
        (True, dict(rate=-1.0), "`rate` must be a finite number of at least 0, got -1.0"),
        (True, dict(rule="tanh"), "`rule` must be one of 'sign', 'mean_free_sign', got 'tanh'"),
    ],
)
def test_bad_updates_are_refused(bias: bool, arguments: dict[str, Any], message: str) -> None:
    router = GroupedTopKRouter(WIDTH, 4, 1, selection_bias=bias)
    with pytest.raises(ValueError, match=message):
        router.update_selection_bias(**{"counts": torch.ones(4), **arguments})


def test_a_bias_in_half_precision_is_not_updated() -> None:
    router = GroupedTopKRouter(WIDTH, 4, 1, selection_bias=True).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"must be kept in float32 or float64, got torch.bfloat16"):
        router.update_selection_bias(torch.ones(4))
