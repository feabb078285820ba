"""Projectors: image features to the width of a text model, with an optional merge of neighbouring patches.

Shapes: L patches of all images in merge order (block after block of m x m), T = L / m^2 tokens, D width of the vision
model, E width of the text model.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .activations import ExactGELU
from .patch_mergers import MultiTapProjector, build_patch_merger


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
