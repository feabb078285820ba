"""NaViTs converted from ViT and Siglip2 compute the same outputs, for images of several sizes in one pack."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    Siglip2Config,
    Siglip2ForImageClassification,
    Siglip2Model,
    Siglip2TextConfig,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from tests.parity.inputs import channels_last, pictures
from tests.tiny import SIZES, order_one, packed_images
from vlparts import NaViTForImageClassification, NaViTModel
from vlparts.checkpoints.vit import from_vit

# The native tables have 4 x 4 entries: some images are smaller, some larger, one has 16 patches in another shape.
GRIDS = [(3, 5), (4, 4), (1, 1), (2, 8), (9, 6)]
# Siglip2 resamples its table in float32, whatever its own type.
IN_FLOAT32 = {"atol": 1e-5, "rtol": 1e-5}


def vit(kind: type = ViTModel, **changes: object) -> PreTrainedModel:
    config = ViTConfig(**{**SIZES, "image_size": 16, "patch_size": 4, "num_labels": 5, **changes})
    return order_one(kind(config)).double().eval()


def siglip2(kind: type = Siglip2VisionModel, **changes: object) -> PreTrainedModel:
    config = Siglip2VisionConfig(**SIZES, num_patches=16, patch_size=4, **changes)
    if kind is not Siglip2VisionModel:
        text = Siglip2TextConfig(**SIZES, vocab_size=20)
        config = Siglip2Config(vision_config=config.to_dict(), text_config=text.to_dict(), num_labels=3)
    return order_one(kind(config)).double().eval()


def run_vit(native: nn.Module, patches: Tensor, grids: Tensor) -> tuple[Tensor, Tensor]:
    """Class tokens `(n, D)` and patches `(L, D)` of a native ViT, image after image."""
    images = pictures(patches, grids)
    hidden = [native(image, interpolate_pos_encoding=True).last_hidden_state[0] for image in images]
    return torch.stack([one[0] for one in hidden]), torch.cat([one[1:] for one in hidden])


def padded(patches: Tensor, grids: Tensor) -> dict[str, Tensor]:
    """Packed patches as Siglip2 takes them: channels last, padded to one row per image."""
    lengths = grids.prod(-1)
    rows = channels_last(patches).split(lengths.tolist())
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    return {
        "pixel_values": nn.utils.rnn.pad_sequence(rows, batch_first=True),
        "pixel_attention_mask": mask.long(),
        "spatial_shapes": grids[:, 1:],
    }


@torch.no_grad()
@pytest.mark.parametrize(
    "changes", [{}, {"qkv_bias": False, "hidden_act": "gelu_pytorch_tanh"}], ids=["plain", "changed"]
)
def test_equals_vit(changes: dict[str, object]) -> None:
    native = vit(**changes)
    patches, grids = packed_images(GRIDS, dtype=torch.float64)
    class_tokens, expected = run_vit(native, patches, grids)
    outputs = from_vit(native)(patches, grids)
    torch.testing.assert_close(outputs.last_hidden_state, expected)
    torch.testing.assert_close(outputs.prefix_hidden_state[:, 0], class_tokens)
    torch.testing.assert_close(outputs.pooler_output, class_tokens)


@torch.no_grad()
def test_equals_vit_classifier() -> None:
    native = vit(ViTForImageClassification)
    patches, grids = packed_images(GRIDS, dtype=torch.float64)
    expected = [native(image, interpolate_pos_encoding=True).logits for image in pictures(patches, grids)]
    model = from_vit(native)
    assert isinstance(model, NaViTForImageClassification)
    assert model.config.id2label == native.config.id2label
    torch.testing.assert_close(model(patches, grids).logits, torch.cat(expected))


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["mean", "max", "map", "none"])
def test_unpooled_class_token_stays_as_register(pooling: str) -> None:
    native = vit()
    patches, grids = packed_images(GRIDS, dtype=torch.float64)
    class_tokens, expected = run_vit(native, patches, grids)
    outputs = from_vit(native, pooling=pooling)(patches, grids)
    torch.testing.assert_close(outputs.last_hidden_state, expected)
    torch.testing.assert_close(outputs.prefix_hidden_state[:, 0], class_tokens)
    by_image = expected.split(grids.prod(-1).tolist())
    if pooling == "mean":
        torch.testing.assert_close(outputs.pooler_output, torch.stack([one.mean(0) for one in by_image]))
    elif pooling == "max":
        torch.testing.assert_close(outputs.pooler_output, torch.stack([one.amax(0) for one in by_image]))


@torch.no_grad()
@pytest.mark.parametrize("kind", [Siglip2VisionModel, Siglip2Model])
def test_equals_siglip2(kind: type) -> None:
    native = siglip2(kind)
    patches, grids = packed_images(GRIDS, dtype=torch.float64)
    inputs = padded(patches, grids)
    expected = getattr(native, "vision_model", native)(**inputs)
    outputs = from_vit(native)(patches, grids)
    hidden = expected.last_hidden_state[inputs["pixel_attention_mask"].bool()]
    torch.testing.assert_close(outputs.last_hidden_state, hidden, **IN_FLOAT32)
    torch.testing.assert_close(outputs.pooler_output, expected.pooler_output, **IN_FLOAT32)
    # Of the native size there is nothing to resample, so that the outputs agree to the last digits of float64.
    native_size = GRIDS.index((4, 4))
    torch.testing.assert_close(outputs.pooler_output[native_size], expected.pooler_output[native_size])
    lengths = grids.prod(-1).tolist()
    torch.testing.assert_close(
        outputs.last_hidden_state.split(lengths)[native_size], hidden.split(lengths)[native_size]
    )


@torch.no_grad()
def test_equals_siglip2_classifier() -> None:
    native = siglip2(Siglip2ForImageClassification)
    patches, grids = packed_images(GRIDS, dtype=torch.float64)
    expected = native(**padded(patches, grids)).logits
    torch.testing.assert_close(from_vit(native)(patches, grids).logits, expected, **IN_FLOAT32)


@torch.no_grad()
def test_equals_siglip2_without_head() -> None:
    native = siglip2(vision_use_head=False)
    patches, grids = packed_images([(4, 4)], dtype=torch.float64)
    outputs = from_vit(native)(patches, grids)
    torch.testing.assert_close(outputs.last_hidden_state, native(**padded(patches, grids)).last_hidden_state[0])
    assert outputs.pooler_output is None


@torch.no_grad()
@pytest.mark.parametrize("size", [3, 9])
@pytest.mark.parametrize("build", [vit, siglip2])
def test_resampled_tables_hold_what_the_source_makes_for_that_size(
    build: Callable[[], PreTrainedModel], size: int
) -> None:
    native = build()
    patches, grids = packed_images([(size, size)], dtype=torch.float64)
    if build is vit:
        expected = run_vit(native, patches, grids)[1]
    else:
        expected = native(**padded(patches, grids)).last_hidden_state[0]
    model = from_vit(native, max_grid_size=size)
    assert model.embeddings.position_embedding.table.shape == (size, size, 32)
    torch.testing.assert_close(model(patches, grids).last_hidden_state, expected, **IN_FLOAT32)


@torch.no_grad()
def test_tables_that_are_not_square_are_resampled_along_one_axis() -> None:
    native = vit(image_size=(16, 24))
    positions = native.embeddings.position_embeddings[0, 1:].unflatten(0, (4, 6))
    table = from_vit(native, max_grid_size=6).embeddings.position_embedding.table
    columns = [
        nn.functional.interpolate(one.T[None, :, :, None], size=(6, 1), mode="bicubic") for one in positions.unbind(1)
    ]
    torch.testing.assert_close(table, torch.stack([one[0, :, :, 0].T for one in columns], dim=1))


def test_gradients_equal_those_of_vit() -> None:
    native = vit()
    model = from_vit(native)
    patches, grids = packed_images([(3, 5), (4, 4)], dtype=torch.float64)
    model(patches, grids).pooler_output.sin().sum().backward()
    run_vit(native, patches, grids)[0].sin().sum().backward()
    positions = native.embeddings.position_embeddings.grad[0]
    torch.testing.assert_close(model.embeddings.position_embedding.table.grad, positions[1:].unflatten(0, (4, 4)))
    torch.testing.assert_close(model.prefix.tokens.grad, native.embeddings.cls_token.grad[0])
    weight = native.embeddings.patch_embeddings.projection.weight.grad
    torch.testing.assert_close(model.embeddings.patch_embedding.weight.grad, weight.flatten(1))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [vit, siglip2])
def test_survives_saving(build: Callable[[], PreTrainedModel], dtype: torch.dtype, tmp_path: Path) -> None:
    model = from_vit(build().to(dtype), spatial_merge_size=2)
    model.save_pretrained(tmp_path)
    loaded = NaViTModel.from_pretrained(tmp_path, dtype="auto").eval()
    assert {parameter.dtype for parameter in (*model.parameters(), *loaded.parameters())} == {dtype}
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    patches, grids = packed_images([(2, 6), (4, 4)], dtype=dtype)
    torch.testing.assert_close(loaded(patches, grids), model(patches, grids))


@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (vit, ViTModel),
        (vit, ViTForImageClassification),
        (siglip2, Siglip2VisionModel),
        (siglip2, Siglip2Model),
        (siglip2, Siglip2ForImageClassification),
    ],
)
def test_folder_gives_what_the_model_gives(
    build: Callable[[type], PreTrainedModel], kind: type, tmp_path: Path
) -> None:
    native = build(kind).bfloat16()
    native.save_pretrained(tmp_path)
    model, expected = from_vit(tmp_path), from_vit(native)
    assert type(model) is type(expected)
    assert model.config.to_diff_dict() == expected.config.to_diff_dict()
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("build", [vit, siglip2])
def test_source_is_unchanged(build: Callable[[], PreTrainedModel]) -> None:
    native = build()
    before = {name: tensor.clone() for name, tensor in native.state_dict().items()}
    native.train()
    model = from_vit(native)
    assert native.training
    assert not model.training
    theirs = {tensor.untyped_storage().data_ptr() for tensor in native.state_dict().values()}
    ours = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    assert not theirs & ours
    for parameter in model.parameters():
        assert parameter.requires_grad
        parameter.detach().zero_()
    torch.testing.assert_close(native.state_dict(), before, rtol=0, atol=0)
