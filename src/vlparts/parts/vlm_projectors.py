"""Projectors: image features to the width of a text model, with an optional merge of neighbouring patches.

Shapes: L patches of all images in merge order (block after block of m x m), T = L / m^2 tokens, D width of the vision
model, E width of the text model.

Projectors that take the patches themselves: each block of m x m becomes one token.

Shapes: L patches of all images in merge order (block after block of m x m), T = L / m^2 tokens, D width of the vision
model, E width of the text model.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .ops_activations import ExactGELU
from .ops_linear import Linear
from .ops_rms_norm import RMSNorm


class BlockMerger(nn.Module):
    """Normalise each patch, join the patches of a block, and map them by two layers with an exact GELU between them.

    Qwen2.5-VL's merger (arXiv 2502.13923, section 2.1), which openPangu-VL took over.

    Args:
        vision_width: D.
        merge_size: m.
        out_features: Width of the tokens.
        eps: Epsilon of the normalisation.
    """

    def __init__(self, vision_width: int, merge_size: int, out_features: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.merged_width = vision_width * merge_size**2
        self.norm = RMSNorm(vision_width, eps)
        self.fc1 = Linear(self.merged_width, self.merged_width)
        self.act_fn = ExactGELU()
        self.fc2 = Linear(self.merged_width, out_features)

    def forward(self, features: Tensor) -> Tensor:
        """Map `(L, D)` patches in merge order to `(T, out_features)` tokens."""
        merged = self.norm(features).reshape(-1, self.merged_width)
        return self.fc2(self.act_fn(self.fc1(merged)))


class MultiTapMerger(nn.Module):
    """One merger for each of several layers of a vision model, and the sum of what they give, as in openPangu-VL.

    Args:
        vision_width: D.
        merge_size: m.
        out_features: Width of the tokens.
        taps: Number of layers.
        eps: Epsilon of the normalisations.
    """

    def __init__(self, vision_width: int, merge_size: int, out_features: int, taps: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.mergers = nn.ModuleList([BlockMerger(vision_width, merge_size, out_features, eps) for _ in range(taps)])

    def forward(self, *taps: Tensor) -> Tensor:
        """Map the layers' patches, `(L, D)` each in merge order, to `(T, out_features)` tokens.

        Merger i takes layer i in the order of the vision configuration's `feature_layers`; openPangu-VL's has the last
        layer first.

        Raises:
            ValueError: If there are not as many layers as mergers.
        """
        if len(taps) != len(self.mergers):
            raise ValueError(f"`taps` must hold {len(self.mergers)} layers, one for each merger, got {len(taps)}.")
        tokens = self.mergers[0](taps[0])
        for merger, tap in zip(self.mergers[1:], taps[1:], strict=True):
            tokens = tokens + merger(tap)
        return tokens


class ActivatedLinear(nn.Module):
    """SiLU, then a linear layer: openPangu-VL's last step to the text width.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.act_fn = nn.SiLU()
        self.fc = Linear(in_features, out_features)

    def forward(self, features: Tensor) -> Tensor:
        """Map `(T, in_features)` to `(T, out_features)`."""
        return self.fc(self.act_fn(features))


class MultiTapProjector(nn.Module):
    """Mergers of several layers, straight to the text width or by way of an inner width.

    Args:
        vision_width: D.
        text_width: E.
        merge_size: m.
        taps: Number of layers.
        hidden_size: Width of the mergers' sum, which an [`ActivatedLinear`] maps to E (3,584 in openPangu-VL-7B); None
            for mergers that give E themselves.
        eps: Epsilon of the normalisations.

    Raises:
        ValueError: If `hidden_size` is not positive.
    """

    def __init__(
        self,
        vision_width: int,
        text_width: int,
        merge_size: int,
        taps: int,
        hidden_size: int | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if hidden_size is not None and hidden_size < 1:
            raise ValueError(f"`hidden_size` must be at least 1, or None, got {hidden_size}.")
        width = text_width if hidden_size is None else hidden_size
        self.merger = MultiTapMerger(vision_width, merge_size, width, taps, eps)
        self.output = None if hidden_size is None else ActivatedLinear(hidden_size, text_width)

    def forward(self, *taps: Tensor) -> Tensor:
        """Map the layers' patches, `(L, D)` each in merge order, to `(T, E)` tokens."""
        tokens = self.merger(*taps)
        return tokens if self.output is None else self.output(tokens)


def build_patch_merger(
    vision_width: int, text_width: int, merge_size: int, taps: int, eps: float = 1e-6
) -> BlockMerger:
    """A [`BlockMerger`] to the text width.

    Args:
        vision_width: D.
        text_width: E.
        merge_size: m.
        taps: Only 1.
        eps: Epsilon of the normalisation.

    Raises:
        ValueError: If there are several layers.
    """
    if taps != 1:
        raise ValueError(f"The projector 'patch_merger' takes one layer, got `taps`={taps}; see 'multi_tap_merger'.")
    return BlockMerger(vision_width, merge_size, text_width, eps)


@dataclass(frozen=True)
class _Kind:
    build: Callable[..., nn.Module]
    takes_patches: bool

    def options(self) -> set[str] | None:
        """Names of the options; None where any is taken."""
        parameters = inspect.signature(self.build).parameters.values()
        if not self.takes_patches:
            return set()
        if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters):
            return None
        return {one.name for one in list(parameters)[4:]}


_PROJECTORS: dict[str, _Kind] = {}


def register_projector(name: str, build: Callable[..., nn.Module], *, takes_patches: bool = False) -> None:
    """Make a projector known by name.

    Args:
        name: The name that configurations use.
        build: Takes the input width (m^2 * D) and the output width E, and returns a module from `(T, m^2 * D)` to
            `(T, E)`. With `takes_patches`: takes D, E, m, the number of layers of the vision model, and options by
            name, and returns a module from that many `(L, D)` to `(T, E)`.
        takes_patches: Whether the projector merges the patches itself. Only such ones take several layers and options.

    Raises:
        ValueError: If the name is taken by another projector.
    """
    kind = _Kind(build, takes_patches)
    if _PROJECTORS.get(name, kind) != kind:
        raise ValueError(f"`name` {name!r} is taken; registered projectors: {', '.join(_PROJECTORS)}.")
    _PROJECTORS[name] = kind


def projector_names() -> tuple[str, ...]:
    """Names of the registered projectors."""
    return tuple(_PROJECTORS)


def check_projector(kind: str, taps: int = 1, options: Mapping[str, Any] | None = None) -> None:
    """Check that a projector exists and takes what it would be given.

    Args:
        kind: Name of the projector.
        taps: Number of layers of the vision model that it would get.
        options: Options of its own.

    Raises:
        ValueError: If there is no such projector, it takes one layer only, or it does not know an option.
    """
    if kind not in _PROJECTORS:
        raise ValueError(f"`kind` must be one of {', '.join(_PROJECTORS)}, got {kind!r}.")
    if taps != 1 and not _PROJECTORS[kind].takes_patches:
        raise ValueError(
            f"The projector {kind!r} takes one layer of the vision model, but `feature_layers` names {taps}; "
            "'multi_tap_merger' takes several."
        )
    known = _PROJECTORS[kind].options()
    unknown = sorted(set(options or {}) - known) if known is not None else []
    if unknown:
        raise ValueError(
            f"The projector {kind!r} has no option {', '.join(unknown)}; it has "
            f"{', '.join(sorted(known or ())) or 'none'}."
        )


class MLP2(nn.Module):
    """Two linear layers with an exact GELU between them (LLaVA-1.5, arXiv 2310.03744; POINTS1.5, arXiv 2412.08443)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, out_features)
        self.act_fn = ExactGELU()
        self.fc2 = nn.Linear(out_features, out_features)

    def forward(self, features: Tensor) -> Tensor:
        """Map `(T, m^2 * D)` to `(T, E)`."""
        return self.fc2(self.act_fn(self.fc1(features)))


register_projector("linear", nn.Linear)
register_projector("mlp2_gelu", MLP2)
register_projector("patch_merger", build_patch_merger, takes_patches=True)
register_projector("multi_tap_merger", MultiTapProjector, takes_patches=True)


class Projector(nn.Module):
    """Merge m x m patches into one token and map it to the text model's width.

    Args:
        kind: One of [`projector_names`].
        vision_width: D.
        text_width: E.
        merge_size: m.
        taps: Number of layers of the vision model that it takes.
        **options: Options of the projector.

    Raises:
        ValueError: If there is no such projector, it does not take so many layers, or it does not know an option.
    """

    def __init__(
        self, kind: str, vision_width: int, text_width: int, merge_size: int = 1, taps: int = 1, **options: Any
    ) -> None:
        super().__init__()
        check_projector(kind, taps, options)
        self.taps = taps
        self.merged_width = None if _PROJECTORS[kind].takes_patches else vision_width * merge_size**2
        if self.merged_width is None:
            self.projection = _PROJECTORS[kind].build(vision_width, text_width, merge_size, taps, **options)
        else:
            self.projection = _PROJECTORS[kind].build(self.merged_width, text_width)

    def forward(self, *taps: Tensor) -> Tensor:
        """Map the patches of each layer, `(L, D)` in merge order, to `(T, E)` tokens.

        Raises:
            ValueError: If there are more or fewer layers than the projector was built for.
        """
        if len(taps) != self.taps:
            raise ValueError(f"`taps` must hold {self.taps} layers of the vision model, got {len(taps)}.")
        if self.merged_width is None:
            return self.projection(*taps)
        return self.projection(taps[0].reshape(-1, self.merged_width))
