"""The dual encoder: parity with native CLIP, kinds of texts and images, padding, and bad inputs."""

import math
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForZeroShotImageClassification,
    BertConfig,
    BertForMaskedLM,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    DistilBertConfig,
    PreTrainedConfig,
    SiglipVisionConfig,
    T5Config,
)

from tests.tiny import (
    SIZES,
    assert_initialised,
    navit,
    navit_config,
    order_one,
    packed_images,
    text_config,
    tokenizer,
    vision_config,
)
from vlparts.parts.configuration_navit_dual_encoder import NaViTDualEncoderConfig
from vlparts.parts.modeling_navit_dual_encoder import NaViTDualEncoder

WORDS = tokenizer()
CAPTIONS = ["a cat", "the big dog sleeps", "x"]
GRIDS = [(3, 5), (1, 1), (2, 7)]


def text_tower(kind: str) -> PreTrainedConfig:
    special = {"eos_token_id": WORDS.eos_token_id, "pad_token_id": WORDS.pad_token_id, "bos_token_id": None}
    if kind == "clip":
        return CLIPTextConfig(**SIZES, vocab_size=len(WORDS), max_position_embeddings=32, **special)
    if kind == "bert":
        return BertConfig(**SIZES, vocab_size=len(WORDS), max_position_embeddings=32, pad_token_id=0)
    if kind == "distilbert":
        return DistilBertConfig(
            dim=32, hidden_dim=48, n_layers=2, n_heads=2, vocab_size=len(WORDS), max_position_embeddings=32
        )
    return text_config(kind, WORDS)


def dual_encoder(vision: str = "navit", text: str = "qwen3", **changes: object) -> NaViTDualEncoder:
    options = {"projection_dim": 24, "chunk_size": 2, **changes}
    model = NaViTDualEncoder.from_towers(vision_config(vision), text_tower(text), **options)
    return order_one(model).eval()


def texts(captions: list[str] = CAPTIONS, side: str = "right") -> dict[str, Tensor]:
    ended = [caption + WORDS.eos_token for caption in captions]
    return dict(WORDS(ended, padding=True, padding_side=side, return_tensors="pt"))


def images(kind: str = "navit") -> dict[str, Tensor]:
    if kind == "clip":
        return {"pixel_values": torch.randn(3, 3, 16, 16)}
    patches, grids = packed_images(GRIDS)
    if kind == "navit":
        return {"pixel_values": patches, "image_grid_thw": grids}
    lengths = grids.prod(-1)
    return {
        "pixel_values": torch.nn.utils.rnn.pad_sequence(patches.split(lengths.tolist()), batch_first=True),
        "pixel_attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
        "spatial_shapes": grids[:, 1:],
    }


def gradients_of(model: NaViTDualEncoder, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_equals_native_clip_forward_and_backward() -> None:
    config = CLIPConfig(
        text_config=text_tower("clip").to_dict(), vision_config=vision_config("clip").to_dict(), projection_dim=24
    )
    native = order_one(CLIPModel(config)).double().eval()
    model = NaViTDualEncoder.from_towers(native, native, projection_dim=24, chunk_size=2).eval()
    with torch.no_grad():
        model.image_projection.weight.copy_(native.visual_projection.weight)
        model.text_projection.weight.copy_(native.text_projection.weight)
        model.logit_scale.copy_(native.logit_scale)
    inputs = {**texts(), "pixel_values": torch.randn(3, 3, 16, 16, dtype=torch.float64)}
    expected, outputs = native(**inputs, return_loss=True), model(**inputs)
    for name in ("logits_per_image", "logits_per_text", "image_embeds", "text_embeds"):
        torch.testing.assert_close(outputs[name], expected[name])
    for tower in ("vision_model_output", "text_model_output"):
        torch.testing.assert_close(outputs[tower].pooler_output, expected[tower].pooler_output)
    loss = model(**inputs, return_loss=True).loss
    torch.testing.assert_close(loss, expected.loss)
    shared = list(native.text_model.parameters()) + list(native.vision_model.parameters())
    wanted = torch.autograd.grad(expected.loss, [*shared, native.logit_scale], allow_unused=True)
    found = torch.autograd.grad(loss, [*shared, model.logit_scale], allow_unused=True)
    for got, there in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.reshape(there.shape), there)


@pytest.mark.parametrize(
    ("vision", "text"),
    [("navit", "qwen3"), ("navit", "clip"), ("navit", "bert"), ("clip", "distilbert"), ("siglip2", "qwen3")],
)
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_logits_and_loss_are_the_formulas_of_the_features(vision: str, text: str, loss: str) -> None:
    model = dual_encoder(vision, text, loss=loss)
    pixels, words = images(vision), texts()
    if text == "bert":
        words["token_type_ids"] = torch.ones_like(words["input_ids"])
    outputs = model(**pixels, **words)
    image = torch.nn.functional.normalize(model.get_image_features(**pixels).pooler_output, dim=-1)
    caption = torch.nn.functional.normalize(model.get_text_features(**words).pooler_output, dim=-1)
    logits = model.logit_scale.exp() * image @ caption.T + (model.logit_bias if loss == "sigmoid" else 0)
    assert logits.shape == (3, 3)
    assert outputs.loss is None
    torch.testing.assert_close(outputs.logits_per_image, logits)
    torch.testing.assert_close(outputs.logits_per_text, logits.T)
    torch.testing.assert_close((outputs.image_embeds, outputs.text_embeds), (image, caption))
    trained = model(**pixels, **words, return_loss=True)
    assert trained.logits_per_image is None
    assert trained.logits_per_text is None
    right = torch.arange(3)
    expected = (
        (torch.nn.functional.cross_entropy(logits, right) + torch.nn.functional.cross_entropy(logits.T, right)) / 2
        if loss == "softmax"
        else -torch.nn.functional.logsigmoid((2 * torch.eye(3) - 1) * logits).sum() / 3
    )
    torch.testing.assert_close(trained.loss, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("pooling", ["last", "first", "mean"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_text_has_the_vector_that_it_has_alone(pooling: str, side: str) -> None:
    model = dual_encoder(text_pooling=pooling)
    together = model.get_text_features(**texts(side=side)).pooler_output
    for row, caption in zip(together, CAPTIONS, strict=True):
        alone = model.get_text_features(texts([caption])["input_ids"]).pooler_output[0]
        torch.testing.assert_close(row, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_absolute_positions_with_padding_on_the_left(side: str) -> None:
    model = dual_encoder(text="distilbert")
    words = texts(side=side)
    positions = (words["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    together = model.get_text_features(**words, text_position_ids=positions).pooler_output
    for row, caption in zip(together, CAPTIONS, strict=True):
        alone = model.get_text_features(**texts([caption])).pooler_output[0]
        torch.testing.assert_close(row, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("text", "same_as"), [("qwen3", "last"), ("distilbert", "mean"), ("clip", "pooler")])
def test_auto_pooling(text: str, same_as: str) -> None:
    model = dual_encoder(text=text)
    found = model.get_text_features(**texts()).pooler_output
    model.config.text_pooling = same_as
    assert torch.equal(found, model.get_text_features(**texts()).pooler_output)
    model.config.text_pooling = "first"
    assert not torch.allclose(found, model.get_text_features(**texts()).pooler_output)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("explicit", [False, True])
def test_padding_examples_are_inert(loss: str, explicit: bool) -> None:
    """A batch of fixed size, with padding rows, dropped patches and padding texts, and one text that is left out."""
    model = dual_encoder(loss=loss).double()
    patches, grids = packed_images(GRIDS, dtype=torch.float64)
    kept = torch.tensor([*range(10), *range(15, 30)])
    words = texts()
    real = {"pixel_values": patches[kept], "image_grid_thw": grids, "keep_index": kept, **words}
    padded = {
        "pixel_values": torch.nn.functional.pad(patches[kept], (0, 0, 0, 3), value=7.0),
        "image_grid_thw": torch.nn.functional.pad(grids, (0, 0, 0, 2)),
        "keep_index": torch.nn.functional.pad(kept, (0, 3), value=-1),
        "input_ids": torch.nn.functional.pad(words["input_ids"], (0, 0, 0, 2)),
        "attention_mask": torch.nn.functional.pad(words["attention_mask"], (0, 0, 0, 2)),
    }
    if explicit:
        padded["image_mask"] = torch.tensor([True, True, True, False, True])
        padded["text_mask"] = torch.tensor([True, True, True, True, False])
        padded["attention_mask"][3:] = 1
    expected, outputs = model(**real, return_loss=True), model(**padded, return_loss=True)
    torch.testing.assert_close(outputs.loss, expected.loss)
    assert not outputs.image_embeds[3].any()
    assert not outputs.text_embeds[4].any()
    wanted, found = gradients_of(model, expected.loss), gradients_of(model, outputs.loss)
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-9, rtol=1e-7)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model = dual_encoder().train()
    inputs = {**images(), **texts(), "return_loss": True}
    expected = gradients_of(model, model(**inputs).loss)
    model.gradient_checkpointing_enable()
    found = gradients_of(model, model(**inputs).loss)
    assert len(expected) > 40
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    model = dual_encoder(loss="sigmoid")
    model.save_pretrained(tmp_path)
    half = NaViTDualEncoder.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    inputs = {**images(), **texts()}
    outputs, expected = half(**inputs), model(**inputs)
    assert outputs.image_embeds.dtype == dtype
    assert outputs.logits_per_image.dtype == torch.float32
    torch.testing.assert_close(outputs.image_embeds.float(), expected.image_embeds, atol=0.1, rtol=0.1)
    loss = half(**inputs, return_loss=True).loss
    assert loss.dtype == torch.float32
    assert all(gradient.isfinite().all() for gradient in gradients_of(half, loss).values())


def test_towers_of_two_types_work_together() -> None:
    model = NaViTDualEncoder.from_towers(navit().bfloat16(), AutoModel.from_config(text_tower("qwen3")))
    loss = model(**images(), **texts(), return_loss=True).loss
    assert {gradient.dtype for gradient in gradients_of(model, loss).values()} == {torch.bfloat16, torch.float32}


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_every_weight_is_initialised(tmp_path: Path, poisoned_empty: None, loss: str) -> None:
    """New, and loaded from a folder that has the towers' weights only."""
    torch.manual_seed(0)
    model = NaViTDualEncoder(dual_encoder(loss=loss).config)
    scale, bias = (math.log(1 / 0.07), None) if loss == "softmax" else (math.log(10), -10)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    towers = {name: value for name, value in weights.items() if name.startswith(("vision_model", "text_model"))}
    assert len(towers) < len(weights)
    save_file(towers, tmp_path / "model.safetensors", metadata={"format": "pt"})
    joined = NaViTDualEncoder.from_towers(model.vision_model, model.text_model, loss=loss, projection_dim=512)
    for built in (model, NaViTDualEncoder.from_pretrained(tmp_path), joined):
        assert all(value.isfinite().all() for value in built.state_dict().values())
        assert built.logit_scale.item() == pytest.approx(scale)
        assert built.logit_bias is None if bias is None else built.logit_bias.item() == bias
        for projection in (built.image_projection, built.text_projection):
            assert projection.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert_initialised(built)


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    model = dual_encoder(loss="sigmoid")
    model.save_pretrained(tmp_path)
    inputs = {**images(), **texts()}
    expected = model(**inputs).logits_per_image
    for auto in (AutoModel, AutoModelForZeroShotImageClassification):
        loaded, report = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is NaViTDualEncoder
        assert not any(report.values())
        torch.testing.assert_close(loaded(**inputs).logits_per_image, expected)
    assert NaViTDualEncoderConfig.from_pretrained(tmp_path).to_diff_dict() == model.config.to_diff_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projection_dim": 0}, "`projection_dim` must be at least 1, got 0"),
        ({"chunk_size": 0}, "`chunk_size` must be at least 1, got 0"),
        ({"loss": "hinge"}, "Field 'loss' expected one of .*, got hinge"),
        ({"negatives": "few"}, "Field 'negatives' expected one of .*, got few"),
        ({"text_pooling": "max"}, "Field 'text_pooling' expected one of .*, got max"),
        ({"logit_bias_init_value": -1.0}, "`logit_bias_init_value` must be None for `loss` 'softmax', got -1.0"),
        ({"logit_scale_init_value": float("inf")}, "`logit_scale_init_value` must be a finite number, got inf"),
        ({"initializer_range": -0.1}, "`initializer_range` must be a finite number of at least 0, got -0.1"),
        ({"vision_config": navit_config(pooling="none")}, "`vision_config` must pool"),
        ({"vision_config": {"hidden_size": 8}}, "`vision_config` must have a 'model_type' .* got None"),
        ({"text_config": {"model_type": "no_such_model"}}, "`text_config` must .* got 'no_such_model'"),
        ({"text_config": T5Config()}, "`text_config` must be an encoder or a decoder, got.*'t5'"),
    ],
)
def test_bad_configuration(changes: dict, message: str) -> None:
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        NaViTDualEncoderConfig(**changes)


def test_a_default_configuration_is_complete() -> None:
    config = NaViTDualEncoderConfig()
    assert (config.vision_config.model_type, config.text_config.model_type) == ("vlparts_navit", "clip_text_model")
    assert config.get_text_config() is config.text_config
    assert NaViTDualEncoderConfig(**config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("vision", "text", "message"),
    [
        ("folder", navit_config(), "`vision` must be a model or a configuration, got str"),
        (navit_config(), 3, "`text` must be a model or a configuration, got int"),
        (navit_config(), BertForMaskedLM(text_tower("bert")), "`text` BertModel does not have the weights.*pooler"),
    ],
)
def test_bad_towers(vision: object, text: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NaViTDualEncoder.from_towers(vision, text)


@pytest.mark.parametrize(
    ("kinds", "changes", "message"),
    [
        ({}, {"pixel_values": None}, "`pixel_values` and `input_ids` must both be given"),
        ({}, {"input_ids": None}, "`pixel_values` and `input_ids` must both be given"),
        ({}, {"image_grid_thw": None}, "`image_grid_thw` must be given for the tower NaViTModel"),
        ({"vision": "siglip2"}, {"spatial_shapes": None}, "`spatial_shapes` must be given for the tower Siglip2"),
        ({"vision": "clip"}, {"keep_index": torch.arange(3)}, "CLIPVisionModel takes no `keep_index`"),
        ({}, {"token_type_ids": torch.zeros(3, 5).long()}, "Qwen3Model takes no `token_type_ids`"),
        ({}, {"image_mask": torch.ones(2, dtype=torch.bool)}, r"`image_mask` must be bool with shape \(3,\).*\(2,\)"),
        ({}, {"text_mask": torch.ones(3)}, "`text_mask` must be bool.*float32"),
        ({}, texts(CAPTIONS[:2]), "`return_loss` needs one text per image, got 3 images and 2 texts"),
    ],
)
def test_bad_inputs(kinds: dict, changes: dict, message: str) -> None:
    inputs = {**images(kinds.get("vision", "navit")), **texts(), "return_loss": True, **changes}
    with pytest.raises(ValueError, match=message):
        dual_encoder(**kinds)(**inputs)


def test_towers_that_do_not_pool_are_refused() -> None:
    model = dual_encoder(text_pooling="pooler")
    with pytest.raises(ValueError, match="`text_pooling` is 'pooler', but the text tower Qwen3Model has no pooler"):
        model.get_text_features(**texts())
    headless = SiglipVisionConfig(**SIZES, image_size=16, patch_size=4, vision_use_head=False)
    model = NaViTDualEncoder.from_towers(headless, text_tower("qwen3"))
    with pytest.raises(ValueError, match="SiglipVisionModel returns no `pooler_output`"):
        model.get_image_features(**images("clip"))
