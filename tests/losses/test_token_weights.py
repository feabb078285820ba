"""Weights of tokens by position: schedules, segments and thoughts."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlparts.losses.token_weights import (
    ANSWER,
    THINKING,
    Constant,
    Cosine,
    Exponential,
    Linear,
    Segments,
    labelled_positions,
    position_weights,
    thinking_segments,
)
from vlparts.parts.thinking import split_thinking_ids

FORMULAS: list[tuple[Any, Callable[[int, int], float]]] = [
    (Constant(), lambda t, n: 1.0),
    (Constant(0.25), lambda t, n: 0.25),
    (Linear(2, 0.5), lambda t, n: 2 - 1.5 * t / max(n - 1, 1)),
    (Cosine(0.5, 3), lambda t, n: 0.5 + 2.5 * (1 - math.cos(math.pi * t / max(n - 1, 1))) / 2),
    (Exponential(5), lambda t, n: 0.5 ** (t / 5)),
    (lambda t, n: 1 / (1 + t) + n, lambda t, n: 1 / (1 + t) + n),
]
tokens = st.lists(st.tuples(st.integers(-1, 3), st.booleans(), st.integers(-1, 2)), max_size=25)


def tensors(made: list[tuple[int, bool, int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Labels, samples and segments."""
    columns = torch.tensor(made, dtype=torch.int64).view(-1, 3)
    return torch.where(columns[:, 1] > 0, 7, -100), columns[:, 0], columns[:, 2]


@given(made=tokens)
@pytest.mark.parametrize(("schedule", "formula"), FORMULAS)
def test_schedules_follow_their_formulas(
    schedule: Any, formula: Callable[[int, int], float], made: list[tuple[int, bool, int]]
) -> None:
    labels, ids, _ = tensors(made)
    numbers = Counter(sample for sample, labelled, _ in made if labelled)
    seen: Counter[int] = Counter()
    expected = []
    for sample, labelled, _ in made:
        expected.append(formula(seen[sample], numbers[sample]) if labelled and sample >= 0 else 0.0)
        seen[sample] += labelled
    weights = position_weights(labels, schedule, sample_ids=ids)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)


@given(made=tokens)
def test_segments_share_a_sample_however_long_they_are(made: list[tuple[int, bool, int]]) -> None:
    labels, ids, segments = tensors(made)
    shares = (0.5, 0.0, 2.0)
    sizes = Counter((sample, segment) for sample, labelled, segment in made if labelled)
    expected = []
    for sample, labelled, segment in made:
        present = sum(shares[other] for other in range(3) if sizes[sample, other])
        number = sum(sizes[sample, other] for other in range(-1, 3))
        counted = labelled and sample >= 0 and segment >= 0 and present
        expected.append(number / sizes[sample, segment] * shares[segment] / present if counted else 0.0)
    weights = position_weights(labels, Segments(shares), segment_ids=segments, sample_ids=ids)
    torch.testing.assert_close(weights.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)


def test_the_mean_of_a_segment_has_its_weight() -> None:
    labels = torch.tensor([[-100, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, -100]])
    segments = torch.tensor([[0, 0, 0, 0, 0, 0, 1], [0, 1, 1, 1, 1, 1, 1]])
    weights = position_weights(labels, Segments((0.3, 0.7)), segment_ids=segments)
    for row in range(2):
        shares = [weights[row][segments[row] == segment].sum() / weights[row].sum() for segment in (0, 1)]
        torch.testing.assert_close(torch.stack(shares), torch.tensor([0.3, 0.7]))
    torch.testing.assert_close(weights.sum(1), torch.tensor([6.0, 6.0]))


def test_segments_move_from_start_to_end() -> None:
    assert Segments.between((0.8, 0.2), (0.2, 0.8), 0).weights == (0.8, 0.2)
    assert Segments.between((0.8, 0.2), (0.2, 0.8), 1).weights == pytest.approx((0.2, 0.8))
    assert Segments.between((0.8, 0.2), (0.2, 0.8), 1 / 3).weights == pytest.approx((0.65, 0.35))


def test_rows_lengths_and_ids_give_the_same_positions() -> None:
    labels = torch.tensor([[1, -100, 2], [3, 4, -100]])
    expected = torch.tensor([0, 0, 1, 0, 1, 0]), torch.tensor([2, 1, 2, 2, 2, 1])
    by_ids = labelled_positions(labels, sample_ids=torch.tensor([[1, 1, 1], [0, 0, 0]]))
    by_length = labelled_positions(labels.flatten(), cu_seqlens=torch.tensor([0, 3, 6]))
    for positions in (labelled_positions(labels), by_ids, by_length):
        torch.testing.assert_close((positions.t, positions.n), expected)


def test_results_of_a_function_are_used_for_labelled_tokens_only() -> None:
    labels = torch.tensor([-100, 1, 1])
    weights = position_weights(labels, lambda t, n: torch.where(n == 1, math.nan, t + 1))
    assert weights.tolist() == [0, 1, 2]


def test_empty_labels() -> None:
    for shape in ((0,), (0, 4), (3, 0)):
        empty = torch.zeros(shape, dtype=torch.int64)
        assert position_weights(empty, Linear(1, 0)).shape == shape
        assert position_weights(empty, Segments((1, 1)), segment_ids=empty).shape == shape
        assert thinking_segments(empty).shape == shape
    assert position_weights(torch.full((4,), -100), Linear(1, 2)).tolist() == [0, 0, 0, 0]


START, END = 91, 92


@given(answers=st.lists(st.lists(st.sampled_from([1, 2, 3, START, END]), max_size=10), max_size=4), order=st.randoms())
def test_thoughts_are_those_of_split_thinking(answers: list[list[int]], order: Any) -> None:
    owners = [sample for sample, answer in enumerate(answers) for _ in answer]
    order.shuffle(owners)  # samples are interleaved, each in its own order
    rest = [iter(answer) for answer in answers]
    ids = torch.tensor([next(rest[sample]) for sample in owners], dtype=torch.int64)
    samples = torch.tensor(owners, dtype=torch.int64)
    segments = thinking_segments(ids, start_id=START, end_id=END, sample_ids=samples)
    for sample, answer in enumerate(answers):
        own = samples == sample
        split = split_thinking_ids(answer, start_id=START, end_id=END)
        thought = ids[own & (segments == THINKING)]
        said = ids[own & (segments == ANSWER)]
        assert thought[(thought != START) & (thought != END)].tolist() == split.thinking
        assert said[said != END].tolist() == split.answer


def test_markers_are_thought_and_blocks_end_with_their_sample() -> None:
    ids = torch.tensor([[5, START, 6, END, 7, END], [8, END, START, 9, 9, 9], [1, 2, 3, 4, 5, 6]])
    expected = [[1, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]
    assert thinking_segments(ids, start_id=START, end_id=END).tolist() == expected
    packed = thinking_segments(ids.flatten(), start_id=START, end_id=END, cu_seqlens=torch.tensor([0, 6, 12, 18]))
    assert packed.view(3, 6).tolist() == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(-1), "`value` must be a finite number of at least 0, got -1"),
        (lambda: Linear(1, math.inf), "`end` must be a finite number of at least 0, got inf"),
        (lambda: Cosine(math.nan, 1), "`start` must be a finite number of at least 0, got nan"),
        (lambda: Exponential(0), "`half_life` must be a finite number above 0, got 0"),
        (lambda: Exponential(True), "`half_life` must be a finite number above 0, got True"),
        (lambda: Segments(()), r"`weights` must have at least one number, got \(\)"),
        (lambda: Segments((1, -1)), r"`weights\[1\]` must be a finite number of at least 0, got -1"),
        (lambda: Segments.between((1,), (1, 2), 0), "`start` and `end` must have as many weights, got 1 and 2"),
        (lambda: Segments.between((1,), (2,), 1.5), "`progress` must be between 0 and 1, got 1.5"),
    ],
)
def test_bad_schedules_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("schedule", "segment_ids", "message"),
    [
        ("cosine", None, "`schedule` must be a function of t and n or `Segments`, got str"),
        (lambda t, n: t[1:], None, r"`schedule` must return numbers of shape \(3,\), got \(2,\)"),
        (lambda t, n: 1.0, None, r"`schedule` must return numbers of shape \(3,\), got float"),
        (lambda t, n: t - 5, None, "`schedule` must return finite weights of at least 0, got -5.0"),
        (lambda t, n: t / 0, None, "`schedule` must return finite weights of at least 0, got nan"),
        (
            Constant(),
            torch.zeros(3, dtype=torch.int64),
            "`segment_ids` must be None unless .* got Constant",
        ),
        (Segments((1, 1)), None, "`segment_ids` must be given for `Segments`, got None"),
        (Segments((1, 1)), torch.zeros(3), r"`segment_ids` must be integers of the shape of `labels`, \(3,\)"),
        (Segments((1, 1)), torch.tensor([0, 1, 2]), "`segment_ids` must be between -1 and 1, got 2"),
    ],
)
def test_what_does_not_fit_is_refused(schedule: Any, segment_ids: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        position_weights(torch.ones(3, dtype=torch.int64), schedule, segment_ids=segment_ids)


def test_bad_token_ids_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`token_ids` must be integers \(S,\) or \(B, S\), got torch.float32"):
        thinking_segments(torch.ones(3))
    with pytest.raises(ValueError, match="`start_id` and `end_id` must differ, got 4 for both"):
        thinking_segments(torch.ones(3, dtype=torch.int64), start_id=4, end_id=4)
