"""The units of a model: its layers, and the modules around them, with the rows that each computes for a pack.

Everything is read from the modules: products from `torch.nn.Linear`, convolutions, routers and stacked experts,
attention from the class names that contain "Attention". Layers are transformers' `GradientCheckpointingLayer`.

Shapes: D width, I inner width of an MLP, E experts, K of them per token.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ...parts.vlm_projectors import FusedMLP2
from .packs import Pack, vision_pairs, vision_rows

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Unit:
    """A layer, or a module outside of layers.

    Args:
        name: Its name in the model.
        part: "vision", "projector" or "text".
        module: The module.
        rows: Rows that it computes for a pack: tokens or patches.
        pairs: Pairs of queries and keys of its attention; 0 without attention.
        is_layer: Whether it is a layer, which gradient checkpointing computes again.
        share: Share K / E of the weights of stacked experts that a row uses.
    """

    name: str
    part: str
    module: nn.Module
    rows: float
    pairs: float
    is_layer: bool
    share: float

    @property
    def trains(self) -> bool:
        """Whether it has parameters that are trained."""
        return any(one.requires_grad for one in self.module.parameters())

    def products(self) -> list[tuple[nn.Module, Tensor, float]]:
        """The weights that rows are multiplied with: their module, weight, and the share of it that a row uses."""
        return [
            (module, weight, self.share if weight.ndim == 3 and is_experts(module) else 1.0)
            for module in self.module.modules()
            for weight in _weights(module)
        ]


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds the stacked weights `(E, out, in)` of experts, in transformers' layout."""
    return hasattr(module, "num_experts") and any(one.ndim == 3 for one in module.parameters(recurse=False))


def is_attention(module: nn.Module) -> bool:
    """Whether a module is an attention with its projections."""
    return "Attention" in type(module).__name__ and any(isinstance(one, nn.Linear) for one in module.children())


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalization."""
    return "Norm" in type(module).__name__ and not any(module.children())


def _weights(module: nn.Module) -> list[Tensor]:
    own = list(module.parameters(recurse=False))
    if isinstance(module, (nn.Linear, *_CONVOLUTIONS)):
        return [module.weight]
    if is_experts(module):
        return [one for one in own if one.ndim == 3]
    if any(word in type(module).__name__ for word in ("Router", "Gate")):
        return [one for one in own if one.ndim == 2 and one.shape[0] > 1]
    return []


def experts_share(config: Any) -> float:
    """Share K / E of the experts that a token uses; 1 without experts.

    Raises:
        ValueError: If the configuration has experts, but not how many a token uses.
    """
    experts = next((getattr(config, name) for name in _EXPERTS if getattr(config, name, None)), None)
    if experts is None:
        return 1.0
    chosen = next((getattr(config, name) for name in _CHOSEN if getattr(config, name, None)), None)
    if chosen is None:
        raise ValueError(f"`text` {type(config).__name__} has {experts} experts and none of {', '.join(_CHOSEN)}.")
    return float(chosen) / float(experts)


_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")


def get_units(model: Any, pack: Pack) -> list[Unit]:
    """The units of a composed model in the order in which they run, from the pixels to the logits.

    Args:
        model: The model.
        pack: What it computes.
    """
    share = experts_share(model.config.text_config)
    body, units = model.model, []
    for name, module, index in _split(body.vision_tower):
        full, rows = f"model.vision_tower.{name}", vision_rows(model, name, pack)
        pairs = 0.0 if index is None else vision_pairs(model, name, index, pack)
        units.append(Unit(full, "vision", module, rows, pairs, index is not None, 1.0))
    tokens, width = pack.images * pack.image_tokens, model.config.vision_width
    repeats = model.config.num_feature_layers if isinstance(body.projector.projection, FusedMLP2) else 1
    for name, module, _ in _split(body.projector):
        is_patchwise = is_norm(module) and next(module.parameters()).shape[-1] == width  # before merging
        rows = pack.patches if is_patchwise else tokens * repeats
        units.append(Unit(f"model.projector.{name}", "projector", module, rows, 0.0, False, 1.0))
    squares = pack.tokens * pack.sample_tokens
    for name, module, index in _split(body.language_model):
        pairs = 0.0 if index is None else squares
        full = f"model.language_model.{name}"
        units.append(Unit(full, "text", module, pack.tokens, pairs, index is not None, share))
    units.append(Unit("lm_head", "text", model.lm_head, pack.tokens, 0.0, False, 1.0))
    return units


def _split(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, int | None]]:
    """Layers with their index in their list, and the modules without children outside of layers."""
    for name, child in module.named_children():
        full = f"{prefix}{name}"
        if isinstance(child, GradientCheckpointingLayer):
            yield full, child, int(name) if name.isdigit() else 0
        elif not any(child.children()) or is_experts(child):
            if next(child.parameters(), None) is not None:
                yield full, child, None
        else:
            yield from _split(child, f"{full}.")
