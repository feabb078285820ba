"""Assembly of views against the published description in loops, and models composed with DeepSeek-OCR's encoder."""

from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from tests.tiny import navit_config, order_one, picture, text_config, tokenizer
from vlparts import (
    DeepEncoderConfig,
    DeepEncoderImageProcessor,
    MoGEConfig,
    VisionLanguageConfig,
    compose,
    compose_processor,
)
from vlparts.parts.vlm_views import ViewAssembler, count_view_tokens, get_view_index

GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 4))
TILES = st.one_of(st.just((0, 0)), st.tuples(st.integers(1, 3), st.integers(1, 3)))


def assembled_by_loops(views: list[Tensor], tiles: tuple[int, int], newline: Tensor, separator: Tensor) -> Tensor:
    """Tiles stitched row by row, then the whole image, then the separator; views are `(rows, columns, E)`."""
    tokens: list[Tensor] = []
    for tile_row in range(tiles[0]):
        for row in range(views[0].shape[0]):
            for tile_column in range(tiles[1]):
                tokens.extend(views[tile_row * tiles[1] + tile_column][row])
            tokens.append(newline)
    for row in views[-1]:
        tokens.extend(row)
        tokens.append(newline)
    return torch.stack([*tokens, separator])


@given(st.lists(st.tuples(TILES, GRIDS, GRIDS), min_size=1, max_size=3))
def test_equals_loops_over_tokens(images: list[tuple[tuple[int, int], tuple[int, int], tuple[int, int]]]) -> None:
    assembler = ViewAssembler(2, 3).double()
    with torch.no_grad():
        for parameter in assembler.parameters():
            parameter.normal_()
    grids = [grid for tiles, tile, whole in images for grid in [tile] * (tiles[0] * tiles[1]) + [whole]]
    features = torch.randn(sum(rows * columns for rows, columns in grids), 2, dtype=torch.float64)
    index, lengths = get_view_index([tiles for tiles, _, _ in images], grids)
    found = assembler(features, index).split(lengths)
    projected = iter(assembler.fc(features).split([rows * columns for rows, columns in grids]))
    for (tiles, tile, whole), tokens in zip(images, found, strict=True):
        views = [next(projected).unflatten(0, tile) for _ in range(tiles[0] * tiles[1])]
        views.append(next(projected).unflatten(0, whole))
        expected = assembled_by_loops(views, tiles, assembler.image_newline, assembler.view_separator)
        torch.testing.assert_close(tokens, expected)
        assert len(tokens) == count_view_tokens(tiles, tile, whole)


# Placeholders that the published processor emits.
@pytest.mark.parametrize(
    ("mode", "size", "count"),
    [
        ("tiny", (900, 900), 73),
        ("small", (900, 900), 111),
        ("base", (900, 900), 273),
        ("large", (900, 900), 421),
        ("gundam", (300, 300), 273),
        ("gundam", (1100, 1100), 693),
        ("gundam", (909, 615), 893),
        ("gundam", (615, 909), 903),
        ("gundam", (3000, 3000), 1203),
        ("gundam_m", (1100, 1100), 421 + 32 * 33),
    ],
)
def test_published_counts(mode: str, size: tuple[int, int], count: int) -> None:
    processor = DeepEncoderImageProcessor(mode=mode)
    assert processor.get_number_of_image_tokens(size[1], size[0]) == count
    assert processor.count_tokens(processor(picture(*size), return_tensors="pt"), 0) == count


def test_views_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="`tile_grid` describes 5 views, but there are 4"):
        get_view_index([(2, 2)], [(2, 2)] * 4)
    with pytest.raises(ValueError, match="The tiles of image 0 must have one size"):
        get_view_index([(1, 2)], [(2, 2), (2, 3), (2, 2)])


def composed(kind: str) -> tuple[Any, Any]:
    made = tokenizer()
    text = MoGEConfig.from_preset("tiny", vocab_size=len(made)) if kind == "moge" else text_config(kind, made)
    model = compose(DeepEncoderConfig.from_preset("deepencoder_tiny"), text, "deepseek_ocr")
    processor = compose_processor(model, made)
    processor.image_processor = DeepEncoderImageProcessor(base_size=128, tile_size=64, untiled_size=64, max_tiles=4)
    return order_one(model).eval(), processor


IMAGES = [[picture(150, 90), picture(40, 40)], [picture(60, 130)], []]
TEXTS = ["<image> and <image>", "what is <image>", "no image"]


@pytest.mark.parametrize("kind", ["qwen3", "moge"])
def test_a_batch_is_answered_as_its_samples_alone(kind: str) -> None:
    model, processor = composed(kind)
    inputs = processor(images=IMAGES[:2], text=TEXTS[:2], padding=True, return_tensors="pt")
    assert inputs["image_tile_grid"].tolist() == [[1, 2], [0, 0], [2, 1]]
    together = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, -4:]
    beams = model.generate(**inputs, max_new_tokens=4, do_sample=False, num_beams=2)[:, -4:]
    assert beams.shape == (2, 4)
    for sample in range(2):
        alone = processor(images=[IMAGES[sample]], text=[TEXTS[sample]], return_tensors="pt")
        found = model.generate(**alone, max_new_tokens=4, do_sample=False)[:, -4:]
        assert torch.equal(found[0], together[sample])
    text_only = processor(text=TEXTS[2], return_tensors="pt")
    assert (
        model.generate(**text_only, max_new_tokens=2, do_sample=False).shape[1] == text_only["input_ids"].shape[1] + 2
    )


def test_every_parameter_gets_a_gradient_and_image_features_have_one_tensor_per_image() -> None:
    model, processor = composed("qwen3")
    inputs = processor(images=IMAGES[:2], text=TEXTS[:2], padding=True, return_tensors="pt")
    names = ("pixel_values", "image_grid_thw", "image_tile_grid")
    features = model.get_image_features(**{name: inputs[name] for name in names}).pooler_output
    counts = [processor.count_image_tokens(inputs, image) for image in range(3)]
    assert [len(tokens) for tokens in features] == counts
    assert (inputs["input_ids"] == model.config.image_token_id).sum(-1).tolist() == [sum(counts[:2]), counts[2]]
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert missing == []


def test_servers_count_the_tokens_of_assembled_images() -> None:
    _, processor = composed("qwen3")
    counted = processor._get_num_multimodal_tokens([(90, 150), (40, 40)])
    inputs = processor(images=[IMAGES[0]], text=TEXTS[:1], return_tensors="pt")
    assert counted["num_image_tokens"] == [processor.count_image_tokens(inputs, image) for image in range(2)]


def test_newline_and_separator_are_initialized() -> None:
    model = compose(
        DeepEncoderConfig.from_preset("deepencoder_tiny"), text_config("qwen3", tokenizer()), "deepseek_ocr"
    )
    for name in ("image_newline", "view_separator"):
        mark = getattr(model.model.projector.projection, name)
        assert 0.3 < mark.std() * len(mark) ** 0.5 < 2


@pytest.mark.parametrize(
    ("vision", "projector", "message"),
    [
        (DeepEncoderConfig.from_preset("deepencoder_tiny"), "mlp2_gelu", "must be one that assembles views"),
        (navit_config(), "deepseek_ocr", "must not be one that assembles views"),
    ],
)
def test_encoder_and_projector_must_agree(vision: Any, projector: str, message: str) -> None:
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        VisionLanguageConfig(vision_config=vision, projector_type=projector)


def test_missing_tiles_are_an_error() -> None:
    model, processor = composed("qwen3")
    inputs = processor(images=[[Image.new("RGB", (150, 90))]], text=["<image>"], return_tensors="pt")
    del inputs["image_tile_grid"]
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        model(**inputs)
