"""Projectors: image features to the width of a text model, with an optional merge of neighbouring patches.

Shapes: L patches of all images in merge order (block after block of m x m), T = L / m^2 tokens, D width of the vision
model, E width of the text model.
"""

from collections.abc import Callable

from torch import Tensor, nn

_PROJECTORS: dict[str, Callable[[int, int], nn.Module]] = {}


def register_projector(name: str, build: Callable[[int, int], nn.Module]) -> None:
    """Make a projector known by name.

    Args:
        name: The name that configurations use.
        build: Takes the input width (m^2 * D) and the output width E, and returns a module from `(T, m^2 * D)` to
            `(T, E)`.

    Raises:
        ValueError: If the name is taken by another projector.
    """
    if _PROJECTORS.get(name, build) is not build:
        raise ValueError(f"`name` {name!r} is taken; registered projectors: {', '.join(_PROJECTORS)}.")
    _PROJECTORS[name] = build


def projector_names() -> tuple[str, ...]:
    """Names of the registered projectors."""
    return tuple(_PROJECTORS)


class MLP2(nn.Module):
    """Two linear layers with an exact GELU between them (LLaVA-1.5, arXiv 2310.03744; POINTS1.5, arXiv 2412.08443)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, out_features)
        self.act_fn = nn.GELU()
        self.fc2 = nn.Linear(out_features, out_features)

    def forward(self, features: Tensor) -> Tensor:
        """Map `(T, m^2 * D)` to `(T, E)`."""
        return self.fc2(self.act_fn(self.fc1(features)))


register_projector("linear", nn.Linear)
register_projector("mlp2_gelu", MLP2)


class Projector(nn.Module):
    """Merge m x m patches into one token and map it to the text model's width.

    Args:
        kind: One of [`projector_names`].
        vision_width: D.
        text_width: E.
        merge_size: m.
    """

    def __init__(self, kind: str, vision_width: int, text_width: int, merge_size: int = 1) -> None:
        super().__init__()
        if kind not in _PROJECTORS:
            raise ValueError(f"`kind` must be one of {', '.join(_PROJECTORS)}, got {kind!r}.")
        self.merged_width = vision_width * merge_size**2
        self.projection = _PROJECTORS[kind](self.merged_width, text_width)

    def forward(self, features: Tensor) -> Tensor:
        """Map `(L, D)` patches in merge order to `(T, E)` tokens."""
        return self.projection(features.reshape(-1, self.merged_width))
