"""Embedding and blocks of the window-free encoder. Their `config` is a [`WindowFreeViTConfig`].

Shapes: L patches of all images, D width, C channels, T frames of a patch, P side of a patch.
"""

from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig

from .activations import get_activation
from .linear import Linear
from .packed_layers import PackedLayer, PackedSelfAttention
from .rms_norm import RMSNorm


class WindowFreeViTPatchEmbedding(nn.Module):
    """Patches to vectors by one matrix product, without a bias and without positions."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.channels, self.frames = config.num_channels, config.temporal_patch_size
        self.features = config.num_channels * config.patch_size**2
        self.projection = Linear(self.features * self.frames, config.hidden_size, bias=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Embed `(L, C*P*P)` patches of one frame, or `(L, C*T*P*P)` of T frames, as `(L, D)`.

        Raises:
            ValueError: If patches have another number of values.
        """
        given, wanted = pixel_values.shape[-1], (self.features, self.features * self.frames)
        if pixel_values.ndim != 2 or given not in wanted:
            raise ValueError(
                f"`pixel_values` must have shape (patches, {wanted[0]}) or (patches, {wanted[1]}), got "
                f"{tuple(pixel_values.shape)}."
            )
        if given != wanted[1]:
            planes = pixel_values.unflatten(1, (self.channels, 1, -1))
            pixel_values = planes.expand(-1, -1, self.frames, -1).flatten(1)
        return self.projection(pixel_values)


class WindowFreeViTMLP(nn.Module):
    """Two linear layers with an activation between them; or, with a gate, three."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(width, inner, bias=bias) if config.gated_mlp else None
        self.up_proj = Linear(width, inner, bias=bias)
        self.act_fn = get_activation(config.hidden_act)
        self.down_proj = Linear(inner, width, bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map `(L, D)` to `(L, D)`."""
        if self.gate_proj is None:
            return self.down_proj(self.act_fn(self.up_proj(hidden_states)))
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class WindowFreeViTAttention(PackedSelfAttention):
    """Self-attention inside each segment: a frame, or a window."""


class WindowFreeViTLayer(PackedLayer):
    """A pre-norm transformer block with RMS normalisations."""

    def __init__(self, config: PreTrainedConfig) -> None:
        norms = [RMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(2)]
        super().__init__(WindowFreeViTAttention(config), WindowFreeViTMLP(config), *norms)
