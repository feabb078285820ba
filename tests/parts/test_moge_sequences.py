"""The balance loss of each sequence, in padded batches, packed rows and composed models, against loops over them."""

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.parts.test_moge import moge, tokens
from tests.parts.test_vlm import GROUPS, batch
from tests.parts.test_vlm_moe import composed, moge_config
from vlparts import MoGEForCausalLM
from vlparts.parts.packed_samples import sequence_bounds

COEFFICIENT = 0.3
GATE = "model.layers.1.mlp.gate.weight"


def by_sequence(form: str = "sequence", **changes: Any) -> MoGEForCausalLM:
    """A small model in float64 with weights of order one."""
    options = {"router_aux_loss_coef": COEFFICIENT, "router_aux_loss_form": form}
    return moge("eager", **options, **changes).double()


def looped(router_logits: Tensor, model: MoGEForCausalLM, sequences: list[list[int]]) -> Tensor:
    """The loss of one layer: sequence by sequence, expert by expert, token by token.

    Args:
        router_logits: `(T, E)`.
        model: Tells E, K, and the groups.
        sequences: The tokens of each sequence.
    """
    config = model.config
    size, chosen = config.num_experts // config.num_expert_groups, config.num_experts_per_tok
    losses = []
    for sequence in sequences:
        loss = torch.zeros((), dtype=torch.float64)
        for expert in range(config.num_experts):
            group = range(expert // size * size, expert // size * size + size)
            count, score = 0, torch.zeros((), dtype=torch.float64)
            for token in sequence:
                shares = router_logits[token].softmax(0)
                best = sorted(group, key=lambda one, shares=shares: -float(shares[one].detach()))
                count += expert in best[: chosen // config.num_expert_groups]
                score = score + shares[expert]
            frequency = config.num_experts / (chosen * len(sequence)) * count
            loss = loss + frequency * score / len(sequence)
        losses.append(loss)
    return torch.stack(losses).mean()


IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13], [14, 15, 16, 17, 18, 19, 20, 21, 22]])
BOUNDS = torch.tensor([0, 4, 5, 9], dtype=torch.int32)
PACKED = [[0, 1, 2, 3], [4], [5, 6, 7, 8]]
CASES: dict[str, tuple[dict[str, Tensor], list[list[int]]]] = {
    "rows": ({"input_ids": IDS}, [[*range(9)], [*range(9, 18)]]),
    "padding on the left": (
        {"input_ids": IDS, "attention_mask": torch.tensor([[0] * 4 + [1] * 5, [1] * 9])},
        [[*range(4, 9)], [*range(9, 18)]],
    ),
    "padding on the right": (
        {"input_ids": IDS, "attention_mask": torch.tensor([[1] * 2 + [0] * 7, [1] * 8 + [0]])},
        [[0, 1], [*range(9, 17)]],
    ),
    "a row of padding": (
        {"input_ids": IDS, "attention_mask": torch.tensor([[0] * 9, [1] * 9])},
        [[*range(9, 18)]],
    ),
    "boundaries": ({"input_ids": IDS[:1], "cu_seq_lens_q": BOUNDS}, PACKED),
    "boundaries and a mask": (
        {"input_ids": IDS[:1], "cu_seq_lens_q": BOUNDS, "attention_mask": torch.ones(1, 9, dtype=torch.int64)},
        PACKED,
    ),
    "positions": ({"input_ids": IDS[:1], "position_ids": torch.tensor([[0, 1, 2, 3, 0, 0, 1, 2, 3]])}, PACKED),
    "positions and padding": (
        {
            "input_ids": IDS,
            "position_ids": torch.tensor([[0, 0, 1, 0, 1, 2, 0, 0, 0], [0, 1, 2, 3, 4, 0, 1, 2, 0]]),
            "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 0, 0, 0], [1] * 8 + [0]]),
        },
        [[1, 2], [3, 4, 5], [*range(9, 14)], [14, 15, 16]],
    ),
}


@pytest.mark.parametrize(("groups", "training"), [(1, True), (2, False), (4, True)])
@pytest.mark.parametrize("case", CASES)
def test_equals_a_loop_over_sequences(case: str, groups: int, training: bool) -> None:
    """Value, share in the loss, and gradient, with 4, 2 and 1 choices in each group."""
    inputs, sequences = CASES[case]
    model = by_sequence(num_expert_groups=groups).train(training)
    outputs = model(**inputs, labels=inputs["input_ids"], use_cache=False, output_router_logits=True)
    expected = torch.stack([looped(one, model, sequences) for one in outputs.router_logits]).mean()
    torch.testing.assert_close(outputs.aux_loss, expected, atol=1e-12, rtol=1e-12)
    pair = (
        torch.autograd.grad(loss, outputs.router_logits, retain_graph=True) for loss in (outputs.aux_loss, expected)
    )
    for found, wanted in zip(*pair, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)
    plain = moge("eager", num_expert_groups=groups).double().train(training)
    loss = plain(**inputs, labels=inputs["input_ids"], use_cache=False).loss
    torch.testing.assert_close(outputs.loss, loss + COEFFICIENT * expected, atol=1e-10, rtol=1e-10)
    batch_form = by_sequence("batch", num_expert_groups=groups)(**inputs, use_cache=False, output_router_logits=True)
    if len(sequences) > 1:
        assert abs(float((batch_form.aux_loss - expected).detach())) > 1e-5


def aux_loss_and_gradient(model: MoGEForCausalLM, **inputs: Any) -> tuple[Tensor, Tensor]:
    loss = model(**inputs, use_cache=False, output_router_logits=True).aux_loss
    return loss.detach(), torch.autograd.grad(loss, model.get_parameter(GATE))[0]


@pytest.fixture(scope="module")
def model() -> MoGEForCausalLM:
    return by_sequence().train()


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), left=st.booleans(), given_by=st.integers(0, 2))
@example(lengths=[1, 1], left=True, given_by=0)  # a column of tokens, whose router logits have as many rows
@settings(max_examples=25)
def test_a_packed_row_equals_a_padded_batch(
    model: MoGEForCausalLM, lengths: list[int], left: bool, given_by: int
) -> None:
    samples = [torch.randint(3, 40, (length,)) for length in lengths]
    row = {"input_ids": torch.cat(samples)[None]}
    if given_by:
        row["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    if given_by != 1:
        row["cu_seq_lens_q"] = torch.tensor([0, *lengths]).cumsum(0).int()
    pad, side = torch.nn.utils.rnn.pad_sequence, "left" if left else "right"
    ids = pad(samples, batch_first=True, padding_side=side)
    mask = pad([torch.ones_like(one) for one in samples], batch_first=True, padding_side=side)
    found = aux_loss_and_gradient(model, **row)
    # Padding shifts positions, whose rotations are computed in float32.
    for one, other in zip(found, aux_loss_and_gradient(model, input_ids=ids, attention_mask=mask), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "vlparts_packed"])
def test_a_packed_row_is_the_mean_of_its_samples(implementation: str) -> None:
    """A sample alone has one sequence, so all forms agree on it."""
    model = by_sequence().train()
    model.set_attn_implementation(implementation)
    inputs, sequences = CASES["boundaries"]
    packed = aux_loss_and_gradient(model, **inputs)
    alone = by_sequence("batch").train()
    found = [aux_loss_and_gradient(alone, input_ids=inputs["input_ids"][:, part]) for part in sequences]
    for one, parts in zip(packed, zip(*found, strict=True), strict=True):
        # "eager" attention has its softmax in float32.
        torch.testing.assert_close(one, torch.stack(parts).mean(0), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("case", ["padding on the left", "boundaries", "positions and padding"])
def test_gradient_checkpointing_changes_nothing(case: str) -> None:
    model, inputs = by_sequence().train(), CASES[case][0]
    expected = aux_loss_and_gradient(model, **inputs)
    model.gradient_checkpointing_enable()
    for one, other in zip(aux_loss_and_gradient(model, **inputs), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
def test_compiles_in_one_graph() -> None:
    torch.compiler.reset()
    model = moge(num_hidden_layers=1, router_aux_loss_coef=COEFFICIENT, router_aux_loss_form="sequence")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    inputs: dict[str, Any] = {"input_ids": tokens(), "labels": tokens(), "use_cache": False}
    inputs["attention_mask"] = torch.ones(2, 9, dtype=torch.int64)
    inputs["attention_mask"][0, :3] = 0
    expected = model(**inputs)
    torch.testing.assert_close(compiled(**inputs).loss, expected.loss, atol=1e-5, rtol=1e-5)


def test_a_composed_model_balances_each_of_its_samples() -> None:
    """Images and text, in a padded batch and in one row."""
    model, processor = composed(moge_config(router_aux_loss_coef=COEFFICIENT, router_aux_loss_form="sequence"))
    model.double().train().set_experts_implementation("eager")
    inputs = {name: one.double() if one.is_floating_point() else one for name, one in batch(processor, GROUPS).items()}
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    assert not mask.all()
    labelled = {**inputs, "labels": ids}
    outputs = model(**labelled)

    lengths = mask.sum(1)
    row = {name: one for name, one in labelled.items() if name != "attention_mask"}
    row |= {"input_ids": ids[mask][None], "labels": ids[mask][None]}
    positions = {"position_ids": torch.cat([torch.arange(int(length)) for length in lengths])[None]}
    bounds = {"cu_seq_lens_q": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()}
    for given_samples in (positions, bounds, positions | bounds):
        packed = model(**row, **given_samples)
        torch.testing.assert_close(packed.aux_loss, outputs.aux_loss, atol=1e-9, rtol=1e-9)

    alone, _ = composed(moge_config(router_aux_loss_coef=COEFFICIENT))
    alone.double().train().set_experts_implementation("eager")
    losses = []
    for group in GROUPS:
        one = {name: x.double() if x.is_floating_point() else x for name, x in batch(processor, [group]).items()}
        losses.append(alone(**one, labels=one["input_ids"]).aux_loss)
    torch.testing.assert_close(outputs.aux_loss, torch.stack(losses).mean(), atol=1e-9, rtol=1e-9)


def test_generation_with_router_logits() -> None:
    """The mask of a step covers the cache, its router logits do not."""
    model = moge(router_aux_loss_form="sequence", output_router_logits=True)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :3] = 0
    options = {"input_ids": tokens(), "attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**options), moge().generate(**options))


def test_bounds_of_an_empty_batch() -> None:
    assert sequence_bounds((0, 5)).tolist() == [0]
    assert sequence_bounds((2, 0)).tolist() == [0, 0, 0]
