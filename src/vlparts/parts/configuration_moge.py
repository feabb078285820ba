"""Configuration of the Pangu Pro MoE decoder, a mixture of grouped experts."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig

from .moe_options import RoutingOptions, check_number
from .utils import NamedPresets

_PRESETS: dict[str, dict[str, Any]] = {
    "pangu_pro_moe_72b": {},
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "num_expert_groups": 4,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    },
    # A token passes as many parameters as in the dense "qwen3:tiny" of the demo.
    "small": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 384,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "num_expert_groups": 4,
        "router_aux_loss_coef": 0.01,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    },
}
_EXPERTS = "layers.*.mlp.experts"


@strict
class MoGEConfig(NamedPresets, LlamaConfig):
    """Configuration of [`MoGEModel`], a decoder whose tokens choose equally many experts of each group.

    The defaults are Pangu Pro MoE (arXiv 2505.21411, table 1): 71.99 billion parameters, 16.50 of them active for a
    token. Fields that are not named here are those of `LlamaConfig`.

    Args:
        vocab_size: Number of tokens.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the gated MLP in the layers `mlp_only_layers`. The published model has none; the
            default is as wide as what a token activates in another layer.
        moe_intermediate_size: Width of each routed expert.
        shared_expert_intermediate_size: Width of the shared expert, which every token passes; published are four of
            1344 in one. 0 for none.
        num_hidden_layers: Number of blocks.
        num_attention_heads: Number of query heads.
        num_key_value_heads: Number of key and value heads; divides `num_attention_heads`.
        head_dim: Channels D of a head, even.
        num_experts: Routed experts N of a layer.
        num_experts_per_tok: Routed experts K that a token chooses; a multiple of `num_expert_groups`.
        num_expert_groups: Groups M of experts that lie side by side; divides `num_experts`. A token chooses K/M of the
            N/M experts of each group. 1 for a free choice.
        mlp_only_layers: Indices of the layers with a dense MLP in place of experts.
        scoring: How the router's logits become scores, as in [`RoutingOptions`]: "softmax" over all experts (equation
            5), "sigmoid", "sqrtsoftplus" or "softmax_over_chosen".
        renormalize: Whether the weights of a token's experts are divided by their sum. Not in Pangu Pro MoE.
        routed_scaling_factor: Factor of those weights, after that.
        router_scale: Whether the router has a learned factor for each expert, which does not change the choice.
            Published weights have it; the paper does not mention it.
        router_jitter: While training, the router's inputs are multiplied by uniform noise from 1 - jitter to
            1 + jitter.
        router_aux_loss_coef: Weight of the balance loss (equation 8) in the loss. The published value could not be
            found; 0 for none.
        output_router_logits: Whether outputs hold the router's logits and the balance loss.
        max_position_embeddings: Tokens of the longest text. The default is the length of Pangu Pro MoE's last stages
            of training.
        rms_norm_eps: Epsilon of every normalisation. The published value could not be found; the default is that of
            openPangu-Embedded.
        attention_bias: Whether the query, key, value and output projections have biases.
        pad_token_id: Id of padding, whose embedding is not trained. Not published in text, like the next two.
        bos_token_id: Id of the first token of a text.
        eos_token_id: Id of the last token of an answer.
        rope_parameters: "rope_type" and "rope_theta" as everywhere in transformers. The `rope_scaling` and
            `rope_theta` of a published configuration are taken too. The published "rope_theta" could not be found; the
            default is that of openPangu-Embedded.
    """

    model_type = "vlparts_moge"
    named_presets = _PRESETS
    base_config_key = "text_config"
    default_theta = 16_000_000.0
    keys_to_ignore_at_inference = ["past_key_values", "router_logits", "aux_loss"]
    base_model_tp_plan = {
        **LlamaConfig.base_model_tp_plan,
        f"{_EXPERTS}.gate_up_proj": "packed_colwise",
        f"{_EXPERTS}.down_proj": "rowwise",
        _EXPERTS: "moe_tp_experts",
        "layers.*.mlp.shared_expert.gate_proj": "colwise",
        "layers.*.mlp.shared_expert.up_proj": "colwise",
        "layers.*.mlp.shared_expert.down_proj": "rowwise",
    }
    base_model_ep_plan = {
        f"{_EXPERTS}.gate_up_proj": "grouped_gemm",
        f"{_EXPERTS}.down_proj": "grouped_gemm",
        _EXPERTS: "ep_dispatch_experts",
    }

    vocab_size: int = 153376
    hidden_size: int = 5120
    intermediate_size: int = 16128
    moe_intermediate_size: int = 1344
    shared_expert_intermediate_size: int = 5376
    num_hidden_layers: int = 48
    num_attention_heads: int = 40
    num_key_value_heads: int = 8
    head_dim: int = 128
    num_experts: int = 64
    num_experts_per_tok: int = 8
    num_expert_groups: int = 8
    mlp_only_layers: list[int] | None = None
    scoring: str = "softmax"
    renormalize: bool = False
    routed_scaling_factor: float = 1.0
    router_scale: bool = True
    router_jitter: float = 0.0
    router_aux_loss_coef: float = 0.0
    output_router_logits: bool = False
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-5
    attention_bias: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.mlp_only_layers = [] if self.mlp_only_layers is None else self.mlp_only_layers
        parameters = kwargs.pop("rope_scaling", None) or self.rope_parameters or {}
        if not isinstance(parameters, dict):
            raise ValueError(f"`rope_scaling` must be a dictionary, got {parameters!r}.")
        self.rope_parameters = dict(parameters)  # transformers writes into it, and the caller's must stay
        theta = kwargs.pop("rope_theta", None)
        if theta is not None and self.rope_parameters.setdefault("rope_theta", theta) != theta:
            raise ValueError(
                f"`rope_theta` must be that of `rope_parameters`, {parameters['rope_theta']}, if both are given, got "
                f"{theta}."
            )
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Check that the sizes fit together.

        Raises:
            ValueError: If a size is not positive, the key and value heads do not divide the query heads, `head_dim` is
                odd, MLPs have biases, or `mlp_only_layers` names a layer that does not exist.
        """
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_key_value_heads")
        for name in (*sizes, "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("num_hidden_layers", "shared_expert_intermediate_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if self.num_attention_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_attention_heads` must be a positive multiple of `num_key_value_heads`, got "
                f"{self.num_attention_heads} and {self.num_key_value_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"`head_dim` must be even, got {self.head_dim}.")
        if self.mlp_bias:
            raise ValueError("`mlp_bias` must be False, got True: MLPs and experts have no biases.")
        layers = self.mlp_only_layers or []
        if len(set(layers)) < len(layers) or not set(layers) <= set(range(self.num_hidden_layers)):
            raise ValueError(
                f"`mlp_only_layers` must hold indices below `num_hidden_layers`, {self.num_hidden_layers}, each once, "
                f"got {layers}."
            )

    def validate_router(self) -> None:
        """Check the groups of experts and the options of the router.

        Raises:
            ValueError: If experts or choices cannot be spread evenly over the groups, if a token were to choose more
                experts of a group than it has, or if an option is out of its range.
        """
        RoutingOptions(self.num_experts, self.num_experts_per_tok, **self.get_router_options())
        check_number("router_jitter", self.router_jitter, lowest=0.0, below=1.0)
        check_number("router_aux_loss_coef", self.router_aux_loss_coef, lowest=0.0)

    def get_router_options(self) -> dict[str, Any]:
        """The options of [`GroupedTopKRouter`] that this configuration decides, by the router's names."""
        return {
            "scoring": self.scoring,
            "grouping": "equal",
            "num_expert_groups": self.num_expert_groups,
            "renormalize": self.renormalize,
            "routed_scaling_factor": self.routed_scaling_factor,
        }


__all__ = ["MoGEConfig"]
