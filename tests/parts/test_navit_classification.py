"""The classification head: losses by hand, padding examples, bad input."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForImageClassification

from tests.tiny import navit_config, order_one, packed_images
from vlparts import NaViTForImageClassification, NaViTModel

GRIDS = [(3, 5), (1, 1), (2, 7)]


def classifier(**changes: object) -> NaViTForImageClassification:
    return order_one(NaViTForImageClassification(navit_config(num_labels=4, **changes))).eval()


def test_logits_are_linear_in_the_pooled_vector() -> None:
    model = classifier().double()
    patches, grids = packed_images(GRIDS, dtype=torch.float64)
    pooled = model.navit(patches, grids).pooler_output
    logits = model(patches, grids).logits
    torch.testing.assert_close(logits, pooled @ model.classifier.weight.T + model.classifier.bias)


def test_loss_of_classes_counts_labelled_images_only() -> None:
    model = classifier()
    patches, grids = packed_images(GRIDS)
    outputs = model(patches, grids, labels=torch.tensor([2, -100, 0]))
    expected = -(outputs.logits.log_softmax(-1)[0, 2] + outputs.logits.log_softmax(-1)[2, 0]) / 2
    torch.testing.assert_close(outputs.loss, expected)
    shared = model(patches, grids, labels=torch.tensor([2, -100, 0]), num_items_in_batch=torch.tensor(8)).loss
    torch.testing.assert_close(shared, expected * 2 / 8)


def test_loss_of_several_classes_at_once() -> None:
    model = classifier()
    patches, grids = packed_images(GRIDS)
    labels = torch.tensor([[1.0, 0, 1, 0], [-100.0] * 4, [0, 0, 0, 1]])
    outputs = model(patches, grids, labels=labels)
    assert model.config.problem_type == "multi_label_classification"
    expected = F.binary_cross_entropy_with_logits(outputs.logits[[0, 2]], labels[[0, 2]])
    torch.testing.assert_close(outputs.loss, expected)


def test_regression() -> None:
    model = order_one(NaViTForImageClassification(navit_config(num_labels=1))).eval()
    patches, grids = packed_images(GRIDS)
    outputs = model(patches, grids, labels=torch.tensor([0.5, -100.0, 2.0]))
    torch.testing.assert_close(outputs.loss, ((outputs.logits[[0, 2], 0] - torch.tensor([0.5, 2.0])) ** 2).mean())


def test_padding_examples_change_no_gradient() -> None:
    model = classifier().train()
    patches, grids = packed_images(GRIDS)
    model(patches, grids, labels=torch.tensor([2, 1, 0])).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    padded = torch.cat([patches, torch.full((7, 48), 50.0)])
    model(
        padded,
        torch.cat([grids, torch.zeros(2, 3, dtype=torch.int64)]),
        labels=torch.tensor([2, 1, 0, -100, -100]),
        keep_index=torch.cat([torch.arange(len(patches)), torch.full((7,), -1)]),
    ).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-5, msg=name)


def test_found_by_its_auto_class(tmp_path: object) -> None:
    model = classifier()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is NaViTForImageClassification
    patches, grids = packed_images(GRIDS)
    torch.testing.assert_close(loaded.eval()(patches, grids).logits, model(patches, grids).logits)
    headless = NaViTModel.from_pretrained(tmp_path)
    for name, weight in headless.state_dict().items():
        assert torch.equal(weight, model.navit.state_dict()[name]), name


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model = classifier().train()
    patches, grids = packed_images(GRIDS)
    labels = torch.tensor([2, 1, 0])
    model(patches, grids, labels=labels).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(patches, grids, labels=labels).loss.backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_bfloat16() -> None:
    model = classifier()
    patches, grids = packed_images(GRIDS)
    expected = model(patches, grids).logits
    outputs = model.to(torch.bfloat16)(patches, grids, labels=torch.tensor([2, 1, 0]))
    assert (outputs.logits.float() - expected).abs().max() < 0.1 * expected.abs().max()
    assert torch.isfinite(outputs.loss)


def test_bad_input() -> None:
    model = classifier()
    patches, grids = packed_images(GRIDS)
    with pytest.raises(ValueError, match=r"`labels` must hold one entry per image, 3, got shape \(2,\)"):
        model(patches, grids, labels=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="`pooling` must not be 'none' for a classifier"):
        NaViTForImageClassification(navit_config(pooling="none"))
