"""Composing from models, configurations and folders."""

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, CLIPConfig, CLIPModel, GPT2Config, Siglip2VisionModel

import vlparts
from tests.tiny import SIZES, navit, navit_config, order_one, text_config, tokenizer, vision_config


def test_models_keep_their_weights_and_are_shared() -> None:
    words = tokenizer()
    tower = navit(pooling="none")
    text = order_one(AutoModelForCausalLM.from_config(text_config("llama", words)))
    model = vlparts.compose(vision=tower, text=text)
    assert model.model.vision_tower is tower
    assert model.model.language_model is text.model
    assert model.lm_head is text.lm_head
    assert all(not parameter.is_meta for parameter in model.parameters())
    ids = torch.arange(5)[None]
    torch.testing.assert_close(model(input_ids=ids).logits, text(input_ids=ids).logits)


def test_folders_of_native_checkpoints(tmp_path: object) -> None:
    words = tokenizer()
    tower = order_one(Siglip2VisionModel(vision_config("siglip2")))
    text = order_one(AutoModelForCausalLM.from_config(text_config("qwen2", words)))
    tower.save_pretrained(tmp_path / "vision")
    text.save_pretrained(tmp_path / "text")
    model = vlparts.compose(vision=tmp_path / "vision", text=str(tmp_path / "text"))
    for ours, theirs in ((model.model.vision_tower, tower), (model.model.language_model, text.model)):
        for (name, mine), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert torch.equal(mine, expected), name
    assert torch.equal(model.lm_head.weight, text.lm_head.weight)


def test_the_vision_tower_of_a_dual_encoder_is_taken() -> None:
    config = CLIPConfig(
        vision_config=vision_config("clip").to_dict(),
        text_config={**SIZES, "vocab_size": 20, "eos_token_id": 1},
    )
    dual = CLIPModel(config)
    model = vlparts.compose(vision=dual, text=text_config("qwen3", tokenizer()))
    assert model.model.vision_tower is dual.vision_model


def test_new_weights_follow_the_configuration() -> None:
    model = vlparts.compose(
        vision=navit_config(),
        text=text_config("qwen3", tokenizer()),
        projector="linear",
        initializer_range=0.5,
    )
    assert 0.4 < model.model.projector.projection.weight.std() < 0.6
    assert 0.4 < model.lm_head.weight.std() < 0.6
    assert torch.count_nonzero(model.model.projector.projection.bias) == 0


def test_a_configuration_of_ours_loses_its_pooling_and_the_original_is_left_alone() -> None:
    config = navit_config(pooling="map")
    model = vlparts.compose(vision=config, text=text_config("qwen3", tokenizer()))
    assert model.model.vision_tower.pooling is None
    assert config.pooling == "map"


def test_the_type_of_the_text_model_is_kept() -> None:
    text = AutoModelForCausalLM.from_config(text_config("llama", tokenizer()), dtype=torch.bfloat16)
    model = vlparts.compose(vision=navit(pooling="none").to(torch.bfloat16), text=text)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_other_embedding_names_are_tied_too() -> None:
    text = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=300, tie_word_embeddings=True)
    model = vlparts.compose(vision=navit_config(), text=text)
    assert model.lm_head.weight is model.model.language_model.wte.weight


def test_the_generation_settings_of_a_checkpoint_are_kept(tmp_path: object) -> None:
    text = AutoModelForCausalLM.from_config(text_config("qwen2", tokenizer()))
    text.generation_config.update(do_sample=True, top_k=7)
    text.save_pretrained(tmp_path)
    for given in (text, tmp_path):
        model = vlparts.compose(vision=navit_config(), text=given)
        assert (model.generation_config.do_sample, model.generation_config.top_k) == (True, 7)


@pytest.mark.parametrize("kind", ["navit", "clip", "siglip2"])
def test_images_of_other_modes_are_taken_by_every_kind_of_tower(kind: str) -> None:
    words = tokenizer()
    model = vlparts.compose(vision=vision_config(kind), text=text_config("qwen3", words))
    processor = vlparts.compose_processor(model, words)
    for mode in ("L", "RGBA", "CMYK", "P"):
        inputs = processor(images=[Image.new(mode, (20, 16))], text="<image>", return_tensors="pt")
        assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


@pytest.mark.parametrize("argument", ["vision", "text"])
def test_other_things_are_refused(argument: str) -> None:
    parts = {"vision": navit_config(), "text": text_config("qwen3", tokenizer()), argument: 3}
    with pytest.raises(ValueError, match=f"`{argument}` must be a model, a configuration or a folder, got int"):
        vlparts.compose(**parts)


def test_a_text_model_as_vision_is_refused() -> None:
    with pytest.raises(ValueError, match="`vision` Qwen3Model takes .*; expected a forward with `pixel_values`"):
        vlparts.compose(vision=text_config("qwen3", tokenizer()), text=text_config("qwen3", tokenizer()))


def test_a_vision_configuration_as_text_is_refused() -> None:
    with pytest.raises(ValueError, match="`text` must be a text model, got CLIPVisionConfig"):
        vlparts.compose(vision=navit_config(), text=vision_config("clip"))


def test_an_unknown_projector_is_refused() -> None:
    with pytest.raises(ValueError, match="`projector` must be one of linear, .* got 'conv'"):
        vlparts.compose(vision=navit_config(), text=text_config("qwen3", tokenizer()), projector="conv")
