"""Routed experts in the layout that transformers and its fast implementations share.

Shapes: T tokens, K experts of each, E experts, H width, I width of an expert.

Expert parallelism of grouped experts: every process holds whole groups.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.configuration_utils import PreTrainedConfig

from .ops_activations import get_activation, swiglu


class RoutedExperts(nn.Module):
    """The gated MLPs of all experts of a layer, their weights stacked.

    A model derives its own class from this one, and puts transformers' decorator for implementations of experts on it
    in the file of its `PreTrainedModel`: transformers looks for the decorator's name in the text of that file, and
    without it ignores a choice of implementation. What stands here is "eager".

    Args:
        config: Has `num_experts` (E), `hidden_size` (H), `moe_intermediate_size` (I) and `hidden_act`.
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
        """Gate `(S, 2I)`, gates first, to `(S, I)`; transformers' other implementations call it too."""
        if self.is_swiglu:
            return swiglu(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Add up each token's experts, expert after expert.

        Args:
            hidden_states: `(T, H)`.
            top_k_index: `(T, K)` int64, the experts of each token. E stands for an expert elsewhere, which adds
                nothing here.
            top_k_weights: `(T, K)`, what their outputs are multiplied by.

        Returns:
            `(T, H)`.
        """
        outputs = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, place = torch.where(top_k_index == expert)
            if not token.numel():
                continue
            gated = self._apply_gate(F.linear(hidden_states[token], self.gate_up_proj[expert]))
            weighted = F.linear(gated, self.down_proj[expert]) * top_k_weights[token, place, None]
            outputs.index_add_(0, token, weighted.to(outputs.dtype))
        return outputs


def check_whole_groups(config: PreTrainedConfig, distributed_config: Any) -> None:
    """Check that expert parallelism divides no group of experts.

    A token chooses equally many experts of each group (arXiv 2505.21411, section 2.2), so that processes with whole
    groups all have the same work. With parts of groups they would wait for each other.

    Args:
        config: Configuration of a model; with `num_expert_groups` in its text part, it is checked.
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
