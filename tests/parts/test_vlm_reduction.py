"""Composed models with fewer vision tokens: features, positions, generation, gradients, counts."""

import re
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from tests.parts.openpangu_shaped import CHATS, encode, openpangu
from tests.parts.test_vlm import GROUPS, batch, composed
from tests.parts.test_vlm_mrope import true_positions
from tests.parts.test_vlm_views import IMAGES, TEXTS
from tests.parts.test_vlm_views import composed as composed_of_views
from tests.tiny import navit_config, order_one, text_config, tokenizer
from tests.vision_towers import composed_tower
from vlparts import (
    DeepEncoderConfig,
    DeepEncoderImageProcessor,
    NaViTModel,
    VisionLanguageConfig,
    VisionTokenReducer,
    WindowFreeViTConfig,
    compose,
    compose_processor,
    reduce_tokens,
)
from vlparts.parts.token_reduction_types import TOKEN_REDUCTIONS, TokenReduction
from vlparts.parts.vlm_reduction import get_frames

GREEDY = {"max_new_tokens": 5, "do_sample": False}
CHANGES: dict[str, dict[str, Any]] = {
    "keep_all": {},
    "average_pool": {"token_ratio": 0.25},
    "pixel_shuffle": {"token_ratio": 0.25},
    "resampler": {"token_count": 3},
    **{method: {"token_ratio": 0.3} for method in ("merge_similar", "prune_by_norm", "prune_by_attention")},
    "prune_diverse": {"token_count": 4},
}
VISIONS = ("navit", "clip", "siglip2")


@pytest.mark.parametrize(
    ("method", "stage"),
    [
        *((method, "encoder") for method in TOKEN_REDUCTIONS),
        *((method, "projector") for method in TOKEN_REDUCTIONS if method != "pixel_shuffle"),
    ],
)
def test_features_are_reduced_between_encoder_and_projector_or_after_it(method: str, stage: str) -> None:
    model, processor = composed(token_reduction=method, token_stage=stage, **CHANGES[method])
    inputs = batch(processor, GROUPS)
    encoder, base = model.model.vision_tower, model.model
    patches = encoder(inputs["pixel_values"], inputs["image_grid_thw"]).last_hidden_state
    grids = inputs["image_grid_thw"][:, 1:]
    if stage == "encoder":
        reduced = base.token_reducer(patches, grids)
        expected = base.projector(reduced.tokens)
    else:
        reduced = base.token_reducer(base.projector(patches), grids)
        expected = reduced.tokens
    found = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    assert [len(part) for part in found.pooler_output] == reduced.lengths
    torch.testing.assert_close(torch.cat(found.pooler_output), expected)
    assert torch.equal(found.token_reduction.assignment, reduced.assignment)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == sum(reduced.lengths)


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("method", TOKEN_REDUCTIONS)
def test_a_padded_batch_generates_what_each_prompt_generates_alone(method: str, vision: str) -> None:
    model, processor = composed(vision, token_reduction=method, **CHANGES[method])
    inputs = batch(processor, GROUPS)
    length = inputs["input_ids"].shape[1]
    greedy = model.generate(**inputs, **GREEDY)[:, length:]
    beams = model.generate(**inputs, **GREEDY, num_beams=3, num_return_sequences=2)[:, length:]
    for index, group in enumerate(GROUPS):
        alone = batch(processor, [group])
        start = alone["input_ids"].shape[1]
        expected = model.generate(**alone, **GREEDY)[0, start:]
        assert greedy[index, : len(expected)].tolist() == expected.tolist()
        expected = model.generate(**alone, **GREEDY, num_beams=3, num_return_sequences=2)[:, start:]
        assert beams[2 * index : 2 * index + 2, : expected.shape[1]].tolist() == expected.tolist()


@pytest.mark.parametrize(
    "kind", ["qwen2_vl_vision", "siglip2_vision_model", "pixtral", "clip_vision_model", "gemma4_vision"]
)
def test_native_encoders_of_all_layouts(kind: str) -> None:
    model, processor = composed_tower(kind, token_reduction="merge_similar", token_ratio=0.5)
    plain, full = composed_tower(kind)
    plain.load_state_dict(model.state_dict())
    images = [image for group in GROUPS for image in group]
    text = ["<image> <image> <image>"]
    inputs, all_inputs = (one(images=images, text=text, return_tensors="pt") for one in (processor, full))
    few, many = (int((one["input_ids"] == model.config.image_token_id).sum()) for one in (inputs, all_inputs))
    counts = [full.count_image_tokens(all_inputs, index) for index in range(3)]
    assert sum(counts) == many
    assert few == sum(max(1, int(count / 2 + 0.5)) for count in counts)
    assert torch.isfinite(model(**inputs).logits).all()
    with torch.no_grad():
        model.config.token_ratio, model.model.token_reducer.reduction = 1.0, TokenReduction("merge_similar", 1.0)
        torch.testing.assert_close(model(**all_inputs).logits, plain(**all_inputs).logits)


@pytest.mark.parametrize("method", [name for name in TOKEN_REDUCTIONS if name not in ("pixel_shuffle", "resampler")])
def test_tokens_keep_their_positions_in_the_image_and_texts_theirs(method: str) -> None:
    """As if the text model had got all tokens, and those that are gone had been cut out."""
    plain, full = openpangu()
    model, processor = openpangu(token_reduction=method, **CHANGES[method])
    model.load_state_dict(plain.state_dict())
    assert model.config.token_stage == "projector"  # of two feature layers
    inputs, all_inputs = encode(processor, CHATS), encode(full, CHATS)
    media = {
        kind: getattr(model, f"get_{kind}_features")(inputs[pixels], inputs[f"{kind}_grid_thw"])
        for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos"))
    }
    kept = torch.ones_like(all_inputs["input_ids"], dtype=torch.bool)
    for kind, outputs in media.items():
        places = (all_inputs["input_ids"] == getattr(model.config, f"{kind}_token_id")).flatten().nonzero().squeeze(1)
        kept.view(-1)[places] = False
        kept.view(-1)[places[outputs.token_reduction.kept_index]] = True
    names = ("input_ids", "attention_mask", "image_grid_thw", "video_grid_thw")
    found = model.model.get_multimodal_position_ids(**{n: inputs[n] for n in names}, mm_encoder_outputs=media)
    expected = true_positions(plain, all_inputs)
    for sample, (mask, all_mask) in enumerate(
        zip(inputs["attention_mask"], all_inputs["attention_mask"], strict=True)
    ):
        chosen = kept[sample] & all_mask.bool()
        assert torch.equal(found[1:, sample, mask.bool()], expected[1:, sample, chosen])
        ids = inputs["input_ids"][sample, mask.bool()]
        assert torch.equal(ids, all_inputs["input_ids"][sample, chosen])
        assert found[0, sample, mask.bool()].tolist() == list(range(len(ids)))
    expected = model(**inputs, position_ids=found).logits
    assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("method", TOKEN_REDUCTIONS)
def test_generation_with_multimodal_positions(method: str) -> None:
    options = {
        **CHANGES[method],
        "vision": WindowFreeViTConfig.from_preset("window_free_tiny", hidden_size=32, intermediate_size=48),
    }
    model, processor = openpangu(token_reduction=method, **options)
    model.generation_config.eos_token_id = None
    inputs = encode(processor, CHATS)
    found = model.generate(**inputs, **GREEDY)
    assert torch.equal(found, model.generate(**inputs, **GREEDY, use_cache=False))
    length = inputs["input_ids"].shape[1]
    beams = model.generate(**inputs, **GREEDY, num_beams=2)[:, length:]
    for index, one in enumerate(CHATS):
        alone = encode(processor, [one])
        start = alone["input_ids"].shape[1]
        assert torch.equal(model.generate(**alone, **GREEDY)[0, start:], found[index, length:])
        assert torch.equal(model.generate(**alone, **GREEDY, num_beams=2)[0, start:], beams[index])
    grown = dict(inputs)
    for _ in range(GREEDY["max_new_tokens"]):
        following = model(**grown).logits[:, -1].argmax(-1, keepdim=True)
        grown["input_ids"] = torch.cat((grown["input_ids"], following), dim=1)
        grown["attention_mask"] = torch.cat((grown["attention_mask"], torch.ones_like(following)), dim=1)
    assert torch.equal(found, grown["input_ids"])


def test_the_queries_of_a_resampler_have_the_positions_of_a_text() -> None:
    model, processor = openpangu(token_reduction="resampler", token_count=3)
    inputs = encode(processor, CHATS[:1])
    media = {"image": model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])}
    media["video"] = model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
    names = ("input_ids", "attention_mask", "image_grid_thw", "video_grid_thw")
    found = model.model.get_multimodal_position_ids(**{n: inputs[n] for n in names}, mm_encoder_outputs=media)
    assert torch.equal(found, torch.arange(found.shape[2]).expand(4, 1, -1))


@pytest.mark.parametrize("method", ["average_pool", "pixel_shuffle", "resampler", "keep_all"])
def test_servers_know_positions_before_images_are_encoded(method: str) -> None:
    vision = WindowFreeViTConfig.from_preset("window_free_tiny", hidden_size=32, intermediate_size=48)
    model, processor = openpangu(token_reduction=method, vision=vision, **CHANGES[method])
    inputs = encode(processor, CHATS)
    grids = {name: inputs[name] for name in ("image_grid_thw", "video_grid_thw")}
    media = {"image": model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])}
    media["video"] = model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
    names = ("input_ids", "attention_mask")
    expected = model.model.get_multimodal_position_ids(
        **{n: inputs[n] for n in names}, **grids, mm_encoder_outputs=media
    )
    found, _ = model.model.get_rope_index(inputs["input_ids"], **grids, attention_mask=inputs["attention_mask"])
    assert torch.equal(found, expected[1:])


@pytest.mark.parametrize("method", ["average_pool", "merge_similar"])
def test_generation_goes_on_from_a_cache(method: str) -> None:
    vision = WindowFreeViTConfig.from_preset("window_free_tiny", hidden_size=32, intermediate_size=48)
    model, processor = openpangu(token_reduction=method, vision=vision, **CHANGES[method])
    model.generation_config.eos_token_id = None
    inputs = encode(processor, CHATS[:1])
    first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    grids = {name: inputs[name] for name in ("image_grid_thw", "video_grid_thw")}
    options = {**GREEDY, "past_key_values": first.past_key_values}
    if method == "merge_similar":
        with pytest.raises(ValueError, match="`mm_encoder_outputs` must be given for positions .* 'merge_similar'"):
            model.generate(first.sequences, **grids, **options)
        return
    more = model.generate(first.sequences, **grids, **options)
    assert torch.equal(more, model.generate(**inputs, max_new_tokens=10, do_sample=False))


@pytest.mark.parametrize("method", TOKEN_REDUCTIONS)
def test_every_parameter_gets_a_gradient(method: str) -> None:
    model, processor = composed(token_reduction=method, **CHANGES[method])
    inputs = batch(processor, GROUPS)
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert missing == []
    trained = [name for name, _ in model.named_parameters() if "token_reducer" in name]
    assert bool(trained) == (method == "resampler")


@pytest.mark.parametrize("method", ["merge_similar", "prune_diverse", "prune_by_norm", "prune_by_attention"])
def test_newlines_and_separators_of_views_are_kept(method: str) -> None:
    plain, full = composed_of_views("qwen3")
    made = tokenizer()
    model = compose(
        DeepEncoderConfig.from_preset("deepencoder_tiny"),
        text_config("qwen3", made),
        "deepseek_ocr",
        token_reduction=method,
        token_ratio=0.4,
    )
    processor = compose_processor(model, made)
    processor.image_processor = DeepEncoderImageProcessor(base_size=128, tile_size=64, untiled_size=64, max_tiles=4)
    model.load_state_dict(plain.state_dict())
    model, plain = model.double().eval(), plain.double()
    few, many = (
        one(images=IMAGES[:2], text=TEXTS[:2], padding=True, return_tensors="pt") for one in (processor, full)
    )
    names = ("pixel_values", "image_grid_thw", "image_tile_grid")
    outputs = model.get_image_features(**{name: few[name] for name in names})
    found, kept = outputs.pooler_output, outputs.token_reduction
    assert torch.equal(kept.assignment[kept.kept_index], torch.arange(len(kept.tokens)))
    fewer = reduce_tokens(plain, many, method, 0.4)
    for one, other in zip(fewer["mm_encoder_outputs"]["image"].pooler_output, found, strict=True):
        torch.testing.assert_close(one, other)
    logits = plain(**fewer).logits[fewer["attention_mask"].bool()]
    torch.testing.assert_close(logits, model(**few).logits[few["attention_mask"].bool()], atol=1e-4, rtol=1e-4)
    whole = plain.get_image_features(**{name: many[name] for name in names}).pooler_output
    newline, separator = (
        plain.model.projector.projection.image_newline,
        plain.model.projector.projection.view_separator,
    )
    for image, (left, all_tokens) in enumerate(zip(found, whole, strict=True)):
        is_mark = (all_tokens == newline).all(1) | (all_tokens == separator).all(1)
        reducer = VisionTokenReducer(method, 0.4)
        reduced = reducer(all_tokens[~is_mark], lengths=[int((~is_mark).sum())])
        rows, kept = [], iter(range(len(reduced.tokens)))
        order = (~is_mark).nonzero().squeeze(1)[reduced.kept_index].tolist()
        for index, mark in enumerate(is_mark.tolist()):
            if mark:
                rows.append(all_tokens[index])
            elif index in order:
                rows.append(reduced.tokens[next(kept)])
        torch.testing.assert_close(left, torch.stack(rows))
        assert len(left) == processor.count_image_tokens(few, image)
    counted = processor._get_num_multimodal_tokens([(90, 150), (40, 40)])
    assert counted["num_image_tokens"] == [len(found[0]), len(found[1])]
    assert torch.isfinite(model(**few).logits).all()


@pytest.mark.parametrize("vision", ["navit", "clip", "siglip2"])
@pytest.mark.parametrize("method", TOKEN_REDUCTIONS)
def test_servers_count_the_tokens_that_are_left(method: str, vision: str) -> None:
    _, processor = composed(vision, token_reduction=method, **CHANGES[method])
    images = [image for group in GROUPS for image in group]
    inputs = processor(images=images, text=["<image>" * 3], return_tensors="pt")
    counted = processor._get_num_multimodal_tokens([image.size[::-1] for image in images])
    assert counted["num_image_tokens"] == [processor.count_image_tokens(inputs, index) for index in range(3)]


def test_the_class_token_as_query() -> None:
    vision = NaViTModel(navit_config(pooling="class_token", num_register_tokens=2))
    words = tokenizer()
    options = {"token_reduction": "prune_by_attention", "token_ratio": 0.3, "token_options": {"query": "class_token"}}
    model = order_one(compose(vision, text_config("qwen3", words), **options)).eval()
    inputs = batch(compose_processor(model, words), GROUPS)
    outputs = model.model.vision_tower(inputs["pixel_values"], inputs["image_grid_thw"])
    found = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    expected = model.model.token_reducer(
        outputs.last_hidden_state, inputs["image_grid_thw"][:, 1:], class_tokens=outputs.prefix_hidden_state[:, 0]
    )
    assert torch.equal(found.token_reduction.kept_index, expected.kept_index)
    clip, processor = composed("clip", **options)
    inputs = batch(processor, GROUPS)
    states = clip.model.vision_tower(inputs["pixel_values"]).last_hidden_state
    found = clip.get_image_features(inputs["pixel_values"])
    expected = clip.model.token_reducer(states[:, 1:].flatten(0, 1), [(4, 4)] * 3, class_tokens=states[:, 0])
    assert torch.equal(found.token_reduction.kept_index, expected.kept_index)
    without, processor = composed("navit", **options)
    with pytest.raises(
        ValueError, match="`query` 'class_token' needs a class token, which the vision encoder NaViTModel"
    ):
        without(**batch(processor, GROUPS))


def test_frames_after_patches_were_dropped() -> None:
    grids = torch.tensor([[1, 2, 4], [2, 2, 2]])
    keep = torch.tensor([4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15])
    frames = get_frames(grids, 2, keep)
    assert (frames.lengths, frames.sizes, frames.counts) == ([1, 1, 1], [(1, 2), (1, 1), (1, 1)], [1, 2])
    assert frames.position_ids.tolist() == [[0, 1], [0, 0], [0, 0]]
    with pytest.raises(ValueError, match="whole blocks of 2 x 2 patches"):
        get_frames(grids, 2, keep[1:])
    with pytest.raises(ValueError, match="whole blocks of 2 x 2 patches"):
        get_frames(grids, 2, keep[2:10])
    with pytest.raises(ValueError, match="must keep a block of each frame, without padding"):
        get_frames(grids, 2, keep[:8])


@pytest.mark.slow
@pytest.mark.parametrize("method", TOKEN_REDUCTIONS)
def test_a_compiled_model(method: str) -> None:
    model, processor = composed(token_reduction=method, **CHANGES[method])
    inputs = batch(processor, GROUPS)
    torch.testing.assert_close(torch.compile(model)(**inputs).logits, model(**inputs).logits, atol=1e-4, rtol=1e-4)


BAD = [
    ({"token_ratio": 0.5}, "`token_ratio` needs `token_reduction`, got 0.5 without it"),
    ({"token_stage": "encoder"}, "`token_stage` needs `token_reduction`"),
    ({"token_reduction": "none"}, "`method` must be one of keep_all"),
    (
        {"token_reduction": "merge_similar"},
        "`token_options` do not fit together: 'merge_similar' takes `ratio` or `count`",
    ),
    ({"token_reduction": "keep_all", "token_stage": "text"}, "`token_stage` must be 'encoder' or 'projector'"),
    (
        {"token_reduction": "pixel_shuffle", "token_ratio": 0.25, "token_stage": "projector"},
        "`token_stage` must be 'encoder' for 'pixel_shuffle'",
    ),
    (
        {
            "token_reduction": "prune_by_attention",
            "token_ratio": 0.25,
            "token_stage": "projector",
            "token_options": {"query": "class_token"},
        },
        "`token_stage` must be 'encoder' for the query 'class_token'",
    ),
    (
        {
            "token_reduction": "average_pool",
            "token_ratio": 0.25,
            "vision_config": {"model_type": "vlparts_deepencoder"},
            "projector_type": "deepseek_ocr",
        },
        "`token_reduction` must be a method without rows and columns",
    ),
    (
        {
            "token_reduction": "keep_all",
            "token_stage": "encoder",
            "vision_config": {"model_type": "vlparts_deepencoder"},
            "projector_type": "deepseek_ocr",
        },
        "`token_stage` must be 'projector' for a vision encoder with several feature layers or several views",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=range(len(BAD)))
def test_compositions_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, StrictDataclassError), match=re.escape(message)):
        VisionLanguageConfig(**changes)


def test_a_text_with_another_number_of_placeholders_is_refused() -> None:
    model, _ = composed(token_reduction="merge_similar", token_ratio=0.5)
    _, full = composed()
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        model(**batch(full, GROUPS))


def test_labels_and_chats_are_as_before() -> None:
    _, processor = composed(token_reduction="merge_similar", token_ratio=0.5)
    _, full = composed()
    few: Tensor = batch(processor, GROUPS[:1])["input_ids"][0]
    many: Tensor = batch(full, GROUPS[:1])["input_ids"][0]
    image = processor.image_token_id
    assert few[few != image].tolist() == many[many != image].tolist()
