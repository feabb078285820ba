"""The composed model over text models with experts: its loss, its outputs, and generation."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    DeepseekV3Config,
    MixtralConfig,
    MixtralForCausalLM,
    MixtralModel,
    PreTrainedConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from tests.parts.test_moge_balance import balance_in_loops
from tests.parts.test_vlm import GROUPS, batch
from tests.tiny import SIZES, order_one, text_config, tokenizer, vision_config
from vlparts import MoGEConfig, MoGEForCausalLM, VisionLanguageForConditionalGeneration, compose, compose_processor

WORDS = tokenizer()
COEFFICIENT = 0.3
NATIVE = {
    **SIZES,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": len(WORDS),
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": COEFFICIENT,
    "pad_token_id": None,
    "eos_token_id": None,
}
HEADS: dict[str, tuple[PreTrainedConfig, type[nn.Module]]] = {
    "mixtral": (MixtralConfig(**NATIVE, num_local_experts=4, sliding_window=None), MixtralForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig(**NATIVE, num_experts=4, moe_intermediate_size=16), Qwen3MoeForCausalLM),
    "moge": (
        MoGEConfig.from_preset("tiny", vocab_size=len(WORDS), router_aux_loss_coef=COEFFICIENT),
        MoGEForCausalLM,
    ),
}


def moge_config(**changes: Any) -> MoGEConfig:
    special = {name: getattr(WORDS, name) for name in ("eos_token_id", "pad_token_id", "bos_token_id")}
    return MoGEConfig.from_preset("tiny", **{"vocab_size": len(WORDS), **special, **changes})


def composed(text: PreTrainedConfig) -> tuple[VisionLanguageForConditionalGeneration, Any]:
    model = compose(vision=vision_config("navit"), text=text)
    processor = compose_processor(model, WORDS)
    return order_one(model).eval(), processor


def labelled(processor: Any) -> dict[str, Tensor]:
    """A batch of two images, none and one, padded on the left, and labels at the last four tokens."""
    inputs = dict(batch(processor, GROUPS))
    assert (inputs["attention_mask"] == 0).any()
    inputs["labels"] = torch.full_like(inputs["input_ids"], -100)
    inputs["labels"][:, -4:] = inputs["input_ids"][:, -4:]
    return inputs


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    kept = labels[:, 1:] != -100
    return F.cross_entropy(logits[:, :-1][kept], labels[:, 1:][kept])


@pytest.mark.parametrize("asked", [True, False, None])
def test_the_loss_holds_the_balance_loss(asked: bool | None) -> None:
    """Cross-entropy and, of the real tokens, equation 8 in loops."""
    model, processor = composed(moge_config(router_aux_loss_coef=COEFFICIENT))
    inputs = labelled(processor)
    outputs = model(**inputs, output_router_logits=asked)
    router_logits = model(**inputs, output_router_logits=True).router_logits
    kept = inputs["attention_mask"].flatten().bool().tolist()
    config = model.config.text_config
    balance = sum(balance_in_loops(one.detach(), config, kept) for one in router_logits) / len(router_logits)
    assert len(router_logits) == 2
    assert float(outputs.aux_loss.detach()) == pytest.approx(balance, rel=1e-5)
    expected = cross_entropy(outputs.logits, inputs["labels"]) + COEFFICIENT * outputs.aux_loss
    torch.testing.assert_close(outputs.loss, expected)
    assert ("router_logits" in outputs) == bool(asked)
    gate = model.get_parameter("model.language_model.layers.1.mlp.gate.weight")
    (gradient,) = torch.autograd.grad(outputs.aux_loss, gate)
    assert gradient.abs().max() > 0


def test_padding_does_not_count() -> None:
    model, processor = composed(moge_config(router_aux_loss_coef=COEFFICIENT))
    inputs = labelled(processor)
    other = dict(inputs, input_ids=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 5))
    assert not torch.equal(other["input_ids"], inputs["input_ids"])
    assert torch.equal(model(**other).aux_loss, model(**inputs).aux_loss)


def test_without_labels_or_without_a_coefficient_there_is_no_balance_loss() -> None:
    model, processor = composed(moge_config(router_aux_loss_coef=COEFFICIENT))
    inputs = labelled(processor)
    assert "aux_loss" not in model(**{name: one for name, one in inputs.items() if name != "labels"})
    plain, _ = composed(moge_config())
    outputs = plain(**inputs)
    assert "aux_loss" not in outputs
    torch.testing.assert_close(outputs.loss, cross_entropy(outputs.logits, inputs["labels"]))
    asked = plain(**inputs, output_router_logits=True)
    torch.testing.assert_close(asked.loss, outputs.loss)
    assert float(asked.aux_loss.detach()) > 0


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("kind", HEADS)
def test_loss_and_gradients_are_those_of_the_text_models_own_head(kind: str, asked: bool, padded: bool) -> None:
    """For text alone. transformers' own add the balance loss only where router logits are asked for."""
    config, head = HEADS[kind]
    text = order_one(head(config)).eval()
    model = compose(vision=vision_config("navit"), text=text).eval()
    input_ids = torch.randint(5, len(WORDS), (2, 9))
    mask = torch.ones_like(input_ids)
    mask[0, : 3 * padded] = 0
    inputs = {"input_ids": input_ids, "attention_mask": mask, "labels": input_ids, "output_router_logits": asked}
    ours, theirs = model(**inputs), text(**inputs)
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(ours.get("aux_loss"), theirs.get("aux_loss"))
    assert ("aux_loss" in ours) == (asked or kind == "moge")
    parameters = [one for one in text.parameters() if one.requires_grad]
    gradients = [torch.autograd.grad(one.loss, parameters) for one in (ours, theirs)]
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_a_native_configuration_can_ask_for_router_logits(kind: str) -> None:
    config = type(HEADS[kind][0]).from_dict({**HEADS[kind][0].to_dict(), "output_router_logits": True})
    model, processor = composed(config)
    inputs = labelled(processor)
    outputs = model(**inputs)
    expected = cross_entropy(outputs.logits, inputs["labels"]) + COEFFICIENT * outputs.aux_loss
    torch.testing.assert_close(outputs.loss, expected)
    assert float(outputs.aux_loss.detach()) > 0
    assert len(outputs.router_logits) == 2
    silent = model(**inputs, output_router_logits=False)
    assert "aux_loss" not in silent
    assert type(silent) is type(outputs)


def test_router_logits_of_a_text_model_without_a_balance_loss_are_refused() -> None:
    dense, processor = composed(text_config("qwen3", WORDS))
    with pytest.raises(ValueError, match="`output_router_logits` must not be True .*, got Qwen3Model"):
        dense(**labelled(processor), output_router_logits=True)
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    deepseek, processor = composed(DeepseekV3Config(**sizes, vocab_size=len(WORDS), q_lora_rank=8, kv_lora_rank=8))
    with pytest.raises(ValueError, match="`output_router_logits` must not be True .*, got DeepseekV3Model"):
        deepseek(**labelled(processor), output_router_logits=True)


class OwnMixtral(MixtralModel):
    """A class in a file without a balance loss."""


def test_the_balance_loss_of_a_class_is_that_of_its_parent() -> None:
    text = order_one(OwnMixtral(HEADS["mixtral"][0]))
    model = compose(vision=vision_config("navit"), text=text)
    input_ids = torch.randint(5, len(WORDS), (2, 9))
    outputs = model(input_ids, output_router_logits=True)
    torch.testing.assert_close(outputs.aux_loss, load_balancing_loss_func(outputs.router_logits, 4, 2))


@pytest.mark.parametrize("kind", ["mixtral", "moge"])
def test_logits_that_were_not_recorded_are_no_balance_loss_of_zero(kind: str) -> None:
    """transformers records outputs by the name of the class, and nothing where it was exchanged."""
    model, processor = composed(HEADS[kind][0])
    base = model.model.language_model
    base.__class__ = type("Exchanged", (type(base),), {})
    with pytest.raises(ValueError, match="`router_logits` must be a tuple, got None"):
        model(**labelled(processor), output_router_logits=True)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "vlparts_sorted"])
def test_a_padded_batch_generates_what_each_prompt_generates_alone(implementation: str) -> None:
    model, processor = composed(moge_config(experts_implementation=implementation, router_aux_loss_coef=COEFFICIENT))
    inputs = batch(processor, GROUPS)
    length = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": 5, "do_sample": False}
    together = model.generate(**inputs, **options)[:, length:]
    assert torch.equal(together, model.generate(**inputs, **options, use_cache=False)[:, length:])
    for index, group in enumerate(GROUPS):
        alone = batch(processor, [group])
        expected = model.generate(**alone, **options)[0, alone["input_ids"].shape[1] :]
        assert together[index, : len(expected)].tolist() == expected.tolist()


def test_a_configuration_that_shows_router_logits_can_generate() -> None:
    """The mask of a step covers the cache, its router logits do not."""
    model, processor = composed(moge_config())
    shown, _ = composed(moge_config(output_router_logits=True))
    inputs, options = batch(processor, GROUPS), {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(shown.generate(**inputs, **options), model.generate(**inputs, **options))
