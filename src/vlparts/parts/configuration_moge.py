"""Configuration of the Pangu Pro MoE decoder, a mixture of grouped experts."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig

from .decoders import check_decoder_sizes, merge_rope_parameters
from .moe_options import BALANCE_FORMS, RoutingOptions, check_name, check_number
from .utils import NamedPresets, check_minimum

_PRESETS: dict[str, dict[str, Any]] = {
    "pangu_pro_moe_72b": {},
    # DeepSeek3B-MoE-A570M: every published field and the defaults of the published code.
    "deepseek_ocr": {
        "vocab_size": 129280,
        "hidden_size": 1280,
        "intermediate_size": 6848,
        "moe_intermediate_size": 896,
        "shared_expert_intermediate_size": 1792,
        "num_hidden_layers": 12,
        "num_attention_heads": 10,
        "num_key_value_heads": 10,
        "num_experts_per_tok": 6,
        "num_expert_groups": 1,
        "mlp_only_layers": [0],
        "router_scale": False,
        "router_aux_loss_coef": 0.001,
        "router_aux_loss_form": "sequence",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    },
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
    # As many active parameters as the dense "qwen3:tiny" of the demo.
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
    """Configuration of [`MoGEModel`], a decoder whose tokens choose the same number of experts in each group.

    The defaults are those of Pangu Pro MoE (arXiv 2505.21411, table 1): 71.99 billion parameters, 16.50 billion of
    them active per token. With one group it is an ordinary mixture of experts: preset "deepseek_ocr" is the decoder of
    DeepSeek-OCR (arXiv 2510.18234, section 3.3), 2.93 billion parameters, 0.57 billion of them active. Fields that are
    not listed here are those of `LlamaConfig`.

    Args:
        vocab_size: Number of tokens.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the gated MLP in the layers `mlp_only_layers`. The published model has none; the
            default is the active width of a layer with experts.
        moe_intermediate_size: Width of each routed expert.
        shared_expert_intermediate_size: Width of the shared expert, which is applied to every token; the published
            model joins four experts of width 1344. 0 for none.
        num_hidden_layers: Number of blocks.
        num_attention_heads: Number of query heads.
        num_key_value_heads: Number of key and value heads; divides `num_attention_heads`.
        head_dim: Channels D of a head, even.
        num_experts: Number N of routed experts of a layer.
        num_experts_per_tok: Number K of routed experts per token; a multiple of `num_expert_groups`.
        num_expert_groups: Number M of groups of adjacent experts; divides `num_experts`. A token chooses K/M of the
            N/M experts of each group. 1 for a choice among all experts.
        mlp_only_layers: Indices of the layers with a dense MLP instead of experts.
        scoring: How the router's logits become scores, as in [`RoutingOptions`]: "softmax" over all experts (equation
            5), "sigmoid", "sqrtsoftplus" or "softmax_over_chosen".
        renormalize: Whether the weights of a token's experts are divided by their sum. Not in Pangu Pro MoE.
        routed_scaling_factor: Factor applied to those weights afterwards.
        router_scale: Whether the router has a learned factor per expert, which does not affect the choice. Published
            weights have it; the paper does not mention it.
        router_jitter: In training, the router's inputs are multiplied by uniform noise from 1 - jitter to 1 + jitter.
        router_aux_loss_coef: Coefficient of the balance loss (equation 8); 0 for none. The published value is unknown.
        router_aux_loss_form: Tokens over which the balance loss is computed: "batch" for those of a forward pass,
            "sequence" for those of each sequence, of which the mean is taken (DeepSeek-V2 and V3), or "global" for
            those of all processes of the default process group in training, which then all take part in every forward
            and backward pass. A packed sample is a sequence. See [`balance_loss`].
        output_router_logits: Whether outputs hold the router's logits and the balance loss.
        max_position_embeddings: Longest sequence in tokens. The default is that of Pangu Pro MoE's last training
            stages.
        rms_norm_eps: Epsilon of every normalisation. The published value is unknown; the default is that of
            openPangu-Embedded.
        attention_bias: Whether the query, key, value and output projections have biases.
        pad_token_id: Id of padding, whose embedding is not trained. The published value is unknown.
        bos_token_id: Id of the beginning-of-sequence token. The published value is unknown.
        eos_token_id: Id of the end-of-sequence token. The published value is unknown.
        rope_parameters: "rope_type" and "rope_theta" as in transformers. `rope_scaling` and `rope_theta` of a
            published configuration are accepted too. The published "rope_theta" is unknown; the default is that of
            openPangu-Embedded.
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
    router_aux_loss_form: str = "batch"
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
        self.rope_parameters = merge_rope_parameters(self.rope_parameters, kwargs)
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Check that the sizes fit together.

        Raises:
            ValueError: If a size is out of range, `num_key_value_heads` does not divide `num_attention_heads`,
                `head_dim` is odd, MLPs have biases, or `mlp_only_layers` names a layer that does not exist.
        """
        check_decoder_sizes(self)
        check_minimum(self, 1, "moe_intermediate_size")
        check_minimum(self, 0, "shared_expert_intermediate_size")
        if self.mlp_bias:
            raise ValueError("`mlp_bias` must be False, got True: MLPs and experts have no biases.")
        layers = self.mlp_only_layers or []
        if len(set(layers)) < len(layers) or not set(layers) <= set(range(self.num_hidden_layers)):
            raise ValueError(
                f"`mlp_only_layers` must hold distinct indices below `num_hidden_layers`, {self.num_hidden_layers}, "
                f"got {layers}."
            )

    def validate_router(self) -> None:
        """Check the groups of experts and the options of the router.

        Raises:
            ValueError: If `num_expert_groups` does not divide `num_experts` and `num_experts_per_tok`, a token would
                choose more experts of a group than it has, or an option is out of range.
        """
        RoutingOptions(self.num_experts, self.num_experts_per_tok, **self.get_router_options())
        check_number("router_jitter", self.router_jitter, lowest=0.0, below=1.0)
        check_number("router_aux_loss_coef", self.router_aux_loss_coef, lowest=0.0)
        check_name("router_aux_loss_form", self.router_aux_loss_form, BALANCE_FORMS)

    def get_router_options(self) -> dict[str, Any]:
        """Return the options of [`RoutingOptions`] that this configuration determines."""
        return {
            "scoring": self.scoring,
            "grouping": "equal",
            "num_expert_groups": self.num_expert_groups,
            "renormalize": self.renormalize,
            "routed_scaling_factor": self.routed_scaling_factor,
        }


__all__ = ["MoGEConfig"]
