"""Projectors: image features to the width of a text model, with an optional merge of neighbouring patches.

Shapes: L patches of all images in merge order (block after block of m x m), T = L / m^2 tokens, D width of the vision
encoder, E width of the text model.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig

from .ops_activations import ExactGELU
from .ops_linear import apply_linear
from .ops_rms_norm import RMSNorm
from .utils import check_finite_number
from .vlm_projector_types import (
    ProjectorType,
    add_projector_type,
    check_projector,
    get_projector_type,
    projector_names,
)
from .vlm_views import ViewAssembler


class MLP2(nn.Module):
    """Two linear layers with an exact GELU between them (LLaVA-1.5, arXiv 2310.03744; POINTS1.5, arXiv 2412.08443)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, out_features)
        self.act_fn = ExactGELU()
        self.fc2 = nn.Linear(out_features, out_features)

    def forward(self, features: Tensor) -> Tensor:
        """Map `(T, m^2 * D)` to `(T, E)`."""
        return apply_linear(self.fc2, self.act_fn(apply_linear(self.fc1, features)))


class FusedMLP2(nn.Module):
    """Weighted sum of several features, each mapped by one and the same [`MLP2`], as in POINTS1.0.

    The published program merges blocks of 2 x 2 patches and adds up the features of its two encoders with the weights
    0.5 and 0.5.

    Args:
        vision_width: D.
        text_width: E.
        merge_size: m.
        num_layers: Number of features.
        weights: Weight of each; equal ones with the sum 1 by default.

    Raises:
        ValueError: If there are not as many weights as features, or one is not a finite number.
    """

    def __init__(
        self,
        vision_width: int,
        text_width: int,
        merge_size: int,
        num_layers: int,
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.weights = [1 / num_layers] * num_layers if weights is None else list(weights)
        if len(self.weights) != num_layers:
            raise ValueError(f"`weights` must hold one weight per feature, {num_layers}, got {weights}.")
        for weight in self.weights:
            check_finite_number("weights", weight, signed=True)
        self.merged_width = vision_width * merge_size**2
        self.mlp = MLP2(self.merged_width, text_width)

    def forward(self, *features: Tensor) -> Tensor:
        """Map patches of each encoder or layer, `(L, D)` in merge order, to `(T, E)`."""
        tokens = [
            self.mlp(patches.reshape(-1, self.merged_width)) * weight
            for patches, weight in zip(features, self.weights, strict=True)
        ]
        return torch.stack(tokens).sum(0)


class BlockMerger(nn.Module):
    """Normalise each patch, concatenate the patches of a block, and apply two linear layers with an exact GELU.

    With RMS normalisation this is the merger of Qwen2.5-VL (arXiv 2502.13923, section 2.1), which openPangu-VL also
    uses; with layer normalisation that of Qwen2-VL, and POINTS1.5's projector (arXiv 2412.08443).

    Args:
        vision_width: D.
        merge_size: m.
        out_features: Width of the tokens.
        eps: Epsilon of the normalisation.
        layer_norm: Whether it is a layer normalisation, with bias, instead of an RMS normalisation.
    """

    def __init__(
        self, vision_width: int, merge_size: int, out_features: int, eps: float = 1e-6, layer_norm: bool = False
    ) -> None:
        super().__init__()
        self.merged_width = vision_width * merge_size**2
        self.norm = nn.LayerNorm(vision_width, eps) if layer_norm else RMSNorm(vision_width, eps)
        self.fc1 = nn.Linear(self.merged_width, self.merged_width)
        self.act_fn = ExactGELU()
        self.fc2 = nn.Linear(self.merged_width, out_features)

    def forward(self, features: Tensor) -> Tensor:
        """Map `(L, D)` patches in merge order to `(T, out_features)` tokens."""
        merged = self.norm(features).reshape(-1, self.merged_width)
        return apply_linear(self.fc2, self.act_fn(apply_linear(self.fc1, merged)))


class MultiTapMerger(nn.Module):
    """Sum of one merger per feature layer of a vision encoder, as in openPangu-VL.

    Args:
        vision_width: D.
        merge_size: m.
        out_features: Width of the tokens.
        num_layers: Number of feature layers.
        eps: Epsilon of the normalisations.
    """

    def __init__(
        self, vision_width: int, merge_size: int, out_features: int, num_layers: int, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.mergers = nn.ModuleList(
            [BlockMerger(vision_width, merge_size, out_features, eps) for _ in range(num_layers)]
        )

    def forward(self, *features: Tensor) -> Tensor:
        """Map the patches of each layer, `(L, D)` in merge order, to `(T, out_features)` tokens.

        Merger i takes layer i in the order of the vision configuration's `feature_layers`; openPangu-VL's begins with
        the last layer.

        Raises:
            ValueError: If the number of layers is not the number of mergers.
        """
        if len(features) != len(self.mergers):
            raise ValueError(f"`features` must hold {len(self.mergers)} layers, one per merger, got {len(features)}.")
        tokens = self.mergers[0](features[0])
        for merger, layer in zip(self.mergers[1:], features[1:], strict=True):
            tokens = tokens + merger(layer)
        return tokens


class ActivatedLinear(nn.Module):
    """SiLU, then a linear layer: the last step of openPangu-VL's projector.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.act_fn = nn.SiLU()
        self.fc = nn.Linear(in_features, out_features)

    def forward(self, features: Tensor) -> Tensor:
        """Map `(T, in_features)` to `(T, out_features)`."""
        return apply_linear(self.fc, self.act_fn(features))


class MultiTapProjector(nn.Module):
    """Mergers of several feature layers, to the text width directly or through an inner width.

    Args:
        vision_width: D.
        text_width: E.
        merge_size: m.
        num_layers: Number of feature layers.
        hidden_size: Width of the mergers' sum, which an [`ActivatedLinear`] maps to E (3,584 in openPangu-VL-7B); None
            for mergers with output width E.
        eps: Epsilon of the normalisations.

    Raises:
        ValueError: If `hidden_size` is not positive.
    """

    def __init__(
        self,
        vision_width: int,
        text_width: int,
        merge_size: int,
        num_layers: int,
        hidden_size: int | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if hidden_size is not None and hidden_size < 1:
            raise ValueError(f"`hidden_size` must be at least 1, or None, got {hidden_size}.")
        width = text_width if hidden_size is None else hidden_size
        self.merger = MultiTapMerger(vision_width, merge_size, width, num_layers, eps)
        self.output = None if hidden_size is None else ActivatedLinear(hidden_size, text_width)

    def forward(self, *features: Tensor) -> Tensor:
        """Map the patches of each layer, `(L, D)` in merge order, to `(T, E)` tokens."""
        tokens = self.merger(*features)
        return tokens if self.output is None else self.output(tokens)


def build_patch_merger(
    vision_width: int, text_width: int, merge_size: int, num_layers: int, eps: float = 1e-6
) -> BlockMerger:
    """Build a [`BlockMerger`] with RMS normalisation to the text width.

    Args:
        vision_width: D.
        text_width: E.
        merge_size: m.
        num_layers: Only 1.
        eps: Epsilon of the normalisation.

    Raises:
        ValueError: If there are several layers.
    """
    _check_one_layer("patch_merger", num_layers)
    return BlockMerger(vision_width, merge_size, text_width, eps)


def build_points_merger(
    vision_width: int, text_width: int, merge_size: int, num_layers: int, eps: float = 1e-6
) -> BlockMerger:
    """Build a [`BlockMerger`] with layer normalisation to the text width, as in POINTS1.5 and Qwen2-VL.

    Arguments and errors are those of [`build_patch_merger`].
    """
    _check_one_layer("points_merger", num_layers)
    return BlockMerger(vision_width, merge_size, text_width, eps, layer_norm=True)


def _check_one_layer(kind: str, num_layers: int) -> None:
    if num_layers != 1:
        raise ValueError(
            f"`num_layers` must be 1 for the projector {kind!r}, got {num_layers}; 'multi_tap_merger' takes several."
        )


_BUILDERS: dict[str, Callable[..., nn.Module]] = {}


def register_projector(
    name: str, build: Callable[..., nn.Module], *, takes_patches: bool = False, takes_views: bool = False
) -> None:
    """Register a projector under a name that configurations can use.

    Args:
        name: Value of `projector_type`.
        build: Takes the input width (m^2 * D) and the output width E, and returns a module from `(T, m^2 * D)` to
            `(T, E)`. With `takes_patches`: takes D, E, m, the number of feature layers of the vision encoder, and
            options by name, and returns a module from one `(L, D)` per feature layer to `(T, E)`.
        takes_patches: Whether the projector merges the patches itself. Only such projectors take several layers and
            options.
        takes_views: Whether the projector assembles the views of images: the module also takes `view_index`, see
            [`ViewAssembler`].

    Raises:
        ValueError: If the name is taken by another projector.
    """
    if _BUILDERS.get(name, build) != build:
        raise ValueError(f"`name` {name!r} is taken; registered projectors: {', '.join(projector_names())}.")
    options = _option_names(build) if takes_patches else ()
    add_projector_type(name, ProjectorType(takes_patches, takes_views, options))
    _BUILDERS[name] = build


def _option_names(build: Callable[..., nn.Module]) -> tuple[str, ...] | None:
    """Names of the options of a function that builds a projector; None if any is accepted."""
    parameters = list(inspect.signature(build).parameters.values())
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return tuple(parameter.name for parameter in parameters[4:])


# Their types are also data in `vlm_projector_types`; a difference is an error here.
register_projector("linear", nn.Linear)
register_projector("mlp2_gelu", MLP2)
register_projector("fused_mlp2_gelu", FusedMLP2, takes_patches=True)
register_projector("patch_merger", build_patch_merger, takes_patches=True)
register_projector("points_merger", build_points_merger, takes_patches=True)
register_projector("multi_tap_merger", MultiTapProjector, takes_patches=True)
register_projector("deepseek_ocr", ViewAssembler, takes_views=True)


class Projector(nn.Module):
    """Merge m x m patches into one token and map it to the text model's width.

    Args:
        kind: One of [`projector_names`].
        vision_width: D.
        text_width: E.
        merge_size: m.
        num_layers: Number of feature layers of the vision encoder.
        **options: Options of the projector.

    Raises:
        ValueError: If there is no such projector, it takes only one layer, or it does not have an option.
    """

    def __init__(
        self, kind: str, vision_width: int, text_width: int, merge_size: int = 1, num_layers: int = 1, **options: Any
    ) -> None:
        super().__init__()
        check_projector(kind, num_layers, options)
        self.num_layers = num_layers
        self.merged_width = None if get_projector_type(kind).takes_patches else vision_width * merge_size**2
        if self.merged_width is None:
            self.projection = _BUILDERS[kind](vision_width, text_width, merge_size, num_layers, **options)
        else:
            self.projection = _BUILDERS[kind](self.merged_width, text_width)

    def forward(self, *features: Tensor, view_index: Tensor | None = None) -> Tensor:
        """Map the patches of each layer, `(L, D)` in merge order, to `(T, E)` tokens.

        Args:
            *features: The patches.
            view_index: `(T,)` int64, for projectors that assemble views only.

        Raises:
            ValueError: If the number of layers is not `num_layers`.
        """
        if len(features) != self.num_layers:
            raise ValueError(f"`features` must hold {self.num_layers} layers, got {len(features)}.")
        if self.merged_width is None:
            return self.projection(*features)
        options = {} if view_index is None else {"index": view_index}
        return self.projection(features[0].reshape(-1, self.merged_width), **options)


def build_projector(config: PreTrainedConfig) -> Projector:
    """Build the projector of a composed model."""
    return Projector(
        config.projector_type,
        config.vision_width,
        config.text_config.hidden_size,
        config.projector_merge_size,
        config.num_feature_layers,
        **(config.projector_options or {}),
    )
