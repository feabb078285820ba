"""The two-tower model in other people's hands: processor, pipeline, Trainer, compiler, composition."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoProcessor,
    Trainer,
    TrainingArguments,
    VisionTextDualEncoderProcessor,
    pipeline,
)

import vlparts
from tests.parts.test_navit_dual_encoder import WORDS, dual_encoder, images, text_tower, texts
from tests.tiny import navit, navit_config, picture
from vlparts import NaViTImageProcessor
from vlparts.parts.modeling_navit_dual_encoder import NaViTDualEncoder
from vlparts.parts.packed_index import get_cu_seqlens, get_max_seqlen, get_position_ids


def test_a_copy_and_a_tuple() -> None:
    model = dual_encoder()
    inputs = {**images(), **texts()}
    outputs = model(**inputs)
    assert torch.equal(copy.deepcopy(model)(**inputs).logits_per_image, outputs.logits_per_image)
    as_tuple = model(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], outputs.logits_per_image)
    hidden = model(**inputs, output_hidden_states=True)
    assert len(hidden.text_model_output.hidden_states) == len(hidden.vision_model_output.hidden_states) == 3


def test_towers_are_shared_not_copied() -> None:
    vision, text = navit(), AutoModel.from_config(text_tower("qwen3"))
    model = NaViTDualEncoder.from_towers(vision, text)
    assert model.vision_model is vision
    assert model.text_model is text
    assert model.config.vision_config is vision.config
    assert vlparts.compose(vision=model, text=text_tower("qwen3")).model.vision_tower is vision
    classifier = vlparts.NaViTForImageClassification(navit_config())
    assert NaViTDualEncoder.from_towers(classifier, text).vision_model is classifier.navit


def test_the_native_processor_and_the_pipeline_fit(tmp_path: Path) -> None:
    model = dual_encoder()
    processor = VisionTextDualEncoderProcessor(NaViTImageProcessor(patch_size=4), WORDS)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is VisionTextDualEncoderProcessor
    labels, pictures = ["cat", "big dog"], [picture(20, 9), picture(5, 13)]
    inputs = again(text=labels, images=pictures, padding=True, return_tensors="pt")
    expected = model(**inputs).logits_per_image.softmax(-1)
    classify = pipeline("zero-shot-image-classification", model=str(tmp_path))
    found = classify(pictures, candidate_labels=labels, hypothesis_template="{}")
    for row, answers in zip(expected, found, strict=True):
        scores = {answer["label"]: answer["score"] for answer in answers}
        torch.testing.assert_close(torch.tensor([scores[label] for label in labels]), row, atol=1e-5, rtol=1e-5)


def test_comparing_compiles_without_a_graph_break() -> None:
    model = dual_encoder()
    inputs = {**images(), **texts()}
    inputs["cu_seqlens"] = get_cu_seqlens(inputs["image_grid_thw"])
    inputs["max_seqlen"] = get_max_seqlen(inputs["cu_seqlens"])
    inputs["position_ids"] = get_position_ids(inputs["image_grid_thw"], 1)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")(**inputs)
    expected = model(**inputs).logits_per_image
    torch.testing.assert_close(compiled.logits_per_image, expected)
    inputs["cu_seqlens_cpu"] = inputs["cu_seqlens"].tolist()
    assert torch.equal(model(**inputs).logits_per_image, expected)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_it_learns_pairs(loss: str) -> None:
    torch.manual_seed(0)
    model = NaViTDualEncoder.from_towers(navit_config(), text_tower("qwen3"), projection_dim=16, loss=loss)
    inputs = {**images(), **texts(), "return_loss": True}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(model(**inputs).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    inputs.pop("return_loss")
    assert model(**inputs).logits_per_image.argmax(-1).tolist() == [0, 1, 2]


def test_the_trainer_accumulates_means(tmp_path: Path) -> None:
    """Two small batches a step: the loss that it logs, and follows, is the mean of theirs."""
    model = dual_encoder()
    inputs = [{**images(), **texts()}, {**images(), **texts(["one", "two", "three"])}]
    with torch.no_grad():
        expected = sum(model(**batch, return_loss=True).loss.item() for batch in inputs) / 2
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
    )
    trainer = Trainer(
        model, arguments, train_dataset=inputs, data_collator=lambda one: {**one[0], "return_loss": True}
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)
