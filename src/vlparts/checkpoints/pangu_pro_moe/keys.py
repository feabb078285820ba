"""Names: which published tensor of Pangu Pro MoE is which, or which part, of a tensor of ours.

Ours stack the experts of a layer: E experts, H width, I width of an expert.
"""

import re
from typing import NamedTuple

import torch
from torch import Tensor

from ...parts.modeling_moge import MoGEForCausalLM
from .._filling import FLOATING, own_tensors
from .._safetensors import Stored

_EXPERTS = re.compile(r"(.+\.mlp\.experts\.)(gate_up_proj|down_proj)")
_ROUTER_SCALE = ".mlp.gate.router_scale"


class Place(NamedTuple):
    """Where a published tensor stands in ours.

    Attributes:
        name: The name of our tensor.
        expert: Index of the expert, None for a tensor that is not stacked.
        half: 0 for the first half of the expert's rows, 1 for the second, None for all.
    """

    name: str
    expert: int | None = None
    half: int | None = None

    def view(self, tensor: Tensor) -> Tensor:
        """The part of our tensor."""
        if self.expert is None:
            return tensor
        rows = tensor[self.expert]
        return rows if self.half is None else rows.chunk(2)[self.half]


def get_places(model: MoGEForCausalLM) -> dict[str, Place]:
    """Where each published tensor stands in those of a model, which may be on the meta device."""
    places: dict[str, Place] = {}
    for name, tensor in own_tensors(model).items():
        match = _EXPERTS.fullmatch(name)
        if match is None:
            places[name.replace(_ROUTER_SCALE, ".mlp.router_scale")] = Place(name)
            continue
        projections = {"down_proj": None} if match[2] == "down_proj" else {"gate_proj": 0, "up_proj": 1}
        for expert in range(tensor.shape[0]):
            for projection, half in projections.items():
                places[f"{match[1]}{expert}.{projection}.weight"] = Place(name, expert, half)
    return places


def stored_types(places: dict[str, Place], found: dict[str, Stored]) -> dict[str, torch.dtype]:
    """The type of each of our tensors by name.

    Raises:
        ValueError: If the experts of a layer have several.
    """
    types: dict[str, set[str]] = {}
    for published, place in places.items():
        types.setdefault(place.name, set()).add(found[published].dtype)
    mixed = [f"{name} of {', '.join(sorted(kinds))}" for name, kinds in types.items() if len(kinds) > 1]
    if mixed:
        raise ValueError(
            "`folder` must have experts of one type in each layer, or be read with a `dtype`, got "
            f"{'; '.join(sorted(mixed))}."
        )
    return {name: FLOATING[kinds.pop()] for name, kinds in types.items()}
