"""Weights of tokens against the formula in loops and against other published losses."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.losses.loss_oracle import IGNORED, Case, assert_equal, formula, gradients, make_case, rows_of
from vlparts.losses.weights import PRESETS, next_token_labels, resolve_mix, weigh_next_tokens, weigh_tokens

LENGTHS = [5, 1, 0, 7, 3]
# Mix and exponent of each preset, as published or described.
MEANINGS = {"token": (0, 0), "sample": (1, 0), "square": (0, 0.5), "openpangu_mix": (0.5, 0)}


def weigh(case: Case, **options: Any) -> Tensor:
    """W in float64."""
    return weigh_tokens(case.labels, **{"dtype": torch.float64, **case.weighting, **options}).weights


def looped(case: Case, mix: float, exponent: float) -> Tensor:
    """W of each token: the loss where that token's loss is 1 and all others are 0."""
    found = []
    for place in range(len(case.labels)):
        samples = []
        for a, rows in zip(case.sample_weights.tolist(), rows_of(case.cu_seqlens), strict=True):
            inside = range(rows.start, rows.stop)
            tokens = [(case.token_weights[t].item(), float(t == place)) for t in inside if case.labels[t] != IGNORED]
            samples.append((a, tokens))
        found.append(formula(samples, mix, exponent))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize(("mix", "exponent"), [(0, 0), (1, 0), (0, 0.5), (0.3, 0), (0.7, 2.5), (0, 1), (1, 3)])
def test_equals_the_formula(mix: float, exponent: float) -> None:
    case = make_case(LENGTHS)
    weights = weigh(case, mix=mix, length_exponent=exponent)
    assert_equal(weights, looped(case, mix, exponent), 1e-14)
    assert_equal(weights.sum().item(), 1.0, 1e-14)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_what_they_say(preset: str) -> None:
    case, (mix, exponent) = make_case(LENGTHS), MEANINGS[preset]
    assert set(PRESETS) == set(MEANINGS)
    assert_equal(weigh(case, preset=preset), looped(case, mix, exponent), 1e-14)
    assert_equal(weigh(case), looped(case, *MEANINGS["openpangu_mix"]), 1e-14)


def test_the_mix_of_openpangu_is_open() -> None:
    case = make_case(LENGTHS)
    assert_equal(weigh(case, preset="openpangu_mix", mix=0.2), looped(case, 0.2, 0), 1e-14)
    assert resolve_mix("openpangu_mix", 0.2, None) == (0.2, 0.0)
    assert resolve_mix(None, None, 0.5) == (0.5, 0.5)


def test_sample_averaging_is_the_exponent_one() -> None:
    case = make_case(LENGTHS)
    assert_equal(weigh(case, preset="sample"), weigh(case, mix=0, length_exponent=1), 1e-14)


@pytest.mark.parametrize("preset", ["token", "sample", "square"])
def test_equals_len2weight_of_internvl(preset: str) -> None:
    # InternVL: each token of a packed sample with x labels weighs x^-p, and the sum is divided by the sum of weights.
    exponent = {"token": 0, "sample": 1, "square": 0.5}[preset]
    case = make_case(LENGTHS)
    given = []
    for rows in rows_of(case.cu_seqlens):
        x = sum(label != IGNORED for label in case.labels[rows].tolist())
        given += [x**-exponent if label != IGNORED else 0.0 for label in case.labels[rows].tolist()]
    expected = torch.tensor(given, dtype=torch.float64) / sum(given)
    assert_equal(weigh(case, preset=preset, sample_weights=None, token_weights=None), expected, 1e-14)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_ways_to_name_samples_agree(preset: str) -> None:
    case = make_case([4, 4, 4])
    options: dict[str, Any] = dict(preset=preset, cu_seqlens=None)
    ids = torch.arange(3).repeat_interleave(4)
    expected = weigh(case, preset=preset)
    assert_equal(weigh(case, sample_ids=ids, **options), expected, 0)
    assert_equal(weigh(case, preset=preset, cu_seqlens=case.cu_seqlens.to(torch.uint8)), expected, 0)
    rows = case._replace(labels=case.labels.view(3, 4), token_weights=case.token_weights.view(3, 4))
    assert_equal(weigh(rows, **options), expected, 0)
    assert_equal(weigh(rows, sample_ids=ids.view(3, 4), **options), expected, 0)
    # Samples need not stand together, and one may reach over rows.
    order = torch.randperm(12)
    mixed = case._replace(labels=case.labels[order], token_weights=case.token_weights[order])
    assert_equal(weigh(mixed, sample_ids=ids[order].int(), **options), expected[order], 1e-15)


def test_a_row_with_two_samples_is_not_one_sample() -> None:
    labels = torch.arange(6).view(2, 3)
    by_row = weigh_tokens(labels, preset="sample").weights
    packed = weigh_tokens(labels, preset="sample", cu_seqlens=torch.tensor([0, 1, 3, 6])).weights
    assert_equal(by_row, torch.full((6,), 1 / 6), 1e-7)
    assert_equal(packed, torch.tensor([1 / 3, 1 / 6, 1 / 6, 1 / 9, 1 / 9, 1 / 9]), 1e-7)


def test_tokens_of_no_sample_have_no_weight() -> None:
    ids = torch.tensor([0, 0, -1, 2, 2, 2, -1])
    found = weigh_tokens(torch.zeros(7).long(), sample_ids=ids, preset="sample")
    assert_equal(found.weights, torch.tensor([1 / 4, 1 / 4, 0, 1 / 6, 1 / 6, 1 / 6, 0]), 1e-7)
    assert found.sizes.tolist() == [2, 0, 3]
    assert found.samples.tolist() == [0, 0, 3, 2, 2, 2, 3]


def test_totals_are_those_of_the_formula() -> None:
    case = make_case(LENGTHS)
    found = weigh_tokens(case.labels, **case.weighting, mix=0.4, length_exponent=0.5, dtype=torch.float64)
    masked = case.token_weights.where(case.labels != IGNORED, 0)
    sizes = [masked[rows].sum().item() for rows in rows_of(case.cu_seqlens)]
    assert sizes[2] == 0
    assert_equal(found.sizes.tolist(), sizes, 1e-14)
    pairs = [(a, size) for a, size in zip(case.sample_weights.tolist(), sizes, strict=True) if size]
    assert_equal(found.total_samples.item(), sum(a for a, _ in pairs), 1e-14)
    assert_equal(found.total_tokens.item(), sum(a * size**0.5 for a, size in pairs), 1e-14)


@pytest.mark.parametrize("options", [dict(preset=name) for name in PRESETS] + [dict(mix=0.3, length_exponent=2)])
def test_nothing_to_weigh_is_zero_with_zero_gradients(options: dict[str, Any]) -> None:
    case = make_case([2, 0, 3])
    a, b = torch.ones(3, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    for labels, importance, weights in [
        (torch.full((5,), IGNORED), a, b),  # which MindSpeed-MM divides by
        (case.labels, a * 0, b),
        (case.labels, a, b * 0),
    ]:
        leaves = importance.clone().requires_grad_(), weights.clone().requires_grad_()
        found = weigh(case._replace(labels=labels, sample_weights=leaves[0], token_weights=leaves[1]), **options)
        assert found.tolist() == [0] * 5
        assert all(gradient.isfinite().all() for gradient in gradients(found.sum(), *leaves))
    for empty in (torch.zeros(0), torch.zeros(0, 4), torch.zeros(4, 0)):
        assert weigh_tokens(empty.long(), **options).weights.shape == (0,)


def test_weights_may_be_integers_and_huge_or_small() -> None:
    case = make_case(LENGTHS)
    integers = case._replace(sample_weights=torch.tensor([1, 2, 3, 0, 1]), token_weights=torch.arange(16))
    as_floats = case._replace(sample_weights=integers.sample_weights.double(), token_weights=torch.arange(16.0))
    assert_equal(weigh(integers), weigh(as_floats), 1e-14)
    for scale in (1e-9, 1e9):
        scaled = {name: scale * case.weighting[name].float() for name in ("sample_weights", "token_weights")}
        found = weigh(case, **scaled, dtype=torch.float32)
        assert found.dtype == torch.float32
        assert_equal(found.double(), weigh(case), 1e-6)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_next_token_labels_drop_the_first_of_each_sample_and_row(dtype: torch.dtype) -> None:
    labels = torch.arange(8, dtype=dtype)
    x = IGNORED
    assert next_token_labels(labels).tolist() == [x, 1, 2, 3, 4, 5, 6, 7]
    assert next_token_labels(labels.view(2, 4)).tolist() == [[x, 1, 2, 3], [x, 5, 6, 7]]
    packed = next_token_labels(labels, cu_seqlens=torch.tensor([0, 3, 3, 4, 8]))
    assert packed.tolist() == [x, 1, 2, x, x, 5, 6, 7]
    # A sample that begins a row has nothing before it there.
    rows = next_token_labels(labels.view(2, 4), cu_seqlens=torch.tensor([0, 6, 8]))
    assert rows.tolist() == [[x, 1, 2, 3], [x, 5, x, 7]]
    by_id = next_token_labels(labels, sample_ids=torch.tensor([0, 0, 1, 1, 1, -1, -1, 2]), ignore_index=9)
    assert by_id.tolist() == [9, 1, 9, 3, 4, 9, 6, 9]
    assert labels.tolist() == list(range(8))
    assert next_token_labels(labels[:0]).shape == (0,)
    assert next_token_labels(labels[:0].view(2, 0)).shape == (2, 0)


PACKED = {
    "rows": {},
    "lengths": dict(cu_seqlens=torch.tensor([0, 3, 3, 7, 16])),
    "ids": dict(sample_ids=torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, -1]).view(2, 8)),
}


@pytest.mark.parametrize("ignore_index", [IGNORED, 7])
@pytest.mark.parametrize("places", PACKED.values(), ids=PACKED)
def test_next_tokens_are_weighed_by_the_same_samples(places: dict[str, Tensor], ignore_index: int) -> None:
    case = make_case([16])
    labels, b = case.labels.masked_fill(case.labels == IGNORED, ignore_index).view(2, 8), case.token_weights.view(2, 8)
    options = dict(token_weights=b, preset="square", dtype=torch.float64)
    found = weigh_next_tokens(labels, **places, **options, ignore_index=ignore_index)
    targets = next_token_labels(labels, **places, ignore_index=ignore_index)
    assert not found.weights.view(2, 8)[targets == ignore_index].any()
    for got, wanted in zip(found, weigh_tokens(targets, **places, **options, ignore_index=ignore_index), strict=True):
        assert_equal(got, wanted, 1e-15)


ROWS = torch.zeros(2, 3).long()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(labels=ROWS.float()), r"`labels` must be integers .* got torch.float32 \(2, 3\)"),
        (dict(labels=ROWS.bool()), "`labels` must be integers .* got torch.bool"),
        (dict(labels=ROWS[0, 0]), r"`labels` must be integers .* got torch.int64 \(\)"),
        (dict(labels=ROWS[None]), r"`labels` must be integers .* \(1, 2, 3\)"),
        (dict(preset="mean"), "`preset` must be one of token, sample, square, openpangu_mix, got 'mean'"),
        (dict(preset="token", mix=0.0), "`mix` is fixed by `preset='token'`, got 0.0"),
        (dict(preset="square", length_exponent=1), "`length_exponent` is fixed by `preset='square'`, got 1"),
        (dict(preset="openpangu_mix", length_exponent=0), "`length_exponent` is fixed by `preset='openpangu_mix'`"),
        (dict(mix=1.1), "`mix` must be between 0 and 1, got 1.1"),
        (dict(mix=float("nan")), "`mix` must be between 0 and 1, got nan"),
        (dict(mix=True), "`mix` must be between 0 and 1, got True"),
        (dict(length_exponent=-0.5), "`length_exponent` must be a finite number of at least 0, got -0.5"),
        (dict(length_exponent=float("inf")), "`length_exponent` must be a finite .* got inf"),
        (dict(sample_weights=torch.tensor([1.0, -1])), "`sample_weights` must be finite and at least 0, got -1.0"),
        (dict(sample_weights=torch.tensor([torch.nan, 1])), "`sample_weights` must be finite .* got nan"),
        (dict(sample_weights=torch.ones(3)), r"`sample_weights` must be numbers of shape \(2,\), .* \(3,\)"),
        (dict(sample_weights=torch.ones(2, 1)), r"`sample_weights` must be numbers .* \(2, 1\)"),
        (dict(sample_weights=torch.ones(2) > 0), "`sample_weights` must be numbers .* got torch.bool"),
        (dict(sample_weights=torch.tensor(1.0), sample_ids=ROWS), r"`sample_weights` must be numbers .* got .* \(\)"),
        (dict(token_weights=torch.full((2, 3), torch.inf)), "`token_weights` must be finite .* got inf"),
        (dict(token_weights=torch.ones(6)), r"`token_weights` must be numbers of shape \(2, 3\), .* \(6,\)"),
        (
            dict(cu_seqlens=torch.tensor([0, 6]), sample_ids=ROWS),
            "both define the samples; pass only one of the two",
        ),
        (dict(cu_seqlens=torch.tensor([0, 5])), r"`cu_seqlens` must rise from 0 to .* 6, got \[0, 5\] ... 5"),
        (dict(cu_seqlens=torch.tensor([1, 6])), "`cu_seqlens` must rise from 0"),
        (dict(cu_seqlens=torch.tensor([0, 4, 3, 6])), "`cu_seqlens` must rise from 0"),
        (dict(cu_seqlens=torch.tensor([0, 4, 3, 6], dtype=torch.uint8)), "`cu_seqlens` must rise from 0"),
        (dict(cu_seqlens=torch.tensor([0.0, 6])), r"`cu_seqlens` must be integers .* got torch.float32 \(2,\)"),
        (dict(cu_seqlens=torch.tensor([False, True])), "`cu_seqlens` must be integers .* got torch.bool"),
        (dict(cu_seqlens=torch.zeros(0).long()), r"`cu_seqlens` must be integers .* \(0,\)"),
        (dict(cu_seqlens=torch.tensor([[0, 6]])), r"`cu_seqlens` must be integers .* \(1, 2\)"),
        (dict(sample_ids=ROWS[0]), r"`sample_ids` must be integers of the shape of `labels`, \(2, 3\), .* \(3,\)"),
        (dict(sample_ids=ROWS.float()), "`sample_ids` must be integers .* got torch.float32"),
        (dict(sample_ids=ROWS.bool()), "`sample_ids` must be integers .* got torch.bool"),
        (dict(sample_ids=ROWS - 2), "`sample_ids` must be between -1 and -1, got -2 to -2.$"),
        (
            dict(sample_ids=ROWS + 2, sample_weights=torch.ones(2)),
            "`sample_ids` must be between -1 and 1, got 2 to 2. `sample_weights` must",
        ),
    ],
)
def test_bad_input_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weigh_tokens(**{"labels": ROWS, **options})
