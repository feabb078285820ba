"""Errors and warnings of `from_vit`."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
)

from tests.parts.position_oracle import INTERPOLATIONS, resize, resize_axis
from tests.tiny import SIZES, assert_initialised
from vlparts.checkpoints.vit import conversion, from_vit

TINY_VIT = {**SIZES, "image_size": 16, "patch_size": 4}


def vit(kind: type = ViTModel, **changes: Any) -> nn.Module:
    return kind(ViTConfig(**{**TINY_VIT, **changes}))


def siglip2(**changes: Any) -> Siglip2VisionModel:
    return Siglip2VisionModel(Siglip2VisionConfig(**{**SIZES, "num_patches": 16, "patch_size": 4, **changes}))


@pytest.mark.parametrize("source", [CLIPVisionModel(CLIPVisionConfig(**SIZES)), ViTConfig(), None])
def test_other_sources_are_refused(source: object) -> None:
    with pytest.raises(ValueError, match=f"`source` must be a ViTModel.*got .*{type(source).__name__}"):
        from_vit(source)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooling": "first"}, "`pooling` must be one of .* or None, got 'first'"),
        ({"hidden_size": 64}, "`hidden_size` is 32 in `source` and must not be changed, got 64"),
        ({"use_qk_norm": True}, "`use_qk_norm` is False in `source`"),
        ({"num_register_tokens": 2}, "`num_register_tokens` is 0 in `source`"),
        ({"max_frame": 2}, "`changes` must be fields of NaViTConfig, got 'max_frame'"),
        ({"dtype": torch.float64}, "`changes` must be fields of NaViTConfig, got 'dtype'"),
    ],
)
def test_changes_that_the_weights_fix(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_vit(vit(), **changes)


def test_options_without_counterpart_are_named() -> None:
    with pytest.raises(ValueError, match=r"`patch_size` = \(4, 8\): patches of NaViT are square"):
        from_vit(vit(patch_size=(4, 8)))
    overlapping = vit()
    overlapping.embeddings.patch_embeddings.projection.stride = (2, 2)
    with pytest.raises(ValueError, match=r"`stride` = \(2, 2\)"):
        from_vit(overlapping)
    padded = vit()
    padded.embeddings.patch_embeddings.projection.padding = (1, 1)
    with pytest.raises(ValueError, match=r"`padding` = \(1, 1\)"):
        from_vit(padded)
    wide = vit()
    wide.config.head_dim = 8
    with pytest.raises(ValueError, match="`head_dim` = 8"):
        from_vit(wide)
    with pytest.raises(ValueError, match="`num_patches` = 15"):
        from_vit(siglip2(num_patches=15))


def test_tables_that_are_not_square_need_max_grid_size() -> None:
    with pytest.raises(ValueError, match="`max_grid_size` must be given.*`image_size` makes 4 x 6 patches"):
        from_vit(vit(image_size=(16, 24)))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 20])
def test_tables_of_one_axis_are_resampled_as_the_rows_of_an_image(size: int, interpolation: str) -> None:
    table, grid = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(
        conversion._resample(table, size, interpolation), resize_axis(table, size, interpolation)
    )
    torch.testing.assert_close(
        conversion._resample(grid, size, interpolation), resize(grid, (size, size), interpolation)
    )


def test_class_token_pooling_needs_a_class_token() -> None:
    with pytest.raises(ValueError, match="`pooling` must not be 'class_token'"):
        from_vit(siglip2(), pooling="class_token")


def test_classifier_needs_a_pooling() -> None:
    with pytest.raises(ValueError, match="`pooling` must not be 'none'"):
        from_vit(vit(ViTForImageClassification), pooling="none")


def test_unexpected_and_missing_tensors_are_named() -> None:
    source = vit()
    source.layers[1].scale = nn.Parameter(torch.ones(32))
    source.layers[0].mlp.fc1.bias = None
    with pytest.raises(ValueError, match=r"Missing: layers\.0\.mlp\.fc1\.bias\. Unexpected: layers\.1\.scale\."):
        from_vit(source)


def test_tensors_of_other_sizes_are_named() -> None:
    source = vit()
    source.layers[1].mlp.fc1 = nn.Linear(32, 40)
    with pytest.raises(ValueError, match=r"'layers\.1\.mlp\.fc1\.weight' must be \(48, 32\), got \(40, 32\)"):
        from_vit(source)


@pytest.mark.parametrize("source", ["google/vit-base-patch16-224", "missing"])
def test_names_that_are_no_folder(source: str) -> None:
    with pytest.raises(ValueError, match=f"`source` must be a module or a local folder.*got '{source}'"):
        from_vit(source)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "naflexvit_base_patch16_siglip"}, "naflexvit_base_patch16_siglip.*timm.create_model"),
        ({"model_type": "clip_vision_model"}, "`source` must have one of .*got 'clip_vision_model'"),
        ({"model_type": "vit", "architectures": ["ViTForMaskedImageModeling"]}, "got 'ViTForMaskedImageModeling'"),
        ({}, "`source` must have one of .*got None"),
    ],
)
def test_folders_of_other_models(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        from_vit(tmp_path)


def test_folder_of_other_weights(tmp_path: Path) -> None:
    """A checkpoint whose configuration names another class than its weights are those of."""
    vit(ViTForMaskedImageModeling).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "architectures": ["ViTForImageClassification"]}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"Missing: classifier\.bias, classifier\.weight\. Unexpected: decoder"):
        from_vit(tmp_path)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    source = vit()
    source.config.save_pretrained(tmp_path)
    torch.save(source.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        from_vit(tmp_path)


@pytest.mark.usefixtures("poisoned_empty")
def test_what_is_new_is_drawn_in_the_type_of_the_source() -> None:
    model = from_vit(vit().bfloat16(), pooling="map", max_frames=100, initializer_range=0.5)
    for parameter in (model.pooling.probe, model.embeddings.frame_embedding.weight, model.pooling.fc1.weight):
        assert parameter.dtype == torch.bfloat16
        assert 0.3 < float(parameter.detach().float().std()) < 0.7
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert_initialised(model)


def test_what_is_left_out_or_new_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="vlparts.checkpoints"):
        from_vit(vit(hidden_dropout_prob=0.1), pooling="none", max_frames=3)
    assert [record.getMessage() for record in caplog.records] == [
        "Left out of the source, since NaViT has no such tensors: pooler.dense.bias, pooler.dense.weight.",
        "Left out of the source, since NaViT has no such training options: hidden_dropout_prob.",
        "New in NaViT, and to be trained: embeddings.frame_embedding.weight.",
    ]


def test_nothing_is_logged_where_all_is_used(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="vlparts.checkpoints"):
        from_vit(siglip2())
    assert not caplog.records


def test_head_of_siglip2_is_left_out_for_another_pooling(caplog: pytest.LogCaptureFixture) -> None:
    model = from_vit(siglip2(), pooling="mean")
    assert model.pooling is None
    assert "head.probe" in caplog.text
