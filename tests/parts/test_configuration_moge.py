"""The presets of Pangu Pro MoE, the published sizes, and what is refused."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from vlparts import MoGEConfig, MoGEForCausalLM


def parameters_of(config: MoGEConfig, experts: int) -> int:
    """Counted by hand, with so many routed experts in each layer."""
    width, queries = config.hidden_size, config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    attention = 2 * width * queries + queries + width + 2 * (width * keys + keys)
    router = (width + 1) * config.num_experts
    mlps = 3 * width * (experts * config.moe_intermediate_size + config.shared_expert_intermediate_size)
    layers = config.num_hidden_layers * (attention + router + mlps + 2 * width)
    return 2 * config.vocab_size * width + layers + width


def test_the_published_size() -> None:
    """Table 1 of arXiv 2505.21411."""
    config = MoGEConfig.from_preset("pangu_pro_moe_72b")
    with torch.device("meta"):
        model = MoGEForCausalLM(config)
    assert model.num_parameters() == parameters_of(config, experts=64)
    assert model.num_activated_parameters() == parameters_of(config, experts=8)
    assert round(model.num_parameters() / 1e9, 3) == 71.989
    assert round(model.num_activated_parameters() / 1e9, 3) == 16.498


def test_dense_layers_and_no_shared_expert_count_too() -> None:
    model = MoGEForCausalLM(
        MoGEConfig.from_preset("tiny", mlp_only_layers=[1], shared_expert_intermediate_size=0, num_experts_per_tok=8)
    )
    assert model.num_activated_parameters() == model.num_parameters()
    fewer = MoGEForCausalLM(MoGEConfig.from_preset("tiny", mlp_only_layers=[1], shared_expert_intermediate_size=0))
    assert fewer.num_parameters() - fewer.num_activated_parameters() == 4 * 3 * 64 * 32
    assert fewer.model.num_activated_parameters() == fewer.num_activated_parameters() - 512 * 64


def test_presets() -> None:
    assert MoGEConfig.presets() == ("pangu_pro_moe_72b", "deepseek_ocr", "tiny", "small")
    assert MoGEConfig.from_preset("pangu_pro_moe_72b").to_dict() == MoGEConfig().to_dict()
    tiny = MoGEConfig.from_preset("tiny", num_experts_per_tok=8)
    assert (tiny.num_experts, tiny.num_expert_groups, tiny.num_experts_per_tok, tiny.vocab_size) == (8, 4, 8, 512)
    tiny.rope_parameters["rope_theta"] = 1.0
    assert MoGEConfig.from_preset("tiny").rope_parameters == {"rope_type": "default", "rope_theta": 1e4}


def test_rotary_base() -> None:
    assert MoGEConfig(rope_theta=5.0).rope_parameters == {"rope_type": "default", "rope_theta": 5.0}
    given = {"rope_type": "default"}
    config = MoGEConfig(rope_parameters=given, rope_theta=5.0)
    assert config.rope_parameters["rope_theta"] == 5.0
    assert given == {"rope_type": "default"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 6}, "`num_expert_groups` must divide `num_experts`=6, got 4"),
        ({"num_experts_per_tok": 6}, "`num_experts_per_tok` must be a multiple of `num_expert_groups`=4 .* got 6"),
        ({"num_experts_per_tok": 12}, "`num_experts_per_tok` must be at most `num_experts`=8, got 12"),
        ({"num_expert_groups": 0}, "`num_expert_groups` must be an integer of at least 1, got 0"),
        ({"num_experts": 0}, "`num_experts` must be an integer of at least 1, got 0"),
        ({"scoring": "cosine"}, "`scoring` must be one of 'softmax', .* got 'cosine'"),
        ({"scoring": "softmax_over_chosen", "renormalize": True}, "`renormalize` must be False if .* got True"),
        ({"router_jitter": 1.0}, "`router_jitter` must be a finite number of at least 0 and below 1, got 1.0"),
        (
            {"router_aux_loss_form": "token"},
            "`router_aux_loss_form` must be one of 'batch', 'sequence', 'global', got 'token'",
        ),
        ({"router_aux_loss_coef": -0.1}, "`router_aux_loss_coef` must be .* at least 0, got -0.1"),
        ({"routed_scaling_factor": float("nan")}, "`routed_scaling_factor` must be a finite number, got nan"),
        ({"num_key_value_heads": 3}, "`num_attention_heads` must be a positive multiple .* got 4 and 3"),
        ({"num_attention_heads": 0}, "`num_attention_heads` must be a positive multiple .* got 0 and 2"),
        ({"head_dim": 15}, "`head_dim` must be even, got 15"),
        ({"rope_parameters": {"rope_theta": 0.0}}, "`rope_theta` must be a finite number above 0, got 0.0"),
        ({"rms_norm_eps": float("nan")}, "`rms_norm_eps` must be a finite number of at least 0, got nan"),
        ({"moe_intermediate_size": 0}, "`moe_intermediate_size` must be at least 1, got 0"),
        ({"shared_expert_intermediate_size": -1}, "`shared_expert_intermediate_size` must be at least 0, got -1"),
        ({"num_hidden_layers": -1}, "`num_hidden_layers` must be at least 0, got -1"),
        ({"mlp_only_layers": [2]}, r"`mlp_only_layers` must hold distinct indices below .*, 2, got \[2\]"),
        ({"mlp_only_layers": [0, 0]}, r"`mlp_only_layers` must hold distinct indices .* got \[0, 0\]"),
        ({"mlp_bias": True}, "`mlp_bias` must be False, got True"),
        ({"rope_scaling": [2]}, r"`rope_scaling` must be a dictionary, got \[2\]"),
        ({"rope_theta": 5.0}, "`rope_theta` must be that of `rope_parameters`, 10000.0, if both are given, got 5.0"),
        ({"hidden_size": "wide"}, "Field 'hidden_size' expected int, got str"),
    ],
)
def test_bad_configuration(changes: dict, message: str) -> None:
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        MoGEConfig.from_preset("tiny", **changes)


def test_an_unknown_preset() -> None:
    names = "pangu_pro_moe_72b, deepseek_ocr, tiny, small"
    with pytest.raises(ValueError, match=f"`name` must be one of {names}, got 'huge'"):
        MoGEConfig.from_preset("huge")
