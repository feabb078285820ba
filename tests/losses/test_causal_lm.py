"""The weighted loss of language models against transformers' own, alone and in a native model."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from tests.losses.loss_oracle import IGNORED, assert_equal, drawn, gradients, make_case
from vlparts.losses.causal_lm import WEIGHTED_LOSS_NAME, next_token_losses, weighted_causal_lm_loss
from vlparts.losses.cross_entropy import weighted_cross_entropy
from vlparts.losses.weights import PRESETS, weigh_next_tokens

ROWS, LENGTH, CLASSES = 3, 6, 11


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits and labels of a batch."""
    labels = make_case([ROWS * LENGTH], vocabulary=CLASSES).labels.view(ROWS, LENGTH)
    return drawn(ROWS, LENGTH, CLASSES, dtype=dtype).requires_grad_(), labels


def shifted(labels: Tensor, fill: float = IGNORED) -> Tensor:
    """The rows shifted left by one."""
    return torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), fill)], 1)


def weights_for(labels: Tensor, cu_seqlens: Tensor | None = None, **options: Any) -> Tensor:
    """Weights as a training loop computes them."""
    weights = weigh_next_tokens(labels, cu_seqlens=cu_seqlens, dtype=torch.float64, **options).weights
    return weights.view(labels.shape)


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7), torch.tensor(2.5)])
@pytest.mark.parametrize("form", ["labels", "shift_labels", "another ignored label"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_weights_it_is_transformers_own(dtype: torch.dtype, form: str, num_items: Any) -> None:
    logits, labels = inputs(dtype)
    options: dict[str, Any] = dict(vocab_size=CLASSES, num_items_in_batch=num_items, labels=labels)
    if form == "shift_labels":
        options.update(labels=None, shift_labels=shifted(labels))
    elif form == "another ignored label":
        options.update(labels=labels.clamp(min=0), ignore_index=0)
    loss, expected = weighted_causal_lm_loss(logits, **options), ForCausalLMLoss(logits, **options)
    assert loss.dtype == expected.dtype == torch.float32
    assert_equal(loss, expected, 1e-6)
    assert_equal(gradients(loss, logits), gradients(expected, logits), 1e-6 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("preset", PRESETS)
def test_with_weights_it_is_the_weighted_loss_of_shifted_labels(preset: str) -> None:
    logits, labels = inputs(torch.float64)
    a, b = make_case([1] * ROWS).sample_weights, make_case([ROWS * LENGTH]).token_weights.view(labels.shape)
    options = dict(preset=preset, sample_weights=a)
    expected = weighted_cross_entropy(logits, shifted(labels), token_weights=shifted(b, 1.0), **options)
    weights = weights_for(labels, token_weights=b, **options)
    for num_items in (None, 7):
        loss = weighted_causal_lm_loss(logits, labels, CLASSES, num_items, loss_weights=weights)
        assert_equal(loss, expected, 1e-13)
        assert_equal(gradients(loss, logits), gradients(expected, logits, retain_graph=True), 1e-13)
    given = dict(shift_labels=shifted(labels), loss_weights=shifted(weights, 0.0))
    assert_equal(weighted_causal_lm_loss(logits, labels, CLASSES, **given), expected, 1e-13)
    flat = weighted_causal_lm_loss(logits.flatten(0, 1), labels, CLASSES, loss_weights=weights)
    assert_equal(flat, expected, 1e-13)


def test_packed_samples_count_as_samples_and_their_first_labels_not_at_all() -> None:
    # Unlike MindSpeed-MM's square loss, which counts labels before the shift and rows instead of packed samples.
    logits, labels = inputs(torch.float64)
    labels, logits = labels.clamp(min=0).view(1, -1), logits.detach().view(1, -1, CLASSES)
    cu_seqlens, preset = torch.tensor([0, 2, 9, 18]), "square"
    loss = weighted_causal_lm_loss(
        logits, labels, CLASSES, loss_weights=weights_for(labels, cu_seqlens=cu_seqlens, preset=preset)
    )
    total = weights = 0.0
    for start, end in ((0, 2), (2, 9), (9, 18)):
        weight = (end - start - 1) ** -0.5
        losses = torch.nn.functional.cross_entropy(
            logits[0, start : end - 1], labels[0, start + 1 : end], reduction="sum"
        )
        total, weights = total + weight * losses.item(), weights + weight * (end - start - 1)
    assert_equal(loss.item(), total / weights, 1e-13)


def test_nothing_to_learn_is_zero_and_not_nan() -> None:
    logits, labels = inputs()
    nothing = torch.full_like(labels, IGNORED)
    assert ForCausalLMLoss(logits, nothing, CLASSES).isnan()
    first = nothing.clone()
    first[:, 0] = 1
    for ignored, weights, num_items in [
        (nothing, None, None),
        (first, None, None),
        (nothing, None, torch.tensor(0)),
        (nothing, weights_for(nothing), None),
        (labels, torch.zeros(labels.shape), 5),
    ]:
        loss = weighted_causal_lm_loss(logits, ignored, CLASSES, num_items, loss_weights=weights)
        assert loss.item() == 0
        assert not torch.autograd.grad(loss, logits)[0].any()


@pytest.mark.parametrize("weighted", [True, False])
def test_ignored_tokens_may_hold_anything(weighted: bool) -> None:
    logits, labels = inputs(torch.float64)
    out = shifted(labels) == IGNORED
    poisoned = logits.detach().masked_fill(out.unsqueeze(-1), torch.nan).requires_grad_()
    weights = weights_for(labels) if weighted else None
    loss, clean = (weighted_causal_lm_loss(x, labels, CLASSES, loss_weights=weights) for x in (poisoned, logits))
    assert_equal(loss, clean, 0)
    gradient = gradients(loss, poisoned)[0]
    assert_equal(gradient, gradients(clean, logits)[0], 0)
    assert not gradient[out].any()


def tiny_model() -> LlamaForCausalLM:
    """A native model in float64."""
    config = LlamaConfig(
        vocab_size=CLASSES,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).double()


@pytest.mark.parametrize("by_name", [True, False])
def test_a_native_model_takes_the_weights_as_an_input(by_name: bool) -> None:
    model, (_, labels) = tiny_model(), inputs()
    tokens = labels.clamp(min=0)
    theirs = model(input_ids=tokens, labels=labels).loss
    if by_name:
        model.loss_type = WEIGHTED_LOSS_NAME
    else:
        model.loss_function = weighted_causal_lm_loss
    assert_equal(model(input_ids=tokens, labels=labels).loss.float(), theirs.float(), 1e-6)
    weights = weights_for(labels, preset="square")
    output = model(input_ids=tokens, labels=labels, loss_weights=weights, num_items_in_batch=3)
    expected = weighted_cross_entropy(output.logits, shifted(labels), preset="square")
    assert_equal(output.loss, expected, 1e-12)
    output.loss.backward()
    wanted = gradients(
        weighted_cross_entropy(model(tokens).logits, shifted(labels), preset="square"), model.lm_head.weight
    )
    assert_equal(model.lm_head.weight.grad, wanted[0], 1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_next_token_losses_are_those_of_single_tokens(monkeypatch: pytest.MonkeyPatch, weighted: bool) -> None:
    """In chunks of two tokens, without a graph of its own."""
    monkeypatch.setattr("vlparts.losses._token_chunks.CHUNK_BYTES", 2 * 4 * 7)
    logits = torch.randn(2, 6, 7)
    labels = torch.randint(7, (2, 6))
    labels[0, :3] = labels[1, 4] = IGNORED
    weights = torch.ones(2, 6) if weighted else None
    if weights is not None:
        weights[1, 2] = 0
    losses, mask = next_token_losses(logits, labels, weights)
    for row in range(2):
        for at in range(6):
            counts = at < 5 and labels[row, at + 1] != IGNORED and not (weighted and (row, at + 1) == (1, 2))
            assert bool(mask[row, at]) == counts
            expected = -logits[row, at].log_softmax(-1)[labels[row, at + 1]] if counts else torch.tensor(0.0)
            torch.testing.assert_close(losses[row, at], expected)


def test_other_models_keep_their_loss() -> None:
    assert LOSS_MAPPING[WEIGHTED_LOSS_NAME] is weighted_causal_lm_loss
    assert LOSS_MAPPING["ForCausalLM"] is ForCausalLMLoss
    assert tiny_model().loss_type == "ForCausalLM"


LOGITS, LABELS = torch.zeros(2, 3, 5), torch.zeros(2, 3).long()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(labels=None), "`labels` or `shift_labels` must be given"),
        (dict(labels=LABELS[:, 1:]), r"`logits` must be of shape \(2, 2, 5\) for these labels, got \(2, 3, 5\)"),
        (dict(vocab_size=10), r"`logits` must be of shape \(2, 3, 10\) for these labels"),
        (dict(labels=LABELS + 5), "`labels` must be between 0 and 4, or -100, got 5"),
        (dict(labels=LABELS.float()), "`labels` must be integers, got torch.float32"),
        (dict(loss_weights=torch.ones(2, 2)), r"`loss_weights` must be numbers of shape \(2, 3\), .* \(2, 2\)"),
        (dict(loss_weights=-torch.ones(2, 3)), "`loss_weights` must be finite and at least 0, got -1.0"),
        (dict(loss_weights=torch.full((2, 3), torch.nan)), "`loss_weights` must be finite and at least 0, got nan"),
    ],
)
def test_bad_input_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weighted_causal_lm_loss(**{"logits": LOGITS, "labels": LABELS, "vocab_size": 5, **options})
