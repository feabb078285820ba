"""Switching the experts implementation of a model, without silent failures."""

from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import PreTrainedModel

from .experts_auto import expert_costs, forget_expert_costs

__all__ = ["expert_costs", "forget_expert_costs", "set_experts_implementation"]


def set_experts_implementation(model: PreTrainedModel, implementation: str) -> int:
    """Let all experts of a model use an implementation, ours or transformers'.

    `model.set_experts_implementation` does nothing, silently, for models whose file does not name transformers'
    decorator. This function reaches every experts module that can follow, and says so where none can.

    Args:
        model: Any transformers model.
        implementation: "vlparts_auto", "vlparts_sorted", "vlparts_merged", "grouped_mm", "batched_mm", "eager", or
            another registered name.

    Returns:
        The number of experts modules that now use it.

    Raises:
        ValueError: If there is no such implementation, or no module of the model takes one.
    """
    known = ["eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()]
    if implementation not in known:
        raise ValueError(f"`implementation` must be one of {', '.join(known)}, got {implementation!r}.")
    modules = [module for module in model.modules() if hasattr(module, "_is_expert_parallel")]
    if not modules:
        raise ValueError(
            f"`model` {type(model).__name__} has no experts module under transformers' `use_experts_implementation`, "
            "so no implementation can be set."
        )
    for module in modules:
        module.config._experts_implementation = implementation
    return len(modules)
