"""The weighted divergence from a teacher against plain loops."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from vlparts.losses import _token_chunks
from vlparts.losses.distillation import DIVERGENCES, weighted_distillation_loss
from vlparts.losses.normalizer import LossNormalizer
from vlparts.losses.weights import PRESETS, weigh_tokens

CLASSES = 6


def made(seed: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, logits of the teacher, and labels of which some are ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits, teacher = torch.randn(2, *shape, CLASSES, generator=generator, dtype=torch.float64)
    labels = torch.zeros(shape, dtype=torch.int64).masked_fill(torch.rand(shape, generator=generator) < 0.4, -100)
    return logits, teacher, labels


def kl(first: torch.Tensor, second: torch.Tensor) -> float:
    p, q = (row.exp() / row.exp().sum() for row in (first, second))
    return sum(float(a) * math.log(float(a / b)) for a, b in zip(p, q, strict=True))


@settings(max_examples=40)
@given(
    seed=st.integers(0, 99),
    divergence=st.sampled_from(DIVERGENCES),
    temperature=st.floats(0.5, 4),
    preset=st.sampled_from([*PRESETS]),
    chunk=st.integers(1, 12),
)
def test_the_loss_is_the_weighted_sum_of_divergences(
    seed: int, divergence: str, temperature: float, preset: str, chunk: int
) -> None:
    logits, teacher, labels = made(seed, 2, 5)
    token_weights = made(seed + 1, 2, 5)[0][..., 0].abs()
    sample_weights = made(seed + 2, 2, 5)[0][:, 0, 0].abs()
    options: dict[str, Any] = dict(preset=preset, token_weights=token_weights, sample_weights=sample_weights)
    weights = weigh_tokens(labels, dtype=torch.float64, **options).weights.view(2, 5)
    total = 0.0
    for row, of_teacher, weight in zip(
        logits.flatten(0, 1), teacher.flatten(0, 1), weights.flatten().tolist(), strict=True
    ):
        pair = (of_teacher, row) if divergence == "forward" else (row, of_teacher)
        total += weight * temperature**2 * kl(*(side / temperature for side in pair))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_token_chunks, "CHUNK_BYTES", chunk * 4 * CLASSES)
        loss = weighted_distillation_loss(
            logits, teacher, labels, divergence=divergence, temperature=temperature, **options
        )
    assert float(loss) == pytest.approx(total, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients(divergence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_token_chunks, "CHUNK_BYTES", 3 * 4 * CLASSES)
    logits, teacher, labels = made(0, 2, 4)
    token_weights = made(1, 2, 4)[0][..., 0].abs().requires_grad_()
    teacher.requires_grad_()

    def loss(logits: torch.Tensor, token_weights: torch.Tensor) -> torch.Tensor:
        return weighted_distillation_loss(
            logits, teacher, labels, divergence=divergence, temperature=1.7, token_weights=token_weights
        )

    assert torch.autograd.gradcheck(loss, (logits.requires_grad_(), token_weights))
    loss(logits, token_weights).backward()
    assert logits.grad is not None
    assert not logits.grad[labels == -100].any()
    assert teacher.grad is None


def test_a_sure_teacher_gives_the_cross_entropy() -> None:
    logits, _, labels = made(3, 2, 6)
    targets = torch.randint(0, CLASSES, (2, 6), generator=torch.Generator().manual_seed(3))
    teacher = torch.full((2, 6, CLASSES), -math.inf, dtype=torch.float64).scatter(2, targets.unsqueeze(2), 0.0)
    leaf = logits.requires_grad_()
    loss = weighted_distillation_loss(leaf, teacher, labels, preset="token")
    kept = targets.masked_fill(labels == -100, -100)
    expected = F.cross_entropy(logits.flatten(0, 1), kept.flatten())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf), torch.autograd.grad(expected, leaf))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_class_that_both_exclude_changes_nothing(divergence: str) -> None:
    logits, teacher, labels = made(4, 5)
    wider = [F.pad(side, (0, 1), value=-math.inf).requires_grad_() for side in (logits, teacher)]
    loss = weighted_distillation_loss(*wider, labels, divergence=divergence)
    leaf = logits.requires_grad_()
    expected = weighted_distillation_loss(leaf, teacher, labels, divergence=divergence)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, wider[0])
    torch.testing.assert_close(gradient[:, :CLASSES], *torch.autograd.grad(expected, leaf))
    assert not gradient[:, CLASSES].any()


def test_the_same_distribution_costs_nothing() -> None:
    logits, _, labels = made(5, 2, 4)
    for divergence in DIVERGENCES:
        loss = weighted_distillation_loss(logits, logits + 3, labels, divergence=divergence)
        assert float(loss) == pytest.approx(0, abs=1e-12)


def test_micro_batches_add_up_to_the_step() -> None:
    logits, teacher, labels = made(6, 5, 4)
    whole = weighted_distillation_loss(logits, teacher, labels)
    normalizer = LossNormalizer()
    pieces = [slice(0, 2), slice(2, 3), slice(3, 5)]
    for piece in pieces:
        normalizer.add(labels[piece])
    parts = [
        weighted_distillation_loss(logits[piece], teacher[piece], labels[piece], **normalizer.options)
        for piece in pieces
    ]
    torch.testing.assert_close(torch.stack(parts).sum(), whole)


@pytest.mark.parametrize(("shape", "weight"), [((0, 3), 1.0), ((0,), 1.0), ((2, 0), 1.0), ((2, 3), 0.0)])
def test_without_weight_the_loss_is_zero_with_a_graph(shape: tuple[int, ...], weight: float) -> None:
    logits = torch.full((*shape, CLASSES), math.nan, requires_grad=True)
    labels = torch.zeros(shape, dtype=torch.int64)
    loss = weighted_distillation_loss(logits, logits.detach(), labels, token_weights=torch.full(shape, weight))
    loss.backward()
    assert float(loss.detach()) == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_tokens_without_label_may_hold_anything() -> None:
    logits, teacher, labels = made(7, 6)
    expected = weighted_distillation_loss(logits, teacher, labels)
    ignored = labels == -100
    assert ignored.any()
    logits[ignored], teacher[ignored] = math.nan, math.inf
    assert float(weighted_distillation_loss(logits, teacher, labels)) == float(expected)


def test_compiled_and_low_precision_give_the_same() -> None:
    logits, teacher, labels = made(8, 2, 5)
    leaf = logits.requires_grad_()
    expected = weighted_distillation_loss(leaf, teacher, labels)
    (gradient,) = torch.autograd.grad(expected, leaf)
    teacher.requires_grad_()
    compiled = torch.compile(weighted_distillation_loss, backend="aot_eager", fullgraph=True)(leaf, teacher, labels)
    torch.testing.assert_close(compiled, expected)
    compiled.backward()
    torch.testing.assert_close(leaf.grad, gradient)
    assert teacher.grad is None
    low = logits.detach().bfloat16().requires_grad_()
    loss = weighted_distillation_loss(low, teacher.float(), labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert low.grad is not None
    assert low.grad.dtype == torch.bfloat16
    torch.testing.assert_close(low.grad.double(), gradient, rtol=0.05, atol=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(4, CLASSES)}, r"`logits` must be floating-point of shape \(3, 'V'\)"),
        (
            {"teacher_logits": torch.zeros(3, 2)},
            rf"`teacher_logits` must be floating-point of the shape of `logits`, \(3, {CLASSES}\), got .* \(3, 2\)",
        ),
        ({"divergence": "both"}, "`divergence` must be one of forward, reverse, got 'both'"),
        ({"temperature": 0}, "`temperature` must be a finite number above 0, got 0"),
        ({"temperature": math.inf}, "`temperature` must be a finite number above 0, got inf"),
        ({"token_weights": -torch.ones(3)}, "`token_weights` must be finite and at least 0, got -1.0"),
    ],
)
def test_bad_inputs_are_refused(changes: dict[str, Any], message: str) -> None:
    inputs = {"logits": torch.zeros(3, CLASSES), "teacher_logits": torch.zeros(3, CLASSES)}
    with pytest.raises(ValueError, match=message):
        weighted_distillation_loss(**{**inputs, "labels": torch.zeros(3, dtype=torch.int64), **changes})
