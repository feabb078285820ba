"""The config.json of Pangu Pro MoE to a MoGE configuration and back.

The fields are those that public inference code reads. That code has no field for the number of expert groups, which
equals the number of experts per token.
"""

from pathlib import Path
from typing import Any

from transformers.activations import ACT2FN

from ...parts.configuration_moge import MoGEConfig
from .. import _folder

FAMILY = "Pangu Pro MoE"
MODEL_TYPE = "PanguProMoE"
ARCHITECTURE = "PanguProMoEForCausalLM"

# Fields with the same name and meaning in both.
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_experts",
    "num_experts_per_tok",
    "hidden_act",
    "rms_norm_eps",
)
_OPTIONAL = (
    "intermediate_size",
    "mlp_only_layers",
    "tie_word_embeddings",
    "max_position_embeddings",
    "initializer_range",
    "attention_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
# Fixed in the published code: by our fields, and by the fields that other models have for it.
_FIXED = {
    "scoring": "softmax",
    "renormalize": False,
    "routed_scaling_factor": 1.0,
    "router_scale": True,
    "attention_bias": True,
    "mlp_bias": False,
}
_FIXED_ELSEWHERE = {
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "attention_bias": True,
    "rope_scaling": None,
}


def read_config(folder: Path) -> MoGEConfig:
    """Read config.json.

    Raises:
        ValueError: If there is none, if it belongs to another model or to quantized weights, or if a field is missing
            or does not fit.
    """
    fields = _folder.read_config(folder, MODEL_TYPE, (ARCHITECTURE,))
    for name, value in _FIXED_ELSEWHERE.items():
        if fields.get(name, value) != value:
            raise ValueError(
                f"`folder` must have a config.json with {name} {value!r} or without {name}, got {fields[name]!r}."
            )
    _folder.require_fields(fields, "", *_REQUIRED, "rope_theta")
    _folder.require_numbers(fields, "", "rope_theta", "rms_norm_eps", "initializer_range", "attention_dropout")
    _folder.require_known(fields, "", "hidden_act", ACT2FN)
    return _folder.build_config(
        MoGEConfig,
        "",
        **{name: fields[name] for name in (*_REQUIRED, *_OPTIONAL) if fields.get(name) is not None},
        head_dim=_folder.get_head_dim(fields, ""),
        num_expert_groups=fields["num_experts_per_tok"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["rope_theta"]},
    )


def published_config(config: MoGEConfig) -> dict[str, Any]:
    """The fields of config.json.

    Raises:
        ValueError: If the model has an option that Pangu Pro MoE does not have; names it.
    """
    expected = {
        **_FIXED,
        "num_expert_groups": config.num_experts_per_tok,
        "head_dim": config.hidden_size // config.num_attention_heads,
    }
    _folder.check_config(config, expected, FAMILY)
    theta = _folder.get_rope_theta(config, FAMILY)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **{name: getattr(config, name) for name in (*_REQUIRED, *_OPTIONAL)},
        "rope_theta": theta,
    }
