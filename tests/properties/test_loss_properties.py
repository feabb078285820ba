"""Properties of the weighted loss for any samples and weights."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tests.losses.loss_oracle import IGNORED, Case, assert_equal, drawn, gradients, looped_loss, make_case, rows_of
from tests.losses.test_normalizer import select, step_loss
from torch import Tensor

from vlparts.losses import _vocab_chunks
from vlparts.losses.cross_entropy import weighted_cross_entropy
from vlparts.losses.linear_cross_entropy import linear_weighted_cross_entropy
from vlparts.losses.weights import PRESETS, weigh_tokens

numbers = st.floats(0, 1)
options = st.one_of(
    st.sampled_from(list(PRESETS)).map(lambda preset: dict(preset=preset)),
    st.builds(lambda mix, exponent: dict(mix=mix, length_exponent=3 * exponent), numbers, numbers),
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Samples, some of them empty, without labels or of weight 0."""
    lengths = draw(st.lists(st.integers(0, 5), max_size=6))
    case = make_case(lengths, draw(st.integers(0, 2**16)), draw(st.sampled_from([0, 0.3, 0.8])))
    for weights in (case.sample_weights, case.token_weights):
        for place in draw(st.sets(st.integers(0, max(len(weights) - 1, 0)), max_size=2)):
            weights[place : place + 1] = 0
    return case


def loss_of(case: Case, **weighting: Any) -> Tensor:
    return weighted_cross_entropy(case.logits, case.labels, **{**case.weighting, **weighting})


def resolved(weighting: dict[str, Any]) -> tuple[float, float]:
    """Mix and exponent."""
    meanings = {"token": (0, 0), "sample": (1, 0), "square": (0, 0.5), "openpangu_mix": (0.5, 0)}
    return meanings[weighting["preset"]] if "preset" in weighting else tuple(weighting.values())


def assert_same(loss: Tensor, expected: Tensor, leaf: Tensor, tolerance: float = 1e-10) -> None:
    """Values and gradients."""
    assert_equal(loss, expected, tolerance)
    assert_equal(gradients(loss, leaf), gradients(expected, leaf), tolerance)


@given(case=cases(), weighting=options)
def test_it_is_the_formula(case: Case, weighting: dict[str, Any]) -> None:
    assert_equal(loss_of(case, **weighting).item(), looped_loss(case, *resolved(weighting)), 1e-11)


@given(case=cases(), weighting=options)
def test_weights_add_up_to_one_or_to_nothing(case: Case, weighting: dict[str, Any]) -> None:
    found = weigh_tokens(case.labels, **case.weighting, **weighting, dtype=torch.float64)
    counted = case.token_weights.where(case.labels != IGNORED, 0)
    importance = [
        a > 0 and counted[rows].any() for a, rows in zip(case.sample_weights, rows_of(case.cu_seqlens), strict=True)
    ]
    assert_equal(found.weights.sum().item(), float(any(importance)), 1e-12)
    assert (found.weights >= 0).all()
    assert not found.weights[(case.labels == IGNORED) | (case.token_weights == 0)].any()


@given(case=cases(), weighting=options, junk=st.sampled_from([torch.nan, torch.inf, -torch.inf]))
def test_what_has_no_weight_gets_no_gradient_and_may_be_anything(
    case: Case, weighting: dict[str, Any], junk: float
) -> None:
    weights = weigh_tokens(case.labels, **case.weighting, **weighting, dtype=torch.float64).weights
    poisoned = case._replace(logits=case.logits.detach().masked_fill(weights[:, None] == 0, junk).requires_grad_())
    loss = loss_of(poisoned, **weighting)
    assert_equal(loss, loss_of(case, **weighting), 1e-13)
    (gradient,) = gradients(loss, poisoned.logits)
    assert not gradient[weights == 0].any()
    assert gradient.isfinite().all()


@given(case=cases(), weighting=options, a=st.floats(1e-4, 1e4), b=st.floats(1e-4, 1e4))
def test_scales_of_weights_do_not_matter_where_lengths_count_alike(
    case: Case, weighting: dict[str, Any], a: float, b: float
) -> None:
    scaled = case._replace(sample_weights=a * case.sample_weights, token_weights=b * case.token_weights)
    assert_same(loss_of(scaled, **weighting), loss_of(case, **weighting), case.logits)


@given(case=cases(), weighting=options, data=st.data())
def test_packing_order_and_micro_batches_do_not_matter(
    case: Case, weighting: dict[str, Any], data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(case.sample_weights))))
    whole = loss_of(case, **weighting)
    packed = select(case, order)
    assert_same(loss_of(packed, **weighting), whole, case.logits)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(order)), max_size=3)))
    batches = [order[start:end] for start, end in zip([0, *cuts], [*cuts, len(order)], strict=True)]
    assert_same(step_loss(case, batches, **weighting), loss_of(case, **weighting), case.logits)


@given(case=cases(), weighting=options, seed=st.integers(0, 2**16))
def test_the_order_of_tokens_does_not_matter(case: Case, weighting: dict[str, Any], seed: int) -> None:
    ids = torch.zeros_like(case.labels)
    for sample, rows in enumerate(rows_of(case.cu_seqlens)):
        ids[rows] = sample
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    mixed = case._replace(
        logits=case.logits[order], labels=case.labels[order], token_weights=case.token_weights[order]
    )
    loss = loss_of(mixed, cu_seqlens=None, sample_ids=ids[order], **weighting)
    assert_same(loss, loss_of(case, **weighting), case.logits)


@given(case=cases(), smoothing=st.sampled_from([0.0, 0.2]))
def test_token_is_torchs_mean_and_sample_the_mean_of_means(case: Case, smoothing: float) -> None:
    plain = dict(cu_seqlens=case.cu_seqlens, sample_weights=None, token_weights=None, label_smoothing=smoothing)
    mean = F.cross_entropy(case.logits, case.labels, label_smoothing=smoothing)
    if (case.labels == IGNORED).all():
        assert loss_of(case, preset="token", **plain).item() == 0
        return
    assert_same(loss_of(case, preset="token", **plain), mean, case.logits)
    means = [
        F.cross_entropy(case.logits[rows], case.labels[rows], label_smoothing=smoothing)
        for rows in rows_of(case.cu_seqlens)
        if (case.labels[rows] != IGNORED).any()
    ]
    assert_same(loss_of(case, preset="sample", **plain), torch.stack(means).mean(), case.logits)


@given(
    case=cases(),
    weighting=options,
    cache_bytes=st.sampled_from([0, 300, 2**30]),
    width=st.integers(1, 5),
    chunk_size=st.integers(1, 14),
    softcap=st.sampled_from([None, 1.3]),
    z=st.sampled_from([0.0, 0.2]),
    bias=st.booleans(),
)
def test_the_linear_form_is_the_form_of_the_logits(
    case: Case,
    weighting: dict[str, Any],
    cache_bytes: int,
    width: int,
    chunk_size: int,
    softcap: float | None,
    z: float,
    bias: bool,
) -> None:
    classes = case.logits.shape[1]
    hidden, weight = (drawn(n, width, seed=n).requires_grad_() for n in (len(case.labels), classes))
    offsets = drawn(classes).requires_grad_() if bias else None
    leaves = [hidden, weight, offsets] if bias else [hidden, weight]
    plain = F.linear(hidden, weight, offsets)
    logits = plain if softcap is None else softcap * (plain / softcap).tanh()
    expected = loss_of(case._replace(logits=logits), z_loss=z, **weighting)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_vocab_chunks, "CACHE_BYTES", cache_bytes)
        patch.setattr(_vocab_chunks, "MAX_CHUNK_CLASSES", chunk_size)
        loss = linear_weighted_cross_entropy(
            hidden, weight, case.labels, bias=offsets, softcap=softcap, z_loss=z, **case.weighting, **weighting
        )
        found = gradients(loss, *leaves)
    assert_equal(loss, expected)
    assert_equal(found, gradients(expected, *leaves))
