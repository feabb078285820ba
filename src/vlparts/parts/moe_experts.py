"""Routed experts in transformers' layout, and the condition on expert parallelism of grouped experts.

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
            top_k_index: `(T, K)` int64, the experts of each token. E marks an expert of another process, which is
                skipped.
            top_k_weights: `(T, K)`, weights of the experts' outputs.

        Returns:
            `(T, H)`.
        """
        outputs = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, rank = torch.where(top_k_index == expert)
            if not token.numel():
                continue
            gated = self._apply_gate(F.linear(hidden_states[token], self.gate_up_proj[expert]))
            weighted = F.linear(gated, self.down_proj[expert]) * top_k_weights[token, rank, None]
            outputs.index_add_(0, token, weighted.to(outputs.dtype))
        return outputs


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
