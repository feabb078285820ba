"""The attention implementation `vlparts_packed` in transformers' models, and dense attention."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from vlparts.parts.ops_attention import (
    PACKED_ATTENTION_FUNCTIONS,
    dense_attention_forward,
    packed_attention,
    packed_attention_forward,
)

LENGTHS = [5, 1, 4]
SIZES = dict(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.5,
)


def llama(attn_implementation: str = "vlparts_packed") -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, attn_implementation=attn_implementation)
    return LlamaForCausalLM(config).double().eval()


def boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def packed_batch(lengths: list[int] = LENGTHS) -> dict[str, Any]:
    samples = [{"input_ids": torch.randint(32, (n,)).tolist()} for n in lengths]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(samples)
    return {name: value for name, value in batch.items() if name != "labels"}


def heads(length_q: int = 10, length_k: int = 10, groups: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value `(1, H, L, D)`."""
    sizes = [(4, length_q), (4 // groups, length_k), (4 // groups, length_k)]
    query, key, value = (torch.randn(1, h, n, 8, dtype=torch.float64) for h, n in sizes)
    return query, key, value


class Layer(nn.Module):
    """Attributes that the functions read from an attention layer."""

    def __init__(self, is_causal: bool = False, groups: int = 1) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.num_key_value_groups = groups


def test_the_names_are_registered() -> None:
    assert ALL_ATTENTION_FUNCTIONS["vlparts_packed"] is packed_attention_forward
    assert ALL_MASK_ATTENTION_FUNCTIONS["vlparts_packed"] is sdpa_mask


def test_packed_models_see_the_packed_operation_under_sdpa() -> None:
    assert PACKED_ATTENTION_FUNCTIONS.get_interface("sdpa", dense_attention_forward) is packed_attention_forward
    assert PACKED_ATTENTION_FUNCTIONS.get_interface("eager", dense_attention_forward) is dense_attention_forward
    flex = ALL_ATTENTION_FUNCTIONS["flex_attention"]
    assert PACKED_ATTENTION_FUNCTIONS.get_interface("flex_attention", dense_attention_forward) is flex
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not packed_attention_forward


# --- native models


def test_a_packed_decoder_gives_what_each_sample_gives_alone() -> None:
    model, batch = llama(), packed_batch()
    packed = model(**batch).logits[0]
    for start, end in pairwise(batch["cu_seq_lens_q"].tolist()):
        alone = model(batch["input_ids"][:, start:end]).logits[0]
        torch.testing.assert_close(packed[start:end], alone, rtol=1e-9, atol=1e-9)


def test_a_packed_decoder_trains_as_on_each_sample_alone() -> None:
    model, batch = llama().train(), packed_batch()
    weights = torch.randn(10, 32, dtype=torch.float64)
    (model(**batch).logits[0] * weights).sum().backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for start, end in pairwise(batch["cu_seq_lens_q"].tolist()):
        (model(batch["input_ids"][:, start:end]).logits[0] * weights[start:end]).sum().backward()
    assert packed.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(packed[name], parameter.grad, rtol=1e-8, atol=1e-8)


def test_padded_batches_are_those_of_sdpa() -> None:
    ids, mask = torch.randint(32, (2, 6)), torch.ones(2, 6, dtype=torch.int64)
    mask[1, :2] = 0
    packed, plain = (llama(name)(ids, attention_mask=mask).logits for name in ("vlparts_packed", "sdpa"))
    torch.testing.assert_close(packed[mask.bool()], plain[mask.bool()], rtol=1e-9, atol=1e-9)
    unmasked = llama()(ids).logits
    assert not torch.allclose(packed[1][mask[1].bool()], unmasked[1][mask[1].bool()])


def test_generated_tokens_are_those_of_sdpa() -> None:
    ids, mask = torch.randint(32, (2, 6)), torch.ones(2, 6, dtype=torch.int64)
    mask[1, :2] = 0
    tokens = [
        llama(name).generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
        for name in ("vlparts_packed", "sdpa")
    ]
    assert torch.equal(*tokens)


def test_boundaries_of_the_prompt_do_not_reach_cached_decoding() -> None:
    ids = torch.randint(32, (1, 7))
    prompt = boundaries([5])
    kwargs = dict(cu_seq_lens_q=prompt, cu_seq_lens_k=prompt.clone(), max_length_q=5, max_length_k=5)
    model = llama()
    prefill = model(ids[:, :5], use_cache=True, **kwargs)
    steps = model(ids[:, 5:], past_key_values=prefill.past_key_values, **kwargs)
    logits = torch.cat((prefill.logits, steps.logits), dim=1)
    torch.testing.assert_close(logits, llama("sdpa")(ids).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("window", [2, 5, 64])
def test_a_sliding_window_holds_inside_each_sample(window: int) -> None:
    config = MistralConfig(**SIZES, sliding_window=window, attn_implementation="vlparts_packed")
    model, batch = MistralForCausalLM(config).double().eval(), packed_batch()
    packed = model(**batch).logits[0]
    model.set_attn_implementation("sdpa")
    for start, end in pairwise(batch["cu_seq_lens_q"].tolist()):
        alone = model(batch["input_ids"][:, start:end]).logits[0]
        torch.testing.assert_close(packed[start:end], alone, rtol=1e-9, atol=1e-9)


def test_a_native_vision_tower_gives_what_sdpa_gives() -> None:
    config = Qwen2_5_VLVisionConfig(
        depth=2,
        hidden_size=16,
        intermediate_size=24,
        num_heads=2,
        out_hidden_size=8,
        fullatt_block_indexes=[1],
    )
    tower = Qwen2_5_VisionTransformerPretrainedModel(config).eval()
    grid = torch.tensor([[1, 4, 6], [1, 2, 8]])
    pixels = torch.randn(40, 3 * 2 * 14 * 14)
    outputs = []
    for name in ("sdpa", "vlparts_packed"):
        tower.set_attn_implementation(name)
        outputs.append(tower(pixels, grid_thw=grid).last_hidden_state)
    torch.testing.assert_close(outputs[1], outputs[0])


def test_a_decoder_compiles_whole() -> None:
    model, batch = llama(), packed_batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch, use_cache=False).logits, model(**batch, use_cache=False).logits)


def test_boundaries_of_the_prompt_do_not_reach_compiled_decoding() -> None:
    """Compiled code cannot read the boundaries: causal attention over more keys than queries has a cache."""
    query, key, value = heads(3, 10)
    mask = torch.ones(1, 1, 3, 10, dtype=torch.bool).tril(7)
    cu_q, cu_k = boundaries([1, 2]), boundaries([4, 6])

    def decode(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        kwargs = dict(cu_seq_lens_q=cu_q, cu_seq_lens_k=cu_k, max_length_q=2, max_length_k=6)
        return packed_attention_forward(Layer(is_causal=True), query, key, value, mask, **kwargs)[0]

    expected, _ = dense_attention_forward(Layer(), query, key, value, mask)
    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, key, value), expected)
    torch.testing.assert_close(decode(query, key, value), expected)


# --- the function alone


def call(tensors: tuple[Tensor, ...], lengths: list[int] = LENGTHS, **kwargs: Any) -> Tensor:
    cu_seqlens = boundaries(lengths)
    options: dict[str, Any] = dict(attention_mask=None, cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens)
    options.update(kwargs)
    output, weights = packed_attention_forward(options.pop("module", Layer()), *tensors, **options)
    assert weights is None
    return output


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_it_is_dense_attention_with_a_block_mask(causal: bool, groups: int) -> None:
    tensors, module = heads(groups=groups), Layer(causal, groups)
    cu_seqlens = boundaries(LENGTHS)
    expected, _ = dense_attention_forward(module, *tensors, None, cu_seq_lens_q=cu_seqlens, scaling=0.7)
    for options in ({}, {"is_causal": causal, "module": Layer(not causal, groups)}, {"cu_seq_lens_k": None}):
        output = call(tensors, scaling=0.7, **{"module": module, **options})
        torch.testing.assert_close(output, expected)
    assert expected.shape == (1, 10, 4, 8)


def test_cross_attention_by_segments() -> None:
    query, key, value = heads(3, 10)
    cu_q, cu_k = boundaries([1, 1, 1]), boundaries(LENGTHS)
    output = call((query, key, value), cu_seq_lens_q=cu_q, cu_seq_lens_k=cu_k)
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]
    torch.testing.assert_close(output[0], packed_attention(*rows, cu_q, cu_k))
    expected, _ = dense_attention_forward(Layer(), query, key, value, None, cu_seq_lens_q=cu_q, cu_seq_lens_k=cu_k)
    torch.testing.assert_close(output, expected)


def test_boundaries_of_something_else_are_left_alone() -> None:
    query, key, value = heads(3, 10)
    plain, _ = dense_attention_forward(Layer(), query, key, value, None)
    one, two = boundaries([1, 1, 1]), boundaries([1, 1, 1])
    torch.testing.assert_close(call((query, key, value), cu_seq_lens_q=one, cu_seq_lens_k=one), plain)
    torch.testing.assert_close(call((query, key, value), cu_seq_lens_q=one, cu_seq_lens_k=two), plain)


@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
@pytest.mark.parametrize("reason", ["dropout", "position_bias", "window"])
def test_what_goes_to_sdpa_stays_inside_its_segment(mask: str, reason: str) -> None:
    tensors = tuple(x.requires_grad_() for x in heads())
    seen = torch.ones(1, 1, 10, 10, dtype=torch.bool).tril()
    masks = {
        "none": None,
        "bool": seen,
        "additive": torch.zeros(1, 1, 10, 10).double().masked_fill(~seen, -1e300),
    }
    bias = torch.randn(1, 4, 10, 10, dtype=torch.float64)
    options = {
        "dropout": {"dropout": 0.5},
        "position_bias": {"position_bias": bias},
        "window": {"sliding_window": 2},
    }
    module = Layer(is_causal=True)
    output = call(tensors, attention_mask=masks[mask], module=module, **options[reason])
    for gradient in torch.autograd.grad(output[0, 5:6].sum(), tensors, retain_graph=True):
        assert gradient[:, :, :5].count_nonzero() == 0
        assert gradient[:, :, 6:].count_nonzero() == 0
    for gradient in torch.autograd.grad(output[0, 6].square().sum(), tensors):
        assert gradient[:, :, 7:].count_nonzero() == 0


def test_position_biases_are_added() -> None:
    tensors, bias = heads(), torch.randn(1, 4, 10, 10, dtype=torch.float64)
    output = call(tensors, position_bias=bias)
    expected, _ = dense_attention_forward(Layer(), *tensors, bias, cu_seq_lens_q=boundaries(LENGTHS))
    torch.testing.assert_close(output, expected)


def test_what_neither_has_is_refused() -> None:
    with pytest.raises(ValueError, match="softcap"):
        call(heads(), softcap=30.0)
    with pytest.raises(ValueError, match=r"`s_aux` \(attention sinks\) is not supported by 'vlparts_packed'"):
        call(heads(), s_aux=torch.zeros(4))


def test_boundaries_that_do_not_cover_the_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="`cu_seqlens_q` must rise from 0 to the number of tokens, 10, got"):
        call(heads(), [5, 4])


# --- the dense form


def test_dense_weights_sum_to_one_inside_the_segment() -> None:
    tensors = heads(groups=2)
    output, weights = dense_attention_forward(Layer(), *tensors, None, cu_seq_lens_q=boundaries(LENGTHS))
    assert weights.shape == (1, 4, 10, 10)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, 10, dtype=torch.float64))
    assert weights[:, :, :5, 5:].count_nonzero() == 0
    values = tensors[2].repeat_interleave(2, dim=1)
    torch.testing.assert_close(output, (weights @ values).transpose(1, 2))


@pytest.mark.parametrize("causal", [False, True])
def test_dense_without_segments_is_sdpa(causal: bool) -> None:
    tensors = heads()
    output, _ = dense_attention_forward(Layer(causal), *tensors, None)
    expected = nn.functional.scaled_dot_product_attention(*tensors, is_causal=causal)
    torch.testing.assert_close(output, expected.transpose(1, 2))


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_dense_masks_join_the_segments(kind: str) -> None:
    tensors = heads()
    seen = torch.rand(1, 1, 10, 12) < 0.6
    seen[..., 3, :] = False
    additive = torch.zeros(1, 1, 10, 12).double().masked_fill(~seen, float("-inf"))
    mask = seen if kind == "bool" else additive
    output, weights = dense_attention_forward(Layer(), *tensors, mask, cu_seq_lens_q=boundaries(LENGTHS))
    block = torch.block_diag(*(torch.ones(n, n) for n in LENGTHS)).bool() & seen[..., :10]
    expected = nn.functional.scaled_dot_product_attention(*tensors, attn_mask=block)
    rows = block[0, 0].any(-1)
    torch.testing.assert_close(output[:, rows], expected.transpose(1, 2)[:, rows])
    assert output[:, ~rows].count_nonzero() == 0
    assert weights[:, :, ~rows].count_nonzero() == 0


def test_a_dense_mask_alone_says_what_is_causal() -> None:
    tensors, mask = heads(), torch.rand(1, 1, 10, 10) < 0.8
    output, _ = dense_attention_forward(Layer(is_causal=True), *tensors, mask)
    expected, _ = dense_attention_forward(Layer(), *tensors, mask)
    assert torch.equal(output, expected)
    within, weights = dense_attention_forward(Layer(is_causal=True), *tensors, mask, cu_seq_lens_q=boundaries(LENGTHS))
    assert weights.triu(1).count_nonzero() == 0
    assert not torch.equal(within, output)


def test_dense_rows_without_keys_have_no_gradient() -> None:
    tensors = tuple(x.requires_grad_() for x in heads())
    mask = torch.zeros(1, 1, 10, 10, dtype=torch.bool)
    mask[..., 4:, :] = True
    output, _ = dense_attention_forward(Layer(), *tensors, mask)
    gradients = torch.autograd.grad(output.square().sum(), tensors)
    assert all(x.isfinite().all() for x in gradients)
    assert gradients[0][:, :, :4].count_nonzero() == 0


def test_dense_softmax_is_at_least_float32() -> None:
    tensors = tuple(x.bfloat16() for x in heads())
    output, weights = dense_attention_forward(Layer(), *tensors, None)
    assert output.dtype == weights.dtype == torch.bfloat16
    expected, _ = dense_attention_forward(Layer(), *(x.double() for x in tensors), None)
    torch.testing.assert_close(output, expected.bfloat16(), rtol=2**-7, atol=0)


def test_dense_dropout_acts_in_training_only() -> None:
    tensors, module = heads(), Layer()
    output, _ = dense_attention_forward(module.eval(), *tensors, None, dropout=0.5)
    expected, _ = dense_attention_forward(module, *tensors, None)
    assert torch.equal(output, expected)
    _, weights = dense_attention_forward(module.train(), *tensors, None, dropout=0.5)
    assert 0.3 < (weights == 0).double().mean() < 0.7


def test_dense_boundaries_are_checked() -> None:
    tensors = heads()
    with pytest.raises(ValueError, match="`cu_seq_lens_q` must rise from 0 to the number of tokens, 10, got"):
        dense_attention_forward(Layer(), *tensors, None, cu_seq_lens_q=boundaries([3, 4]))
    with pytest.raises(ValueError, match="`cu_seq_lens_q` needs a batch of 1, got a batch of 2"):
        dense_attention_forward(
            Layer(), *(x.expand(2, -1, -1, -1) for x in tensors), None, cu_seq_lens_q=boundaries(LENGTHS)
        )
