"""Composed models with videos, raw pixels and several feature layers: placeholders, generation, training."""

import itertools
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

import vlparts
from tests.parts.openpangu_shaped import CHATS, VISION, encode, openpangu, user, video
from tests.tiny import navit_config, order_one, picture, text_config, tokenizer, vision_config
from vlparts import NaViTImageProcessor, VisionLanguageConfig, WindowFreeViTConfig, WindowFreeViTImageProcessor
from vlparts.parts.image_pixels import normalize_raw_pixels
from vlparts.parts.vlm_inputs import check_placeholders

GREEDY = {"max_new_tokens": 5, "do_sample": False}


def filled(model: Any, inputs: dict[str, Tensor], features: dict[str, Tensor]) -> Tensor:
    """Embeddings with the features in place, token by token."""
    embeds = model.get_input_embeddings()(inputs["input_ids"]).clone()
    for kind, rows in features.items():
        places = (inputs["input_ids"] == getattr(model.config, f"{kind}_token_id")).nonzero().tolist()
        for (sample, token), row in zip(places, rows, strict=True):
            embeds[sample, token] = row
    return embeds


@pytest.mark.parametrize("order", list(itertools.permutations(["image", "video", "other"])))
def test_images_and_videos_in_any_order_fill_their_own_places(order: tuple[str, ...]) -> None:
    model, processor = openpangu("qwen3")
    media = {"image": picture(48, 32), "video": video(2), "other": picture(16, 33)}
    inputs = encode(processor, [user(*(media[name] for name in order)), user(video(1, seed=5), picture(20, 20, 3))])
    images = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    videos = model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"]).pooler_output
    assert [len(one) for one in images] == (inputs["image_grid_thw"].prod(-1) // 4).tolist()
    assert [len(one) for one in videos] == (inputs["video_grid_thw"].prod(-1) // 4).tolist()
    embeds = filled(model, inputs, {"image": torch.cat(images), "video": torch.cat(videos)})
    expected = model.model.language_model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    torch.testing.assert_close(model(**inputs).logits, model.lm_head(expected.last_hidden_state))


def test_the_frames_of_a_video_are_encoded_like_images() -> None:
    model, processor = openpangu()
    inputs = encode(processor, [user(video(3))])
    frames, rows, columns = inputs["video_grid_thw"][0].tolist()
    whole = model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"]).pooler_output
    assert len(whole) == 1
    grids = torch.tensor([[1, rows, columns]] * frames)
    single = model.get_image_features(inputs["pixel_values_videos"], grids).pooler_output
    torch.testing.assert_close(whole[0], torch.cat(single))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_raw_pixels_are_normalised_once_and_never_cast(dtype: torch.dtype) -> None:
    model, processor = openpangu()
    model.to(dtype)
    inputs = encode(processor, [user(picture(48, 40))])
    assert inputs["pixel_values"].dtype == torch.uint8
    seen = []
    tower = model.model.vision_tower
    tower.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    raw = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output[0]
    config = tower.config
    pixels = normalize_raw_pixels(inputs["pixel_values"], config.image_mean, config.image_std, dtype)
    normalised = model.get_image_features(pixels, inputs["image_grid_thw"]).pooler_output[0]
    assert seen == [torch.uint8, dtype]
    assert torch.equal(raw, normalised)


@pytest.mark.parametrize("kind", ["navit", "clip", "siglip2"])
def test_towers_that_do_not_normalise_refuse_raw_pixels(kind: str) -> None:
    model, processor = openpangu("qwen3", vision=vision_config(kind))
    inputs = encode(processor, [user(picture(16, 16))])
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.uint8)
    with pytest.raises(ValueError, match="`pixel_values` is torch.uint8; expected normalized pixels"):
        model(**inputs)


def test_every_feature_layer_reaches_its_merger() -> None:
    model, processor = openpangu()
    inputs = encode(processor, [user(picture(48, 40))])
    tower = model.model.vision_tower
    maps = tower(inputs["pixel_values"], inputs["image_grid_thw"]).feature_maps
    assert tower.config.feature_layers == [-1, -3]
    found = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output[0]
    merger = model.model.projector.projection.merger
    tokens = merger.mergers[0](maps[0]) + merger.mergers[1](maps[1])
    torch.testing.assert_close(found, model.model.projector.projection.output(tokens))
    # The first of the two is the last layer.
    last = tower(inputs["pixel_values"], inputs["image_grid_thw"]).last_hidden_state
    assert torch.equal(maps[0], last)


@pytest.mark.parametrize("layers", [[-3], [-1]])
def test_a_projector_of_one_layer_takes_the_one_that_is_named(layers: list[int]) -> None:
    vision = WindowFreeViTConfig.from_preset("hybrid_tiny", **VISION, feature_layers=layers)
    model, processor = openpangu(vision=vision, projector="mlp2_gelu")
    inputs = encode(processor, [user(picture(48, 40))])
    features = model.model.vision_tower(inputs["pixel_values"], inputs["image_grid_thw"]).feature_maps[0]
    found = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output[0]
    torch.testing.assert_close(found, model.model.projector(features))


def test_a_hidden_state_of_a_window_encoder_is_one_layer() -> None:
    vision = WindowFreeViTConfig.from_preset("hybrid_tiny", **VISION)
    model, processor = openpangu(vision=vision, projector="patch_merger", vision_feature_layer=2)
    inputs = encode(processor, [user(picture(48, 40))])
    outputs = model.model.vision_tower(inputs["pixel_values"], inputs["image_grid_thw"], output_hidden_states=True)
    hidden = outputs.hidden_states[2][outputs.patch_index]
    found = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output[0]
    torch.testing.assert_close(found, model.model.projector(hidden))


def test_a_padded_batch_with_videos_generates_what_each_prompt_generates_alone() -> None:
    model, processor = openpangu("qwen3")
    inputs = encode(processor, CHATS)
    length = inputs["input_ids"].shape[1]
    greedy = model.generate(**inputs, **GREEDY)[:, length:]
    assert torch.equal(greedy, model.generate(**inputs, **GREEDY, use_cache=False)[:, length:])
    beams = model.generate(**inputs, **GREEDY, num_beams=3, num_return_sequences=2)[:, length:]
    for index, chat in enumerate(CHATS):
        alone = encode(processor, [chat])
        start = alone["input_ids"].shape[1]
        expected = model.generate(**alone, **GREEDY)[0, start:]
        assert greedy[index, : len(expected)].tolist() == expected.tolist()
        expected = model.generate(**alone, **GREEDY, num_beams=3, num_return_sequences=2)[:, start:]
        assert beams[2 * index : 2 * index + 2, : expected.shape[1]].tolist() == expected.tolist()


@pytest.mark.parametrize("text", ["pangu", "qwen3"])
def test_images_and_videos_are_encoded_once_for_a_generation(text: str) -> None:
    model, processor = openpangu(text)
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *args: calls.append(1))
    model.generate(**encode(processor, CHATS), max_new_tokens=4, num_beams=2)
    assert len(calls) == 2


def test_older_transformers_never_repeat_patches_one_by_one() -> None:
    model, processor = openpangu()
    inputs = encode(processor, [user(video(2))])
    with pytest.raises(ValueError, match="newer transformers"):
        model._expand_inputs_for_generation(expand_size=2, **inputs)


def test_encoded_videos_in_place_of_pixels_give_the_same_logits() -> None:
    model, processor = openpangu()
    inputs = encode(processor, CHATS)
    expected = model(**inputs).logits
    pixels = inputs.pop("pixel_values_videos")
    videos = model.get_video_features(pixels, inputs["video_grid_thw"])
    torch.testing.assert_close(model(**inputs, mm_encoder_outputs={"video": videos}).logits, expected)
    with pytest.raises(ValueError, match=r"both `pixel_values_videos` and `mm_encoder_outputs\['video'\]`"):
        model(**inputs, pixel_values_videos=pixels, mm_encoder_outputs={"video": videos})


def test_what_the_tower_precomputes_is_passed_to_it() -> None:
    model, processor = openpangu()
    inputs = encode(processor, CHATS)
    expected = model(**inputs).logits
    seen = []
    model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(sorted(kwargs)), with_kwargs=True
    )
    precomputed = {}
    for kind in ("image", "video"):
        grids = inputs[f"{kind}_grid_thw"]
        lengths = (grids[:, 1] * grids[:, 2]).repeat_interleave(grids[:, 0])
        ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        precomputed |= {f"{kind}_cu_seqlens": ends, f"{kind}_max_seqlen": int(lengths.max())}
    torch.testing.assert_close(model(**inputs, **precomputed).logits, expected)
    assert seen == [["cu_seqlens", "max_seqlen"]] * 2


@pytest.mark.parametrize("name", ["nonsense", "image_nonsense", "video_nonsense", "pixel_mask", "cu_seqlens"])
@pytest.mark.parametrize("kind", ["navit", "clip", "siglip2", "windowfree"])
def test_options_that_the_tower_does_not_take_are_named(kind: str, name: str) -> None:
    model, processor = openpangu("qwen3", vision=None if kind == "windowfree" else vision_config(kind))
    inputs = encode(processor, [user(picture(16, 16))])
    names = ("pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes")
    images = {one: inputs[one] for one in names if one in inputs}
    for features in (model.get_image_features, model.model.get_image_features):
        with pytest.raises(ValueError, match=f"`kwargs` of the image features must be among .*, got {name}."):
            features(**images, **{name: 1})
    if kind == "windowfree":
        grids = inputs["image_grid_thw"]
        with pytest.raises(ValueError, match=f"`kwargs` of the video features must be among .*, got {name}."):
            model.get_video_features(inputs["pixel_values"], grids, **{name: 1})
    if name == "image_nonsense":
        with pytest.raises(ValueError, match=f"must be among .*, got {name}."):
            model(**inputs, **{name: 1})
    outputs = model.get_image_features(**images, output_hidden_states=True)
    assert len(outputs.hidden_states) == model.config.vision_config.num_hidden_layers + 1
    assert model.get_image_features(**images).get("hidden_states") is None
    if kind == "windowfree":
        assert model.get_video_features(inputs["pixel_values"], grids, output_hidden_states=True).hidden_states


def test_missing_and_unfit_videos_are_named() -> None:
    model, processor = openpangu()
    inputs = encode(processor, [user(video(2))])
    pixels = inputs["pixel_values_videos"]
    with pytest.raises(ValueError, match="`video_grid_thw` must be given"):
        model.get_video_features(pixels)
    square, _ = openpangu("qwen3", vision=vision_config("clip"))
    with pytest.raises(ValueError, match="`pixel_values_videos`.*CLIPVision.* takes single images"):
        square.get_video_features(pixels, inputs["video_grid_thw"])
    model.config.video_token_id = None
    with pytest.raises(ValueError, match="`config.video_token_id` must be set for inputs with videos"):
        model(**inputs)


@pytest.mark.parametrize("text", ["pangu", "qwen3"])
def test_a_sample_truncated_inside_a_video_is_named(text: str) -> None:
    model, processor = openpangu(text)
    inputs = encode(processor, [user(video(2)), user(video(2))])
    place = (inputs["input_ids"][1] == model.config.video_token_id).nonzero()[-1]
    inputs["input_ids"][1, place] = processor.tokenizer.pad_token_id
    message = {
        "pangu": "Sample 1 has 1 placeholders in a row where a frame of `video_grid_thw",
        "qwen3": "Video features and video tokens do not match: sample 1 has 3 video tokens, but its videos have 4 "
        "features. Was it truncated inside a video",
    }
    with pytest.raises(ValueError, match=message[text]):
        model(**inputs)


def test_videos_without_placeholders_are_counted() -> None:
    mask = torch.zeros(2, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="2 videos with 5 features have no video tokens in any of the 2 samples"):
        check_placeholders(mask, [2, 3], "video")


def test_gradients_reach_the_tower_through_both() -> None:
    model, processor = openpangu()
    inputs = encode(processor, CHATS)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.model.projector.parameters())
    assert all(parameter.grad.abs().max() > 0 for parameter in model.model.vision_tower.parameters())


def test_three_steps_of_training_lower_the_loss() -> None:
    model, processor = openpangu()
    inputs = encode(processor, [CHATS[0]])
    tokens = [getattr(model.config, f"{kind}_token_id") for kind in ("image", "video")]
    labels = inputs["input_ids"].masked_fill(torch.isin(inputs["input_ids"], torch.tensor(tokens)), -100)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]


def test_options_of_the_projector_are_kept(tmp_path: Any) -> None:
    model, processor = openpangu()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = vlparts.VisionLanguageForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.projector_options == {"hidden_size": 40}
    assert loaded.config.video_token_id == processor.video_token_id
    again = vlparts.VisionLanguageProcessor.from_pretrained(tmp_path)
    assert isinstance(again.image_processor, WindowFreeViTImageProcessor)
    inputs, expected = encode(again, CHATS), encode(processor, CHATS)
    assert inputs.keys() == expected.keys()
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    assert torch.equal(loaded(**inputs).logits, loaded(**expected).logits)


def test_new_mergers_are_initialised_like_the_rest() -> None:
    vision = WindowFreeViTConfig.from_preset("hybrid_tiny", **VISION)
    model = vlparts.compose(
        vision=vision, text=text_config("qwen3", tokenizer()), projector="multi_tap_merger", initializer_range=0.5
    )
    for merger in model.model.projector.projection.merger.mergers:
        assert torch.equal(merger.norm.weight, torch.ones(32))
        assert 0.4 < merger.fc1.weight.std() < 0.6
        assert not merger.fc1.bias.any()


def test_the_processor_of_a_window_free_tower() -> None:
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    vision = WindowFreeViTConfig.from_preset("window_free_tiny", image_mean=mean, image_std=std)
    words = tokenizer()
    model = vlparts.compose(vision=vision, text=text_config("qwen3", words))
    tokens = {"image_token": "<i>", "video_token": "<v>", "vision_start_token": "<s>", "vision_end_token": "<e>"}
    processor = vlparts.compose_processor(model, words, **tokens)
    images = processor.image_processor
    assert isinstance(images, WindowFreeViTImageProcessor)
    assert (images.patch_size, images.merge_size) == (8, 2)
    assert (list(images.image_mean), list(images.image_std)) == (mean, std)
    assert set(tokens.values()) <= set(words.get_vocab())
    assert model.config.video_token_id == processor.video_token_id == words.convert_tokens_to_ids("<v>")
    assert model.get_input_embeddings().num_embeddings >= len(words)


def test_without_a_video_token_nothing_about_videos_is_set() -> None:
    words = tokenizer()
    model = vlparts.compose(vision=navit_config(), text=text_config("qwen3", words))
    processor = vlparts.compose_processor(model, words)
    assert model.config.video_token_id is None
    assert processor.video_token is None
    assert isinstance(processor.image_processor, NaViTImageProcessor)


def test_a_composed_part_keeps_its_weights() -> None:
    model, _ = openpangu()
    text = order_one(vlparts.PanguEmbeddedForCausalLM(model.config.text_config), seed=3)
    composed = vlparts.compose(vision=navit_config(), text=text)
    assert composed.model.language_model is text.model
    assert composed.lm_head is text.lm_head


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video_token_id": 10**6}, "`video_token_id` must lie in the vocabulary"),
        ({"video_token_id": 3, "image_token_id": 3}, "`video_token_id` must differ from `image_token_id`, got 3"),
        ({"projector_options": {"hidden_size": 3}}, "'mlp2_gelu' has no option hidden_size"),
        (
            {"vision_config": WindowFreeViTConfig.from_preset("hybrid_tiny")},
            "'mlp2_gelu' takes one layer of the vision encoder, but `feature_layers` names 2",
        ),
    ],
)
def test_bad_configuration(changes: dict, message: str) -> None:
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        VisionLanguageConfig(**changes)
