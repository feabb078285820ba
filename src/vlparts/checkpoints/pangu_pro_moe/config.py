"""The config.json of Pangu Pro MoE as a configuration of ours, and back.

The fields are those that public inference code reads. There are as many groups of experts as experts for a token; that
code has no field for it.
"""

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from ...parts.configuration_moge import MoGEConfig
from .._safetensors import read_json

MODEL_TYPE = "PanguProMoE"
ARCHITECTURE = "PanguProMoEForCausalLM"

# The same names here and there.
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
# What the published code computes, by the names of our options and of other models' fields for them.
_FIXED = {
    "scoring": "softmax",
    "renormalize": False,
    "routed_scaling_factor": 1.0,
    "router_scale": True,
    "attention_bias": True,
    "mlp_bias": False,
}
_FOREIGN = {"norm_topk_prob": False, "routed_scaling_factor": 1.0, "attention_bias": True, "rope_scaling": None}


def read_config(folder: Path) -> MoGEConfig:
    """Read config.json.

    Raises:
        ValueError: If there is none, if it is another model's or that of quantised weights, or if a field is missing
            or does not fit.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"`folder` must be a local folder with a config.json, got {str(folder)!r}.")
    fields = read_json(folder / "config.json")
    if fields.get("model_type") != MODEL_TYPE:
        raise ValueError(f"`folder` must have the model_type {MODEL_TYPE!r}, got {fields.get('model_type')!r}.")
    if (fields.get("architectures") or [ARCHITECTURE]) != [ARCHITECTURE]:
        raise ValueError(f"`folder` must have the architecture {ARCHITECTURE}, got {fields['architectures']}.")
    if fields.get("quantization_config") is not None:
        raise ValueError(
            "`folder` must have weights that are not quantised, got a config.json with quantization_config."
        )
    for name, value in _FOREIGN.items():
        if fields.get(name, value) != value:
            raise ValueError(
                f"`folder` must have a config.json with {name} {value!r} or without {name}, got {fields[name]!r}."
            )
    lacking = [name for name in (*_REQUIRED, "rope_theta") if fields.get(name) is None]
    if lacking:
        raise ValueError(f"`folder` must have a config.json with {', '.join(lacking)}, got none.")
    return _build(fields)


def _build(fields: dict[str, Any]) -> MoGEConfig:
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    if not isinstance(width, int) or not isinstance(heads, int) or heads < 1 or width % heads:
        raise ValueError(
            f"`folder` must have a config.json whose num_attention_heads divides hidden_size, got {heads!r} and "
            f"{width!r}."
        )
    try:
        return MoGEConfig(
            **{name: fields[name] for name in (*_REQUIRED, *_OPTIONAL) if fields.get(name) is not None},
            head_dim=width // heads,
            num_expert_groups=fields["num_experts_per_tok"],
            rope_parameters={"rope_type": "default", "rope_theta": fields["rope_theta"]},
        )
    except (StrictDataclassError, ValueError, TypeError) as error:
        # Strict configurations wrap what their checks raise.
        raise ValueError(f"`folder` has a config.json whose fields do not fit: {error.__cause__ or error}") from error


def published_config(config: MoGEConfig) -> dict[str, Any]:
    """The fields of config.json.

    Raises:
        ValueError: If the model has an option that Pangu Pro MoE has not; names it.
    """
    wanted = {
        **_FIXED,
        "num_expert_groups": config.num_experts_per_tok,
        "head_dim": config.hidden_size // config.num_attention_heads,
    }
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"`model` must have `{name}` = {value!r} for Pangu Pro MoE, got {getattr(config, name)!r}."
            )
    rope = dict(config.rope_parameters or {})
    theta = rope.pop("rope_theta")
    if rope.pop("rope_type", "default") != "default" or rope:
        raise ValueError(
            "`model` must have `rope_parameters` with 'rope_theta' alone for Pangu Pro MoE, got "
            f"{config.rope_parameters}."
        )
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **{name: getattr(config, name) for name in (*_REQUIRED, *_OPTIONAL)},
        "rope_theta": theta,
    }
