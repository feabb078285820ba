"""Composed models whose text model has three-axis positions: forward, generation, packed rows."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2VLTextConfig

from tests.parts.openpangu_shaped import CHATS, encode, openpangu, user, video
from tests.tiny import SIZES, order_one, picture, vision_config
from vlparts import VisionLanguageForConditionalGeneration, compose, compose_processor
from vlparts.parts.rope_multimodal import get_multimodal_position_ids
from vlparts.parts.vlm_positions import multimodal_positions
from vlparts.training.collators import collate_packed
from vlparts.training.encoding import Sample

MEDIA = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
GREEDY = {"max_new_tokens": 5, "do_sample": False}


def true_positions(model: VisionLanguageForConditionalGeneration, inputs: dict[str, Tensor]) -> Tensor:
    """Place, T, H and W of a batch of whole texts."""
    positions, _ = get_multimodal_position_ids(
        inputs["input_ids"],
        image_token_id=model.config.image_token_id,
        image_grid_thw=inputs.get("image_grid_thw"),
        video_token_id=model.config.video_token_id,
        video_grid_thw=inputs.get("video_grid_thw"),
        spatial_merge_size=model.config.merge_size,
        attention_mask=inputs["attention_mask"],
    )
    places = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return torch.cat((places[None], positions))


def filled(model: VisionLanguageForConditionalGeneration, inputs: dict[str, Tensor]) -> Tensor:
    """Embeddings with the features in place, item by item."""
    embeds = model.get_input_embeddings()(inputs["input_ids"]).clone()
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if pixels in inputs:
            encoded = getattr(model, f"get_{kind}_features")(inputs[pixels], inputs[f"{kind}_grid_thw"])
            places = (inputs["input_ids"] == getattr(model.config, f"{kind}_token_id")).nonzero().tolist()
            for (sample, token), feature in zip(places, torch.cat(encoded.pooler_output), strict=True):
                embeds[sample, token] = feature
    return embeds


def test_the_text_model_gets_the_positions_of_images_and_videos() -> None:
    model, processor = openpangu()
    inputs = encode(processor, CHATS)
    hidden = model.model.language_model(
        inputs_embeds=filled(model, inputs),
        position_ids=true_positions(model, inputs),
        attention_mask=inputs["attention_mask"],
    ).last_hidden_state
    logits = model(**inputs).logits
    torch.testing.assert_close(logits, model.lm_head(hidden))
    plain = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0).expand(4, -1, -1)
    assert (model(**inputs, position_ids=plain).logits - logits)[inputs["attention_mask"] == 1].abs().max() > 1e-2


def test_what_the_model_computes_can_be_given() -> None:
    model, processor = openpangu()
    inputs = encode(processor, CHATS)
    expected = model(**inputs).logits
    media = {name: inputs[name] for name in ("attention_mask", "image_grid_thw", "video_grid_thw")}
    positions = model.model.get_multimodal_position_ids(inputs["input_ids"], **media)
    assert torch.equal(positions, true_positions(model, inputs))
    assert torch.equal(model(**inputs, position_ids=positions).logits, expected)
    torch.testing.assert_close(model(**inputs, position_ids=positions[1:]).logits, expected)
    assert torch.equal(model(**inputs, position_ids=positions[0]).logits, expected)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    torch.testing.assert_close(model(inputs_embeds=embeds, **inputs).logits, expected)


def test_texts_without_images_are_left_to_the_text_model() -> None:
    model, processor = openpangu()
    inputs = encode(processor, [CHATS[1]])
    hidden = model.model.language_model(**inputs).last_hidden_state
    torch.testing.assert_close(model(**inputs).logits, model.lm_head(hidden))
    processed = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    model.config.image_token_id = model.config.video_token_id = None
    assert model.generate(**processed, **GREEDY).shape[1] == inputs["input_ids"].shape[1] + 5


def test_a_padded_batch_generates_what_each_prompt_generates_alone() -> None:
    model, processor = openpangu()
    inputs = encode(processor, CHATS)
    length = inputs["input_ids"].shape[1]
    greedy = model.generate(**inputs, **GREEDY)[:, length:]
    beams = model.generate(**inputs, **GREEDY, num_beams=3, num_return_sequences=2)[:, length:]
    for index, chat in enumerate(CHATS):
        alone = encode(processor, [chat])
        start = alone["input_ids"].shape[1]
        expected = model.generate(**alone, **GREEDY)[0, start:]
        assert greedy[index, : len(expected)].tolist() == expected.tolist()
        expected = model.generate(**alone, **GREEDY, num_beams=3, num_return_sequences=2)[:, start:]
        assert beams[2 * index : 2 * index + 2, : expected.shape[1]].tolist() == expected.tolist()


def test_generation_with_and_without_a_cache_equals_forward_step_by_step() -> None:
    model, processor = openpangu()
    model.generation_config.eos_token_id = None
    inputs = encode(processor, CHATS)
    with_cache = model.generate(**inputs, **GREEDY)
    assert torch.equal(with_cache, model.generate(**inputs, **GREEDY, use_cache=False))
    grown = dict(inputs)
    for _ in range(GREEDY["max_new_tokens"]):
        following = model(**grown).logits[:, -1].argmax(-1, keepdim=True)
        grown["input_ids"] = torch.cat((grown["input_ids"], following), dim=1)
        grown["attention_mask"] = torch.cat((grown["attention_mask"], torch.ones_like(following)), dim=1)
    assert torch.equal(with_cache, grown["input_ids"])


def test_several_sequences_are_drawn_for_each_prompt() -> None:
    """With one token to draw from, all of them are the greedy one."""
    model, processor = openpangu()
    inputs = encode(processor, CHATS)
    expected = model.generate(**inputs, **GREEDY)
    drawn = model.generate(**inputs, max_new_tokens=5, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(drawn, expected.repeat_interleave(2, dim=0))


def test_generation_takes_positions_on_all_axes_or_none() -> None:
    model, processor = openpangu()
    inputs = encode(processor, CHATS)
    names = ("input_ids", "attention_mask", "image_grid_thw", "video_grid_thw")
    positions = model.model.get_multimodal_position_ids(**{name: inputs[name] for name in names})
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, position_ids=positions), expected)
    with pytest.raises(ValueError, match=r"`image_grid_thw` must be given.* takes .* \(4, samples"):
        model.generate(**inputs, **GREEDY, position_ids=positions[0])


def test_embeddings_generate_what_ids_generate() -> None:
    model, processor = openpangu()
    inputs = encode(processor, CHATS)
    expected = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(model.generate(inputs_embeds=embeds, **inputs, **GREEDY), expected)


def continued(model: Any, inputs: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """A cache after some tokens, and text and mask so far."""
    first = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    ones = torch.ones(len(first.sequences), 3, dtype=torch.int64)
    mask = torch.cat((inputs["attention_mask"], ones), dim=1)
    return first.past_key_values, {"input_ids": first.sequences, "attention_mask": mask}


def test_generation_goes_on_from_a_cache() -> None:
    model, processor = openpangu()
    model.generation_config.eos_token_id = None
    inputs = encode(processor, CHATS)
    cache, text = continued(model, inputs)
    grids = {name: inputs[name] for name in ("image_grid_thw", "video_grid_thw")}
    whole = model.generate(**inputs, max_new_tokens=7, do_sample=False)
    found = model.generate(**text, **grids, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert torch.equal(found, whole)


def test_generation_goes_on_with_new_images() -> None:
    model, processor = openpangu()
    model.generation_config.eos_token_id = None
    first, second = encode(processor, [CHATS[0]]), encode(processor, [CHATS[2]])
    cache, text = continued(model, first)
    grown = {name: torch.cat((text[name], second[name]), dim=1) for name in text}
    media = {name: torch.cat((first[name], second[name])) for name in MEDIA}
    expected = model.generate(**grown, **media, **GREEDY)
    grids = {name: media[name] for name in ("image_grid_thw", "video_grid_thw")}
    positions = model.model.get_multimodal_position_ids(**grown, **grids)
    new = {name: second[name] for name in MEDIA}
    found = model.generate(**grown, **new, position_ids=positions, past_key_values=cache, **GREEDY)
    assert torch.equal(found, expected)


def samples_of(processor: Any) -> tuple[list[dict[str, Tensor]], list[Sample]]:
    separate = [encode(processor, [chat]) for chat in [*CHATS, user(picture(20, 20)), user(video(1))]]
    samples = []
    for inputs in separate:
        ids = inputs["input_ids"][0]
        media = {name: inputs[name] for name in MEDIA if name in inputs}
        samples.append(Sample(ids, ids.clone(), media))
    return separate, samples


@pytest.mark.parametrize("attention", ["vlparts_packed", "sdpa", "eager"])
def test_packed_samples_have_the_logits_and_loss_of_separate_ones(attention: str) -> None:
    model, processor = openpangu()
    model.set_attn_implementation({"text_config": attention})
    separate, samples = samples_of(processor)
    images = [one for one in samples if "pixel_values" in one.images]
    videos = [one for one in samples if "pixel_values_videos" in one.images]
    row = collate_packed([[Sample(one.input_ids, one.labels, {}) for one in samples]])
    row["pixel_values"] = torch.cat([one.images["pixel_values"] for one in images])
    row["image_grid_thw"] = torch.cat([one.images["image_grid_thw"] for one in images])
    row["pixel_values_videos"] = torch.cat([one.images["pixel_values_videos"] for one in videos])
    row["video_grid_thw"] = torch.cat([one.images["video_grid_thw"] for one in videos])
    packed = model(**row, use_cache=False)  # with a cache, masks do not tell texts apart
    logits, losses, count = [], 0.0, 0
    for inputs in separate:
        alone = model(**inputs, labels=inputs["input_ids"])
        targets = inputs["input_ids"].shape[1] - 1
        logits.append(alone.logits[0])
        losses, count = losses + alone.loss * targets, count + targets
    torch.testing.assert_close(packed.logits[0], torch.cat(logits), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(packed.loss, losses / count, atol=1e-5, rtol=1e-5)


def test_packed_texts_have_the_positions_that_they_have_alone() -> None:
    model, processor = openpangu()
    separate, samples = samples_of(processor)
    expected = torch.cat([true_positions(model, inputs) for inputs in separate], dim=-1)
    ids = torch.cat([one.input_ids for one in samples])[None]
    found = multimodal_positions(
        ids == model.config.image_token_id,
        ids == model.config.video_token_id,
        image_grid_thw=torch.cat([one["image_grid_thw"] for one in separate if "image_grid_thw" in one]),
        video_grid_thw=torch.cat([one["video_grid_thw"] for one in separate if "video_grid_thw" in one]),
        merge_size=model.config.merge_size,
        position_ids=torch.cat([torch.arange(len(one)) for one in samples])[None],
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["clip", "siglip2", "navit"])
def test_other_towers_with_three_axis_positions(kind: str) -> None:
    model, processor = openpangu(vision=vision_config(kind))
    inputs = encode(processor, [user(picture(20, 9), picture(5, 13)), CHATS[1], user(picture(11, 11))])
    grids = inputs.get("image_grid_thw")
    if grids is None:
        shapes = inputs.get("spatial_shapes", torch.full((len(inputs["pixel_values"]), 2), 4))
        grids = torch.cat((torch.ones_like(shapes[:, :1]), shapes), dim=1)
    expected = true_positions(model, {**inputs, "image_grid_thw": grids})
    logits = model(**inputs).logits
    torch.testing.assert_close(model(**inputs, position_ids=expected).logits, logits)
    steps = model.generate(**inputs, **GREEDY)
    assert torch.equal(steps[:, inputs["input_ids"].shape[1]], logits[:, -1].argmax(-1))
    assert torch.equal(steps, model.generate(**inputs, **GREEDY, use_cache=False))


def test_native_text_models_with_three_axis_positions() -> None:
    _, processor = openpangu()
    words = processor.tokenizer
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
    text = Qwen2VLTextConfig(
        **SIZES, num_key_value_heads=1, vocab_size=len(words), rope_parameters=rope, bos_token_id=0, eos_token_id=None
    )
    model = order_one(compose(vision=vision_config("navit"), text=text)).eval()
    processor = compose_processor(model, words)
    inputs = encode(processor, [user(picture(20, 9), picture(5, 13)), CHATS[1], user(picture(11, 11))])
    logits = model(**inputs).logits
    torch.testing.assert_close(model(**inputs, position_ids=true_positions(model, inputs)).logits, logits)
    steps = model.generate(**inputs, **GREEDY)
    assert torch.equal(steps[:, inputs["input_ids"].shape[1]], logits[:, -1].argmax(-1))
    assert torch.equal(steps, model.generate(**inputs, **GREEDY, use_cache=False))


def test_positions_that_do_not_count_are_refused() -> None:
    model, processor = openpangu()
    inputs = encode(processor, [CHATS[0]])
    places = torch.arange(inputs["input_ids"].shape[1])[None]
    for wrong in (places + 1, places * 2, places.flip(-1)):
        with pytest.raises(ValueError, match="must count 0, 1, 2, ... in each text"):
            model(**inputs, position_ids=wrong)
    with pytest.raises(ValueError, match=r"`position_ids` must have shape \(1, \d+\), got \(1, 3\)"):
        model(**inputs, position_ids=places[:, :3])


def test_a_second_row_does_not_go_on_with_the_text_of_the_first() -> None:
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="must count 0, 1, 2"):
        multimodal_positions(nothing, nothing, position_ids=torch.arange(6).view(2, 3))


def test_images_without_grids_are_refused() -> None:
    model, processor = openpangu()
    inputs = encode(processor, [CHATS[0]])
    images = model.get_image_features(inputs.pop("pixel_values"), inputs.pop("image_grid_thw"))
    with pytest.raises(ValueError, match="`image_grid_thw` must be given, got None"):
        model(**inputs, mm_encoder_outputs={"image": images})


def test_a_video_across_two_packed_texts_is_refused() -> None:
    model, processor = openpangu()
    inputs = encode(processor, [user(video(2))])
    length = inputs["input_ids"].shape[1]
    last = int((inputs["input_ids"] == model.config.video_token_id)[0].nonzero()[-1])
    places = torch.cat((torch.arange(last - 1), torch.arange(length - last + 1)))[None]
    with pytest.raises(ValueError, match="ends with 1 frames of `video_grid_thw"):
        model(**inputs, position_ids=places)


def test_a_cache_without_positions_is_refused() -> None:
    model, processor = openpangu()
    inputs = encode(processor, [CHATS[0]])
    cache = model(**inputs, use_cache=True).past_key_values
    following = torch.tensor([[5]])
    with pytest.raises(ValueError, match="`position_ids` must be given with a cache that holds tokens"):
        model(input_ids=following, past_key_values=cache)
    positions = torch.arange(inputs["input_ids"].shape[1])[None]
    inputs["attention_mask"] = inputs["attention_mask"].repeat(1, 2)
    with pytest.raises(ValueError, match="`position_ids` must be given with a cache that holds tokens"):
        model(**inputs, position_ids=positions, past_key_values=cache)


def test_one_step_from_a_cache_with_positions_equals_forward() -> None:
    model, processor = openpangu()
    inputs = encode(processor, CHATS)
    following = torch.tensor([[5], [6], [7]])
    whole = {
        **inputs,
        "input_ids": torch.cat((inputs["input_ids"], following), dim=1),
        "attention_mask": torch.cat((inputs["attention_mask"], torch.ones_like(following)), dim=1),
    }
    cache = model(**inputs, use_cache=True).past_key_values
    positions = true_positions(model, whole)[..., -1:]
    mask = whole["attention_mask"]
    step = model(following, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    torch.testing.assert_close(step[:, 0], model(**whole).logits[:, -1], atol=1e-4, rtol=1e-4)


def test_going_on_with_the_new_ids_alone_is_refused() -> None:
    model, processor = openpangu()
    cache, text = continued(model, encode(processor, [CHATS[0]]))
    text["input_ids"] = text["input_ids"][:, -1:]
    with pytest.raises(ValueError, match="positions follow from the whole text"):
        model.generate(**text, past_key_values=cache, **GREEDY)


def test_going_on_without_the_grids_is_refused() -> None:
    model, processor = openpangu()
    cache, text = continued(model, encode(processor, [CHATS[0]]))
    with pytest.raises(ValueError, match="`image_grid_thw` must be given, got None"):
        model.generate(**text, past_key_values=cache, **GREEDY)


def test_positions_are_made_of_ids_or_embeddings() -> None:
    model, _ = openpangu()
    with pytest.raises(ValueError, match="Exactly one of `input_ids` and `inputs_embeds` must be given, got none"):
        model.model.get_multimodal_position_ids()


def test_a_row_without_tokens() -> None:
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    mask = torch.tensor([[0, 0, 0], [0, 1, 1]])
    positions = multimodal_positions(nothing, nothing, attention_mask=mask)
    assert torch.equal(positions, torch.tensor([[0, 0, 0], [0, 0, 1]]).expand(4, -1, -1))
    assert not multimodal_positions(nothing, nothing, attention_mask=torch.zeros_like(mask)).any()
