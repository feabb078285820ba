"""Samples that share a row: each is computed as if it were alone, or there is an error with the remedy."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.tiny import SIZES, TEXTS, navit_config, order_one
from vlparts import MoGEConfig, MoGEForCausalLM, PanguEmbeddedConfig, PanguEmbeddedForCausalLM, compose
from vlparts.parts.packed_samples import positions_in_samples

LENGTHS = (4, 1, 3)
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
BOUNDS = torch.tensor([0, 4, 5, 8], dtype=torch.int32)
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 0, 1, 2]])
LENGTH_INPUTS = {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS, "max_length_q": 4, "max_length_k": 4}
GIVEN = {
    "positions": {"position_ids": POSITIONS},
    "boundaries": LENGTH_INPUTS,
    "q": {"cu_seq_lens_q": BOUNDS},
    "both": {"position_ids": POSITIONS, **LENGTH_INPUTS},
    "positions and a mask": {"position_ids": POSITIONS, "attention_mask": torch.ones(1, 8).long()},
    "boundaries and a mask": {**LENGTH_INPUTS, "attention_mask": torch.ones(1, 8).long()},
}
SMALL = {**SIZES, "num_key_value_heads": 1, "vocab_size": 64}


def small_model(kind: str) -> PreTrainedModel:
    """A model with a head and weights of order one."""
    if kind == "moge":
        model = MoGEForCausalLM(MoGEConfig.from_preset("tiny", vocab_size=64))
    elif kind == "pangu":
        model = PanguEmbeddedForCausalLM(PanguEmbeddedConfig.from_preset("tiny", vocab_size=64))
    else:
        text = AutoModelForCausalLM.from_config(TEXTS[kind](**SMALL, head_dim=16))
        model = compose(vision=navit_config(), text=text)
    return order_one(model).eval()


def alone(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """Logits of the samples one by one."""
    return torch.cat([model(input_ids=ids, **inputs).logits for ids in IDS.split(LENGTHS, dim=1)], dim=1)


def served_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention of a server, which knows from elsewhere where its requests are in the row of tokens."""
    assert query.shape[::2] == (1, sum(LENGTHS))
    assert attention_mask is None
    parts = zip(*(tensor.split(LENGTHS, dim=2) for tensor in (query, key, value)), strict=True)
    attend = nn.functional.scaled_dot_product_attention
    rows = [attend(*part, is_causal=True, scale=scaling, enable_gqa=True) for part in parts]
    return torch.cat(rows, dim=2).transpose(1, 2), None


@pytest.mark.parametrize("kind", ["llama", "qwen3", "pangu", "moge"])
@torch.no_grad()
def test_a_server_gets_its_requests_in_one_row(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(kind)
    expected = alone(model)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "vllm", served_attention)
    getattr(model.config, "text_config", model.config)._attn_implementation = "vllm"
    logits = model(input_ids=IDS, position_ids=POSITIONS, use_cache=False).logits
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "vlparts_packed"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "pangu", "moge"])
@torch.no_grad()
def test_packed_samples_are_computed_as_if_alone(kind: str, implementation: str) -> None:
    model = small_model(kind)
    model.set_attn_implementation(
        {"text_config": implementation} if hasattr(model.config, "text_config") else implementation
    )
    expected = alone(model)
    assert (model(input_ids=IDS).logits - expected).abs().max() > 0.1
    for name, given in GIVEN.items():
        for use_cache in (None, False):
            outputs = model(input_ids=IDS, use_cache=use_cache, **given)
            torch.testing.assert_close(outputs.logits, expected, msg=lambda text, name=name: f"{name}: {text}")
            assert outputs.past_key_values is None
        with pytest.raises(ValueError, match="`use_cache` must be False, and `past_key_values` empty"):
            model(input_ids=IDS, use_cache=True, **given)


@torch.no_grad()
def test_several_rows_of_several_samples_with_padding() -> None:
    model = small_model("qwen3")
    ids = torch.tensor([[5, 6, 7, 8, 9, 0], [5, 9, 10, 11, 12, 13]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 1, 0, 1, 2, 0], [0, 0, 1, 2, 3, 4]])
    outputs = model(input_ids=ids, attention_mask=mask, position_ids=positions, output_hidden_states=True)
    samples = {(0, 0): ids[:1, :2], (0, 2): ids[:1, 2:5], (1, 0): ids[1:, :1], (1, 1): ids[1:, 1:]}
    for (row, start), sample in samples.items():
        expected = model(input_ids=sample, output_hidden_states=True)
        part = slice(start, start + sample.shape[1])
        torch.testing.assert_close(outputs.logits[row, part], expected.logits[0])
        for found, hidden in zip(outputs.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(found[row, part], hidden[0])


@torch.no_grad()
def test_a_row_of_padding_hides_no_samples_of_another() -> None:
    """Two rows with two samples in all, both in one of them."""
    model, ids = small_model("moge"), torch.tensor([[0, 0, 0, 0], [5, 6, 7, 8]])
    positions = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 1]])
    logits = model(input_ids=ids, attention_mask=(ids > 0).long(), position_ids=positions).logits
    for part in (slice(0, 2), slice(2, 4)):
        torch.testing.assert_close(logits[1, part], model(input_ids=ids[1:, part]).logits[0])


@pytest.mark.parametrize("kind", ["qwen3", "moge"])
def test_gradients_and_losses_are_those_of_single_samples(kind: str) -> None:
    model = small_model(kind)
    labels = torch.where(POSITIONS == 0, -100, IDS)
    loss = model(input_ids=IDS, labels=labels, **GIVEN["both"]).loss
    loss.backward()
    found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    model.set_attn_implementation({"text_config": "vlparts_packed"} if kind == "qwen3" else "vlparts_packed")
    expected = model(input_ids=IDS, labels=labels, **GIVEN["both"]).loss
    torch.testing.assert_close(loss, expected)
    expected.backward()
    for name, one in model.named_parameters():
        if one.grad is not None:
            torch.testing.assert_close(found[name], one.grad, msg=name)


@torch.no_grad()
def test_one_sample_per_row_keeps_its_cache() -> None:
    model = small_model("qwen3")
    bounds = torch.tensor([0, 8], dtype=torch.int32)
    for given in ({"position_ids": torch.arange(8)[None]}, {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}):
        assert model(input_ids=IDS, **given).past_key_values.get_seq_length() == 8
    padded = {"attention_mask": (IDS > 6).long(), "position_ids": (torch.arange(8)[None] - 2).clamp(min=0)}
    assert model(input_ids=IDS, **padded).past_key_values.get_seq_length() == 8


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cu_seq_lens_q": torch.tensor([0, 4, 7])}, r"must rise from 0 to the number of tokens .*\[0, 4, 7\] for 1"),
        ({"cu_seq_lens_q": torch.tensor([0, 5, 4, 8])}, r"must rise from 0 .* got \[0, 5, 4, 8\]"),
        ({"cu_seq_lens_q": BOUNDS[None]}, r"`cu_seq_lens_q` must have shape \(any\), got \(1, 4\)"),
        ({"cu_seq_lens_q": BOUNDS, "input_ids": IDS.repeat(2, 1)}, "for 2 rows of 8 tokens"),
        (
            {"cu_seq_lens_q": BOUNDS, "attention_mask": (IDS < 12).long()},
            "`attention_mask` must be all ones, or absent, with `cu_seq_lens_q`, got zeros",
        ),
        (
            {"cu_seq_lens_q": BOUNDS, "attention_mask": torch.ones(1, 1, 8, 8, dtype=torch.bool)},
            "`attention_mask` must be absent, or have shape .*, got another mask",
        ),
        ({"position_ids": POSITIONS, "output_attentions": True}, "`output_attentions` must be False for rows of"),
    ],
)
@pytest.mark.parametrize("kind", ["qwen3", "pangu"])
def test_inputs_that_do_not_fit_are_refused(kind: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_model(kind)(**{"input_ids": IDS, **given})


def test_generation_needs_a_row_per_sample() -> None:
    with pytest.raises(ValueError, match="`use_cache` must be False.* Give each sample a row"):
        small_model("qwen3").generate(IDS, position_ids=POSITIONS, max_new_tokens=2)


def test_positions_in_samples_skip_empty_samples() -> None:
    assert torch.equal(positions_in_samples(torch.tensor([0, 4, 4, 5, 8, 8]), 8), POSITIONS)
