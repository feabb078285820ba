"""Pangu Pro MoE: the block against loops over tokens, the model against transformers' relatives, and its use."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
)
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from tests.tiny import order_one
from vlparts import MoGEConfig, MoGEForCausalLM, MoGEModel
from vlparts.parts.modeling_moge import MoGEBlock

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "head_dim": 8,
}
FREE = {"num_expert_groups": 1, "renormalize": True, "router_scale": False, "shared_expert_intermediate_size": 0}
both_implementations = pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])


def config_of(**changes: Any) -> MoGEConfig:
    return MoGEConfig.from_preset("tiny", **{**SIZES, **changes})


def moge(implementation: str = "grouped_mm", **changes: Any) -> MoGEForCausalLM:
    """A small model with weights of order one."""
    model = order_one(MoGEForCausalLM(config_of(**changes))).eval()
    model.set_experts_implementation(implementation)
    return model


def block_of(**changes: Any) -> MoGEBlock:
    """A block with weights of order one, in float64."""
    return order_one(MoGEBlock(config_of(**changes, experts_implementation="eager"))).double()


def tokens(samples: int = 2, length: int = 9) -> Tensor:
    return torch.randint(3, SIZES["vocab_size"], (samples, length))


def gradients_of(model: nn.Module, **inputs: Tensor) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    loss = model(**inputs, use_cache=False).loss
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def mlp(token: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return down @ (F.silu(gate @ token) * (up @ token))


def block_in_loops(block: MoGEBlock, config: MoGEConfig, hidden_states: Tensor) -> Tensor:
    """Equations 5 to 7, token by token: scores over all experts, the best of each group, weighted and added."""
    weights, size = dict(block.named_parameters()), config.num_experts // config.num_expert_groups
    outputs = []
    for token in hidden_states.reshape(-1, config.hidden_size):
        logits = [row @ token for row in weights["gate.weight"]]
        total = sum(torch.exp(one) for one in logits)
        scores = [torch.exp(one) / total if config.scoring == "softmax" else torch.sigmoid(one) for one in logits]
        chosen = []
        for start in range(0, config.num_experts, size):
            best = sorted(range(start, start + size), key=lambda expert: -float(scores[expert].detach()))
            chosen += best[: config.num_experts_per_tok // config.num_expert_groups]
        divisor = sum(scores[expert] for expert in chosen) if config.renormalize else 1.0
        output = torch.zeros_like(token)
        for expert in chosen:
            weight = scores[expert] / divisor * config.routed_scaling_factor
            if config.router_scale:
                weight = weight * weights["gate.router_scale"][0, expert]
            gate, up = weights["experts.gate_up_proj"][expert].split(config.moe_intermediate_size)
            output = output + weight * mlp(token, gate, up, weights["experts.down_proj"][expert])
        if config.shared_expert_intermediate_size:
            shared = [weights[f"shared_expert.{name}_proj.weight"] for name in ("gate", "up", "down")]
            output = output + mlp(token, *shared)
        outputs.append(output)
    return torch.stack(outputs).view_as(hidden_states)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_experts_per_tok": 8},
        {"num_expert_groups": 2, "renormalize": True, "routed_scaling_factor": 2.5},
        {"num_expert_groups": 8, "num_experts_per_tok": 8, "shared_expert_intermediate_size": 0},
        {"num_expert_groups": 1, "num_experts_per_tok": 1, "router_scale": False},
        {"scoring": "sigmoid", "num_experts": 12},
    ],
    ids=["published", "two of two", "renormalised", "all experts", "one of all", "sigmoid"],
)
def test_the_block_equals_loops(changes: dict[str, Any]) -> None:
    block, config = block_of(**changes), config_of(**changes)
    hidden_states = torch.randn(2, 7, config.hidden_size, dtype=torch.float64, requires_grad=True)
    outputs = block(hidden_states)
    expected = block_in_loops(block, config, hidden_states)
    torch.testing.assert_close(outputs, expected)
    weights, inputs = torch.randn_like(outputs), [hidden_states, *block.parameters()]
    gradients = [torch.autograd.grad((one * weights).sum(), inputs) for one in (outputs, expected)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_one_group_is_qwen3s_block() -> None:
    """Without a shared expert and with renormalised weights."""
    config = config_of(**FREE, experts_implementation="eager")
    block = order_one(MoGEBlock(config))
    names = ("hidden_size", "moe_intermediate_size", "num_experts", "num_experts_per_tok")
    fields = {name: getattr(config, name) for name in names}
    qwen = Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**fields, norm_topk_prob=True, experts_implementation="eager"))
    qwen.load_state_dict(block.state_dict(), strict=True)
    hidden_states = torch.randn(2, 7, config.hidden_size)
    ours, theirs = block(hidden_states), qwen(hidden_states)
    torch.testing.assert_close(ours, theirs)
    for name, parameter in block.named_parameters():
        (mine,) = torch.autograd.grad(ours.square().sum(), parameter, retain_graph=True)
        (other,) = torch.autograd.grad(theirs.square().sum(), qwen.get_parameter(name), retain_graph=True)
        torch.testing.assert_close(mine, other, msg=lambda text, name=name: f"{name}: {text}")


def relative(kind: str, model: MoGEForCausalLM) -> nn.Module:
    """Transformers' Llama or Mixtral with the weights of `model`, whose keys are the same."""
    config = model.config
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    fields = {name: getattr(config, name) for name in (*names, "head_dim", "rms_norm_eps", "rope_parameters")}
    if kind == "llama":
        other = LlamaForCausalLM(LlamaConfig(**fields, intermediate_size=48, attention_bias=True))
    else:
        experts = {"num_local_experts": config.num_experts, "num_experts_per_tok": config.num_experts_per_tok}
        other = MixtralForCausalLM(MixtralConfig(**fields, **experts, intermediate_size=16, sliding_window=None))
    other.load_state_dict(model.state_dict(), strict=True)
    return other.eval()


RELATIVES = {"llama": {"mlp_only_layers": [0, 1]}, "mixtral": {**FREE, "attention_bias": False}}
each_relative = pytest.mark.parametrize("kind", RELATIVES)


@each_relative
@pytest.mark.parametrize("labelled", [slice(None), slice(4, None)])
def test_logits_loss_and_gradients_equal_a_relative(kind: str, labelled: slice) -> None:
    model, input_ids = moge(**RELATIVES[kind]), tokens()
    other = relative(kind, model)
    labels = torch.full_like(input_ids, -100)
    labels[:, labelled] = input_ids[:, labelled]
    ours, theirs = (one(input_ids, labels=labels, use_cache=False) for one in (model, other))
    torch.testing.assert_close(ours.logits, theirs.logits)
    torch.testing.assert_close(ours.loss, theirs.loss)
    expected = gradients_of(other, input_ids=input_ids, labels=labels)
    for name, gradient in gradients_of(model, input_ids=input_ids, labels=labels).items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda text, name=name: f"{name}: {text}")


@each_relative
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=["greedy", "beams", "no cache"])
def test_generate_equals_a_relative(kind: str, options: dict[str, Any]) -> None:
    model, input_ids = moge(**RELATIVES[kind]), tokens(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, **options}
    expected = relative(kind, model).generate(input_ids, eos_token_id=None, **options)
    assert torch.equal(model.generate(input_ids, **options), expected)


@both_implementations
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_generation_with_a_cache_and_without(implementation: str, options: dict[str, Any]) -> None:
    """And in a padded batch as alone."""
    model, input_ids = moge(implementation), tokens(2, 6)
    mask = torch.ones_like(input_ids)
    mask[1, :3] = 0
    options = {"max_new_tokens": 6, "do_sample": False, **options}
    found = model.generate(input_ids, attention_mask=mask, **options)
    assert torch.equal(found, model.generate(input_ids, attention_mask=mask, use_cache=False, **options))
    alone = model.generate(input_ids[1:, 3:], **options)
    assert torch.equal(found[1, 3:], alone[0])


def test_positions_after_a_cache_are_counted() -> None:
    model, input_ids = moge(), tokens()
    expected = model(input_ids, use_cache=False).logits
    cache = model(input_ids[:, :5], use_cache=True).past_key_values
    torch.testing.assert_close(
        model(input_ids[:, 5:], past_key_values=cache).logits, expected[:, 5:], atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("left", [True, False])
def test_padding_changes_nothing(attention: str, left: bool) -> None:
    model, input_ids = moge(), tokens(2, 9)
    model.set_attn_implementation(attention)
    mask = torch.ones_like(input_ids)
    mask[1, slice(4) if left else slice(5, None)] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    together = model(input_ids, attention_mask=mask, position_ids=positions).logits
    for sample in range(2):
        kept = mask[sample].bool()
        alone = model(input_ids[sample, kept][None]).logits[0]
        torch.testing.assert_close(together[sample, kept], alone, atol=1e-5, rtol=1e-5)


def test_texts_in_one_row_do_not_see_each_other() -> None:
    model, input_ids = moge(), tokens(1, 9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    together = model(input_ids, position_ids=positions, use_cache=False).logits
    apart = [model(one, use_cache=False).logits for one in (input_ids[:, :4], input_ids[:, 4:])]
    torch.testing.assert_close(together, torch.cat(apart, dim=1), atol=1e-5, rtol=1e-5)


def test_implementations_agree() -> None:
    inputs = {"input_ids": tokens(), "labels": tokens()}
    eager, grouped = moge("eager"), moge("grouped_mm")
    torch.testing.assert_close(grouped(**inputs).logits, eager(**inputs).logits)
    expected = gradients_of(eager, **inputs)
    for name, gradient in gradients_of(grouped, **inputs).items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_the_choice_of_an_implementation_has_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def spy(*arguments: Any) -> Tensor:
        calls.append(len(arguments))
        return grouped_mm_experts_forward(*arguments)

    monkeypatch.setitem(ExpertsInterface._global_mapping, "spy", spy)
    assert MoGEForCausalLM(config_of()).config._experts_implementation == "grouped_mm"
    moge("spy")(tokens())
    assert calls == [4, 4]
    MoGEForCausalLM(config_of(experts_implementation="spy"))(tokens())
    assert len(calls) == 4
    with pytest.raises(ValueError, match='`experts_implementation="nothing"` is not supported'):
        moge("nothing")


@both_implementations
def test_an_expert_of_another_process_adds_nothing(implementation: str) -> None:
    """Index E, as transformers marks it where experts are spread over processes."""
    experts = moge(implementation).model.layers[0].mlp.experts
    hidden_states, index = torch.randn(5, 32), torch.tensor([[0, 8], [8, 8], [3, 1], [8, 2], [7, 8]])
    weights = torch.rand(5, 2)
    experts._is_expert_parallel = True
    found = experts(hidden_states, index, weights)
    experts._is_expert_parallel = False
    expected = experts(hidden_states, index.clamp(max=7), weights.masked_fill(index == 8, 0.0))
    torch.testing.assert_close(found, expected)
    if implementation == "eager":  # our own
        with pytest.raises(ValueError, match="`top_k_index` must lie from 0 to 7 .*, got 8"):
            experts(hidden_states, index, weights)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model = moge(router_aux_loss_coef=0.3).train()
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :2] = 0
    inputs = {"input_ids": tokens(), "labels": tokens(), "attention_mask": mask}
    expected = gradients_of(model, **inputs)
    model.gradient_checkpointing_enable()
    for name, gradient in gradients_of(model, **inputs).items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_jitter_is_for_training() -> None:
    model, plain, input_ids = moge(router_jitter=0.3), moge(), tokens()
    assert torch.equal(model(input_ids).logits, plain(input_ids).logits)
    assert not torch.equal(model.train()(input_ids).logits, model(input_ids).logits)


def test_hidden_states_and_attention_weights_are_recorded() -> None:
    model = moge(mlp_only_layers=[0])
    model.set_attn_implementation("eager")
    outputs = model(tokens(), output_hidden_states=True, output_attentions=True, output_router_logits=True)
    assert [tuple(one.shape) for one in outputs.hidden_states] == [(2, 9, 32)] * 3
    assert [tuple(one.shape) for one in outputs.attentions] == [(2, 4, 9, 9)] * 2
    assert len(outputs.router_logits) == 1


@both_implementations
def test_bfloat16_is_near_float32(implementation: str) -> None:
    """With all experts for each token, since rounding may change a choice."""
    model = moge(implementation, num_experts_per_tok=8)
    input_ids = tokens()
    expected = model(input_ids).logits
    logits = model.to(torch.bfloat16)(input_ids).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).pow(2).mean().sqrt() < 0.1 * expected.pow(2).mean().sqrt()


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("coefficient", [0.0, 0.3])
def test_compiles_in_one_graph(masked: bool, coefficient: float) -> None:
    torch.compiler.reset()
    model = moge(num_hidden_layers=1, router_aux_loss_coef=coefficient)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for length in (9, 7):
        inputs: dict[str, Any] = {"input_ids": tokens(2, length), "labels": tokens(2, length), "use_cache": False}
        if masked:
            inputs["attention_mask"] = torch.ones(2, length, dtype=torch.int64)
            inputs["attention_mask"][0, :3] = 0
        # transformers installs the hooks that record logits at the first call, which cannot be compiled.
        expected = model(**inputs)
        found = compiled(**inputs)
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("poisoned_empty")
def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    model = moge(mlp_only_layers=[0])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is MoGEForCausalLM
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found = loaded.get_parameter(name) if name in model.state_dict() else loaded.get_buffer(name)
        assert torch.equal(found, tensor), name
    headless = AutoModel.from_pretrained(tmp_path, experts_implementation="eager")
    assert type(headless) is MoGEModel
    assert headless.config._experts_implementation == "eager"
    input_ids = tokens()
    torch.testing.assert_close(loaded(input_ids).logits, model(input_ids).logits)
    torch.testing.assert_close(loaded.lm_head(headless(input_ids).last_hidden_state), loaded(input_ids).logits)


@pytest.mark.usefixtures("poisoned_empty")
def test_new_weights() -> None:
    model = MoGEForCausalLM(config_of(initializer_range=0.5))
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    block = model.model.layers[0].mlp
    assert torch.equal(block.gate.router_scale, torch.ones(1, 8))
    for weight in (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj):
        assert 0.4 < float(weight.std().detach()) < 0.6


def test_names_of_weights() -> None:
    prefix = "model.layers.1."
    names = {name.removeprefix(prefix) for name in moge().state_dict() if name.startswith(prefix)}
    attention = {f"self_attn.{one}_proj.{leaf}" for one in "qkvo" for leaf in ("weight", "bias")}
    shared = {f"mlp.shared_expert.{one}_proj.weight" for one in ("gate", "up", "down")}
    mlps = {"mlp.gate.weight", "mlp.gate.router_scale", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert names == attention | shared | mlps | {"input_layernorm.weight", "post_attention_layernorm.weight"}


def test_tied_embeddings() -> None:
    model = MoGEForCausalLM(config_of(tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_plans_of_parallelism_name_what_there_is() -> None:
    model = moge(mlp_only_layers=[0])
    names = {name for name, _ in model.model.named_modules()} | {name for name, _ in model.model.named_parameters()}
    for plan in (model.config.base_model_tp_plan, model.config.base_model_ep_plan):
        for pattern in plan:
            assert {pattern.replace("*", "0"), pattern.replace("*", "1")} & names, pattern
    assert model.tp_plan["model.layers.*.mlp.shared_expert.down_proj"] == "rowwise"
    assert model.ep_plan["model.layers.*.mlp.experts"] == "ep_dispatch_experts"
    assert set(model.pp_plan) >= {"model.layers", "lm_head"}


def test_embeddings_in_place_of_tokens() -> None:
    model, input_ids = moge(), tokens()
    expected = model(input_ids).logits
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(input_ids)).logits, expected)
    torch.testing.assert_close(model(input_ids, logits_to_keep=2).logits, expected[:, -2:])


def test_tokens_or_embeddings_but_not_both() -> None:
    model = moge()
    for arguments in ({}, {"input_ids": tokens(), "inputs_embeds": torch.zeros(2, 9, 32)}):
        with pytest.raises(ValueError, match="Exactly one of `input_ids` and `inputs_embeds` must be given"):
            model(**arguments)
