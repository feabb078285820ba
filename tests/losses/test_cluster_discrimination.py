"""The multi-label loss against loops over images and centres."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests.parts.test_dual_encoder_loss import LargestTensor
from vlparts.losses.cluster_discrimination import multi_label_cluster_loss, sample_negative_centers

LABELS = torch.tensor([[1, 4, -1], [0, 0, 0], [-1, -1, -1], [5, 2, 6]])


def plain(
    features: Tensor,
    centers: Tensor,
    labels: Tensor,
    scale: float,
    margin: float = 0.0,
    negatives: list[int] | None = None,
) -> Tensor:
    """The formula of the paper, cosine by cosine."""
    losses = []
    for feature, row in zip(features, labels.tolist(), strict=True):
        cosines = [feature @ center / (feature.norm() * center.norm()) for center in centers]
        own = set(row) - {-1}
        others = set(range(len(centers)) if negatives is None else negatives) - own
        one = torch.ones((), dtype=features.dtype)
        positive = sum((torch.exp(-scale * (cosines[i] - margin)) for i in own), one).log()
        negative = sum((torch.exp(scale * cosines[j]) for j in others), one).log()
        losses.append(positive + negative)
    return torch.stack(losses).mean()


def inputs(images: int = 4, centers: int = 7, width: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((images, width), (centers, width))
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    return drawn[0], drawn[1]


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
@pytest.mark.parametrize("margin", [0.0, 0.3])
@pytest.mark.parametrize("negatives", [None, [6, 0, 3, 1], []])
def test_value_and_gradients_are_those_of_the_formula(
    chunk_size: int, margin: float, negatives: list[int] | None
) -> None:
    tensors = inputs()
    chosen = None if negatives is None else torch.tensor(negatives, dtype=torch.int64)
    ours = multi_label_cluster_loss(
        *tensors, LABELS, scale=4.0, margin=margin, negatives=chosen, chunk_size=chunk_size
    )
    expected = plain(*tensors, LABELS, 4.0, margin, negatives)
    torch.testing.assert_close(ours, expected)
    for found, wanted in zip(torch.autograd.grad(ours, tensors), torch.autograd.grad(expected, tensors), strict=True):
        torch.testing.assert_close(found, wanted)


def test_gradients_hold_against_small_differences() -> None:
    def loss(features: Tensor, centers: Tensor) -> Tensor:
        return multi_label_cluster_loss(features, centers, LABELS, scale=3.0, margin=0.1, chunk_size=2)

    assert torch.autograd.gradcheck(loss, inputs())


def test_one_label_is_the_plain_form() -> None:
    features, centers = inputs()
    labels = torch.tensor([2, 0, 6, 2])
    scores = 10.0 * F.normalize(features) @ F.normalize(centers).T
    right = scores.gather(1, labels[:, None])[:, 0]
    others = scores.scatter(1, labels[:, None], -torch.inf)
    expected = F.softplus(-right) + F.softplus(others.logsumexp(1))
    ours = multi_label_cluster_loss(features, centers, labels[:, None], scale=10.0)
    torch.testing.assert_close(ours, expected.mean())


label_rows = st.integers(0, 4).flatmap(
    lambda width: st.lists(st.lists(st.integers(-1, 6), min_size=width, max_size=width), min_size=1, max_size=5)
)


@given(label_rows, st.randoms(use_true_random=False), st.integers(1, 8))
def test_order_and_repetition_change_nothing(rows: list[list[int]], chance: Any, chunk_size: int) -> None:
    features, centers = inputs(len(rows))
    labels = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), -1)
    loss = multi_label_cluster_loss(features, centers, labels, scale=5.0)
    images, places = (chance.sample(range(size), size) for size in (len(rows), len(centers)))
    moved = torch.tensor([places.index(center) for center in range(7)] + [-1])
    shuffled = moved[labels[images]][:, chance.sample(range(labels.shape[1]), labels.shape[1])]
    shuffled = torch.cat([shuffled, shuffled[:, :2], torch.full((len(rows), 1), -1)], dim=1)
    again = multi_label_cluster_loss(features[images], centers[places], shuffled, scale=5.0, chunk_size=chunk_size)
    torch.testing.assert_close(again, loss)


@given(label_rows, st.floats(0, 2), st.floats(0.1, 100))
def test_the_margin_raises_the_loss_by_its_scores_at_most(rows: list[list[int]], margin: float, scale: float) -> None:
    features, centers = inputs(len(rows))
    labels = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), -1)
    without = multi_label_cluster_loss(features, centers, labels, scale=scale)
    raised = multi_label_cluster_loss(features, centers, labels, scale=scale, margin=margin) - without
    labelled = (labels >= 0).any(1).double().mean() if labels.shape[1] else 0.0
    assert -1e-9 <= raised <= labelled * scale * margin + 1e-9


@given(label_rows, st.floats(0.1, 100), st.floats(0.1, 10))
def test_lengths_do_not_count_and_the_loss_is_bounded(rows: list[list[int]], scale: float, length: float) -> None:
    features, centers = inputs(len(rows))
    labels = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), -1)
    loss = multi_label_cluster_loss(features, centers, labels, scale=scale)
    torch.testing.assert_close(
        multi_label_cluster_loss(features * length, centers / length, labels, scale=scale), loss
    )
    assert 0 <= loss <= 2 * (scale + math.log(1 + len(centers)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores_stay_finite(dtype: torch.dtype) -> None:
    centers = torch.eye(4, dtype=dtype).requires_grad_()
    features = torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]], dtype=dtype, requires_grad=True)
    labels = torch.tensor([[1], [0]])
    loss = multi_label_cluster_loss(features, centers, labels, scale=1e6, margin=0.5)
    assert loss.dtype == torch.float32
    # Image 0 has its label at cosine 0 and a wrong centre at 1; image 1 has its label at -1.
    torch.testing.assert_close(loss.item(), (0.5e6 + 1e6 + 1.5e6 + math.log(4)) / 2)
    for gradient in torch.autograd.grad(loss, (features, centers)):
        assert gradient.isfinite().all()
        assert gradient.dtype == dtype


def test_half_precision_is_computed_in_single() -> None:
    features, centers = (tensor.detach().bfloat16() for tensor in inputs())
    expected = plain(features.double(), centers.double(), LABELS, 20.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = multi_label_cluster_loss(features, centers, LABELS, scale=20.0, chunk_size=2)
    torch.testing.assert_close(ours, expected.float())


def test_the_scores_of_all_centers_are_never_held() -> None:
    features, centers = inputs(images=32, centers=512, width=4)
    labels = torch.randint(512, (32, 3), generator=torch.Generator().manual_seed(0))
    with LargestTensor() as largest:
        multi_label_cluster_loss(features, centers, labels, scale=4.0, chunk_size=16).backward()
    assert largest.elements <= centers.numel() < len(features) * len(centers)


def test_training_separates_two_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(2, 8, generator=generator)
    kinds = torch.arange(40) % 2
    images = directions[kinds] + 0.5 * torch.randn(40, 8, generator=generator)
    layer = torch.nn.Linear(8, 4, bias=False)
    centers = torch.nn.Parameter(torch.randn(6, 4, generator=generator))
    with torch.no_grad():
        layer.weight.copy_(torch.randn(4, 8, generator=generator) / 8**0.5)
    labels = torch.stack([kinds, kinds + 2], dim=1)  # two centres per kind, and two unused ones

    def margins() -> Tensor:
        """Margin of each image's worse label over the better label of the other kind."""
        cosines = F.normalize(layer(images)) @ F.normalize(centers).T
        others = torch.stack([1 - kinds, 3 - kinds], dim=1)
        return cosines.gather(1, labels).amin(1) - cosines.gather(1, others).amax(1)

    assert margins().min() < 0
    optimizer = torch.optim.Adam([*layer.parameters(), centers], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        multi_label_cluster_loss(layer(images), centers, labels, scale=8.0, margin=0.1).backward()
        optimizer.step()
    assert margins().min() > 0
    assert margins().mean() > 1


@given(label_rows, st.integers(1, 7), st.integers(0, 2**31))
def test_drawn_centers_hold_the_labels(rows: list[list[int]], count: int, seed: int) -> None:
    labels = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), -1)
    drawn = sample_negative_centers(labels, 7, count, torch.Generator().manual_seed(seed))
    ids = drawn.tolist()
    wanted = {label for row in rows for label in row} - {-1}
    assert ids == sorted(set(ids))
    assert wanted <= set(ids) <= set(range(7))
    assert len(ids) == max(count, len(wanted))


def test_drawn_centers_are_reproducible_and_vary() -> None:
    labels = torch.tensor([[3, -1]])
    draws = [sample_negative_centers(labels, 1000, 20, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_drawn_centers_serve_as_negatives() -> None:
    tensors = inputs()
    drawn = sample_negative_centers(LABELS[:2], 7, 5, torch.Generator().manual_seed(0))
    ours = multi_label_cluster_loss(*tensors, LABELS, scale=4.0, negatives=drawn)
    torch.testing.assert_close(ours, plain(*tensors, LABELS, 4.0, negatives=drawn.tolist()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": torch.zeros(4)}, "`features` must be floating point with shape"),
        ({"features": torch.zeros(0, 5)}, "`features` must be floating point .* at least one row"),
        ({"features": torch.zeros(4, 5, dtype=torch.int64)}, "`features` must be floating point"),
        ({"centers": torch.zeros(0, 5)}, "`centers` must be floating point"),
        ({"centers": torch.zeros(7, 6)}, "the same width, got 5 and 6"),
        ({"labels": LABELS.int()}, "`labels` must be int64 .* got torch.int32"),
        ({"labels": LABELS[:3]}, r"`labels` must be int64 with shape \(4, labels\)"),
        ({"labels": LABELS[:, 0]}, "`labels` must be int64"),
        ({"labels": LABELS + 1}, "`labels` must be between -1 .padding. and 6, got values from 0 to 7"),
        ({"labels": LABELS - 1}, "got values from -2 to 5"),
        ({"scale": 0.0}, "`scale` must be a finite number above 0, got 0.0"),
        ({"scale": math.inf}, "`scale` must be a finite number"),
        ({"margin": -0.1}, "`margin` must be a finite number of at least 0, got -0.1"),
        ({"margin": math.nan}, "`margin` must be a finite number"),
        ({"negatives": torch.tensor([0.0])}, "`negatives` must be int64"),
        ({"negatives": torch.tensor([[0]])}, r"`negatives` must be int64 with shape \(count,\)"),
        ({"negatives": torch.tensor([7])}, "`negatives` must be between 0 and 6"),
        ({"negatives": torch.tensor([-1])}, "`negatives` must be between 0 and 6"),
        ({"negatives": torch.tensor([1, 2, 1])}, "`negatives` must be distinct, got 3 of which 2 are distinct"),
        ({"chunk_size": 0}, "`chunk_size` must be an integer of at least 1, got 0"),
    ],
)
def test_bad_inputs_are_refused(changes: dict[str, Any], message: str) -> None:
    features, centers = inputs()
    with pytest.raises(ValueError, match=message):
        multi_label_cluster_loss(**{"features": features, "centers": centers, "labels": LABELS, **changes})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((LABELS, 7, 8), "`count` must be at most `num_centers`=7, got 8"),
        ((LABELS, 7, 0), "`count` must be an integer of at least 1, got 0"),
        ((LABELS, 6, 3), "`labels` must be between -1 .padding. and 5"),
        ((LABELS, 0, 3), "`num_centers` must be an integer of at least 1, got 0"),
    ],
)
def test_bad_draws_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_negative_centers(*arguments)
