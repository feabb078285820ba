"""Names and options of projectors, as data: configurations check them without a reference to a module.

Servers pickle configurations by value with all that their modules reach, and operations cannot be pickled.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ProjectorType:
    """What a projector takes.

    Attributes:
        takes_patches: Whether it merges the patches itself, and takes several layers and options.
        takes_views: Whether it assembles the views of images.
        options: Names of its options; None if any is accepted.
    """

    takes_patches: bool = False
    takes_views: bool = False
    options: tuple[str, ...] | None = ()


_TYPES = {
    "linear": ProjectorType(),
    "mlp2_gelu": ProjectorType(),
    "fused_mlp2_gelu": ProjectorType(takes_patches=True, options=("weights",)),
    "patch_merger": ProjectorType(takes_patches=True, options=("eps",)),
    "points_merger": ProjectorType(takes_patches=True, options=("eps",)),
    "multi_tap_merger": ProjectorType(takes_patches=True, options=("hidden_size", "eps")),
    "deepseek_ocr": ProjectorType(takes_views=True),
}


def add_projector_type(name: str, projector: ProjectorType) -> None:
    """Add what a projector takes.

    Raises:
        ValueError: If another projector has the name.
    """
    if _TYPES.setdefault(name, projector) != projector:
        raise ValueError(f"`name` {name!r} is taken; registered projectors: {', '.join(_TYPES)}.")


def projector_names() -> tuple[str, ...]:
    """Return the names of the registered projectors."""
    return tuple(_TYPES)


def get_projector_type(kind: str) -> ProjectorType:
    """Return what a registered projector takes."""
    return _TYPES[kind]


def check_projector(kind: str, num_layers: int = 1, options: Mapping[str, Any] | None = None) -> None:
    """Check that a projector exists and accepts the feature layers and options.

    Args:
        kind: Name of the projector.
        num_layers: Number of feature layers of the vision encoder.
        options: Options of the projector.

    Raises:
        ValueError: If there is no such projector, it takes only one layer, or it does not have an option.
    """
    if kind not in _TYPES:
        raise ValueError(f"`kind` must be one of {', '.join(_TYPES)}, got {kind!r}.")
    if num_layers != 1 and not _TYPES[kind].takes_patches:
        raise ValueError(
            f"The projector {kind!r} takes one layer of the vision encoder, but `feature_layers` names {num_layers}; "
            "'multi_tap_merger' takes several."
        )
    known = _TYPES[kind].options
    unknown = sorted(set(options or {}) - set(known)) if known is not None else []
    if unknown:
        raise ValueError(
            f"The projector {kind!r} has no option {', '.join(unknown)}; it has "
            f"{', '.join(sorted(known or ())) or 'none'}."
        )
