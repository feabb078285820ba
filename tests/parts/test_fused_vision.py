"""Two encoders with one projector against the published steps, models composed with them, tiles, bad input."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from tests.tiny import SIZES, assert_initialised, order_one, picture, text_config, tokenizer, vision_config
from vlparts import (
    CattyImageProcessor,
    FusedVisionConfig,
    FusedVisionModel,
    PanguEmbeddedConfig,
    compose,
    compose_processor,
)

IMAGES = [[picture(40, 30), picture(20, 20)], [picture(20, 70)]]
TEXTS = ["<image> and <image>", "what is <image>"]
ERRORS = (ValueError, StrictDataclassError)


def encoders() -> tuple[CLIPVisionModel, CLIPVisionModel]:
    """Two CLIP encoders with different weights of order one, for images of 4 x 4 patches."""
    general, ocr = (order_one(CLIPVisionModel(vision_config("clip")), seed).eval() for seed in (0, 1))
    return general, ocr


def composed(**changes: Any) -> tuple[Any, Any]:
    words = tokenizer()
    model = compose(
        FusedVisionModel.from_encoders(*encoders()),
        text_config("qwen3", words),
        "fused_mlp2_gelu",
        **changes,
    )
    processor = compose_processor(model, words)
    return order_one(model).eval(), processor


def test_features_are_those_of_each_encoder_without_the_class_token() -> None:
    general, ocr = encoders()
    model = FusedVisionModel.from_encoders(general, ocr, feature_layers=[-2, 1])
    pixels = torch.randn(3, 3, 16, 16)
    output = model(pixels, output_hidden_states=True)
    states = [one(pixels, output_hidden_states=True).hidden_states for one in (general, ocr)]
    assert torch.equal(output.feature_maps[0], states[0][-2][:, 1:])
    assert torch.equal(output.feature_maps[1], states[1][1][:, 1:])
    assert torch.equal(output.last_hidden_state, torch.cat(output.feature_maps, -1))
    assert all(torch.equal(*pair) for pair in zip(output.hidden_states, states[0] + states[1], strict=True))
    assert model(pixels).hidden_states is None
    assert model(pixels).attentions is None


def published_tokens(view: Tensor, model: Any, weights: tuple[float, float]) -> Tensor:
    """The tokens of one view in float64: pixel shuffle by indices, the shared layers, the weighted sum."""
    fused, mlp = model.model.vision_tower, model.model.projector.projection.mlp
    total: Any = 0
    for encoder, weight in zip((fused.general_encoder, fused.ocr_encoder), weights, strict=True):
        state = encoder(view[None], output_hidden_states=True).hidden_states[-2][0, 1:]
        grid = state.view(4, 4, -1)
        for_each = []
        for row in range(0, 4, 2):
            for column in range(0, 4, 2):
                block = [grid[row + down, column + right] for down in (0, 1) for right in (0, 1)]
                hidden = mlp.fc1.weight @ torch.cat(block) + mlp.fc1.bias
                hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
                for_each.append(mlp.fc2.weight @ hidden + mlp.fc2.bias)
        total = total + weight * torch.stack(for_each)
    return total


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.75, 0.25)])
def test_tokens_of_tiled_images_equal_the_published_steps_with_gradients(weights: tuple[float, float]) -> None:
    options = None if weights == (0.5, 0.5) else {"weights": list(weights)}
    model, processor = composed(projector_options=options)
    model.double()
    inputs = processor(images=IMAGES, text=TEXTS, padding=True, return_tensors="pt")
    assert inputs["image_tile_grid"].tolist() == [[2, 3], [1, 1], [4, 1]]
    pixels = inputs["pixel_values"].double()
    found = model.get_image_features(pixels, image_tile_grid=inputs["image_tile_grid"]).pooler_output
    views = [published_tokens(view, model, weights) for view in pixels]
    expected = [torch.cat(views[:7]), torch.cat(views[7:9]), torch.cat(views[9:])]
    torch.testing.assert_close(found, tuple(expected))
    names, parameters = zip(*model.model.projector.named_parameters(), strict=True)
    gradients = (torch.autograd.grad(torch.cat(one).square().sum(), parameters) for one in (found, expected))
    for name, ours, theirs in zip(names, *gradients, strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_a_batch_is_answered_as_its_samples_alone() -> None:
    model, processor = composed()
    inputs = processor(images=IMAGES, text=TEXTS, padding=True, return_tensors="pt")
    together = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, -4:]
    beams = model.generate(**inputs, max_new_tokens=4, do_sample=False, num_beams=2)[:, -4:]
    assert beams.shape == (2, 4)
    for sample in range(2):
        alone = processor(images=[IMAGES[sample]], text=[TEXTS[sample]], return_tensors="pt")
        found = model.generate(**alone, max_new_tokens=4, do_sample=False)[:, -4:]
        assert torch.equal(found[0], together[sample])


def test_every_used_parameter_gets_a_gradient() -> None:
    model, processor = composed()
    inputs = processor(images=IMAGES, text=TEXTS, padding=True, return_tensors="pt")
    model.train()
    model.gradient_checkpointing_enable()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    # The layers after the features that are taken.
    assert all(".layers.1." in name or ".post_layernorm." in name for name in missing)
    assert not any(name.startswith("model.projector") for name in missing)


def test_servers_count_the_tokens_of_tiled_images() -> None:
    _, processor = composed()
    counted = processor._get_num_multimodal_tokens([(30, 40), (20, 20), (70, 20)])
    inputs = processor(images=IMAGES, text=TEXTS, padding=True, return_tensors="pt")
    assert counted["num_image_tokens"] == [processor.count_image_tokens(inputs, image) for image in range(3)]
    assert counted["num_image_patches"] == [7, 2, 5]
    assert sum(counted["num_image_patches"]) == len(inputs["pixel_values"])


def test_one_encoder_takes_tiles_too() -> None:
    words = tokenizer()
    model = compose(vision_config("clip"), text_config("qwen3", words), vision_feature_layer=-2, spatial_merge_size=2)
    processor = compose_processor(model, words, CattyImageProcessor(tile_size=16))
    inputs = processor(images=IMAGES, text=TEXTS, padding=True, return_tensors="pt")
    together = (
        order_one(model).eval().get_image_features(inputs["pixel_values"], image_tile_grid=inputs["image_tile_grid"])
    )
    views = model.get_image_features(inputs["pixel_values"]).pooler_output
    assert [len(tokens) for tokens in together.pooler_output] == [7 * 4, 2 * 4, 5 * 4]
    torch.testing.assert_close(torch.cat(together.pooler_output), torch.cat(views))
    assert model(**inputs).logits.isfinite().all()


def test_encoders_of_two_families_need_an_image_processor() -> None:
    siglip = SiglipVisionConfig(**SIZES, image_size=16, patch_size=4)
    config = FusedVisionConfig(general_config=vision_config("clip"), ocr_config=siglip, feature_layers=[-2, -1])
    words = tokenizer()
    model = order_one(compose(config, text_config("qwen3", words), "fused_mlp2_gelu")).eval()
    with pytest.raises(ValueError, match="of type 'clip_vision_model' and 'siglip_vision_model', whose image"):
        compose_processor(model, words)
    processor = compose_processor(model, words, CattyImageProcessor(tile_size=16))
    inputs = processor(images=IMAGES[1], text=TEXTS[1], return_tensors="pt")
    features = model.model.vision_tower(inputs["pixel_values"]).feature_maps
    encoder = model.model.vision_tower.ocr_encoder
    torch.testing.assert_close(features[1], encoder(inputs["pixel_values"]).last_hidden_state)
    assert model(**inputs).logits.isfinite().all()


def test_views_have_positions_of_their_own_on_three_axes() -> None:
    words = tokenizer()
    text = PanguEmbeddedConfig.from_preset("tiny_mrope", vocab_size=len(words))
    model = compose(FusedVisionModel.from_encoders(*encoders()), text, "fused_mlp2_gelu")
    processor = compose_processor(model, words)
    inputs = processor(images=IMAGES[1], text=TEXTS[1], return_tensors="pt")
    grids = torch.tensor([[1, 4, 4]] * 5)  # 4 tiles and the whole image
    positions = model.model.get_multimodal_position_ids(inputs["input_ids"], image_grid_thw=grids)
    found = order_one(model).eval()(**inputs).logits
    torch.testing.assert_close(found, model(**inputs, position_ids=positions).logits)
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


def test_tiles_that_do_not_fit_the_images_are_refused() -> None:
    model, processor = composed()
    inputs = processor(images=IMAGES[:1], text=TEXTS[:1], return_tensors="pt")
    inputs["image_tile_grid"][1, 0] = 2
    with pytest.raises(ValueError, match="`image_tile_grid` describes 10 views, but there are 9"):
        model(**inputs)


def test_encoders_are_shared_and_initialised(tmp_path: Path) -> None:
    general, ocr = encoders()
    model = FusedVisionModel.from_encoders(general, ocr)
    assert model.general_encoder is general
    assert model.ocr_encoder is ocr
    assert not model.training
    assert_initialised(model)
    assert_initialised(FusedVisionModel(FusedVisionConfig(general_config=vision_config("clip"))))
    model.save_pretrained(tmp_path)
    again = FusedVisionModel.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    fields = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert fields["ocr_config"]["model_type"] == "clip_vision_model"


def test_the_defaults_are_those_of_points() -> None:
    config = FusedVisionConfig.from_preset("points_1_0")
    assert config.to_dict() == FusedVisionConfig().to_dict()
    assert (config.image_size, config.patch_size, config.hidden_size) == (336, 14, 1024)
    with torch.device("meta"):
        model = FusedVisionModel(config)
    assert sum(one.numel() for one in model.parameters()) == 2 * 303_507_456
    siglip = SiglipVisionConfig(**SIZES, image_size=16, patch_size=4)
    assert not FusedVisionConfig(general_config=siglip).ocr_config.vision_use_head


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"general_config": {"model_type": "pixtral"}}, "`general_config` must be that of a native vision encoder of"),
        ({"ocr_config": {}}, "`ocr_config` must be that of a native vision encoder of images of one size"),
        ({"ocr_config": {"model_type": "clip_vision_model"}}, "`ocr_config` must have the image size, the patch size"),
        ({"spatial_merge_size": 0}, "`spatial_merge_size` must be at least 1, got 0"),
        ({"feature_layers": [-2]}, "`feature_layers` must hold one layer per encoder, 2, got"),
        ({"feature_layers": [-2, 30]}, "`feature_layers` must be from -25 to 24 for `ocr_config`"),
    ],
)
def test_bad_configurations(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ERRORS, match=message):
        FusedVisionConfig(**fields)


def test_bad_encoders_and_inputs() -> None:
    general, _ = encoders()
    with_head = SiglipVisionModel(SiglipVisionConfig(**SIZES, image_size=16, patch_size=4))
    with pytest.raises(ValueError, match="`general` must be a SiglipVisionModel with the weights .*'head"):
        FusedVisionModel.from_encoders(with_head, with_head)
    model = FusedVisionModel.from_encoders(general, general)
    with pytest.raises(ValueError, match="`pixel_values` is torch.uint8"):
        model(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="`kwargs` must be among"):
        model(torch.zeros(1, 3, 16, 16), interpolate=True)
