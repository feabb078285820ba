"""Routed experts in transformers' layout, the check of their routing, and the condition on expert parallelism.

Shapes: T tokens, K experts per token, E experts, H width, I inner width of an expert.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.configuration_utils import PreTrainedConfig

from .ops_activations import get_activation, swiglu


class RoutedExperts(nn.Module):
    """The gated MLPs of all experts of a layer, with stacked weights.

    A model derives its own class and decorates it with transformers' `use_experts_implementation` in the file of its
    `PreTrainedModel`: transformers looks for the decorator's name in the text of that file, and ignores
    `experts_implementation` without it. `forward` is the "eager" implementation.

    Args:
        config: Configuration with `num_experts` (E), `hidden_size` (H), `moe_intermediate_size` (I) and `hidden_act`.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = get_activation(config.hidden_act)
        self.is_swiglu = config.hidden_act in ("silu", "swish")

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        """Map `(rows, 2I)`, gates first, to `(rows, I)`; transformers' other implementations call it too."""
        if self.is_swiglu:
            return swiglu(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum the weighted outputs of each token's experts, in a loop over experts.

        Args:
            hidden_states: `(T, H)`.
            top_k_index: `(T, K)` int64, the experts of each token. Under expert parallelism E marks an expert of
                another process, which is skipped.
            top_k_weights: `(T, K)`, weights of the experts' outputs.

        Returns:
            `(T, H)`.

        Raises:
            ValueError: As [`check_routing`].
        """
        check_routing(self, hidden_states, top_k_index, top_k_weights)
        outputs = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, rank = torch.where(top_k_index == expert)
            if not token.numel():
                continue
            gated = self._apply_gate(F.linear(hidden_states[token], self.gate_up_proj[expert]))
            weighted = F.linear(gated, self.down_proj[expert]) * top_k_weights[token, rank, None]
            outputs.index_add_(0, token, weighted.to(outputs.dtype))
        return outputs


def is_expert_parallel(module: Any) -> bool:
    """Whether an experts module may be split over processes: transformers marks it; some versions mark no module."""
    return bool(getattr(module, "_is_expert_parallel", True))


def check_routing(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
    """Check the shapes of a routing, and on CPU also the indices.

    Args:
        module: Experts module in transformers' layout.
        hidden_states: `(T, H)`.
        top_k_index: `(T, K)` integers from 0 to E - 1. Under expert parallelism, E marks an expert of another process.
        top_k_weights: `(T, K)`.

    Raises:
        ValueError: If shapes do not fit together or an index is out of range.
    """
    if hidden_states.ndim != 2 or top_k_index.shape != top_k_weights.shape or top_k_index.ndim != 2:
        raise ValueError(
            "`hidden_states`, `top_k_index` and `top_k_weights` must have shapes (tokens, width), (tokens, k) and "
            f"(tokens, k), got {tuple(hidden_states.shape)}, {tuple(top_k_index.shape)} and "
            f"{tuple(top_k_weights.shape)}."
        )
    if len(top_k_index) != len(hidden_states):
        raise ValueError(
            f"`top_k_index` must have a row for each of {len(hidden_states)} tokens, got {len(top_k_index)}."
        )
    if top_k_index.device.type == "cpu" and top_k_index.numel() and not torch.compiler.is_compiling():
        low, high = (int(x) for x in torch.aminmax(top_k_index))
        experts = module.num_experts
        if low < 0 or high >= experts + is_expert_parallel(module):
            raise ValueError(
                f"`top_k_index` must lie from 0 to {experts - 1} (under expert parallelism also {experts}, an expert "
                f"of another process), got {low if low < 0 else high}."
            )


def check_whole_groups(config: PreTrainedConfig, distributed_config: Any) -> None:
    """Check that expert parallelism divides no group of experts.

    A token chooses the same number of experts in each group (arXiv 2505.21411, section 2.2), so the load is balanced
    over processes that hold whole groups.

    Args:
        config: Configuration of a model. Nothing is checked if its text configuration has no `num_expert_groups`.
        distributed_config: transformers' `DistributedConfig`, or None.

    Raises:
        ValueError: If `ep_size` does not divide `num_expert_groups`.
    """
    groups = getattr(config.get_text_config(), "num_expert_groups", None)
    processes = getattr(distributed_config, "ep_size", None) or 1
    if groups is not None and groups % processes:
        raise ValueError(
            f"`ep_size` must divide `num_expert_groups`, {groups}, so that every process holds whole groups, got "
            f"{processes}."
        )
