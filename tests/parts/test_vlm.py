"""The composed model: generation, losses, and placeholders that do not match."""

import re
from collections.abc import Callable

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

import vlparts
from tests.parts.openpangu_shaped import encode, openpangu, video
from tests.tiny import TEXTS, navit_config, order_one, picture, text_config, tokenizer, vision_config
from vlparts import VisionLanguageConfig, VisionLanguageForConditionalGeneration
from vlparts.parts.vlm_inputs import check_placeholders

GROUPS = [[picture(20, 9), picture(5, 13)], [], [picture(11, 11)]]


def composed(vision: str = "navit", text: str = "qwen3", **changes: object) -> tuple:
    words = tokenizer()
    tower = vision_config(vision)
    model = vlparts.compose(vision=tower, text=text_config(text, words), **changes)
    processor = vlparts.compose_processor(model, words)
    return order_one(model).eval(), processor


def chat(images: list, question: str = "Where is the cat?") -> list[dict]:
    blocks = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*blocks, {"type": "text", "text": question}]}]


def batch(processor: object, groups: list, **kwargs: object) -> dict:
    return processor.apply_chat_template(
        [chat(group) for group in groups],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True, "padding_side": "left", **kwargs},
    )


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("vision", ["navit", "clip", "siglip2"])
def test_a_padded_batch_generates_what_each_prompt_generates_alone(vision: str, text: str) -> None:
    model, processor = composed(vision, text)
    inputs = batch(processor, GROUPS)
    length = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": 5, "do_sample": False}
    greedy = model.generate(**inputs, **options)[:, length:]
    beams = model.generate(**inputs, **options, num_beams=3, num_return_sequences=2)[:, length:]
    for index, group in enumerate(GROUPS):
        alone = batch(processor, [group])
        start = alone["input_ids"].shape[1]
        expected = model.generate(**alone, **options)[0, start:]
        assert greedy[index, : len(expected)].tolist() == expected.tolist()
        expected = model.generate(**alone, **options, num_beams=3, num_return_sequences=2)[:, start:]
        assert beams[2 * index : 2 * index + 2, : expected.shape[1]].tolist() == expected.tolist()


def test_generation_with_and_without_a_cache_agrees() -> None:
    model, processor = composed()
    inputs = batch(processor, GROUPS)
    options = {"max_new_tokens": 6, "do_sample": False}
    with_cache = model.generate(**inputs, **options, use_cache=True)
    assert with_cache.tolist() == model.generate(**inputs, **options, use_cache=False).tolist()


@pytest.mark.parametrize("vision", ["navit", "clip"])
def test_a_static_cache_changes_nothing(vision: str) -> None:
    model, processor = composed(vision)
    inputs, options = batch(processor, GROUPS), {"max_new_tokens": 5, "do_sample": False}
    static = model.generate(**inputs, **options, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, model.generate(**inputs, **options))
    assert model._can_compile_fullgraph


def test_packed_patches_are_never_repeated_one_by_one() -> None:
    """What older versions of transformers would do, which do not encode images before they repeat the inputs."""
    model, processor = composed()
    inputs = dict(batch(processor, GROUPS))
    with pytest.raises(ValueError, match="newer transformers"):
        model._expand_inputs_for_generation(expand_size=2, **inputs)


def test_images_are_encoded_once_for_a_generation() -> None:
    model, processor = composed()
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *args: calls.append(1))
    model.generate(**batch(processor, GROUPS), max_new_tokens=4, num_beams=2)
    assert len(calls) == 1


def test_each_image_token_sees_its_own_image() -> None:
    """Swapping the images of two samples swaps their logits, and touches no other sample."""
    model, processor = composed()
    first, second, third = picture(12, 12, 1), picture(12, 12, 2), picture(12, 12, 3)
    logits = model(**batch(processor, [[first], [second], [third]])).logits
    swapped = model(**batch(processor, [[second], [first], [third]])).logits
    torch.testing.assert_close(swapped[[1, 0, 2]], logits, atol=1e-5, rtol=1e-5)
    assert (logits[0] - logits[1]).abs().max() > 1e-2


def test_embeddings_in_place_of_ids_give_the_same_logits() -> None:
    model, processor = composed()
    inputs = dict(batch(processor, GROUPS))
    expected = model(**inputs).logits
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
    torch.testing.assert_close(model(inputs_embeds=embeddings, **inputs).logits, expected)


def test_encoded_images_in_place_of_pixels_give_the_same_logits() -> None:
    model, processor = composed()
    inputs = dict(batch(processor, GROUPS))
    expected = model(**inputs).logits
    grids = inputs.pop("image_grid_thw")
    images = model.get_image_features(inputs.pop("pixel_values"), grids)
    assert [len(tokens) for tokens in images.pooler_output] == grids.prod(-1).tolist()
    torch.testing.assert_close(model(**inputs, mm_encoder_outputs={"image": images}).logits, expected)
    with pytest.raises(ValueError, match="both `pixel_values`"):
        model(**inputs, pixel_values=torch.zeros(1, 48), mm_encoder_outputs={"image": images})


def test_merged_patches_are_the_blocks_of_the_image() -> None:
    """With an identity-like projector, token (i, j) holds the four features of block (i, j)."""
    words = tokenizer()
    model = vlparts.compose(
        vision=navit_config(spatial_merge_size=2), text=text_config("qwen3", words), projector="linear"
    ).eval()
    processor = vlparts.compose_processor(model, words)
    inputs = batch(processor, [[picture(24, 16)]])
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 6]]
    features = model.model.vision_tower(inputs["pixel_values"], inputs["image_grid_thw"]).last_hidden_state
    from vlparts.parts.packed_index import merge_order

    raster = torch.empty_like(features)
    raster[merge_order(4, 6, 2)] = features
    grid = raster.reshape(4, 6, 32)
    expected = torch.stack([grid[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten() for i in range(2) for j in range(3)])
    tokens = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output[0]
    torch.testing.assert_close(tokens, model.model.projector.projection(expected))


def test_an_inner_layer_can_be_chosen() -> None:
    model, processor = composed(vision_feature_layer=1)
    inputs = batch(processor, [[picture(8, 8)]])
    tower = model.model.vision_tower
    hidden = tower(inputs["pixel_values"], inputs["image_grid_thw"], output_hidden_states=True).hidden_states[1]
    tokens = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output[0]
    torch.testing.assert_close(tokens, model.model.projector(hidden))


def test_packed_samples_have_the_loss_of_separate_ones() -> None:
    from vlparts.training.collators import collate_packed
    from vlparts.training.encoding import Sample

    model, processor = composed()
    model.set_attn_implementation({"text_config": "vlparts_packed"})
    samples, losses, count = [], [], 0
    for group in GROUPS:
        inputs = dict(batch(processor, [group]))
        ids = inputs.pop("input_ids")
        attention_mask = inputs.pop("attention_mask")
        labels = ids.clone()
        losses.append(
            model(input_ids=ids, attention_mask=attention_mask, labels=labels, **inputs).loss * (ids.numel() - 1)
        )
        count += ids.numel() - 1
        samples.append(Sample(ids[0], labels[0], inputs))
    packed = model(**collate_packed([samples]))
    torch.testing.assert_close(packed.loss, sum(losses) / count, atol=1e-5, rtol=1e-5)


def test_logits_to_keep() -> None:
    model, processor = composed()
    inputs = batch(processor, GROUPS)
    torch.testing.assert_close(model(**inputs, logits_to_keep=2).logits, model(**inputs).logits[:, -2:])


def test_tied_embeddings_are_one_tensor_and_saved_once(tmp_path: object) -> None:
    words = tokenizer()
    text = text_config("qwen3", words)
    text.tie_word_embeddings = True
    model = vlparts.compose(vision=navit_config(), text=text)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = VisionLanguageForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    torch.testing.assert_close(loaded.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize(
    ("placeholders", "images", "message"),
    [
        ([4, 4], [4, 3], r"sample 1 has 4 image tokens, but its images have 3"),
        ([4, 4], [4], r"sample 1 has 4 image tokens, but its images have 0"),
        ([5, 3], [4, 4], r"sample 0 has 5 image tokens, but its images have 4 \+ 4"),
        ([4, 0], [4, 2], r"1 images with 2 features have no image tokens"),
        ([6], [4, 4], r"sample 0 has 6 image tokens.*truncated"),
    ],
)
def test_placeholders_must_match_image_by_image(placeholders: list[int], images: list[int], message: str) -> None:
    mask = torch.arange(10)[None] < torch.tensor(placeholders)[:, None]
    with pytest.raises(ValueError, match="Image features and image tokens do not match.*" + message):
        check_placeholders(mask, images)


def test_matching_placeholders_pass() -> None:
    check_placeholders(torch.arange(10)[None] < torch.tensor([7, 0, 2])[:, None], [4, 3, 2])


RUNS = [
    ([12, 10], [12, 10], None, True),
    ([12, 10], [10, 12], None, False),
    ([22], [10, 12], None, True),  # images without text in between
    ([10, 22, 7], [10, 12, 10, 7], [1, 1, 1, 1], True),
    ([10, 22, 7], [10, 12, 7, 10], [1, 1, 1, 1], False),
    ([12, 10], [22], [1], False),  # text inside an image
    ([12, 10], [22], None, True),  # features whose images are unknown, as in a chunk of a prompt
    ([6, 6, 12], [12, 12], [2, 1], True),  # frame by frame
    ([6, 6, 12], [12, 12], [1, 2], False),
    ([6, 6, 12], [12, 12], None, True),
    ([6, 8, 10], [12, 12], None, False),
]


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize(("runs", "tokens", "frames", "fits"), RUNS)
def test_placeholders_must_match_run_by_run(
    runs: list[int], tokens: list[int], frames: list[int] | None, fits: bool, kind: str
) -> None:
    row = [inside for length in runs for inside in [True] * length + [False]]
    mask = torch.tensor([[False] * len(row), row])
    if fits:
        check_placeholders(mask, tokens, kind, frames)
        return
    written = f"sample 1 has {kind} tokens in runs of {', '.join(map(str, runs))}, but its {kind}s have "
    written += re.escape(" + ".join(map(str, tokens))) + " features in this order"
    with pytest.raises(ValueError, match=written):
        check_placeholders(mask, tokens, kind, frames)


@pytest.mark.parametrize("generates", [True, False])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_images_in_another_order_are_refused(kind: str, generates: bool) -> None:
    model, processor = openpangu("qwen3")
    media = {"image": [picture(32, 16), picture(16, 16)], "video": [video(1), video(1, 16)]}[kind]
    blocks = [{"type": kind, kind: one} for one in media]
    blocks.insert(1, {"type": "text", "text": "or"})
    inputs = encode(processor, [[{"role": "user", "content": blocks}]])
    model(**inputs)
    name, grids = {"image": "pixel_values", "video": "pixel_values_videos"}[kind], inputs[f"{kind}_grid_thw"]
    inputs[name] = torch.cat(inputs[name].split(grids.prod(-1).tolist())[::-1])
    inputs[f"{kind}_grid_thw"] = grids.flip(0)
    written = {"image": r"8, 4, but its images have 4 \+ 8", "video": r"2, 1, but its videos have 1 \+ 2"}[kind]
    with pytest.raises(ValueError, match=f"sample 0 has {kind} tokens in runs of {written} features in this order"):
        model.generate(**inputs, max_new_tokens=2) if generates else model(**inputs)


def test_a_prompt_can_be_taken_in_chunks() -> None:
    model, processor = composed()
    inputs = batch(processor, [[picture(20, 9), picture(5, 13)]])
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, prefill_chunk_size=7), expected)


def test_a_sample_truncated_inside_an_image_is_named() -> None:
    model, processor = composed()
    inputs = dict(batch(processor, [[picture(24, 16)], [picture(24, 16)]]))
    ids = inputs["input_ids"].clone()
    place = (ids[1] == model.config.image_token_id).nonzero()[-1]
    ids[1, place] = processor.tokenizer.pad_token_id
    inputs["input_ids"] = ids
    with pytest.raises(ValueError, match="sample 1 has 23 image tokens, but its images have 24"):
        model(**inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projector_type": "conv"}, "`projector_type` must be one of linear, .* got 'conv'"),
        ({"spatial_merge_size": 2}, "`spatial_merge_size` must be that of `vision_config`, 1, got 2"),
        ({"image_token_id": 10**6}, "`image_token_id` must lie in the vocabulary of 151936 tokens, got 1000000"),
        ({"vision_config": {"hidden_size": 8}}, "`vision_config` must have a 'model_type' .* got None"),
        (
            {"text_config": {"model_type": "no_such_model"}},
            "`text_config` must .* got 'no_such_model'",
        ),
    ],
)
def test_bad_configuration(changes: dict, message: str) -> None:
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        VisionLanguageConfig(**changes)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("attention_mask", lambda mask: mask[:, :-2], r"`attention_mask` must have shape \(3, \d+\), got \(3, \d+\)"),
        ("input_ids", lambda ids: ids + 10**6, r"`input_ids` must be between 0 and 280, got 1\d+ to 1\d+"),
        ("labels", lambda labels: labels.T, r"`labels` must have shape \(3, \d+\), got \(\d+, 3\)"),
        ("shift_labels", lambda labels: labels[:, 1:], r"`shift_labels` must have shape \(3, \d+\)"),
        ("spatial_shapes", lambda shapes: shapes[:-1], r"`spatial_shapes` must have shape \(3, 2\), got \(2, 2\)"),
        ("pixel_attention_mask", lambda mask: mask[:, 1:], r"`pixel_attention_mask` must have shape \(3, 16\)"),
        ("pixel_values", lambda pixels: pixels[0], r"`pixel_values` must have shape \(any, any, any\)"),
    ],
)
def test_shapes_are_checked_by_name(name: str, change: Callable[[Tensor], Tensor], message: str) -> None:
    model, processor = composed("siglip2")
    inputs = dict(batch(processor, GROUPS))
    inputs |= {"labels": inputs["input_ids"], "shift_labels": inputs["input_ids"]}
    inputs[name] = change(inputs[name])
    with pytest.raises(ValueError, match=message):
        model(**inputs)


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_masks_of_every_cache_fit(cache: str) -> None:
    model, processor = composed()
    inputs = batch(processor, GROUPS)
    options = {"max_new_tokens": 3, "do_sample": False, "disable_compile": True}
    expected = model.generate(**inputs, **options, use_cache=False)
    assert torch.equal(model.generate(**inputs, **options, cache_implementation=cache), expected)


def test_ids_and_embeddings_exclude_each_other() -> None:
    model, _ = composed()
    with pytest.raises(ValueError, match="Exactly one of `input_ids` and `inputs_embeds` must be given, got none"):
        model()


def test_images_without_a_placeholder_id_are_refused() -> None:
    model, processor = composed()
    inputs = batch(processor, [[picture(8, 8)]])
    model.config.image_token_id = None
    with pytest.raises(ValueError, match="`config.image_token_id` must be set for inputs with images, got None"):
        model(**inputs)


@pytest.mark.parametrize(("vision", "missing"), [("navit", "image_grid_thw"), ("siglip2", "spatial_shapes")])
def test_a_missing_image_input_is_named(vision: str, missing: str) -> None:
    model, processor = composed(vision)
    inputs = dict(batch(processor, [[picture(8, 8)]]))
    inputs.pop(missing)
    with pytest.raises(ValueError, match=f"`{missing}` must be given with `pixel_values`"):
        model(**inputs)
