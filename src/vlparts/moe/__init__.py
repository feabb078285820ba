"""Mixture of experts: experts implementations for any transformers model, and router statistics.

Importing this package registers the implementations with transformers.
"""

from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface
from transformers.modeling_utils import PreTrainedModel

from .experts_auto import AUTO_EXPERTS_NAME, auto_experts_forward, expert_costs, forget_expert_costs
from .experts_dense import MERGED_EXPERTS_NAME, merged_experts_forward
from .experts_sorted import SORTED_EXPERTS_NAME, sorted_experts_forward
from .statistics import RouterLoad, RouterStatistics

__all__ = [
    "RouterLoad",
    "RouterStatistics",
    "expert_costs",
    "forget_expert_costs",
    "register",
    "set_experts_implementation",
]


def register() -> None:
    """Register the experts implementations with transformers; a second call changes nothing."""
    ExpertsInterface.register(AUTO_EXPERTS_NAME, auto_experts_forward)
    ExpertsInterface.register(MERGED_EXPERTS_NAME, merged_experts_forward)
    ExpertsInterface.register(SORTED_EXPERTS_NAME, sorted_experts_forward)


def set_experts_implementation(model: PreTrainedModel, implementation: str) -> int:
    """Set the experts implementation of all experts modules of a model.

    `model.set_experts_implementation` silently does nothing for models whose source file does not name transformers'
    decorator. This function changes every experts module that supports it, and raises an error if there is none.

    Args:
        model: Any transformers model.
        implementation: "vlparts_auto", "vlparts_sorted", "vlparts_merged", "grouped_mm", "batched_mm", "eager", or
            another registered name.

    Returns:
        The number of experts modules that were changed.

    Raises:
        ValueError: If the implementation is unknown, or no module of the model supports one.
    """
    known = ["eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()]
    if implementation not in known:
        raise ValueError(f"`implementation` must be one of {', '.join(known)}, got {implementation!r}.")
    modules = [module for module in model.modules() if hasattr(module, "_is_expert_parallel")]
    if not modules:
        raise ValueError(
            "`model` must have an experts module with transformers' `use_experts_implementation`, got "
            f"{type(model).__name__} without one."
        )
    for module in modules:
        module.config._experts_implementation = implementation
    return len(modules)


register()
