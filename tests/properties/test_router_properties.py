"""Properties of the router for all sizes and options."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vlparts.moe import RouterStatistics
from vlparts.parts.moe_losses import balance_loss, router_z_loss
from vlparts.parts.moe_options import SCORINGS
from vlparts.parts.moe_router import GroupedTopKRouter
from vlparts.parts.moe_routing import RoutingOptions, choose_experts, expert_counts, route

seeds = st.integers(0, 2**16)


def drawn(*shape: int, seed: int) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def all_options(draw: st.DrawFn) -> RoutingOptions:
    """Options of all kinds that fit together."""
    groups, size = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    scoring, grouping = draw(st.sampled_from(SCORINGS)), draw(st.sampled_from(["none", "equal", "limited"]))
    chosen = scoring == "softmax_over_chosen"
    settings: dict[str, Any] = dict(scoring=scoring, grouping=grouping, renormalize=not chosen and draw(st.booleans()))
    if grouping == "none":
        return RoutingOptions(groups * size, draw(st.integers(1, groups * size)), **settings)
    settings["num_expert_groups"] = groups
    if grouping == "equal":
        return RoutingOptions(groups * size, groups * draw(st.integers(1, size)), **settings)
    limit = draw(st.integers(1, groups))
    settings["group_score"] = draw(st.sampled_from(["max", "top2_sum", "topm_sum"]))
    settings["group_mask"] = "exclude" if chosen else draw(st.sampled_from(["exclude", "zero"]))
    return RoutingOptions(groups * size, limit * draw(st.integers(1, size)), num_limited_groups=limit, **settings)


@given(groups=st.integers(1, 6), size=st.integers(1, 6), tokens=st.integers(0, 9), seed=seeds, data=st.data())
def test_equal_groups_are_exactly_balanced(
    groups: int, size: int, tokens: int, seed: int, data: st.DataObject
) -> None:
    share = data.draw(st.integers(1, size))
    options = RoutingOptions(groups * size, groups * share, grouping="equal", num_expert_groups=groups)
    _, indices = route(drawn(tokens, groups * size, seed=seed).round(), options)  # many equal logits
    assert (indices // size).tolist() == [[group for group in range(groups) for _ in range(share)]] * tokens
    assert all(len(set(row)) == groups * share for row in indices.tolist())
    statistics = RouterStatistics(groups * size, groups)
    statistics.update(indices)
    load = statistics.compute()
    assert load.imbalance_score == load.batch_imbalance_score == 0
    assert load.tokens_per_group.tolist() == [tokens * share] * groups


@given(options=all_options(), tokens=st.integers(1, 8), seed=seeds)
def test_choices_are_distinct_and_weights_sum(options: RoutingOptions, tokens: int, seed: int) -> None:
    weights, indices = route(drawn(tokens, options.num_experts, seed=seed), options)
    assert weights.shape == indices.shape == (tokens, options.num_experts_per_tok)
    assert all(len(set(row)) == options.num_experts_per_tok for row in indices.tolist())
    assert (weights > 0).all()
    sums = weights.sum(dim=1)
    if options.renormalize or options.scoring == "softmax_over_chosen":
        torch.testing.assert_close(sums, torch.ones_like(sums))
    elif options.scoring == "softmax":
        assert (sums <= 1 + 1e-12).all()
    if options.grouping == "limited":
        assert all(len(set(row)) <= options.num_limited_groups for row in (indices // options.group_size).tolist())


@given(options=all_options(), tokens=st.integers(1, 8), seed=seeds)
def test_the_order_of_tokens_does_not_matter(options: RoutingOptions, tokens: int, seed: int) -> None:
    logits = drawn(tokens, options.num_experts, seed=seed)
    order = drawn(tokens, seed=seed + 1).argsort()
    (weights, indices), (shuffled, places) = route(logits, options), route(logits[order], options)
    assert torch.equal(indices[order], places)
    torch.testing.assert_close(weights[order], shuffled, atol=1e-12, rtol=1e-12)


@given(options=all_options(), tokens=st.integers(1, 8), seed=seeds)
def test_names_of_groups_and_of_experts_in_a_group_do_not_matter(
    options: RoutingOptions, tokens: int, seed: int
) -> None:
    logits, groups = drawn(tokens, options.num_experts, seed=seed), options.num_expert_groups or 1
    # Shuffle experts within groups, and the groups.
    inside = drawn(groups, options.group_size, seed=seed + 1).argsort(dim=1)
    inside = inside + torch.arange(groups)[:, None] * options.group_size
    order = inside[drawn(groups, seed=seed + 2).argsort()].flatten()
    dense = []
    for values in (logits, logits[:, order]):
        weights, indices = route(values, options)
        dense.append(torch.zeros_like(logits).scatter(1, indices, weights))
    torch.testing.assert_close(dense[0][:, order], dense[1], atol=1e-12, rtol=1e-12)


@given(options=all_options(), tokens=st.integers(1, 8), seed=seeds)
def test_a_constant_bias_changes_no_choice(options: RoutingOptions, tokens: int, seed: int) -> None:
    ranking = drawn(tokens, options.num_experts, seed=seed)
    if options.group_mask == "zero":
        ranking = ranking.abs()
    assert torch.equal(choose_experts(ranking, options), choose_experts(ranking + 2, options))


@given(mask=st.lists(st.booleans(), min_size=1, max_size=9), voted=st.none() | st.integers(1, 4), seed=seeds)
def test_masked_tokens_change_nothing(mask: list[bool], voted: int | None, seed: int) -> None:
    real, options = torch.tensor(mask), dict(grouping="equal", num_expert_groups=2, num_voted_experts=voted)
    router = GroupedTopKRouter(3, 8, 2, router_dtype="float64", **options).eval()
    hidden = drawn(len(mask), 3, seed=seed)
    hidden[~real] = torch.nan
    results = router(hidden, real), router(hidden[real])
    for padded, alone in zip(*results, strict=True):
        torch.testing.assert_close(padded[real], alone, atol=1e-12, rtol=1e-12)
    (logits, weights, indices), (few_logits, _, few_indices) = results
    assert not weights[~real].any()
    assert torch.equal(expert_counts(indices, 8, real), expert_counts(few_indices, 8))
    loss = balance_loss(logits, indices, token_mask=real)
    torch.testing.assert_close(loss, balance_loss(few_logits, few_indices), atol=1e-12, rtol=1e-12)
    z_loss = router_z_loss(logits, token_mask=real)
    torch.testing.assert_close(z_loss, router_z_loss(few_logits), atol=1e-12, rtol=1e-12)
    loads = []
    for values in ((indices, logits.detach().exp(), real), (few_indices, few_logits.detach().exp())):
        statistics = RouterStatistics(8, 2)
        statistics.update(*values)
        loads.append(vars(statistics.compute()))
    for name, value in loads[0].items():
        wanted = loads[1][name]
        if value is not None:
            torch.testing.assert_close(torch.as_tensor(value), torch.as_tensor(wanted), atol=1e-12, rtol=1e-12)
        else:
            assert wanted is None


@given(counts=st.lists(st.integers(0, 100), min_size=4, max_size=4), cut=st.integers(0, 9), seed=seeds)
def test_micro_batches_sum_to_the_whole(counts: list[int], cut: int, seed: int) -> None:
    logits, given_counts = drawn(9, 4, seed=seed), torch.tensor(counts)
    indices = logits.argsort(dim=1)[:, :2]
    whole = balance_loss(logits, indices, form="global", counts=given_counts)
    parts = [
        balance_loss(logits[part], indices[part], form="global", counts=given_counts)
        for part in (slice(0, cut), slice(cut, 9))
    ]
    torch.testing.assert_close(sum(parts), whole, atol=1e-12, rtol=1e-12)
