"""Router statistics against NumPy, and the published imbalance of a free choice."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vlparts.moe.statistics import RouterLoad, RouterStatistics
from vlparts.parts.moe_routing import RoutingOptions, route

EXPERTS, GROUPS, CHOSEN = 8, 4, 3
BATCHES = (5, 1, 9)


def batch(tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Choices among the first seven experts, scores, and which tokens are real."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, EXPERTS, generator=generator, dtype=torch.float64)
    logits[:, -1] = -5
    return logits.argsort(dim=1, descending=True)[:, :CHOSEN], logits.exp(), torch.arange(tokens) % 4 != 2


def filled(*seeds: int, junk: bool = False) -> RouterStatistics:
    """Statistics of the batches with these seeds."""
    statistics = RouterStatistics(EXPERTS, GROUPS)
    for seed in seeds:
        indices, scores, mask = batch(BATCHES[seed], seed)
        if junk:
            scores[~mask] = torch.nan
        statistics.update(indices, scores, mask)
    return statistics


def entropy(shares: Any) -> float:
    return float(-sum(share * np.log(share) for share in shares if share > 0))


def expected() -> dict[str, Any]:
    """The measures of all batches in NumPy."""
    counts, importance = np.zeros(EXPERTS, dtype=int), np.zeros(EXPERTS)
    tokens, entropies, imbalances, violations = 0, [], [], []
    for seed, size in enumerate(BATCHES):
        indices, scores, mask = (value.numpy() for value in batch(size, seed))
        single = np.bincount(indices[mask].ravel(), minlength=EXPERTS)
        groups = single.reshape(GROUPS, -1).sum(axis=1)
        imbalances.append((groups.max() - groups.min()) / mask.sum())
        violations.append(single.max() / single.mean() - 1)
        counts, tokens = counts + single, tokens + mask.sum()
        shares = scores[mask] / scores[mask].sum(axis=1, keepdims=True)
        importance += shares.sum(axis=0)
        entropies += [entropy(row) for row in shares]
    groups = counts.reshape(GROUPS, -1).sum(axis=1)
    return dict(
        tokens=tokens,
        imbalance_score=(groups.max() - groups.min()) / tokens,
        batch_imbalance_score=np.mean(imbalances),
        max_violation=counts.max() / counts.mean() - 1,
        batch_max_violation=np.mean(violations),
        load_cv2=counts.var() / counts.mean() ** 2,
        load_entropy=entropy(counts / counts.sum()) / np.log(EXPERTS),
        importance_cv2=importance.var() / importance.mean() ** 2,
        score_entropy=np.mean(entropies) / np.log(EXPERTS),
        dead_experts=(EXPERTS - 1,),
        tokens_per_expert=counts.tolist(),
        tokens_per_group=groups.tolist(),
    )


def assert_expected(load: RouterLoad) -> None:
    for name, wanted in expected().items():
        got = getattr(load, name)
        got = got.tolist() if isinstance(got, Tensor) else got
        assert got == pytest.approx(wanted, rel=1e-12), name


@pytest.mark.parametrize("junk", [False, True])
def test_streamed_measures_are_right(junk: bool) -> None:
    statistics = filled(0, 1, 2, junk=junk)
    assert_expected(statistics.compute())
    assert statistics.tokens_per_expert.tolist() == expected()["tokens_per_expert"]


def test_parts_merge_to_the_whole() -> None:
    whole = filled(0)
    whole.merge(filled(1, 2))
    assert_expected(whole.compute())


def test_without_scores_there_is_no_entropy_of_scores() -> None:
    statistics = RouterStatistics(EXPERTS, GROUPS)
    for seed, size in enumerate(BATCHES):
        indices, _, mask = batch(size, seed)
        statistics.update(indices, token_mask=mask)
    load = statistics.compute()
    assert load.importance_cv2 is None
    assert load.score_entropy is None
    assert load.load_cv2 == pytest.approx(expected()["load_cv2"])


def test_batches_without_tokens_change_nothing() -> None:
    statistics = filled(0, 1, 2)
    indices, scores, mask = batch(4, 0)
    statistics.update(indices, scores, torch.zeros_like(mask))
    statistics.update(indices[:0], scores[:0])
    assert_expected(statistics.compute())


def test_nothing_seen_and_reset() -> None:
    statistics = filled(0, 1)
    statistics.reset()
    load = statistics.compute()
    assert load.tokens == 0
    assert load.imbalance_score == load.max_violation == load.load_cv2 == load.load_entropy == 0
    assert load.dead_experts == tuple(range(EXPERTS))
    assert load.score_entropy is None


def test_an_even_load() -> None:
    statistics = RouterStatistics(EXPERTS, GROUPS)
    statistics.update(torch.arange(16).view(8, 2) % EXPERTS, torch.ones(8, EXPERTS))
    load = statistics.compute()
    assert load.imbalance_score == load.max_violation == load.load_cv2 == 0
    assert load.load_entropy == pytest.approx(1)
    assert load.score_entropy == pytest.approx(1)
    assert load.dead_experts == ()


def test_plain_choice_is_as_uneven_as_published() -> None:
    """64 experts on 8 devices, 8 chosen, 16 tokens (arXiv 2505.21411, section 2.2): hardly ever even."""
    draws = 1000
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(draws * 16, 64, generator=generator)
    _, indices = route(logits, RoutingOptions(64, 8))
    scores = []
    for choice in indices.view(draws, 16, 8):
        statistics = RouterStatistics(64, 8)
        statistics.update(choice)
        scores.append(statistics.compute().imbalance_score)
    assert np.mean(scores) == pytest.approx(0.668, abs=0.02)
    assert min(scores) > 0
    grouped = RouterStatistics(64, 8)
    for part in logits.view(draws, 16, 64):
        grouped.update(route(part, RoutingOptions(64, 8, grouping="equal", num_expert_groups=8))[1])
    assert grouped.compute().batch_imbalance_score == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            dict(indices=torch.zeros(3, dtype=torch.int64)),
            r"`indices` must be int64 with shape .* got torch.int64 \(3,\)",
        ),
        (dict(indices=torch.zeros(3, 2)), "`indices` must be int64 .* got torch.float32"),
        (dict(scores=torch.zeros(3, 7)), r"`scores` must be floating point with shape \(3, 8\), got .* \(3, 7\)"),
        (dict(scores=torch.zeros(3, 8, dtype=torch.int64)), "`scores` must be floating point .* got torch.int64"),
        (dict(token_mask=torch.ones(2, dtype=torch.bool)), r"`token_mask` must be bool with shape \(3,\)"),
    ],
)
def test_bad_updates_are_refused(arguments: dict[str, Any], message: str) -> None:
    statistics = RouterStatistics(EXPERTS, GROUPS)
    with pytest.raises(ValueError, match=message):
        statistics.update(**{"indices": torch.zeros(3, 2, dtype=torch.int64), **arguments})
    assert statistics.compute().tokens == 0


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="`num_groups` must divide `num_experts`=8, got 3"):
        RouterStatistics(8, 3)
    with pytest.raises(ValueError, match="`num_experts` must be an integer of at least 1, got 0"):
        RouterStatistics(0, 1)
    with pytest.raises(ValueError, match=r"`other` must have \(8, 4\) experts and groups, got \(8, 2\)"):
        RouterStatistics(8, 4).merge(RouterStatistics(8, 2))
    with pytest.raises(ValueError, match="`group` must be a process group, None or 'local', got 'all'"):
        RouterStatistics(8, 4).all_reduce("all")
