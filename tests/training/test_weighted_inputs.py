"""Weights in batches: which tokens belong to which sample, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.weighted_making import Rows, one_row, padded, padded_left
from vlparts.losses.normalizer import LossNormalizer
from vlparts.losses.weights import find_samples
from vlparts.training.weighted_inputs import WeightedCollator, checked_weight, ignore_repeated, take_weights

LABELS = torch.arange(10, 17)[None]
X = -100
STARTS = [[X, 11, 12, X, 14, X, 16]]


def samples_of(batch: dict[str, Any]) -> list[int]:
    found = take_weights(batch)[1]
    assert found is not None
    return find_samples(found.labels, found.options["cu_seqlens"], found.options["sample_ids"])[0].tolist()


PLACES: dict[str, dict[str, Any]] = {
    "sample_ids": {"sample_ids": torch.tensor([[0, 0, 0, 1, 1, 2, 2]])},
    "lengths": {"cu_seq_lens_q": torch.tensor([0, 3, 5, 7], dtype=torch.int32)},
    "positions": {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1]])},
    "positions of text among four": {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1]]).expand(4, 1, 7)},
    "lengths before positions": {
        "cu_seq_lens_q": torch.tensor([0, 3, 5, 7]),
        "position_ids": torch.arange(7)[None],
    },
    "ids before lengths": {
        "sample_ids": torch.tensor([[0, 0, 0, 1, 1, 2, 2]]),
        "cu_seq_lens_q": torch.tensor([0, 7]),
    },
}


@pytest.mark.parametrize("case", PLACES)
def test_samples_of_a_row(case: str) -> None:
    """The first token of each has no loss, since nothing before it in its sample predicts it."""
    batch = {"labels": LABELS, "input_ids": LABELS, **PLACES[case]}
    assert samples_of(batch) == [0, 0, 0, 1, 1, 2, 2]
    inputs, found = take_weights(batch)
    assert found is not None
    assert found.labels.tolist() == STARTS
    assert set(inputs) == set(batch) - {"sample_ids"}


ROWS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "positions with a mask": {
        "position_ids": torch.tensor([[0, 0, 1], [0, 1, 2]]),
        "attention_mask": torch.ones(2, 3, dtype=torch.long),
    },
    "positions of three axes": {"position_ids": torch.zeros(3, 2, 3, dtype=torch.long)},
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_are_samples(case: str) -> None:
    assert samples_of({"labels": torch.arange(6).view(2, 3), **ROWS[case]}) == [0, 0, 0, 1, 1, 1]


def test_padding_at_position_0_is_named() -> None:
    batch = {"labels": torch.arange(8)[None], "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 0, 0]])}
    message = "`sample_weights` must .* of `position_ids`, in which 5 samples start at position 0, got 2. If padding"
    with pytest.raises(ValueError, match=message):
        take_weights({**batch, "sample_weights": torch.ones(2)})
    ids = torch.tensor([[0, 0, 0, 1, 1, -1, -1, -1]])
    assert samples_of({**batch, "sample_weights": torch.ones(2), "sample_ids": ids}) == [0, 0, 0, 1, 1, 2, 2, 2]


def test_weights_of_samples_that_positions_do_not_show_are_an_error() -> None:
    # The second sample continues the positions of the first.
    batch = {"labels": torch.arange(5)[None], "position_ids": torch.tensor([[0, 1, 2, 3, 4]])}
    message = "in which 1 samples start at position 0, got 2.*or not every sample starts there, give `sample_ids`"
    with pytest.raises(ValueError, match=message):
        take_weights({**batch, "sample_weights": torch.ones(2)})
    ids = torch.tensor([[0, 0, 0, 1, 1]])
    assert samples_of({**batch, "sample_weights": torch.ones(2), "sample_ids": ids}) == [0, 0, 0, 1, 1]


def test_the_first_token_after_padding_has_no_loss() -> None:
    batch = {"labels": torch.arange(10, 18).view(2, 4), "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])}
    found = take_weights(batch)[1]
    assert found is not None
    assert found.labels.tolist() == [[X, X, X, 13], [X, 15, 16, X]]


def test_shifted_labels_stay_as_they_are() -> None:
    shifted = torch.tensor([[11, 12, X, 14]])
    found = take_weights({"labels": LABELS[:, :4], "shift_labels": shifted})[1]
    assert found is not None
    assert torch.equal(found.labels, shifted)


def test_a_batch_without_labels() -> None:
    inputs, found = take_weights({"input_ids": LABELS, "sample_weights": torch.ones(1)})
    assert list(inputs) == ["input_ids"]
    assert found is None


@pytest.mark.parametrize("name", ["sample_weights", "token_weights"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_weights_must_be_finite_and_not_negative(name: str, value: float) -> None:
    weights = torch.full((2,) if name == "sample_weights" else (2, 3), value)
    found = take_weights({"labels": torch.arange(6).view(2, 3), name: weights})[1]
    assert found is not None
    with pytest.raises(ValueError, match=f"`{name}` must be finite and at least 0, got {value}"):
        LossNormalizer().add(found.labels, **found.options)


@pytest.mark.parametrize("collator", [padded, padded_left, one_row])
def test_weights_are_aligned_with_their_tokens(collator: Any) -> None:
    features = [Rows()[index] for index in range(4)]
    batch = WeightedCollator(collator)(features)
    plain = collator(features)
    assert set(batch) == {*plain, "sample_weights", "token_weights"}
    assert batch["sample_weights"].tolist() == pytest.approx([one["sample_weight"] for one in features])
    used = plain["attention_mask"].bool() if "attention_mask" in plain else torch.ones_like(plain["labels"]).bool()
    assert torch.equal(batch["token_weights"][used], torch.cat([one["token_weights"] for one in features]))
    assert batch["token_weights"][~used].count_nonzero() == 0


def test_features_without_weights() -> None:
    features = [Rows(sample_weight=False, token_weights=False)[index] for index in range(3)]
    assert set(WeightedCollator(padded)(features)) == set(padded(features))


def test_fields_of_other_names() -> None:
    features = [{**Rows(sample_weight=False, token_weights=False)[index], "a": index} for index in range(3)]
    collator = WeightedCollator(padded, sample_weight_field="a", token_weight_field="b")
    assert collator.fields == ("a", "b")
    assert collator(features)["sample_weights"].tolist() == [0, 1, 2]


def changed(**fields: Any) -> list[dict[str, Any]]:
    first, *rest = (dict(Rows()[index]) for index in range(3))
    first |= fields
    return [{name: value for name, value in first.items() if value is not None}, *rest]


def cut(features: Any) -> dict[str, Tensor]:
    return {name: value[:, :4] for name, value in padded(features).items()}


BROKEN: dict[str, tuple[Any, list[dict[str, Any]], str]] = {
    "missing": (
        padded,
        changed(sample_weight=None),
        "`sample_weight` must be in every feature of a batch, got 2 of 3",
    ),
    "negative": (padded, changed(sample_weight=-1), "`sample_weight` must be a finite number of at least 0, got -1"),
    "NaN": (
        padded,
        changed(sample_weight=float("nan")),
        "`sample_weight` must be a finite number of at least 0, got nan",
    ),
    "text": (padded, changed(sample_weight="1"), "`sample_weight` must be a finite number of at least 0, got '1'"),
    "number of tokens": (
        padded,
        changed(token_weights=[1.0]),
        r"`token_weights` must have one number per token, \[3",
    ),
    "a collator that cuts": (
        cut,
        changed(),
        r"`token_weights` has 14 numbers for a batch of shape \(3, 4\) with 10 tokens",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_features(case: str) -> None:
    collator, features, message = BROKEN[case]
    with pytest.raises(ValueError, match=message):
        WeightedCollator(collator)(features)


def test_integers_are_weights_and_huge_ones_are_not() -> None:
    assert checked_weight(3, "a") == 3.0
    with pytest.raises(ValueError, match="`a` must be a finite number of at least 0, got 1000"):
        checked_weight(10**400, "a")


@pytest.mark.parametrize("collator", [padded, one_row])
@pytest.mark.parametrize("kept", [0, 2, 4])
def test_repeated_features_are_ignored(collator: Any, kept: int) -> None:
    features = [Rows()[index] for index in range(4)]
    found = take_weights(WeightedCollator(collator)(features))[1]
    assert found is not None
    left = ignore_repeated(found, kept, 4).labels
    valid = [int((one["labels"][1:] != X).sum()) for one in features]
    assert int((left != X).sum()) == sum(valid[:kept])


def test_repeated_features_must_be_identifiable() -> None:
    found = take_weights({"labels": LABELS, **PLACES["lengths"]})[1]
    assert found is not None
    with pytest.raises(ValueError, match=r"shape \(1, 7\) from 2 features .* per_device_eval_batch_size=1\."):
        ignore_repeated(found, 1, 2)
