"""The encoders of Qwen2-VL, Qwen2.5-VL and Qwen3-VL against transformers' towers, by copied weights."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn.functional import interpolate

from tests.parts.qwen_towers import TOWERS, native_features, native_tower, ours_like
from tests.tiny import order_one, packed_images, windowfree, windowfree_config
from vlparts import WindowFreeViTConfig, WindowFreeViTModel
from vlparts.parts.modeling_windowfree import WindowFreeViTPositionTable
from vlparts.parts.packed_index import get_position_ids
from vlparts.parts.pos_embed_tables import resample_grid

# Images, a video, and grids larger and smaller than the position table of 5 x 5.
GRIDS = [(1, 4, 6), (3, 6, 2), (1, 2, 2), (1, 8, 12), (2, 2, 10)]
PIXELS = 3 * 2 * 4 * 4  # two frames in every patch
CLOSE = {"atol": 1e-6, "rtol": 1e-6}  # rotary angles and interpolation weights are float32 in the native towers
every_tower = pytest.mark.parametrize("kind", TOWERS)


@every_tower
def test_images_and_videos_equal_the_native_tower(kind: str) -> None:
    native = native_tower(kind)
    model = ours_like(kind, native)
    pixels, grids = packed_images(GRIDS, PIXELS, dtype=torch.float64)
    outputs = model(pixels, grids)
    theirs = native_features(kind, native, pixels, grids)
    assert outputs.last_hidden_state is outputs.feature_maps[0]
    assert outputs.pooler_output is None
    assert theirs[0].abs().mean() > 0.5
    torch.testing.assert_close(list(outputs.feature_maps), theirs, **CLOSE)


@every_tower
def test_gradients_equal_those_of_the_native_tower(kind: str) -> None:
    native = native_tower(kind)
    model = ours_like(kind, native)
    pixels, grids = packed_images(GRIDS, PIXELS, dtype=torch.float64)
    gradients = []
    for run in (lambda one: model(one, grids).feature_maps, lambda one: native_features(kind, native, one, grids)):
        given = pixels.clone().requires_grad_()
        sum(one.pow(2).mean() for one in run(given)).backward()
        gradients.append(given.grad)
    torch.testing.assert_close(*gradients, **CLOSE)
    for parameter in native.parameters():  # mergers have none
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    theirs = ours_like(kind, native).state_dict()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name], atol=1e-5, rtol=1e-5, msg=name)


@every_tower
def test_an_image_comes_out_as_it_does_alone(kind: str) -> None:
    model = ours_like(kind, native_tower(kind))
    pixels, grids = packed_images(GRIDS, PIXELS, dtype=torch.float64)
    lengths = grids.prod(-1).tolist()
    packed = [one.split(lengths) for one in model(pixels, grids).feature_maps]
    for index, part in enumerate(pixels.split(lengths)):
        alone = model(part, grids[index : index + 1]).feature_maps
        torch.testing.assert_close([one[index] for one in packed], list(alone), atol=1e-12, rtol=1e-12)


@every_tower
def test_gradient_checkpointing_changes_no_gradient(kind: str) -> None:
    model = ours_like(kind, native_tower(kind)).train()
    pixels, grids = packed_images(GRIDS, PIXELS, dtype=torch.float64)
    gradients = []
    for turn in range(2):
        if turn:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        sum(one.pow(2).sum() for one in model(pixels, grids).feature_maps).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)


@every_tower
def test_presets_have_the_sizes_of_the_published_towers(kind: str) -> None:
    tower = TOWERS[kind]
    widths = {"qwen2_5_vl": {"hidden_size": 1280}}.get(kind, {})  # the published width is not the native default
    with torch.device("meta"):
        native = tower.model(tower.config(**widths))
        ours = WindowFreeViTModel(WindowFreeViTConfig.from_preset(tower.preset))
    shapes = sorted(
        tuple(parameter.flatten(1).shape if parameter.ndim > 2 else parameter.shape)
        for name, parameter in native.named_parameters()
        if "merger" not in name
    )
    assert sorted(tuple(parameter.shape) for parameter in ours.parameters()) == shapes
    if kind == "qwen2_vl":
        assert sum(parameter.numel() for parameter in ours.parameters()) == 631_183_360


@pytest.mark.parametrize("grid", [(5, 5), (2, 8), (12, 3), (1, 1), (7, 1)], ids=str)
def test_the_position_table_is_torch_interpolate_with_aligned_corners(grid: tuple[int, int]) -> None:
    table = order_one(WindowFreeViTPositionTable(windowfree_config(position_grid_size=5))).double()
    positions = get_position_ids(torch.tensor([[1, *grid]]))
    found = table(positions, torch.tensor([grid]).expand(len(positions), 2))
    image = table.weight.T.unflatten(1, (1, 5, 5)).transpose(0, 1)
    expected = interpolate(image, size=grid, mode="bilinear", align_corners=True)[0].flatten(1).T
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_positions_follow_the_patches_into_windows() -> None:
    windows = {"attention_pattern": {"window_size": 16, "full_attention_layers": [0, 1, 2, 3]}}
    windowed, plain = (windowfree(position_grid_size=5, **changes) for changes in (windows, {}))
    pixels, grids = packed_images(GRIDS)
    expected = plain(pixels, grids).last_hidden_state
    torch.testing.assert_close(windowed(pixels, grids).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


def test_the_position_table_tells_patches_apart() -> None:
    model = windowfree(position_grid_size=5)
    pixels, grids = packed_images([(2, 4)])
    with torch.no_grad():
        before = model(pixels, grids).last_hidden_state
        model.position_table.weight[0] += 1
        after = model(pixels, grids).last_hidden_state
    assert not torch.allclose(before, after)


def test_corners_of_an_antialiased_table_are_not_aligned() -> None:
    table, positions = torch.zeros(3, 3, 4), torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="`align_corners` must be False with `interpolation`='bilinear_antialias'"):
        resample_grid(table, positions, positions + 2, "bilinear_antialias", align_corners=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_grid_size": 0}, "`position_grid_size` must be at least 1, or None, got 0"),
        ({"norm_type": "batch_norm"}, "'norm_type' expected one of"),
    ],
)
def test_bad_configuration(changes: dict[str, object], message: str) -> None:
    with pytest.raises(StrictDataclassError, match=message):
        windowfree_config(**changes)
