"""The weighted loss of logits against its formula in loops and against torch's loss, and its edge cases."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.losses.loss_oracle import (
    IGNORED,
    VOCABULARY,
    Case,
    assert_equal,
    drawn,
    gradients,
    looped_loss,
    make_case,
    numeric_gradient,
    rows_of,
    token_loss,
)
from vlparts.losses.cross_entropy import WeightedLoss, weighted_cross_entropy, weighted_cross_entropy_with_parts
from vlparts.losses.weights import PRESETS

LENGTHS = [5, 1, 0, 6]


def loss_of(case: Case, **options: Any) -> Tensor:
    return weighted_cross_entropy(case.logits, case.labels, **{**case.weighting, **options})


def parts_of(case: Case, **options: Any) -> WeightedLoss:
    return weighted_cross_entropy_with_parts(case.logits, case.labels, **{**case.weighting, **options})


def plain(case: Case) -> dict[str, Tensor]:
    """The samples without weights."""
    return dict(cu_seqlens=case.cu_seqlens, sample_weights=None, token_weights=None)


@pytest.mark.parametrize(("smoothing", "z"), [(0, 0), (0.1, 0), (0, 0.3), (0.2, 0.1), (1, 0)])
@pytest.mark.parametrize(("mix", "exponent"), [(0, 0), (1, 0), (0, 0.5), (0.4, 1.5)])
def test_equals_the_formula(mix: float, exponent: float, smoothing: float, z: float) -> None:
    case = make_case(LENGTHS)
    loss = loss_of(case, mix=mix, length_exponent=exponent, label_smoothing=smoothing, z_loss=z)
    assert loss.dtype == torch.float64
    assert_equal(loss.item(), looped_loss(case, mix, exponent, smoothing, z), 1e-12)


def test_gradients_are_those_of_the_formula() -> None:
    case = make_case([4, 0, 3])
    case.sample_weights.requires_grad_()
    case.token_weights.requires_grad_()
    leaves = [case.logits, case.sample_weights, case.token_weights]
    loss = loss_of(case, mix=0.4, length_exponent=0.5, label_smoothing=0.1, z_loss=0.2)
    for leaf, got in zip(leaves, gradients(loss, *leaves), strict=True):
        assert_equal(got, numeric_gradient(lambda: looped_loss(case, 0.4, 0.5, 0.1, 0.2), leaf), 1e-8)


def test_gradcheck() -> None:
    case = make_case([3, 2])

    def function(logits: Tensor, a: Tensor, b: Tensor) -> Tensor:
        options = dict(case.weighting, sample_weights=a, token_weights=b, mix=0.3, length_exponent=0.5)
        return weighted_cross_entropy(logits, case.labels, z_loss=0.1, label_smoothing=0.1, **options)

    leaves = case.logits, case.sample_weights.requires_grad_(), case.token_weights.requires_grad_()
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_a_weight_of_zero_has_the_gradient_of_the_formula() -> None:
    case = make_case([4, 3], ignored=0)
    weights = case.token_weights.index_fill(0, torch.tensor([1, 5]), 0).requires_grad_()
    importance = torch.tensor([0.7, 0.0]).double().requires_grad_()
    case = case._replace(token_weights=weights, sample_weights=importance)
    for leaf, got in zip((weights, importance), gradients(loss_of(case), weights, importance), strict=True):
        assert_equal(got, numeric_gradient(lambda: looped_loss(case, 0.5, 0), leaf), 1e-8)
        assert got[1] != 0
    outside = case.logits.detach().index_fill(0, torch.tensor([6]), torch.nan)
    ids = torch.tensor([0, 0, 0, 0, 1, 1, -1])
    loss = loss_of(case._replace(logits=outside), cu_seqlens=None, sample_ids=ids)
    assert loss.isfinite()
    assert gradients(loss, weights)[0].isfinite().all()


@pytest.mark.parametrize("smoothing", [0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_token_is_torchs_mean(dtype: torch.dtype, smoothing: float) -> None:
    logits, labels = (3 * drawn(3, 8, VOCABULARY)).to(dtype).requires_grad_(), make_case([24]).labels.view(3, 8)
    loss = weighted_cross_entropy(logits, labels, preset="token", label_smoothing=smoothing)
    wide = logits.to(loss.dtype)
    expected = F.cross_entropy(wide.flatten(0, 1), labels.flatten(), label_smoothing=smoothing)
    assert loss.dtype == (dtype if dtype == torch.float64 else torch.float32)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 1e-3)
    assert_equal(loss, expected, tolerance)
    assert_equal(gradients(loss, logits), gradients(expected, logits), tolerance)


def test_sample_is_the_mean_of_means() -> None:
    case = make_case([5, 1, 4], ignored=0)
    case.labels[1:3] = IGNORED
    means = [F.cross_entropy(case.logits[rows], case.labels[rows]) for rows in rows_of(case.cu_seqlens)]
    loss = loss_of(case, preset="sample", **plain(case))
    assert_equal(loss, torch.stack(means).mean(), 1e-12)
    assert_equal(gradients(loss, case.logits), gradients(torch.stack(means).mean(), case.logits), 1e-12)


def test_the_mix_lies_between() -> None:
    case = make_case(LENGTHS)
    sample, token = loss_of(case, preset="sample"), loss_of(case, preset="token")
    assert_equal(loss_of(case, preset="openpangu_mix", mix=0.3), 0.3 * sample + 0.7 * token, 1e-13)
    assert_equal(loss_of(case), (sample + token) / 2, 1e-13)


@pytest.mark.parametrize("junk", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("preset", PRESETS)
def test_ignored_tokens_may_hold_anything(preset: str, junk: float) -> None:
    case = make_case(LENGTHS)
    case.token_weights[4] = 0
    case.sample_weights[1] = 0
    for z in (0, 0.1):
        out = (case.labels == IGNORED) | (case.token_weights == 0) | (torch.arange(12) == 5)
        clean = loss_of(case, preset=preset, z_loss=z)
        poisoned = case._replace(logits=case.logits.detach().masked_fill(out[:, None], junk).requires_grad_())
        loss = loss_of(poisoned, preset=preset, z_loss=z)
        assert_equal(loss, clean, 1e-14)
        (got,), (wanted,) = gradients(loss, poisoned.logits), gradients(clean, case.logits)
        assert_equal(got, wanted, 1e-14)
        assert not got[out].any()
        assert got[~out].any(1).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_nothing_to_learn_is_zero_with_a_graph(preset: str) -> None:
    case = make_case([2, 0, 3])
    nothing = [
        case._replace(labels=torch.full_like(case.labels, IGNORED)),
        case._replace(sample_weights=torch.zeros(3)),
        case._replace(token_weights=torch.zeros(5)),
        make_case([]),
        make_case([0, 0]),
    ]
    for empty in nothing:
        found = parts_of(empty, preset=preset, z_loss=0.1, label_smoothing=0.1)
        assert found.loss.item() == 0
        assert found.per_token.tolist() == [0] * len(empty.labels)
        assert found.per_sample.tolist() == [0] * len(empty.sample_weights)
        (gradient,) = torch.autograd.grad(found.loss, empty.logits)
        assert gradient.shape == empty.logits.shape
        assert not gradient.any()
    assert parts_of(nothing[0]).valid_tokens == 0
    assert parts_of(nothing[1]).valid_tokens == (case.labels != IGNORED).sum()


def test_one_sample_without_labels_does_not_disturb_the_others() -> None:
    # MindSpeed-MM divides by the number of labels even if it is 0.
    case = make_case([3, 2, 4], ignored=0)
    case.labels[3:5] = IGNORED
    keep = torch.tensor([0, 1, 2, 5, 6, 7, 8])
    for preset in PRESETS:
        rest = weighted_cross_entropy(
            case.logits[keep],
            case.labels[keep],
            preset=preset,
            cu_seqlens=torch.tensor([0, 3, 7]),
            sample_weights=case.sample_weights[[0, 2]],
            token_weights=case.token_weights[keep],
        )
        assert_equal(loss_of(case, preset=preset), rest, 1e-14)


def test_parts_say_what_the_loss_is_made_of() -> None:
    case = make_case(LENGTHS)
    case.sample_weights[1] = 0
    found = parts_of(case, preset="square", label_smoothing=0.1)
    assert_equal((found.weights * found.per_token).sum(), found.loss.detach(), 1e-13)
    assert not any(part.requires_grad for part in found[1:])
    for place, label in enumerate(case.labels.tolist()):
        counted = label != IGNORED and place != 5
        wanted = token_loss(case.logits[place].tolist(), label, 0.1) if counted else 0.0
        assert_equal(found.per_token[place].item(), wanted, 1e-12)
    for sample, rows in enumerate(rows_of(case.cu_seqlens)):
        b = case.token_weights[rows].where(case.labels[rows] != IGNORED, 0)
        mean = (b * found.per_token[rows]).sum() / b.sum() if sample not in (1, 2) else torch.zeros(()).double()
        assert_equal(found.per_sample[sample], mean, 1e-12)
    assert found.valid_tokens == (case.labels != IGNORED).sum()
    assert found.valid_samples == sum(bool((case.labels[rows] != IGNORED).any()) for rows in rows_of(case.cu_seqlens))
    shaped = weighted_cross_entropy_with_parts(case.logits.view(3, 4, -1), case.labels.view(3, 4))
    assert (shaped.per_token.shape, shaped.weights.shape, shaped.per_sample.shape) == ((3, 4), (3, 4), (3,))


def test_another_label_may_be_ignored() -> None:
    case = make_case(LENGTHS)
    other = case.labels.masked_fill(case.labels == IGNORED, VOCABULARY + 3)
    loss = weighted_cross_entropy(case.logits, other.int(), ignore_index=VOCABULARY + 3, **case.weighting)
    assert_equal(loss, loss_of(case), 0)
    zero = weighted_cross_entropy(case.logits, case.labels.clamp(min=0), ignore_index=0, preset="token")
    assert_equal(zero, F.cross_entropy(case.logits, case.labels.clamp(min=0), ignore_index=0), 1e-13)


@pytest.mark.parametrize("preset", ["square", "openpangu_mix"])
def test_compiles(preset: str) -> None:
    case = make_case([12])
    rows = dict(preset=preset, token_weights=case.token_weights.view(3, 4), label_smoothing=0.1, z_loss=0.1)
    logits, labels = case.logits.detach().view(3, 4, -1).clone(), case.labels.view(3, 4)
    logits[labels == IGNORED] = torch.nan
    logits.requires_grad_()
    compiled = torch.compile(weighted_cross_entropy, backend="aot_eager", fullgraph=True)(logits, labels, **rows)
    expected = weighted_cross_entropy(logits, labels, **rows)
    assert_equal(compiled, expected, 1e-12)
    assert_equal(gradients(compiled, logits), gradients(expected, logits), 1e-12)


LOGITS, LABELS = torch.zeros(2, 3, 5), torch.zeros(2, 3).long()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(logits=LOGITS.long()), "`logits` must be floating-point .* got torch.int64"),
        (dict(logits=LOGITS[0]), r"`logits` must be .* shape \(2, 3, 'V'\) with V > 0, got .* \(3, 5\)"),
        (dict(logits=LOGITS[..., :0]), r"`logits` must be .* V > 0, got torch.float32 \(2, 3, 0\)"),
        (dict(logits=LOGITS[0, 0], labels=LABELS[0, 0]), r"`labels` must be integers \(S,\) or \(B, S\)"),
        (dict(labels=LABELS.float()), "`labels` must be integers, got torch.float32"),
        (dict(labels=LABELS + 5), "`labels` must be between 0 and 4, or -100, got 5"),
        (dict(labels=LABELS - 1), "`labels` must be between 0 and 4, or -100, got -1"),
        (dict(labels=LABELS - 100, ignore_index=-1), "`labels` must be between .* or -1, got -100"),
        (dict(label_smoothing=1.5), "`label_smoothing` must be between 0 and 1, got 1.5"),
        (dict(label_smoothing=True), "`label_smoothing` must be between 0 and 1, got True"),
        (dict(z_loss=-1e-4), "`z_loss` must be a finite number of at least 0, got -0.0001"),
        (dict(z_loss=float("nan")), "`z_loss` must be a finite number .* got nan"),
        (dict(preset="mean"), "`preset` must be one of"),
        (dict(sample_weights=-torch.ones(2)), "`sample_weights` must be finite and at least 0"),
        (dict(token_weights=torch.ones(2, 2)), "`token_weights` must be numbers of shape"),
        (dict(cu_seqlens=torch.tensor([0, 7])), "`cu_seqlens` must rise from 0"),
    ],
)
def test_bad_input_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weighted_cross_entropy(**{"logits": LOGITS, "labels": LABELS, **options})
