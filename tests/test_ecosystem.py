"""The composed model with peft, gradient checkpointing, device_map, pipelines, autocast and torch.compile."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText, pipeline

from tests.parts.test_vlm import batch, chat, composed
from tests.tiny import picture

GROUPS = [[picture(20, 9)], [picture(11, 11)]]


def labelled(processor: object) -> dict:
    inputs = dict(batch(processor, GROUPS))
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def test_peft_trains_saves_and_loads(tmp_path: object) -> None:
    model, processor = composed()
    inputs = labelled(processor)
    before = model(**inputs).logits
    options = {"target_modules": ["q_proj", "v_proj", "qkv"], "modules_to_save": ["projector"], "r": 4}
    adapted = get_peft_model(model, LoraConfig(**options))
    torch.testing.assert_close(adapted(**inputs).logits, before)
    adapted.enable_input_require_grads()
    adapted.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW([one for one in adapted.parameters() if one.requires_grad], lr=0.05)
    adapted.train()
    losses = []
    for _ in range(4):
        losses.append(adapted(**inputs).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    adapted.eval()
    expected = adapted(**inputs).logits
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(composed()[0], tmp_path).eval()
    torch.testing.assert_close(again(**inputs).logits, expected)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model, processor = composed()
    model.train()
    inputs = labelled(processor)
    model(**inputs).loss.backward()
    expected = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**inputs).loss.backward()
    for name, one in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(one.grad, expected[name])
    assert {name.split(".")[1] for name in expected} >= {"vision_tower", "projector", "language_model"}


def test_device_map_and_half_precision(tmp_path: object) -> None:
    model, processor = composed()
    inputs = batch(processor, GROUPS)
    model.save_pretrained(tmp_path)
    placed = AutoModelForImageTextToText.from_pretrained(tmp_path, device_map="auto").eval()
    torch.testing.assert_close(placed(**inputs).logits, model(**inputs).logits)
    half = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert {one.dtype for one in half.parameters()} == {torch.bfloat16}
    tokens = half.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 3


def test_the_pipeline_answers_like_generate() -> None:
    model, processor = composed()
    images = [picture(20, 9), picture(7, 7)]
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    answer = ask(text=chat(images), max_new_tokens=6, do_sample=False, return_full_text=False)[0]["generated_text"]
    inputs = batch(processor, [images])
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer == processor.decode(tokens, skip_special_tokens=True)


def test_the_pipeline_of_all_modalities_answers_like_generate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """transformers requires torchvision for it, though our processors do not use it."""
    model, processor = composed()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    monkeypatch.setattr("transformers.pipelines.any_to_any.requires_backends", lambda *_: None)
    ask = pipeline("any-to-any", model=str(tmp_path))
    assert type(ask.model) is type(model)
    images = [picture(20, 9)]
    answer = ask(text=chat(images), max_new_tokens=6, do_sample=False, return_full_text=False)[0]["generated_text"]
    inputs = batch(processor, [images])
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer == processor.decode(tokens, skip_special_tokens=True)


def test_autocast_is_near_float32() -> None:
    model, processor = composed()
    inputs = batch(processor, GROUPS)
    expected = model(**inputs).logits
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**inputs).logits
    assert (logits.float() - expected).pow(2).mean().sqrt() < 0.1 * expected.pow(2).mean().sqrt()


@pytest.mark.slow
def test_training_compiles_without_graph_breaks() -> None:
    from vlparts.parts.packed_index import get_cu_seqlens, get_max_seqlen, get_position_ids

    model, processor = composed()
    inputs = labelled(processor)
    cu_seqlens = get_cu_seqlens(inputs["image_grid_thw"])
    inputs |= {
        "image_cu_seqlens": cu_seqlens,
        "image_max_seqlen": get_max_seqlen(cu_seqlens),
        "image_position_ids": get_position_ids(inputs["image_grid_thw"]),
        "use_cache": False,
    }
    expected = model(**inputs)
    expected.loss.backward()
    gradients = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = compiled(**inputs)
    outputs.loss.backward()
    torch.testing.assert_close(outputs.logits, expected.logits, atol=1e-5, rtol=1e-5)
    for name, one in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(one.grad, gradients[name], atol=1e-5, rtol=1e-4)


def test_new_tokens_enlarge_the_vocabulary() -> None:
    model, processor = composed()
    before = model.config.text_config.vocab_size
    model.resize_token_embeddings(before + 5)
    assert model(**batch(processor, GROUPS)).logits.shape[-1] == before + 5
    assert model.config.text_config.vocab_size == before + 5


def test_attention_weights_and_hidden_states_are_recorded() -> None:
    model, processor = composed()
    model.set_attn_implementation("eager")
    inputs = batch(processor, GROUPS)
    outputs = model(**inputs, output_attentions=True, output_hidden_states=True)
    assert len(outputs.hidden_states) == 3
    assert len(outputs.attentions) == 2
    length = inputs["input_ids"].shape[1]
    assert outputs.attentions[0].shape == (2, 2, length, length)
