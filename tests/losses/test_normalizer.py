"""Denominators of a step: loss and gradients do not depend on packing and micro-batches; sums over processes."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from tests.losses.loss_oracle import IGNORED, Case, assert_equal, gradients, looped_loss, make_case, rows_of
from vlparts.losses.cross_entropy import weighted_cross_entropy
from vlparts.losses.linear_cross_entropy import linear_weighted_cross_entropy
from vlparts.losses.normalizer import LossNormalizer, sum_over_processes
from vlparts.losses.weights import PRESETS, next_token_labels, weigh_next_tokens, weigh_tokens

LENGTHS = [5, 1, 0, 7, 3, 4]


def select(case: Case, samples: list[int]) -> Case:
    """These samples, packed; gradients flow to the whole case."""
    rows = rows_of(case.cu_seqlens)
    tokens = torch.cat([torch.arange(rows[s].start, rows[s].stop) for s in samples]) if samples else torch.zeros(0)
    lengths = [rows[s].stop - rows[s].start for s in samples]
    tokens = tokens.long()
    return Case(
        case.logits[tokens],
        case.labels[tokens],
        torch.tensor([0, *lengths]).cumsum(0),
        case.sample_weights[torch.tensor(samples, dtype=torch.int64)],
        case.token_weights[tokens],
    )


def add(normalizer: LossNormalizer, case: Case) -> None:
    """Count a micro-batch."""
    normalizer.add(case.labels, **case.weighting)


def step_loss(case: Case, batches: list[list[int]], **options: Any) -> Tensor:
    """The sum of the losses of micro-batches."""
    normalizer = LossNormalizer(**options)
    parts = [select(case, samples) for samples in batches]
    for part in parts:
        add(normalizer, part)
    normalizer.all_reduce()  # does nothing in one process
    losses = [weighted_cross_entropy(p.logits, p.labels, **p.weighting, **normalizer.options) for p in parts]
    return torch.stack(losses).sum()


SPLITS = [
    [[0, 1, 2, 3, 4, 5]],
    [[5, 3, 1, 0, 2, 4]],
    [[0, 1, 2], [3, 4, 5]],
    [[3], [2], [5, 0, 4], [], [1]],  # one of no sample, one of an empty sample
    [[s] for s in range(6)],
]
OPTIONS = [*[dict(preset=preset) for preset in PRESETS], dict(mix=0.3, length_exponent=1.5)]


@pytest.mark.parametrize("batches", SPLITS)
@pytest.mark.parametrize("options", OPTIONS)
def test_the_split_does_not_matter(options: dict[str, Any], batches: list[list[int]]) -> None:
    case = make_case(LENGTHS)
    normalizer = LossNormalizer(**options)
    loss = step_loss(case, batches, **options)
    assert_equal(loss.item(), looped_loss(case, normalizer.mix, normalizer.length_exponent), 1e-12)
    whole = weighted_cross_entropy(case.logits, case.labels, **case.weighting, **options)
    assert_equal(gradients(loss, case.logits), gradients(whole, case.logits), 1e-12)


def test_rows_samples_and_packs_add_up_alike() -> None:
    case = make_case([4, 4, 4])
    packed, rows, ids = (LossNormalizer("square") for _ in range(3))
    add(packed, case)
    shape = dict(sample_weights=case.sample_weights, token_weights=case.token_weights.view(3, 4))
    rows.add(case.labels.view(3, 4), **shape)
    ids.add(case.labels.view(3, 4), sample_ids=torch.arange(3).repeat_interleave(4).view(3, 4), **shape)
    found = weigh_tokens(case.labels, preset="square", **case.weighting, dtype=torch.float64)
    for normalizer in (packed, rows, ids):
        assert_equal(normalizer.samples, found.total_samples, 1e-14)
        assert_equal(normalizer.tokens, found.total_tokens, 1e-14)
        assert normalizer.samples.dtype == normalizer.tokens.dtype == torch.float64


def test_weights_of_a_step_add_up_to_one() -> None:
    case, normalizer = make_case(LENGTHS), LossNormalizer("openpangu_mix", mix=0.2)
    parts = [select(case, samples) for samples in SPLITS[3]]
    for part in parts:
        add(normalizer, part)
    weights = [weigh_tokens(part.labels, **part.weighting, **normalizer.options).weights for part in parts]
    assert weights[0].dtype == torch.float32
    assert_equal(sum(weight.sum().item() for weight in weights), 1.0, 1e-6)


def test_the_linear_form_takes_it() -> None:
    case, normalizer = make_case(LENGTHS), LossNormalizer("square")
    add(normalizer, case)
    add(normalizer, case)
    options = dict(case.weighting, **normalizer.options)
    weight = torch.eye(case.logits.shape[1], dtype=torch.float64)
    loss = linear_weighted_cross_entropy(case.logits, weight, case.labels, **options)
    assert_equal(2 * loss.item(), looped_loss(case, 0, 0.5), 1e-12)


def test_reset_begins_a_new_step() -> None:
    case, normalizer = make_case(LENGTHS), LossNormalizer("token")
    add(normalizer, make_case([3, 3], seed=5))
    normalizer.reset()
    assert normalizer.samples == normalizer.tokens == 0
    add(normalizer, case)
    loss = weighted_cross_entropy(case.logits, case.labels, **case.weighting, **normalizer.options)
    assert_equal(loss.item(), looped_loss(case, 0, 0), 1e-12)


def test_it_holds_no_graph() -> None:
    case, normalizer = make_case(LENGTHS), LossNormalizer()
    case.sample_weights.requires_grad_()
    add(normalizer, case)
    assert not normalizer.samples.requires_grad
    assert not normalizer.tokens.requires_grad


def test_another_label_may_be_ignored() -> None:
    case = make_case(LENGTHS)
    normalizer = LossNormalizer("square", ignore_index=99)
    other = case._replace(labels=case.labels.masked_fill(case.labels == IGNORED, 99))
    add(normalizer, other)
    loss = weighted_cross_entropy(other.logits, other.labels, **other.weighting, **normalizer.options)
    assert_equal(loss.item(), looped_loss(case, 0, 0.5), 1e-12)


def test_a_step_without_labels_is_zero() -> None:
    case = make_case(LENGTHS, ignored=2)
    loss = step_loss(case, SPLITS[3])
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, case.logits)[0].any()


def test_a_micro_batch_of_weight_0_is_zero() -> None:
    case = make_case(LENGTHS)
    case.sample_weights[:3] = 0
    assert_equal(step_loss(case, SPLITS[2]).item(), looped_loss(case, 0.5, 0), 1e-12)


@pytest.mark.parametrize("preset", PRESETS)
def test_labels_that_the_loss_shifts_add_up_without_first_tokens(preset: str) -> None:
    case, whole, split = make_case(LENGTHS), LossNormalizer(preset), LossNormalizer(preset)
    parts = [select(case, samples) for samples in SPLITS[3]]
    for part in parts:
        split.add(part.labels, next_tokens=True, **part.weighting)
    whole.add(next_token_labels(case.labels, cu_seqlens=case.cu_seqlens), **case.weighting)
    assert_equal((split.samples, split.tokens), (whole.samples, whole.tokens), 1e-12)
    weights = [weigh_next_tokens(part.labels, **part.weighting, **split.options).weights for part in parts]
    assert_equal(sum(weight.sum().item() for weight in weights), 1.0, 1e-6)


def test_a_step_is_summed_over_processes_once() -> None:
    case, normalizer = make_case(LENGTHS), LossNormalizer("token")
    add(normalizer, case)
    normalizer.all_reduce()
    totals = (normalizer.samples.item(), normalizer.tokens.item())
    for again in (normalizer.all_reduce, lambda: add(normalizer, case)):
        with pytest.raises(RuntimeError, match="already been summed over processes; call `reset` to start a new one"):
            again()
    assert totals == (normalizer.samples.item(), normalizer.tokens.item())
    normalizer.reset()
    add(normalizer, case)
    normalizer.all_reduce()
    assert totals == (normalizer.samples.item(), normalizer.tokens.item())


def test_bad_input_is_refused() -> None:
    case, normalizer = make_case(LENGTHS), LossNormalizer("square")
    with pytest.raises(ValueError, match="`normalizer` has no samples; add the labels of the whole step to it first"):
        weighted_cross_entropy(case.logits, case.labels, **case.weighting, **normalizer.options)
    add(normalizer, case)
    with pytest.raises(ValueError, match="`normalizer` has a `length_exponent` of 0.5, got 0.0"):
        weighted_cross_entropy(case.logits, case.labels, preset="token", normalizer=normalizer)
    with pytest.raises(ValueError, match="`preset` must be one of"):
        LossNormalizer("mean")
    with pytest.raises(ValueError, match="`mix` is fixed by `preset='token'`"):
        LossNormalizer("token", mix=0.5)
    with pytest.raises(ValueError, match="`token_weights` must be finite"):
        normalizer.add(case.labels, token_weights=-case.token_weights)
    with pytest.raises(ValueError, match="`cu_seqlens` must rise from 0"):
        normalizer.add(case.labels, cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="`labels` must be integers"):
        normalizer.add(case.logits)


VALUES = torch.tensor([1 / 3, -2e-300, 7e300, torch.inf], dtype=torch.float64)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_without_processes_values_stay_as_they_are() -> None:
    assert sum_over_processes(VALUES) is VALUES


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")])
def test_one_process_has_its_own_values(alone: None, device: Any) -> None:
    total = sum_over_processes(VALUES, device=device)
    assert total.dtype == torch.float64
    assert total.tolist() == VALUES.tolist()


def test_nothing_that_is_sent_is_float64(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sent, real = [], distributed.all_gather

    def recording(gathered: list[Tensor], own: Tensor, **options: Any) -> Any:
        sent.extend([own.dtype, *(tensor.dtype for tensor in gathered)])
        return real(gathered, own, **options)

    monkeypatch.setattr(distributed, "all_gather", recording)
    monkeypatch.delattr(distributed, "all_reduce")
    sum_over_processes(VALUES)
    assert sent == [torch.int32, torch.int32]
