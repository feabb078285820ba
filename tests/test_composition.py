"""Composing from models, configurations and folders."""

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, CLIPConfig, CLIPModel, GPT2Config, Siglip2VisionModel

import vlparts
from tests.tiny import (
    SIZES,
    assert_initialised,
    navit,
    navit_config,
    order_one,
    picture,
    text_config,
    tokenizer,
    vision_config,
)


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
        expected = {name: value for name, value in theirs.named_parameters() if not name.startswith("head.")}
        assert dict(ours.named_parameters()).keys() == expected.keys()
        for name, mine in ours.named_parameters():
            assert torch.equal(mine, expected[name]), name
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


@pytest.mark.parametrize("kind", ["configuration", "model", "base"])
@pytest.mark.parametrize("tied", [True, False])
def test_initialisation_happens_once(kind: str, tied: bool) -> None:
    """Also of a new head and a trained projector, and after the vocabulary has grown."""
    words = tokenizer()
    config = text_config("qwen3", words)
    config.tie_word_embeddings = tied
    text = config if kind == "configuration" else AutoModelForCausalLM.from_config(config)
    model = vlparts.compose(vision=vision_config("clip"), text=text.model if kind == "base" else text)
    assert_initialised(model)
    vlparts.compose_processor(model, words, vision_start_token="<start>", vision_end_token="<end>")
    assert_initialised(order_one(model))


def test_parts_without_weights_are_initialised_later() -> None:
    with torch.device("meta"):
        model = vlparts.compose(vision=navit_config(), text=text_config("qwen3", tokenizer()))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    model.init_weights()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


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


def test_placeholders_are_suppressed_beside_the_tokens_of_the_text_model() -> None:
    words = tokenizer()
    text = AutoModelForCausalLM.from_config(text_config("qwen2", words))
    text.generation_config.update(suppress_tokens=[7, 5], eos_token_id=None)
    model = vlparts.compose(vision=navit_config(), text=text, image_token_id=9, video_token_id=8)
    assert model.generation_config.suppress_tokens == [5, 7, 8, 9]
    tokens = {"video_token": "<video>", "vision_start_token": "<start>", "vision_end_token": "<end>"}
    vlparts.compose_processor(model, words, **tokens)
    ids = words.convert_tokens_to_ids(["<image>", *tokens.values()])
    assert model.generation_config.suppress_tokens == sorted({5, 7, *ids})
    # The options of the given model are its own.
    assert text.generation_config.suppress_tokens == [7, 5]
    assert text.generation_config.eos_token_id is None


def test_a_model_without_placeholders_suppresses_nothing() -> None:
    model = vlparts.compose(vision=navit_config(), text=text_config("qwen3", tokenizer()))
    assert model.generation_config.suppress_tokens is None


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_k": 0},
        {"do_sample": False, "prompt_lookup_num_tokens": 3},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "num_beams": 2},
    ],
)
def test_placeholders_are_not_generated(options: dict, tmp_path: object) -> None:
    """Placeholders have the largest logits by far, and the prompt ends in what precedes them."""
    words = tokenizer()
    model = vlparts.compose(vision=navit_config(), text=text_config("qwen3", words)).eval()
    processor = vlparts.compose_processor(model, words, vision_start_token="<start>", vision_end_token="<end>")
    model.save_pretrained(tmp_path)
    loaded = vlparts.VisionLanguageForConditionalGeneration.from_pretrained(tmp_path)
    ids = words.convert_tokens_to_ids(["<image>", "<start>", "<end>"])
    text = "Where is <start><image><end> Where is "
    inputs = processor(images=[picture(12, 12)], text=text, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    for one in (model, loaded):
        one.lm_head.register_forward_hook(lambda module, args, logits: logits.index_fill(-1, torch.tensor(ids), 100.0))
        one.generation_config.eos_token_id = None
        generated = one.generate(**inputs, max_new_tokens=8, **options)[0, length:].tolist()
        assert len(generated) == 8
        assert not set(generated) & set(ids)


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
    with pytest.raises(
        ValueError, match="`vision` Qwen3Config of type 'qwen3' is no vision encoder .*; expected one of type "
    ):
        vlparts.compose(vision=text_config("qwen3", tokenizer()), text=text_config("qwen3", tokenizer()))


def test_a_vision_configuration_as_text_is_refused() -> None:
    with pytest.raises(ValueError, match="`text` must be a text model, got CLIPVisionConfig"):
        vlparts.compose(vision=navit_config(), text=vision_config("clip"))


def test_an_unknown_projector_is_refused() -> None:
    with pytest.raises(ValueError, match="`projector` must be one of linear, .* got 'conv'"):
        vlparts.compose(vision=navit_config(), text=text_config("qwen3", tokenizer()), projector="conv")
