"""The config.json of DeepSeek-OCR to configurations of our parts and back.

Sizes that the published code fixes (widths of MLPs, side of windows, channels of the neck) are not in the file.
"""

from pathlib import Path
from typing import Any

from ...parts.configuration_deepencoder import DeepEncoderConfig
from ...parts.configuration_moge import MoGEConfig
from ...parts.configuration_vlm import VisionLanguageConfig
from .. import _folder

FAMILY = "DeepSeek-OCR"
MODEL_TYPE = "deepseek_vl_v2"
ARCHITECTURE = "DeepseekOCRForCausalLM"
PROJECTOR = "deepseek_ocr"
IMAGE_TOKEN = "<image>"
IMAGE_TOKEN_ID = 128815

# Published name: our name.
_TEXT_FIELDS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
    "moe_intermediate_size": "moe_intermediate_size",
    "n_routed_experts": "num_experts",
    "num_attention_heads": "num_attention_heads",
    "num_experts_per_tok": "num_experts_per_tok",
    "num_hidden_layers": "num_hidden_layers",
    "num_key_value_heads": "num_key_value_heads",
    "vocab_size": "vocab_size",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
}
_COUNTS = ("n_shared_experts", "first_k_dense_replace")
# Not in the published file; the defaults of the published configuration class.
_TEXT_DEFAULTS = {
    "rms_norm_eps": ("rms_norm_eps", 1e-6),
    "hidden_act": ("hidden_act", "silu"),
    "aux_loss_alpha": ("router_aux_loss_coef", 0.001),
    "initializer_range": ("initializer_range", 0.02),
}
_ROPE_THETA = 10000.0
_BALANCE_FORMS = {True: "sequence", False: "batch"}  # of seq_aux, which is True where it is absent
# Options of the published class that have one value in DeepSeek-OCR.
_TEXT_FIXED = {
    "use_mla": False,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "moe_layer_freq": 1,
    "attention_bias": False,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "lm_head": True,
    "rm_head": False,
    "q_lora_rank": None,
    "kv_lora_rank": None,
}
# Written for other readers: attention without latent projections has none of these.
_TEXT_WRITTEN = {"qk_nope_head_dim": 0, "qk_rope_head_dim": 0, "v_head_dim": 0}
_OTHER_FIXED = {"tile_tag": "2D"}
_CLIP, _SAM = "clip-l-14-224", "sam_vit_b"
_CLIP_FIELDS = {"heads": "clip_num_attention_heads", "layers": "clip_num_hidden_layers", "width": "clip_hidden_size"}
_SAM_FIELDS = {
    "downsample_channels": "compressor_channels",
    "global_attn_indexes": "sam_global_layers",
    "heads": "sam_num_attention_heads",
    "layers": "sam_num_hidden_layers",
    "width": "sam_hidden_size",
}
_MLP_RATIO = 4
_PATCH_SIZE = 16


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json.

    Raises:
        ValueError: If there is none, or if it belongs to another model or to quantized weights.
    """
    return _folder.read_config(folder, MODEL_TYPE, (ARCHITECTURE,))


def get_text_config(config: dict[str, Any]) -> MoGEConfig:
    """Build the decoder's configuration, from fields at the top level, under "language_config", or both.

    Args:
        config: The published fields, from [`read_config`].

    Raises:
        ValueError: If a field is missing, is different in both places, or has a value that ours does not have.
    """
    inner = config.get("language_config") or {}
    if not isinstance(inner, dict):
        raise ValueError(f"`folder` must have a config.json whose language_config is an object, got {inner!r}.")
    names = {*_TEXT_FIELDS, *_COUNTS, *_TEXT_DEFAULTS, *_TEXT_FIXED, "rope_theta", "seq_aux"}
    for name in sorted(names & config.keys() & inner.keys()):
        if config[name] != inner[name]:
            raise ValueError(
                f"`folder` must have a config.json with one value of {name}, got {config[name]!r} and "
                f"{inner[name]!r} in language_config."
            )
    fields = config | inner
    _folder.require_fields(fields, "language_config", *_TEXT_FIELDS, *_COUNTS)
    _folder.require_numbers(fields, "language_config", *_COUNTS, "moe_intermediate_size", integers=True)
    _folder.require_numbers(fields, "language_config", "rms_norm_eps", "aux_loss_alpha", "rope_theta")
    for name, value in _TEXT_FIXED.items():
        if fields.get(name, value) != value:
            raise ValueError(
                f"`folder` must have a config.json with {name} {value!r} or without {name}, got {fields[name]!r}."
            )
    by_sequence = fields.get("seq_aux", True)
    if not isinstance(by_sequence, bool):
        raise ValueError(f"`folder` must have a config.json with seq_aux true or false, got {by_sequence!r}.")
    return _folder.build_config(
        MoGEConfig,
        "language_config",
        **{ours: fields[published] for published, ours in _TEXT_FIELDS.items()},
        **{ours: fields.get(published, default) for published, (ours, default) in _TEXT_DEFAULTS.items()},
        head_dim=_folder.get_head_dim(fields, "language_config"),
        shared_expert_intermediate_size=fields["n_shared_experts"] * fields["moe_intermediate_size"],
        mlp_only_layers=list(range(fields["first_k_dense_replace"])),
        num_expert_groups=1,
        router_scale=False,
        router_aux_loss_form=_BALANCE_FORMS[by_sequence],
        attention_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": fields.get("rope_theta", _ROPE_THETA)},
    )


def get_vision_config(config: dict[str, Any]) -> DeepEncoderConfig:
    """Build the encoder's configuration.

    Args:
        config: The published fields, from [`read_config`].

    Raises:
        ValueError: If a field is missing, or if the encoder has an option that ours does not have.
    """
    vision = config.get("vision_config")
    widths = vision.get("width") if isinstance(vision, dict) else None
    if (
        not isinstance(vision, dict)
        or not isinstance(widths, dict)
        or not all(isinstance(widths.get(name), dict) for name in (_CLIP, _SAM))
    ):
        raise ValueError(
            f"`folder` must have a config.json with {_CLIP} and {_SAM} as width of its vision_config, got {vision!r}."
        )
    clip, sam = widths[_CLIP], widths[_SAM]
    _folder.require_fields(vision, "vision_config", "image_size")
    _folder.require_numbers(vision, "vision_config", "image_size", integers=True)
    _folder.require_fields(clip, _CLIP, *_CLIP_FIELDS, "image_size", "patch_size")
    _folder.require_numbers(clip, _CLIP, *_CLIP_FIELDS, "image_size", "patch_size", integers=True)
    _folder.require_fields(sam, _SAM, *_SAM_FIELDS)
    _folder.require_numbers(sam, _SAM, "heads", "layers", "width", integers=True)
    return _folder.build_config(
        DeepEncoderConfig,
        "vision_config",
        **{ours: clip[published] for published, ours in _CLIP_FIELDS.items()},
        **{ours: sam[published] for published, ours in _SAM_FIELDS.items()},
        sam_intermediate_size=_MLP_RATIO * sam["width"],
        clip_intermediate_size=_MLP_RATIO * clip["width"],
        sam_position_size=vision["image_size"] // _PATCH_SIZE,
        clip_position_size=clip["image_size"] // clip["patch_size"],
        clip_patch_embedding=clip["patch_size"],
    )


def get_composed_config(config: dict[str, Any], image_token_id: int) -> VisionLanguageConfig:
    """Build the configuration of the composed model.

    Args:
        config: The published fields, from [`read_config`].
        image_token_id: Id of the image placeholder, which config.json does not have.

    Raises:
        ValueError: If a field is missing, or if the model has an option that ours does not have.
    """
    for name, value in _OTHER_FIXED.items():
        if config.get(name, value) != value:
            raise ValueError(f"`folder` must have a config.json with {name} {value!r}, got {config[name]!r}.")
    projector = config.get("projector_config") or {}
    if projector.get("projector_type", "linear") != "linear":
        raise ValueError(f"`folder` must have a linear projector, got projector_config {projector!r}.")
    return _folder.build_config(
        VisionLanguageConfig,
        "",
        vision_config=get_vision_config(config),
        text_config=get_text_config(config),
        projector_type=PROJECTOR,
        image_token_id=image_token_id,
    )


def published_config(config: VisionLanguageConfig) -> dict[str, Any]:
    """The fields of config.json.

    Raises:
        ValueError: If the model has parts or options that DeepSeek-OCR does not have; names them.
    """
    vision, text = config.vision_config, config.text_config
    if not isinstance(vision, DeepEncoderConfig) or not isinstance(text, MoGEConfig):
        raise ValueError(
            "`model` must be composed of a DeepEncoderModel and a MoGEModel, got configurations "
            f"{type(vision).__name__} and {type(text).__name__}."
        )
    _folder.check_config(config, {"projector_type": PROJECTOR, "vision_feature_layer": -1}, FAMILY)
    language = _published_text_config(text)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "candidate_resolutions": [[vision.sam_position_size * vision.patch_size] * 2],
        "global_view_pos": "head",
        **_OTHER_FIXED,
        "projector_config": {
            "input_dim": vision.hidden_size,
            "model_type": "mlp_projector",
            "n_embed": text.hidden_size,
            "projector_type": "linear",
        },
        "vision_config": _published_vision_config(vision),
        "language_config": {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", **language},
        **language,
    }


def _published_vision_config(vision: DeepEncoderConfig) -> dict[str, Any]:
    default = DeepEncoderConfig()
    expected = {
        "sam_intermediate_size": _MLP_RATIO * vision.sam_hidden_size,
        "clip_intermediate_size": _MLP_RATIO * vision.clip_hidden_size,
        "patch_size": _PATCH_SIZE,
        "feature_layers": [-1],
        **{name: getattr(default, name) for name in ("num_channels", "neck_channels", "sam_window_size")},
        **{name: getattr(default, name) for name in ("sam_layer_norm_eps", "clip_layer_norm_eps")},
    }
    _folder.check_config(vision, expected, FAMILY)
    if vision.clip_patch_embedding is None:
        raise ValueError(f"`model` must have `clip_patch_embedding` in its vision_config for {FAMILY}, got None.")
    clip = {published: getattr(vision, ours) for published, ours in _CLIP_FIELDS.items()}
    clip |= {
        "image_size": vision.clip_position_size * vision.clip_patch_embedding,
        "patch_size": vision.clip_patch_embedding,
    }
    sam = {published: getattr(vision, ours) for published, ours in _SAM_FIELDS.items()}
    return {
        "image_size": vision.sam_position_size * vision.patch_size,
        "model_name": "deeplip_b_l",
        "model_type": "vision",
        "width": {_CLIP: clip, _SAM: sam},
    }


def _published_text_config(text: MoGEConfig) -> dict[str, Any]:
    layers = text.mlp_only_layers or []
    expected = {
        "scoring": "softmax",
        "renormalize": False,
        "routed_scaling_factor": 1.0,
        "router_scale": False,
        "num_expert_groups": 1,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "mlp_only_layers": list(range(len(layers))),
        "head_dim": text.hidden_size // text.num_attention_heads,
    }
    _folder.check_config(text, expected, FAMILY)
    shared, left = divmod(text.shared_expert_intermediate_size, text.moe_intermediate_size)
    if left or not shared:
        raise ValueError(
            f"`model` must have a `shared_expert_intermediate_size` that is a multiple of `moe_intermediate_size` for "
            f"{FAMILY}, got {text.shared_expert_intermediate_size} and {text.moe_intermediate_size}."
        )
    theta = _folder.get_rope_theta(text, FAMILY)
    optional = {published: getattr(text, ours) for published, (ours, _) in _TEXT_DEFAULTS.items()}
    changed = {name: value for name, value in optional.items() if value != _TEXT_DEFAULTS[name][1]}
    if text.router_aux_loss_form not in _BALANCE_FORMS.values():
        raise ValueError(
            f"`model` must have the `router_aux_loss_form` 'sequence' or 'batch' for {FAMILY}, got "
            f"{text.router_aux_loss_form!r}."
        )
    if text.router_aux_loss_form == "batch":
        changed["seq_aux"] = False
    if theta != _ROPE_THETA:
        changed["rope_theta"] = theta
    fixed = ("use_mla", "topk_method", "n_group", "topk_group", "lm_head", "rm_head", "q_lora_rank", "kv_lora_rank")
    return {
        **{published: getattr(text, ours) for published, ours in _TEXT_FIELDS.items()},
        "n_shared_experts": shared,
        "first_k_dense_replace": len(layers),
        **{name: _TEXT_FIXED[name] for name in fixed},
        **_TEXT_WRITTEN,
        **changed,
    }
