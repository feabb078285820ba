"""Projectors against loops over tokens, and against the mergers of Qwen2-VL and Qwen2.5-VL."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPatchMerger
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger

from tests.tiny import order_one
from vlparts.parts import vlm_projector_types as projector_types
from vlparts.parts import vlm_projectors as projectors
from vlparts.parts.vlm_projector_types import check_projector, projector_names
from vlparts.parts.vlm_projectors import ActivatedLinear, BlockMerger, MultiTapMerger, Projector, register_projector

WIDTH, TEXT, MERGE = 3, 5, 2


def merged(merger: BlockMerger, rows: Tensor, merge_size: int) -> Tensor:
    """A merger's tokens, one after the other."""
    tokens = []
    for block in rows.split(merge_size**2):
        joined = []
        for patch in block:
            root = math.sqrt(sum(float(x) ** 2 for x in patch) / len(patch) + merger.norm.eps)
            joined.append(patch / root * merger.norm.weight)
        hidden = merger.fc1.weight @ torch.cat(joined) + merger.fc1.bias
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        tokens.append(merger.fc2.weight @ hidden + merger.fc2.bias)
    return torch.stack(tokens)


def rows(count: int = 8, width: int = WIDTH) -> Tensor:
    return torch.randn(count, width, dtype=torch.float64)


@pytest.mark.parametrize("merge_size", [1, 2, 3])
def test_a_patch_merger_equals_a_loop_over_tokens(merge_size: int) -> None:
    merger = order_one(BlockMerger(WIDTH, merge_size, TEXT, eps=0.1).double())
    features = rows(2 * merge_size**2)
    tokens = merger(features)
    assert tokens.shape == (2, TEXT)
    torch.testing.assert_close(tokens, merged(merger, features, merge_size))


@pytest.mark.parametrize(
    ("kind", "merger"),
    [("patch_merger", Qwen2_5_VLPatchMerger), ("points_merger", PatchMerger)],
    ids=["Qwen2.5-VL", "Qwen2-VL and POINTS1.5"],
)
def test_the_mergers_are_the_native_ones(kind: str, merger: type[nn.Module]) -> None:
    ours, theirs = order_one(Projector(kind, 12, TEXT, MERGE).projection).double(), merger(TEXT, 12, MERGE).double()
    names = {"norm.": "ln_q.", "fc1.": "mlp.0.", "fc2.": "mlp.2."}

    def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {names[name[: name.index(".") + 1]] + name.split(".")[1]: weight for name, weight in weights.items()}

    theirs.load_state_dict(renamed(ours.state_dict()), strict=True)
    features, target = rows(16, 12), rows(4, TEXT)
    close = {"atol": 1e-6, "rtol": 1e-6}  # the native RMS normalization is computed in float32
    torch.testing.assert_close(ours(features), theirs(features), **close)
    for one in (ours, theirs):
        (one(features) * target).sum().backward()
    gradients = renamed({name: parameter.grad for name, parameter in ours.named_parameters()})
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, **close)


@pytest.mark.parametrize("merge_size", [1, 2])
def test_several_layers_are_summed_each_by_its_own_merger(merge_size: int) -> None:
    merger = order_one(MultiTapMerger(WIDTH, merge_size, TEXT, num_layers=3).double())
    layers = [rows() for _ in range(3)]
    expected = sum(merged(one, layer, merge_size) for one, layer in zip(merger.mergers, layers, strict=True))
    torch.testing.assert_close(merger(*layers), expected)
    swapped = merger(layers[1], layers[0], layers[2])
    assert (swapped - expected).abs().max() > 1e-2


def test_the_activation_comes_before_the_linear_layer() -> None:
    layer = order_one(ActivatedLinear(WIDTH, TEXT).double())
    features = rows(4)
    expected = [layer.fc.weight @ (row / (1 + torch.exp(-row))) + layer.fc.bias for row in features]
    torch.testing.assert_close(layer(features), torch.stack(expected))


def test_openpangus_projector_goes_by_way_of_an_inner_width() -> None:
    projector = order_one(Projector("multi_tap_merger", WIDTH, TEXT, MERGE, num_layers=2, hidden_size=7).double())
    layers = [rows(), rows()]
    inner = projector.projection.merger(*layers)
    assert inner.shape == (2, 7)
    output = projector.projection.output.fc
    torch.testing.assert_close(projector(*layers), nn.functional.silu(inner) @ output.weight.T + output.bias)
    weights = ["norm.weight", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    assert set(projector.state_dict()) == {
        *(f"projection.merger.mergers.{index}.{weight}" for index in range(2) for weight in weights),
        "projection.output.fc.weight",
        "projection.output.fc.bias",
    }


def test_without_an_inner_width_the_mergers_give_the_text_width() -> None:
    projector = order_one(Projector("multi_tap_merger", WIDTH, TEXT, MERGE, num_layers=2).double())
    layers = [rows(), rows()]
    assert projector.projection.output is None
    expected = sum(
        merged(one, layer, MERGE) for one, layer in zip(projector.projection.merger.mergers, layers, strict=True)
    )
    torch.testing.assert_close(projector(*layers), expected)


@pytest.mark.parametrize("merge_size", [1, 2])
def test_a_patch_merger_as_a_projector(merge_size: int) -> None:
    projector = order_one(Projector("patch_merger", WIDTH, TEXT, merge_size, eps=0.5).double())
    features = rows()
    assert projector.projection.norm.eps == 0.5
    torch.testing.assert_close(projector(features), merged(projector.projection, features, merge_size))


def test_gradients_reach_every_layer_and_weight() -> None:
    projector = order_one(Projector("multi_tap_merger", WIDTH, TEXT, MERGE, num_layers=2, hidden_size=4).double())
    layers = [rows(4).requires_grad_() for _ in range(2)]
    assert torch.autograd.gradcheck(projector, layers)
    projector(*layers).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in projector.parameters())


def build_custom(
    vision_width: int, text_width: int, merge_size: int, num_layers: int, scale: float = 1.0
) -> nn.Module:
    class Custom(nn.Module):
        def forward(self, *given: Tensor) -> Tensor:
            return scale * torch.cat(given).mean(0).expand(merge_size, text_width, vision_width)[..., 0] * num_layers

    return Custom()


def build_open(vision_width: int, text_width: int, merge_size: int, num_layers: int, **options: Any) -> nn.Module:
    return build_custom(vision_width, text_width, merge_size, num_layers, scale=options["anything"])


def test_a_projector_of_ones_own_takes_patches_and_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projectors, "_BUILDERS", dict(projectors._BUILDERS))
    monkeypatch.setattr(projector_types, "_TYPES", dict(projector_types._TYPES))
    register_projector("test_custom", build_custom, takes_patches=True)
    register_projector("test_custom", build_custom, takes_patches=True)
    assert "test_custom" in projector_names()
    layers = [torch.ones(4, 1), 3 * torch.ones(4, 1)]
    projector = Projector("test_custom", 1, TEXT, MERGE, num_layers=2, scale=5.0)
    torch.testing.assert_close(projector(*layers), torch.full((MERGE, TEXT), 20.0))
    register_projector("test_open", build_open, takes_patches=True)
    open_ended = Projector("test_open", 1, TEXT, MERGE, num_layers=2, anything=5.0)
    torch.testing.assert_close(open_ended(*layers), torch.full((MERGE, TEXT), 20.0))


def test_projectors_merge_neighbours() -> None:
    projector = Projector("linear", vision_width=3, text_width=7, merge_size=2)
    features = torch.randn(8, 3)
    expected = projector.projection(torch.stack([features[:4].flatten(), features[4:].flatten()]))
    torch.testing.assert_close(projector(features), expected)


def test_a_name_is_registered_for_one_projector() -> None:
    register_projector("linear", nn.Linear)
    for build, takes_patches in ((lambda width, out: nn.Identity(), False), (nn.Linear, True)):
        with pytest.raises(ValueError, match="'linear' is taken"):
            register_projector("linear", build, takes_patches=takes_patches)
    assert {"linear", "mlp2_gelu"} <= set(projector_names())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Projector("no such", 3, 7), "`kind` must be one of .*, got 'no such'"),
        (lambda: check_projector("conv"), "`kind` must be one of .*multi_tap_merger.*'conv'"),
        (lambda: Projector("linear", 3, 5, num_layers=2), "'linear' takes one layer.*names 2.*multi_tap_merger"),
        (
            lambda: Projector("patch_merger", 3, 5, num_layers=2),
            "`num_layers` must be 1 for the projector 'patch_merger', got 2",
        ),
        (
            lambda: Projector("points_merger", 3, 5, num_layers=2),
            "`num_layers` must be 1 for the projector 'points_merger', got 2",
        ),
        (lambda: Projector("mlp2_gelu", 3, 5, hidden_size=4), "'mlp2_gelu' has no option hidden_size; it has none"),
        (
            lambda: Projector("multi_tap_merger", 3, 5, hidden=4, wide=2),
            "'multi_tap_merger' has no option hidden, wide; it has eps, hidden_size",
        ),
        (
            lambda: Projector("fused_mlp2_gelu", 3, 5, num_layers=2, weights=[1.0]),
            r"`weights` must hold one weight per feature, 2, got \[1.0\]",
        ),
        (
            lambda: Projector("fused_mlp2_gelu", 3, 5, num_layers=2, weights=[1.0, math.inf]),
            "`weights` must be a finite number, got inf",
        ),
        (lambda: Projector("multi_tap_merger", 3, 5, hidden_size=0), "`hidden_size` must be at least 1"),
        (lambda: Projector("multi_tap_merger", 3, 5, num_layers=2)(rows()), "`features` must hold 2 layers, got 1"),
        (lambda: Projector("linear", 3, 5)(rows(), rows()), "`features` must hold 1 layers, got 2"),
        (lambda: MultiTapMerger(3, 1, 5, 2)(rows()), "`features` must hold 2 layers, one per merger, got 1"),
    ],
)
def test_bad_arguments(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
