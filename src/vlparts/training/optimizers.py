"""Muon for weight matrices combined with AdamW for all other parameters."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the weight matrices of layers, AdamW for embeddings, heads, biases and norm weights.

    Muon (Jordan et al., 2024) orthogonalizes the update of each matrix. Its updates are scaled to the RMS of AdamW's
    (Moonlight, arXiv 2502.16982, section 2.2), so that one learning rate serves both.

    Args:
        matrices: Two-dimensional parameters for Muon.
        others: Parameters for AdamW.
        lr: Learning rate.
        weight_decay: Decoupled weight decay; not applied to one-dimensional parameters.
    """

    def __init__(self, matrices: Iterable[Tensor], others: Iterable[Tensor], lr: float, weight_decay: float) -> None:
        others = list(others)
        groups = [
            {"params": [one for one in others if one.ndim > 1], "weight_decay": weight_decay},
            {"params": [one for one in others if one.ndim <= 1], "weight_decay": 0.0},
        ]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW([group for group in groups if group["params"]], lr=lr),
        ]
        matrices = list(matrices)
        if matrices:
            muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            self.parts.append(muon)
        super().__init__([one for part in self.parts for one in part.param_groups], {})
        # The same dicts as in the inner optimizers, so that a scheduler sets the learning rates of both.
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters; return the loss of `closure`, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the inner optimizers, AdamW first."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that [`state_dict`] returned."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def muon_with_adamw(model: nn.Module, lr: float, weight_decay: float) -> MuonWithAdamW:
    """Build the optimizer of a model: weights of linear layers except the language head to Muon, the rest to AdamW.

    Args:
        model: The model.
        lr: Learning rate.
        weight_decay: Weight decay.
    """
    embeddings: list[Any] = [
        getattr(model, name)() for name in ("get_input_embeddings", "get_output_embeddings") if hasattr(model, name)
    ]
    matrices = {
        id(module.weight): module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad
    }
    for module in embeddings:
        if module is not None:
            matrices.pop(id(module.weight), None)
    others = [one for one in model.parameters() if one.requires_grad and id(one) not in matrices]
    return MuonWithAdamW(matrices.values(), others, lr, weight_decay)
