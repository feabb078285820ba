"""The router of a mixture of experts, which chooses and weights the experts of each token.

Shapes: `T` tokens, `H` channels, `E` experts, `K` chosen, `B` sequences of `S` tokens.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .moe_options import ROUTER_DTYPES, RoutingOptions, check_name, check_number
from .moe_routing import route
from .utils import positive_integer

__all__ = ["GroupedTopKRouter"]

BIAS_RULES = ("sign", "mean_free_sign")

PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2505.21411, table 1 and eq. 5 to 7; the scale is in the checkpoint, not in the paper.
    "pangu_pro_moe": dict(num_experts_per_tok=8, grouping="equal", num_expert_groups=8, router_scale=True),
    "deepseek_v2": dict(
        num_experts_per_tok=6,
        grouping="limited",
        num_expert_groups=8,
        num_limited_groups=3,
        group_score="max",
        group_mask="zero",
        routed_scaling_factor=16.0,
    ),
    "deepseek_v3": dict(
        num_experts_per_tok=8,
        scoring="sigmoid",
        grouping="limited",
        num_expert_groups=8,
        num_limited_groups=4,
        group_score="top2_sum",
        group_mask="exclude",
        selection_bias=True,
        renormalize=True,
        routed_scaling_factor=2.5,
    ),
    "mixtral": dict(num_experts_per_tok=2, renormalize=True),
    "qwen3_moe": dict(num_experts_per_tok=8, renormalize=True),
    "openpangu_2": dict(
        num_experts_per_tok=8, scoring="sigmoid", selection_bias=True, renormalize=True, routed_scaling_factor=2.5
    ),
}


class GroupedTopKRouter(nn.Module):
    """A linear router that chooses the K best experts, with or without groups.

    It returns what transformers' experts modules take. Logits, scores and weights are computed in `router_dtype`, or
    in the dtype of the hidden states if that is wider, also under autocast and with parameters in half precision.

    Parameters and buffers: `weight (E, H)`; `router_scale (1, E)`, initially ones, with `router_scale`;
    `e_score_correction_bias (E,)`, initially zeros, float32, with `selection_bias`.

    Args:
        hidden_size: H.
        num_experts: E.
        num_experts_per_tok: K.
        router_scale: Whether to learn a factor of each expert's weight, applied after the choice.
        router_dtype: "float32" or "float64", or the torch dtype.
        jitter: Half-width e of the multiplicative noise on the router's input, from U(1 - e, 1 + e), in training only.
            The experts get the input without noise, as in Switch Transformer (arXiv 2101.03961) and unlike
            transformers' Mixtral.
        options: Options of [`RoutingOptions`]. `num_voted_experts` has an effect in inference only.

    Raises:
        ValueError: If an option is out of range, unknown, or does not fit the others.
    """

    router_scale: nn.Parameter | None
    e_score_correction_bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        *,
        router_scale: bool = False,
        router_dtype: str | torch.dtype = "float32",
        jitter: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        self.options = RoutingOptions(num_experts, num_experts_per_tok, **options)
        self.hidden_size = positive_integer(hidden_size, "hidden_size")
        check_number("jitter", jitter, lowest=0.0, below=1.0)
        self.jitter = jitter
        dtype_name = str(router_dtype).removeprefix("torch.")
        check_name("router_dtype", dtype_name, ROUTER_DTYPES)
        self.router_dtype: torch.dtype = getattr(torch, dtype_name)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.register_parameter("router_scale", nn.Parameter(torch.empty(1, num_experts)) if router_scale else None)
        bias = torch.empty(num_experts, dtype=torch.float32) if self.options.selection_bias else None
        self.register_buffer("e_score_correction_bias", bias)
        self.reset_parameters()

    @classmethod
    def presets(cls) -> tuple[str, ...]:
        """Return the names of the presets."""
        return tuple(PRESETS)

    @classmethod
    def from_preset(cls, name: str, hidden_size: int, num_experts: int, **changes: Any) -> "GroupedTopKRouter":
        """Build the router of a published model.

        The presets, with the published numbers of experts: "pangu_pro_moe" (64), "deepseek_v2" (160), "deepseek_v3"
        (256), "mixtral" (8), "qwen3_moe" (128; `renormalize` as in its checkpoints) and "openpangu_2" (256; its
        `renormalize_eps` is not published).

        Args:
            name: One of `presets()`.
            hidden_size: H.
            num_experts: E.
            changes: Options that replace those of the preset.

        Raises:
            ValueError: If the name is unknown, or the options do not fit together.
        """
        check_name("name", name, cls.presets())
        return cls(hidden_size, num_experts, **{**PRESETS[name], **changes})

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the weight as in `torch.nn.Linear`, the scale with ones, the bias with zeros."""
        bound = 1 / math.sqrt(self.hidden_size)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.router_scale is not None:
            nn.init.ones_(self.router_scale)
        if self.e_score_correction_bias is not None:
            nn.init.zeros_(self.e_score_correction_bias)

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Choose and weight the experts of each token.

        Args:
            hidden_states: `(T, H)`, or `(B, S, H)` with T = B * S.
            token_mask: `(T,)` or `(B, S)` bool, false at padding. Padding gets logits and weights of zero and valid
                indices, does not vote, and has gradients of exactly zero, also if it holds NaN. Pass the same mask to
                losses and statistics.

        Returns:
            Logits `(T, E)`, weights `(T, K)`, both in the router's dtype, and indices `(T, K)` int64.

        Raises:
            ValueError: If a shape or dtype does not fit; on CPU and outside of compiled code, if a logit is NaN.
        """
        self._check_input(hidden_states, token_mask)
        hidden = hidden_states.reshape(-1, self.hidden_size)
        hidden = hidden.to(torch.promote_types(self.router_dtype, hidden.dtype))
        if token_mask is not None:
            token_mask = token_mask.reshape(-1)
            hidden = torch.where(token_mask[:, None], hidden, 0.0)  # 0 * NaN would reach the weight's gradient
        if self.training and self.jitter:
            hidden = hidden * torch.empty_like(hidden).uniform_(1 - self.jitter, 1 + self.jitter)
        with torch.autocast(hidden.device.type, enabled=False):
            logits = F.linear(hidden, self.weight.to(hidden.dtype))
            weights, indices = route(
                logits,
                self.options,
                selection_bias=self.e_score_correction_bias,
                expert_scale=self.router_scale,
                token_mask=token_mask,
                vote=not self.training,
            )
        return logits, weights, indices

    @torch.no_grad()
    def update_selection_bias(self, counts: Tensor, rate: float = 1e-3, rule: str = "sign") -> None:
        """Raise the bias of experts with too few tokens and lower that of experts with too many (arXiv 2408.15664).

        Call it once per optimizer step.

        Args:
            counts: `(E,)` tokens of each expert in the step, over all micro-batches and processes, as
                `RouterStatistics` counts them.
            rate: Step u of the bias; the paper uses 1e-3.
            rule: "sign": `u * sign(mean - count)`, as in the paper. "mean_free_sign": the same minus its mean over the
                experts, which keeps the bias centred and does not affect the choice unless groups are masked with
                zero.

        Raises:
            ValueError: If the router has no bias or stores it in half precision, in which such steps are rounded away;
                if `counts` has another shape or is negative or not finite; or if `rate` or `rule` is invalid.
        """
        bias = self.e_score_correction_bias
        if bias is None:
            raise ValueError("`update_selection_bias` needs a router with `selection_bias`, got one without.")
        if bias.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"`e_score_correction_bias` must be kept in float32 or float64, got {bias.dtype}.")
        check_name("rule", rule, BIAS_RULES)
        check_number("rate", rate, lowest=0.0)
        if counts.shape != bias.shape:
            raise ValueError(f"`counts` must have shape {tuple(bias.shape)}, got {tuple(counts.shape)}.")
        counts = counts.to(bias.device, torch.float64)
        if not bool((counts.isfinite() & (counts >= 0)).all()):
            raise ValueError("`counts` must be finite and not negative.")
        step = (counts.mean() - counts).sign()
        if rule == "mean_free_sign":
            step = step - step.mean()
        bias.add_(rate * step)

    def extra_repr(self) -> str:
        """Return sizes and options for the module's representation."""
        options = self.options
        text = f"{self.hidden_size}, {options.num_experts}, {options.num_experts_per_tok}"
        groups = "" if options.num_expert_groups is None else f", num_expert_groups={options.num_expert_groups}"
        return f"{text}, scoring={options.scoring!r}, grouping={options.grouping!r}{groups}"

    def _check_input(self, hidden_states: Tensor, token_mask: Tensor | None) -> None:
        shape = tuple(hidden_states.shape)
        if len(shape) not in (2, 3) or shape[-1] != self.hidden_size or not hidden_states.is_floating_point():
            raise ValueError(
                f"`hidden_states` must be floating point with shape (tokens, {self.hidden_size}) or (batch, length, "
                f"{self.hidden_size}), got {hidden_states.dtype} with {shape}."
            )
        if token_mask is None:
            return
        fits = token_mask.shape in (hidden_states.shape[:-1], (math.prod(shape[:-1]),))
        if token_mask.dtype != torch.bool or not fits:
            raise ValueError(
                f"`token_mask` must be bool with shape {shape[:-1]} or ({math.prod(shape[:-1])},), got "
                f"{token_mask.dtype} with {tuple(token_mask.shape)}."
            )
