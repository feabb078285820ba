"""Learning rates and weight decays of parts, and Muon for weight matrices combined with AdamW for the rest."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .building import select_parameters


@dataclass(frozen=True)
class Rates:
    """Learning rates and weight decays of the parameters of a model.

    Args:
        learning_rate: Learning rate of all other parameters.
        weight_decay: Weight decay of all other parameters that have one.
        learning_rates: Learning rates of parts or of patterns of names, see [`select_parameters`].
        weight_decays: Weight decays of parts or of patterns of names.
    """

    learning_rate: float
    weight_decay: float
    learning_rates: Mapping[str, float]
    weight_decays: Mapping[str, float]

    def groups(self, model: nn.Module, parameters: Iterable[tuple[Tensor, bool]]) -> list[dict[str, Any]]:
        """Parameter groups of an optimizer, one for each pair of rates.

        Args:
            model: The model.
            parameters: Parameters, and whether they decay; those without gradients are left out.

        Raises:
            ValueError: If a name matches no parameter that is trained, or a parameter has two rates.
        """
        rates = _by_parameter(model, self.learning_rates, "learning_rates")
        decays = _by_parameter(model, self.weight_decays, "weight_decays")
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for one, decays_it in parameters:
            if one.requires_grad:
                decay = decays.get(id(one), self.weight_decay) if decays_it else 0.0
                groups.setdefault((rates.get(id(one), self.learning_rate), decay), []).append(one)
        return [{"params": ones, "lr": rate, "weight_decay": decay} for (rate, decay), ones in groups.items()]


def _by_parameter(model: nn.Module, rates: Mapping[str, float], argument: str) -> dict[int, float]:
    """The rate of each trained parameter that a name matches, by the parameter's id."""
    found: dict[int, float] = {}
    for name, rate in rates.items():
        chosen = {key: one for key, one in select_parameters(model, [name], argument).items() if one.requires_grad}
        if not chosen:
            raise ValueError(f"`{argument}` {name!r} matches no parameter that is trained.")
        for key, one in chosen.items():
            if found.setdefault(id(one), rate) != rate:
                raise ValueError(
                    f"`{argument}` gives {key} two values, {found[id(one)]:g} and {rate:g} by {name!r}; expected one."
                )
    return found


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the weight matrices of layers, AdamW for embeddings, heads, biases and norm weights.

    Muon (Jordan et al., 2024) orthogonalizes the update of each matrix. Its updates are scaled to the RMS of AdamW's
    (Moonlight, arXiv 2502.16982, section 2.2), so that one learning rate serves both.

    Args:
        matrices: Groups of two-dimensional parameters for Muon, with "lr" and "weight_decay".
        others: Groups of parameters for AdamW, likewise.
    """

    def __init__(self, matrices: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
        self.parts: list[torch.optim.Optimizer] = []
        if others:
            self.parts.append(torch.optim.AdamW(others))
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw"))
        super().__init__([one for part in self.parts for one in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let the inner optimizers use the groups and states of this one, as a scheduler or a checkpoint sets them."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, as of any optimizer."""
        super().load_state_dict(state_dict)
        self._share()


def muon_with_adamw(model: nn.Module, lr: float, weight_decay: float, rates: Rates | None = None) -> MuonWithAdamW:
    """Build the optimizer of a model: weights of linear layers except the language head to Muon, the rest to AdamW.

    Args:
        model: The model.
        lr: Learning rate.
        weight_decay: Weight decay; one-dimensional parameters have none.
        rates: Rates of parts, in place of `lr` and `weight_decay`.
    """
    rates = Rates(lr, weight_decay, {}, {}) if rates is None else rates
    embeddings: list[Any] = [
        getattr(model, name)() for name in ("get_input_embeddings", "get_output_embeddings") if hasattr(model, name)
    ]
    matrices = {id(module.weight): module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    for module in embeddings:
        if module is not None:
            matrices.pop(id(module.weight), None)
    others = [(one, one.ndim > 1) for one in model.parameters() if id(one) not in matrices]
    return MuonWithAdamW(rates.groups(model, [(one, True) for one in matrices.values()]), rates.groups(model, others))
