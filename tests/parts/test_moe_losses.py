"""The router's losses against their formulas in loops, and against Mixtral's."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from vlparts.parts.moe_losses import balance_loss, router_z_loss
from vlparts.parts.moe_router import GroupedTopKRouter
from vlparts.parts.moe_routing import expert_counts

EXPERTS, CHOSEN = 6, 2
MASK = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1, 1, 0, 1], dtype=torch.bool)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Numbers of order one."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(tokens: int = len(MASK), seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits, and choices that have nothing to do with them."""
    order = drawn(tokens, EXPERTS, seed=seed + 100).argsort(dim=1)
    return (2 * drawn(tokens, EXPERTS, seed=seed)).requires_grad_(), order[:, :CHOSEN]


def shares(row: Tensor, scoring: str | None) -> Tensor:
    """One token's scores with sum 1."""
    scores = {
        "softmax": lambda: row.exp(),
        "softmax_over_chosen": lambda: row.exp(),
        "sigmoid": lambda: 1 / (1 + (-row).exp()),
        "sqrtsoftplus": lambda: (1 + row.exp()).log().sqrt(),
        None: lambda: row,
    }[scoring]()
    return scores / scores.sum()


def looped(logits: Tensor, indices: Tensor, scoring: str | None = "softmax") -> Tensor:
    """The loss of these tokens, all of them real."""
    tokens, loss = len(logits), logits.sum() * 0
    for expert in range(EXPERTS):
        count = sum(expert in row for row in indices.tolist())
        mean = sum(shares(row, scoring)[expert] for row in logits) / tokens
        loss = loss + EXPERTS / (CHOSEN * tokens) * count * mean
    return loss


def assert_same(loss: Tensor, expected: Tensor, logits: Tensor) -> None:
    """Values and gradients."""
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
    (got,), (wanted,) = (torch.autograd.grad(value, logits, retain_graph=True) for value in (loss, expected))
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("form", ["batch", "global"])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus", "softmax_over_chosen"])
def test_equals_the_formula(scoring: str, form: str) -> None:
    logits, indices = case()
    assert_same(balance_loss(logits, indices, scoring=scoring, form=form), looped(logits, indices, scoring), logits)
    masked = balance_loss(logits, indices, scoring=scoring, form=form, token_mask=MASK)
    assert_same(masked, looped(logits[MASK], indices[MASK], scoring), logits)


def test_scores_may_be_given() -> None:
    logits, indices = case()
    scores = logits.detach().exp().requires_grad_()
    assert_same(balance_loss(scores, indices, scoring=None), looped(scores, indices, None), scores)


def test_by_sequence_is_the_mean_over_sequences() -> None:
    logits, indices = case()
    bounds = [0, 3, 3, 5, 10]  # the second has no token, the third no real one of its own; the last token is padding
    mask = MASK.clone()
    mask[3:5] = False
    losses = []
    for start, end in ((0, 3), (5, 10)):
        real = mask[start:end]
        losses.append(looped(logits[start:end][real], indices[start:end][real]))
    loss = balance_loss(logits, indices, form="sequence", token_mask=mask, cu_seqlens=torch.tensor(bounds))
    assert_same(loss, sum(losses) / 2, logits)


def test_by_sequence_without_padding() -> None:
    logits, indices = case()
    cut = [slice(0, 4), slice(4, 11)]
    expected = sum(looped(logits[part], indices[part]) for part in cut) / 2
    cu_seqlens = torch.tensor([0, 4, 11], dtype=torch.int32)
    assert_same(balance_loss(logits, indices, form="sequence", cu_seqlens=cu_seqlens), expected, logits)


def test_the_global_form_is_exact_over_micro_batches() -> None:
    logits, indices = case()
    counts = sum(expert_counts(indices[cut], EXPERTS, MASK[cut]) for cut in (slice(0, 4), slice(4, 11)))
    parts = [
        balance_loss(logits[cut], indices[cut], form="global", counts=counts, token_mask=MASK[cut])
        for cut in (slice(0, 4), slice(4, 11))
    ]
    assert_same(sum(parts), looped(logits[MASK], indices[MASK]), logits)


@pytest.mark.parametrize("mask", [None, MASK])
def test_mixtrals_loss_is_k_times_ours(mask: Tensor | None) -> None:
    router = GroupedTopKRouter.from_preset("mixtral", 5, EXPERTS)
    logits, _, indices = router(drawn(len(MASK), 5).float())
    native = load_balancing_loss_func((logits,), EXPERTS, CHOSEN, None if mask is None else mask.view(1, -1))
    ours = balance_loss(logits, indices, token_mask=mask)
    torch.testing.assert_close(ours * CHOSEN, native)
    gradients = [torch.autograd.grad(loss, router.weight, retain_graph=True)[0] for loss in (ours * CHOSEN, native)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("form", ["batch", "global", "sequence"])
def test_perfect_balance_is_one(form: str) -> None:
    indices = torch.arange(12).view(6, 2) % EXPERTS
    sequences = torch.tensor([0, 3, 6]) if form == "sequence" else None
    loss = balance_loss(torch.zeros(6, EXPERTS), indices, form=form, cu_seqlens=sequences)
    torch.testing.assert_close(loss, torch.tensor(1.0))
    worst = torch.zeros(6, EXPERTS).index_fill(1, torch.tensor([2]), 50.0)
    loss = balance_loss(worst, torch.full((6, 1), 2), form=form, cu_seqlens=sequences)
    torch.testing.assert_close(loss, torch.tensor(float(EXPERTS)))


def test_z_loss() -> None:
    logits, _ = case()
    expected = sum(row.exp().sum().log() ** 2 for row in logits[MASK])
    assert_same(router_z_loss(logits, token_mask=MASK), expected / int(MASK.sum()), logits)
    assert_same(router_z_loss(logits, token_mask=MASK, num_tokens=20), expected / 20, logits)
    everything = sum(row.exp().sum().log() ** 2 for row in logits) / len(logits)
    assert_same(router_z_loss(logits), everything, logits)


def test_padding_may_hold_anything() -> None:
    logits, indices = case()
    poisoned = logits.detach().masked_fill(~MASK[:, None], torch.nan).requires_grad_()
    cu_seqlens = torch.tensor([0, 5, 11])
    for arguments in ({}, dict(form="global"), dict(form="sequence", cu_seqlens=cu_seqlens), dict(scoring="sigmoid")):
        loss = balance_loss(poisoned, indices, token_mask=MASK, **arguments)
        (gradient,) = torch.autograd.grad(loss, poisoned)
        assert not gradient[~MASK].any()
        assert gradient[MASK].all()
    (gradient,) = torch.autograd.grad(router_z_loss(poisoned, token_mask=MASK), poisoned)
    assert not gradient[~MASK].any()
    assert gradient[MASK].all()


@pytest.mark.parametrize("tokens", [0, 3])
def test_without_a_real_token_losses_are_zero(tokens: int) -> None:
    logits, indices = case(tokens)
    mask = torch.zeros(tokens, dtype=torch.bool)
    sequences = torch.tensor([0, tokens])
    for loss in (
        balance_loss(logits, indices, token_mask=mask),
        balance_loss(logits, indices, token_mask=mask, form="global"),
        balance_loss(logits, indices, token_mask=mask, form="sequence", cu_seqlens=sequences),
        router_z_loss(logits, token_mask=mask),
    ):
        assert loss.item() == 0
        assert not torch.autograd.grad(loss, logits)[0].any()


def test_half_precision_is_summed_in_float32() -> None:
    logits, indices = case(2000)
    half = logits.detach().bfloat16()
    loss = balance_loss(half, indices)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), balance_loss(half.double(), indices), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["batch", "global", "sequence"])
def test_losses_compile(form: str) -> None:
    logits, indices = case()
    arguments = dict(form=form, cu_seqlens=torch.tensor([0, 4, 9]) if form == "sequence" else None, token_mask=MASK)

    def both(logits: Tensor) -> Tensor:
        return balance_loss(logits, indices, **arguments) + router_z_loss(logits, token_mask=MASK)

    assert_same(torch.compile(both, backend="aot_eager", fullgraph=True)(logits), both(logits), logits)


LOGITS, INDICES = torch.zeros(3, EXPERTS), torch.zeros(3, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(router_logits=torch.zeros(3)), r"`router_logits` must be floating .* with \(3,\)"),
        (dict(router_logits=INDICES), "`router_logits` must be floating point .* got torch.int64"),
        (dict(indices=INDICES[:2]), r"`indices` must be int64 with shape \(3, chosen\), got .* \(2, 2\)"),
        (dict(indices=INDICES.int()), "`indices` must be int64 .* got torch.int32"),
        (dict(form="micro"), "`form` must be one of 'batch', 'sequence', 'global', got 'micro'"),
        (dict(scoring="tanh"), "`scoring` must be one of .* got 'tanh'"),
        (dict(token_mask=torch.ones(3)), r"`token_mask` must be bool with shape \(3,\), got torch.float32"),
        (dict(form="sequence"), "`cu_seqlens` must be given if and only if .* got `form` 'sequence'"),
        (dict(cu_seqlens=torch.tensor([0, 3])), "`cu_seqlens` must be given if and only if .* got `form` 'batch'"),
        (dict(form="sequence", cu_seqlens=torch.zeros(2)), "`cu_seqlens` must be integers .* got torch.float32"),
        (dict(counts=torch.ones(EXPERTS)), "`counts` must be None unless `form` is 'global', got `form` 'batch'"),
        (dict(form="global", counts=torch.ones(2)), r"`counts` must have shape \(6,\), got \(2,\)"),
        (dict(form="global", group="all"), "`group` must be a process group, None or 'local', got 'all'"),
    ],
)
def test_bad_input_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        balance_loss(**{"router_logits": LOGITS, "indices": INDICES, **arguments})


def test_bad_input_of_the_z_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="`router_logits` must be floating point"):
        router_z_loss(INDICES)
    with pytest.raises(ValueError, match="`token_mask` must be bool"):
        router_z_loss(LOGITS, token_mask=torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="`num_tokens` must be positive, got 0"):
        router_z_loss(LOGITS, num_tokens=0)
