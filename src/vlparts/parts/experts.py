"""Routed experts in the layout that transformers and its fast implementations share.

Shapes: T tokens, K experts of each, E experts, H width, I width of an expert.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.configuration_utils import PreTrainedConfig

from .activations import get_activation, swiglu
from .experts_auto import AUTO_EXPERTS_NAME
from .experts_merged import MERGED_EXPERTS_NAME
from .experts_sorted import SORTED_EXPERTS_NAME

# To import them registers them, also where these files run as remote code.
OUR_IMPLEMENTATIONS = (SORTED_EXPERTS_NAME, MERGED_EXPERTS_NAME, AUTO_EXPERTS_NAME)


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
