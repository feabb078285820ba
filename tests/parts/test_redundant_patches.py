"""Patches that repeat a neighbour: found by loops over single blocks, and left out from image to answer."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from tests.tiny import navit_config, order_one, picture, text_config, tokenizer
from vlparts import NaViTImageProcessor, NaViTModel, compose, compose_processor
from vlparts.parts.redundant_patches import find_redundant, get_blocks, get_kept_patches

GREEDY = {"max_new_tokens": 4, "do_sample": False}


def oracle(blocks: np.ndarray, tolerance: int) -> tuple[np.ndarray, np.ndarray]:
    """Every block is compared with the kept one that stands for its predicted neighbour."""
    rows, columns, _ = blocks.shape
    stands = {}

    def differ(first: tuple[int, int], second: tuple[int, int]) -> bool:
        levels = blocks[first].astype(int) - blocks[second].astype(int)
        return bool(np.abs(levels).max() > tolerance)

    for row in range(rows):
        for column in range(columns):
            here, left, above = (row, column), stands.get((row, column - 1)), stands.get((row - 1, column))
            corner = stands.get((row - 1, column - 1))
            predicted = left if left is not None else above
            if corner is not None and left is not None and above is not None:
                vertical = not differ(corner, left) and differ(corner, above)
                predicted = above if vertical else left
            stands[here] = here if predicted is None or differ(here, predicted) else predicted
    keep = np.array([[stands[row, column] == (row, column) for column in range(columns)] for row in range(rows)])
    source = [
        [stands[row, column][0] * columns + stands[row, column][1] for column in range(columns)] for row in range(rows)
    ]
    return keep, np.array(source)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.sampled_from([0, 1, 5]), st.integers(0, 2**16))
def test_loops(rows: int, columns: int, levels: int, tolerance: int, seed: int) -> None:
    blocks = np.random.default_rng(seed).integers(0, levels, (rows, columns, 2)).astype(np.uint8) * 3
    keep, source = find_redundant(blocks, tolerance)
    expected, stands = oracle(blocks, tolerance)
    assert keep.tolist() == expected.tolist()
    assert source.tolist() == stands.tolist()
    flat = blocks.reshape(rows * columns, -1).astype(int)
    assert np.abs(flat - flat[source.ravel()]).max() <= tolerance
    assert keep.ravel()[source.ravel()].all()


@pytest.mark.parametrize("budget", [1, 3, 100])
def test_a_budget_keeps_the_largest_differences(budget: int) -> None:
    blocks = np.random.default_rng(0).integers(0, 256, (3, 4, 5)).astype(np.uint8)
    keep, source = find_redundant(blocks, budget=budget)
    assert keep.sum() == min(budget, 12)
    assert keep[0, 0]
    assert keep.ravel()[source.ravel()].all()
    flat = np.zeros((3, 4, 1), dtype=np.uint8)
    flat[1, 2] = 200
    assert np.flatnonzero(find_redundant(flat, budget=3)[0]).tolist() == [0, 6, 7]


def test_an_axis_aligned_rectangle_keeps_few_blocks() -> None:
    blocks = np.zeros((8, 8, 1), dtype=np.uint8)
    blocks[2:6, 3:7] = 9
    keep, source = find_redundant(blocks)
    assert keep.sum() <= 6
    assert (blocks.ravel()[source.ravel()] == blocks.ravel()).all()


def page(width: int = 64, height: int = 48) -> Image.Image:
    """Mostly white paper with some marks."""
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).rectangle((9, 9, 30, 14), fill="black")
    return image


@pytest.mark.parametrize("merge_size", [1, 2])
def test_kept_patches_are_those_of_the_whole_image(merge_size: int) -> None:
    options = {"patch_size": 4, "merge_size": merge_size}
    images = [page(), picture(24, 16), page(32, 32)]
    whole = NaViTImageProcessor(**options)(images, return_tensors="pt")
    fewer = NaViTImageProcessor(**options, drop_redundant_patches=True)(images, return_tensors="pt")
    assert torch.equal(fewer["image_grid_thw"], whole["image_grid_thw"])
    assert torch.equal(fewer["pixel_values"], whole["pixel_values"][fewer["keep_index"]])
    assert len(fewer["keep_index"]) < 0.5 * len(whole["pixel_values"])
    start = 0
    for image, grid in zip(images, whole["image_grid_thw"].tolist(), strict=True):
        count = grid[1] * grid[2]
        own = fewer["keep_index"][(fewer["keep_index"] >= start) & (fewer["keep_index"] < start + count)] - start
        blocks = get_blocks(np.asarray(image).transpose(2, 0, 1), 4 * merge_size)
        assert own.tolist() == get_kept_patches(find_redundant(blocks)[0], merge_size).tolist()
        start += count


def test_the_encoder_takes_what_the_processor_returns() -> None:
    encoder = order_one(NaViTModel(navit_config(max_grid_size=16))).eval()
    inputs = NaViTImageProcessor(patch_size=4, drop_redundant_patches=True)(
        [page(), picture(16, 16)], return_tensors="pt"
    )
    outputs = encoder(**inputs)
    assert len(outputs.last_hidden_state) == len(inputs["keep_index"])
    assert torch.equal(outputs.keep_index, inputs["keep_index"])


def composed(merge_size: int = 1, image_options: dict | None = None, **changes: object) -> tuple:
    words = tokenizer()
    vision = navit_config(max_grid_size=16, spatial_merge_size=merge_size, pooling="none")
    model = order_one(compose(vision, text_config("qwen3", words), **changes)).eval()
    images = NaViTImageProcessor(
        patch_size=4, merge_size=merge_size, **(image_options or {"drop_redundant_patches": True})
    )
    return model, compose_processor(model, words, images)


@pytest.mark.parametrize("changes", [{}, {"token_reduction": "merge_similar", "token_ratio": 0.5}])
@pytest.mark.parametrize("merge_size", [1, 2])
def test_a_composed_model_answers_a_batch_as_its_samples(merge_size: int, changes: dict) -> None:
    model, processor = composed(merge_size, **changes)
    groups, texts = [[page(), picture(16, 16)], [page(32, 32)]], ["<image> or <image>", "where is <image>"]
    inputs = processor(images=groups, text=texts, padding=True, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    found = model.generate(**inputs, **GREEDY)[:, length:]
    beams = model.generate(**inputs, **GREEDY, num_beams=2)[:, length:]
    for index, (group, text) in enumerate(zip(groups, texts, strict=True)):
        alone = processor(images=[group], text=[text], return_tensors="pt")
        start = alone["input_ids"].shape[1]
        assert torch.equal(model.generate(**alone, **GREEDY)[0, start:], found[index])
        assert torch.equal(model.generate(**alone, **GREEDY, num_beams=2)[0, start:], beams[index])
    counts = [processor.count_image_tokens(inputs, index) for index in range(3)]
    features = model.get_image_features(
        inputs["pixel_values"], inputs["image_grid_thw"], image_keep_index=inputs["image_keep_index"]
    )
    assert [len(part) for part in features.pooler_output] == counts
    patches = [(64 // 4) * (48 // 4), 16, 64]
    assert all(1 <= count <= patch // merge_size**2 for count, patch in zip(counts, patches, strict=True))
    assert counts[0] < patches[0] // merge_size**2 / 2


def test_without_redundant_patches_nothing_changes() -> None:
    model, processor = composed()
    _, whole = composed(image_options={"size": {"shortest_edge": 16, "longest_edge": 4096}})
    image = picture(24, 16)
    few, many = (one(images=[image], text=["<image>"], return_tensors="pt") for one in (processor, whole))
    assert torch.equal(few["input_ids"], many["input_ids"])
    torch.testing.assert_close(model(**few).logits, model(**many).logits)


def test_a_budget_is_known_from_the_size() -> None:
    options = {"token_budget": 10, "size": {"shortest_edge": 64, "longest_edge": 4096}}
    _, processor = composed(image_options={"drop_redundant_patches": True, **options})
    counted = processor._get_num_multimodal_tokens([(48, 64), (8, 8)])
    inputs = processor(images=[page(), page(8, 8)], text=["<image><image>"], return_tensors="pt")
    assert (
        counted["num_image_tokens"] == [processor.count_image_tokens(inputs, index) for index in range(2)] == [10, 4]
    )
    _, without = composed()
    with pytest.raises(ValueError, match="depends on its pixels with `drop_redundant_patches`"):
        without._get_num_multimodal_tokens([(48, 64)])


def test_a_server_is_told() -> None:
    _, processor = composed()
    with pytest.raises(ValueError, match="`drop_redundant_patches` must be False on a server"):
        processor(images=[page()], text="<image>", return_text_replacement_offsets=True)


BAD = [
    ({"redundancy_tolerance": 3}, "`drop_redundant_patches` must be True for `redundancy_tolerance`"),
    ({"token_budget": 3}, "`drop_redundant_patches` must be True for"),
    ({"drop_redundant_patches": True, "redundancy_tolerance": 256}, "must be from 0 to 255 levels, got 256"),
    ({"drop_redundant_patches": True, "token_budget": 0}, "`token_budget` must be a positive integer or None, got 0"),
    (
        {"drop_redundant_patches": True, "token_budget": 3, "redundancy_tolerance": 1},
        "must be 0 with a `token_budget`",
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=range(len(BAD)))
def test_options_that_do_not_fit(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        NaViTImageProcessor(**options)(picture(32, 32))
