"""Native models in plain Trainer: one step is the same however samples are split, packed and padded."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    DataCollatorWithFlattening,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Trainer,
)

from tests.tiny import SIZES, order_one
from tests.training.weighted_making import (
    VOCABULARY,
    Rows,
    arguments,
    assert_same,
    expected_loss,
    llama,
    one_row,
    one_row_by_positions,
    oracle,
    padded,
    padded_left,
)
from vlparts.losses.weights import PRESETS
from vlparts.training.weighted_inputs import WeightedCollator
from vlparts.training.weighted_loss import WeightedLossTrainer

LAYOUTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "one batch": (padded, {}),
    "two micro-batches": (padded, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
    "a smaller last micro-batch": (padded, {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}),
    "fewer micro-batches than wished": (padded, {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5}),
    "one at a time": (padded, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}),
    "padded on the left": (padded_left, {}),
    "one row": (one_row, {}),
    "rows": (one_row, {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}),
    "rows by positions": (one_row_by_positions, {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}),
    "without average_tokens_across_devices": (
        padded,
        {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3, "average_tokens_across_devices": False},
    ),
    "gradient checkpointing": (
        padded,
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
    ),
}


def step(
    folder: Path, model: nn.Module, collator: Any, preset: str, data: Rows | None = None, **changes: Any
) -> tuple[float, dict[str, Tensor]]:
    """The loss of one step of gradient descent, and the gradients."""
    before = {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}
    trainer = WeightedLossTrainer(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=data or Rows(),
        data_collator=WeightedCollator(collator),
        preset=preset,
    )
    trainer.train()
    assert trainer.state.global_step == 1
    after = dict(model.named_parameters())
    rate = trainer.args.learning_rate
    gradients = {name: (one - after[name].detach()) / rate for name, one in before.items()}
    return trainer.state.log_history[0]["loss"], gradients


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("layout", ["a smaller last micro-batch", "rows"])
def test_a_step_has_the_loss_and_gradients_of_the_formula(tmp_path: Path, preset: str, layout: str) -> None:
    collator, changes = LAYOUTS[layout]
    attention = {"attn_implementation": "vlparts_packed"} if collator is one_row else {}
    assert_same(step(tmp_path, llama(**attention), collator, preset, **changes), oracle(llama(), preset))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_does_not_depend_on_how_samples_are_laid_out(tmp_path: Path, layout: str) -> None:
    collator, changes = LAYOUTS[layout]
    attention = {"attn_implementation": "vlparts_packed"} if collator is one_row else {}
    found = step(tmp_path, llama(**attention), collator, "openpangu_mix", **changes)
    assert_same(found, oracle(llama(), "openpangu_mix"))


def test_transformers_own_rows_of_samples(tmp_path: Path) -> None:
    data = Rows(token_weights=False)
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    changes = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}

    def listed(features: list[dict[str, Any]]) -> Any:
        return collator([{name: value.tolist() for name, value in one.items()} for one in features])

    found = step(tmp_path, llama(attn_implementation="vlparts_packed"), listed, "sample", data, **changes)
    assert_same(found, oracle(llama(), "sample", data))


def test_token_averaging_is_trainers_own(tmp_path: Path) -> None:
    changes = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}
    data = Rows(sample_weight=False, token_weights=False)
    found = step(tmp_path, llama(), padded, "token", data, **changes)
    plain = Trainer(llama(), arguments(tmp_path, **changes), train_dataset=data, data_collator=padded)
    plain.train()
    assert abs(found[0] - plain.state.log_history[0]["loss"]) < 1e-6


def composed(kind: str) -> nn.Module:
    text = {**SIZES, "num_key_value_heads": 2, "vocab_size": VOCABULARY, "pad_token_id": 0}
    if kind == "llava":
        vision = CLIPVisionConfig(**SIZES, image_size=16, patch_size=8)
        config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**text), image_token_id=1)
        return order_one(LlavaForConditionalGeneration(config).double())
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    special = {"image_token_id": 1, "video_token_id": 0, "vision_start_token_id": 0}
    config = Qwen2VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=vision, **special)
    return order_one(Qwen2VLForConditionalGeneration(config).double())


class WithImages:
    """Each sample begins with an image, whose placeholders have no loss."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        places = torch.ones(4, dtype=torch.long)
        framed = [
            {"input_ids": torch.cat([places, one["input_ids"]]), "labels": torch.cat([-100 * places, one["labels"]])}
            for one in features
        ]
        batch: dict[str, Any] = padded(framed)
        generator = torch.Generator().manual_seed(5)
        if self.kind == "llava":
            picture = torch.randn(1, 3, 16, 16, generator=generator, dtype=torch.float64)
            return {**batch, "pixel_values": picture.repeat(len(features), 1, 1, 1)}
        patches = torch.randn(16, 3 * 2 * 16, generator=generator, dtype=torch.float64)
        return {
            **batch,
            "pixel_values": patches.repeat(len(features), 1),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * len(features)),
            "mm_token_type_ids": (batch["input_ids"] == 1).long(),
        }


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_native_vision_language_models(tmp_path: Path, kind: str) -> None:
    """A step of small micro-batches is that of one batch, and its loss is computed from the logits of each sample."""
    data, collator = Rows(token_weights=False), WithImages(kind)
    changes = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3, "learning_rate": 0.01}
    model = composed(kind)
    one, many = (
        step(tmp_path, copy.deepcopy(model), collator, "openpangu_mix", data, **each)
        for each in ({"learning_rate": 0.01}, changes)
    )
    assert_same(many, one)
    samples, sums = [data[index] for index in range(len(data))], []
    with torch.no_grad():
        for sample in samples:
            logits = model(**{k: v for k, v in collator([sample]).items() if k != "labels"}).logits[0, 3:-1]
            labels = sample["labels"]
            losses = nn.functional.cross_entropy(logits, labels, reduction="none")
            sums.append((sample["sample_weight"], float(losses.sum()), int((labels != -100).sum())))
    wanted = 0.5 * sum(a * x / n for a, x, n in sums if n) / sum(a for a, _, n in sums if n)
    wanted += 0.5 * sum(a * x for a, x, _ in sums) / sum(a * n for a, _, n in sums)
    assert abs(one[0] - wanted) < 1e-6


def test_lora(tmp_path: Path) -> None:
    """Only adapters learn, with the weighted loss of the model inside."""

    def adapted() -> nn.Module:
        torch.manual_seed(0)
        config = LoraConfig(
            r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False
        )
        return get_peft_model(llama(), config).double()

    changes = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}
    found = step(tmp_path, adapted(), padded, "square", **changes)
    assert all("lora" in name for name in found[1])
    assert_same(found, oracle(adapted(), "square"))


def test_a_model_that_is_built_anew_has_the_loss_too(tmp_path: Path) -> None:
    trainer = WeightedLossTrainer(
        model_init=lambda: llama(),
        args=arguments(tmp_path),
        train_dataset=Rows(),
        data_collator=WeightedCollator(padded),
        preset="square",
    )
    first = trainer.model
    trainer.train()
    assert trainer.model is not first
    assert abs(trainer.state.log_history[0]["loss"] - oracle(llama(), "square")[0]) < 1e-6


def test_fields_that_are_weights_are_kept_where_others_are_removed(tmp_path: Path) -> None:
    seen = []

    def watched(features: list[dict[str, Any]]) -> Any:
        seen.extend(features)
        return padded(features)

    rows: Any = [{**Rows()[index], "unknown": 1} for index in range(8)]
    found = step(tmp_path, llama(), watched, "square", rows)
    assert all(set(one) == {"input_ids", "labels"} for one in seen)
    assert_same(found, oracle(llama(), "square"))


@pytest.mark.parametrize("collator", [padded, one_row])
@pytest.mark.parametrize("preset", PRESETS)
def test_evaluation_is_the_loss_of_the_whole_set(tmp_path: Path, preset: str, collator: Any) -> None:
    model = llama(attn_implementation="vlparts_packed" if collator is one_row else "sdpa")
    trainer = WeightedLossTrainer(
        model=model,
        args=arguments(tmp_path),
        eval_dataset=Rows(),
        data_collator=WeightedCollator(collator),
        preset=preset,
    )
    wanted = expected_loss(llama(), [Rows()[index] for index in range(8)], preset).item()
    for batch in (1, 3, 8):
        trainer.args.per_device_eval_batch_size = batch
        assert abs(trainer.evaluate()["eval_loss"] - wanted) < 1e-6


def test_predicting_without_labels(tmp_path: Path) -> None:
    def unlabelled(features: Any) -> dict[str, Any]:
        return {name: value for name, value in padded(features).items() if name != "labels"}

    data = Rows(token_weights=False)
    trainer = WeightedLossTrainer(llama(), arguments(tmp_path), data_collator=WeightedCollator(unlabelled))
    output = trainer.predict(data)
    assert "test_loss" not in output.metrics
    assert output.predictions.shape[0] == len(data)


def test_a_trained_model_can_be_copied(tmp_path: Path) -> None:
    """Nothing on it holds the graph of the last step."""
    model = llama()
    step(tmp_path, model, padded, "token")
    copied = copy.deepcopy(model)
    assert all(torch.equal(one, two) for one, two in zip(copied.parameters(), model.parameters(), strict=True))
