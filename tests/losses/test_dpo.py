"""DPO with weights of pairs and tokens against plain loops."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlparts.losses import _token_chunks
from vlparts.losses.dpo import sequence_log_probs, weighted_dpo_loss
from vlparts.losses.normalizer import LossNormalizer

CLASSES = 7


def made(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def labels_of(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, shape, generator=generator)
    return labels.masked_fill(torch.rand(shape, generator=generator) < 0.4, -100)


def pair_loss(difference: float, beta: float, smoothing: float) -> float:
    def log_sigmoid(x: float) -> float:
        return -math.log1p(math.exp(-x))

    return -(1 - smoothing) * log_sigmoid(beta * difference) - smoothing * log_sigmoid(-beta * difference)


@settings(max_examples=30)
@given(seed=st.integers(0, 99), average=st.booleans(), weighted=st.booleans(), chunk=st.integers(1, 20))
def test_log_probs_are_sums_over_samples(seed: int, average: bool, weighted: bool, chunk: int) -> None:
    logits, labels = made(seed, 12, CLASSES), labels_of(seed, 12)
    ids = torch.randint(-1, 4, (12,), generator=torch.Generator().manual_seed(seed))
    ids[0] = 3
    weights = made(seed + 1, 12).abs() if weighted else None
    sums, sizes = [0.0] * 4, [0.0] * 4
    for row, label, sample, weight in zip(logits, labels, ids, weights if weighted else [1.0] * 12, strict=True):
        if label >= 0 and sample >= 0:
            sums[sample] += float(weight) * math.log(float(row[label].exp() / row.exp().sum()))
            sizes[sample] += float(weight)
    if average:
        sums = [total / size if size else 0.0 for total, size in zip(sums, sizes, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_token_chunks, "CHUNK_BYTES", chunk * 4 * CLASSES)
        found = sequence_log_probs(logits, labels, average=average, token_weights=weights, sample_ids=ids)
    torch.testing.assert_close(found.log_probs, torch.tensor(sums, dtype=torch.float64))
    torch.testing.assert_close(found.sizes, torch.tensor(sizes, dtype=torch.float64))


@settings(max_examples=30)
@given(
    seed=st.integers(0, 99),
    beta=st.floats(0.01, 5),
    smoothing=st.floats(0, 0.45),
    referenced=st.booleans(),
    weighted=st.booleans(),
    per_token=st.booleans(),
)
def test_dpo_is_the_weighted_mean_over_pairs(
    seed: int, beta: float, smoothing: float, referenced: bool, weighted: bool, per_token: bool
) -> None:
    chosen, rejected, first, second = (made(seed + i, 5, 3 + i) for i in range(4))
    sums = [side.sum(1) for side in (chosen, rejected, first, second)]
    weights = made(seed + 9, 5).abs() if weighted else torch.ones(5, dtype=torch.float64)
    total = 0.0
    for i in range(5):
        difference = float(sums[0][i] - sums[1][i])
        if referenced:
            difference -= float(sums[2][i] - sums[3][i])
        total += float(weights[i] / weights.sum()) * pair_loss(difference, beta, smoothing)
    given_sides = ((chosen, rejected, first, second) if per_token else sums)[: 4 if referenced else 2]
    options = dict(beta=beta, label_smoothing=smoothing, sample_weights=weights if weighted else None)
    loss = weighted_dpo_loss(*given_sides, **options)
    assert loss.dtype == torch.float64
    assert float(loss) == pytest.approx(total, rel=1e-9)


def test_gradients() -> None:
    logits, labels = made(0, 2, 5, CLASSES).requires_grad_(), labels_of(0, 2, 5)
    weights = made(1, 2, 5).abs().requires_grad_()

    def log_probs(logits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return sequence_log_probs(logits, labels, token_weights=weights, average=True).log_probs

    assert torch.autograd.gradcheck(log_probs, (logits, weights))
    sides = tuple(made(i, 4).requires_grad_() for i in range(2))
    reference, importance = made(7, 2, 4), made(2, 4).abs()
    assert torch.autograd.gradcheck(
        lambda a, b: weighted_dpo_loss(a, b, *reference, label_smoothing=0.1, sample_weights=importance), sides
    )


def test_references_get_no_gradient() -> None:
    sides = [made(i, 4).requires_grad_() for i in range(4)]
    weighted_dpo_loss(*sides).backward()
    assert [side.grad is None for side in sides] == [False, False, True, True]


def test_micro_batches_add_up_to_the_step() -> None:
    sides, weights = made(0, 4, 6), made(1, 6).abs()
    whole = weighted_dpo_loss(*sides, sample_weights=weights)
    normalizer = LossNormalizer("sample")
    micro_batches = list(zip(sides.split([1, 3, 2], 1), weights.split([1, 3, 2]), strict=True))
    for _, importance in micro_batches:
        normalizer.add(torch.zeros(len(importance), 1, dtype=torch.int64), sample_weights=importance)
    parts = [
        weighted_dpo_loss(*of_pairs, sample_weights=importance, normalizer=normalizer)
        for of_pairs, importance in micro_batches
    ]
    torch.testing.assert_close(torch.stack(parts).sum(), whole)


@pytest.mark.parametrize("masked", [True, False])
def test_pairs_without_weight_may_hold_anything(masked: bool) -> None:
    chosen, rejected = made(0, 3), made(1, 3)
    chosen[1], rejected[1] = math.nan, math.inf
    sides = chosen.requires_grad_(), rejected.requires_grad_()
    counted = torch.tensor([True, False, True])
    options: dict[str, Any] = {"pair_mask": counted} if masked else {"sample_weights": counted.double()}
    loss = weighted_dpo_loss(*sides, **options)
    loss.backward()
    kept = [side.detach()[counted].requires_grad_() for side in sides]
    expected = weighted_dpo_loss(*kept)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for side, other in zip(sides, kept, strict=True):
        assert side.grad is not None
        assert side.grad[1] == 0
        torch.testing.assert_close(side.grad[counted], other.grad)


@pytest.mark.parametrize(("pairs", "weight"), [(0, 1.0), (3, 0.0)])
def test_without_weight_the_loss_is_zero_with_a_graph(pairs: int, weight: float) -> None:
    sides = made(0, pairs).requires_grad_(), made(1, pairs).requires_grad_()
    loss = weighted_dpo_loss(*sides, sample_weights=torch.full((pairs,), weight))
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(side.grad is not None and not side.grad.any() for side in sides)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (2, 3)])
def test_answers_without_tokens_have_log_probability_zero(shape: tuple[int, ...]) -> None:
    logits = torch.full((*shape, CLASSES), math.nan, requires_grad=True)
    found = sequence_log_probs(logits, torch.full(shape, -100), average=True)
    assert found.log_probs.tolist() == found.sizes.tolist() == [0.0] * (1 if len(shape) == 1 else shape[0])
    found.log_probs.sum().backward()
    assert logits.grad is not None
    assert not logits.grad.any()
    both = weighted_dpo_loss(found.log_probs, found.log_probs, pair_mask=found.sizes > 0)
    assert float(both.detach()) == 0


def test_low_precision_is_summed_in_float32() -> None:
    logits, labels = made(0, 2, 5, CLASSES).bfloat16(), labels_of(0, 2, 5)
    found, expected = (sequence_log_probs(side, labels).log_probs for side in (logits, logits.double()))
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    assert weighted_dpo_loss(found.bfloat16(), found.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0}, "`beta` must be a finite number above 0, got 0"),
        ({"beta": math.nan}, "`beta` must be a finite number above 0, got nan"),
        ({"label_smoothing": 0.5}, "`label_smoothing` must be at least 0 and below 0.5, got 0.5"),
        (
            {"reference_chosen": torch.zeros(3)},
            "`reference_rejected` must be given together, got only one",
        ),
        (
            {"rejected": torch.zeros(2)},
            r"`rejected` must be floating-point \(3,\) or \(3, S\), got torch.float32 \(2,\)",
        ),
        ({"chosen": torch.zeros(3, dtype=torch.int64)}, r"`chosen` must be floating-point \(n,\) or \(n, S\)"),
        ({"chosen": torch.zeros(())}, r"`chosen` must be floating-point \(n,\) or \(n, S\), got torch.float32 \(\)"),
        ({"pair_mask": torch.ones(3)}, r"`pair_mask` must be bool of shape \(3,\), got torch.float32 \(3,\)"),
        ({"sample_weights": torch.ones(2)}, r"`sample_weights` must be numbers of shape \(3,\)"),
        ({"sample_weights": -torch.ones(3)}, "`sample_weights` must be finite and at least 0, got -1.0"),
    ],
)
def test_bad_pairs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weighted_dpo_loss(**{"chosen": torch.zeros(3), "rejected": torch.zeros(3), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(4, CLASSES)}, r"`logits` must be floating-point of shape \(3, 'V'\)"),
        ({"logits": torch.zeros(3, CLASSES, dtype=torch.int64)}, "`logits` must be floating-point"),
        ({"labels": torch.tensor([0, 1, CLASSES])}, f"`labels` must be between 0 and {CLASSES - 1}, or -100, got 7"),
        ({"token_weights": torch.tensor([1, math.nan, 1])}, "`token_weights` must be finite and at least 0, got nan"),
    ],
)
def test_bad_logits_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sequence_log_probs(**{"logits": torch.zeros(3, CLASSES), "labels": torch.tensor([0, 1, -100]), **changes})
