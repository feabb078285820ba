"""Conversion of timm's NaFlexVit. timm is not imported: all options are read off the module."""

from typing import Any

from torch import nn

from .naflexvit_rules import attention_pooling_rules, block_rules, embedding_rules
from .rules import Conversion, pooling_fields, refuse_if, square_patch_size, weight_and_bias

_ACTIVATIONS = {
    "GELU": "gelu",
    "GELUTanh": "gelu_pytorch_tanh",
    "QuickGELU": "quick_gelu",
    "ReLU": "relu",
    "SiLU": "silu",
    "Swish": "silu",
}
_POOLINGS = {"": "none", "avg": "mean", "max": "max", "token": "class_token"}


def is_naflexvit(source: object) -> bool:
    """Whether an object is a timm NaFlexVit."""
    names = ((kind.__module__, kind.__name__) for kind in type(source).__mro__)
    return ("timm.models.naflexvit", "NaFlexVit") in names


def read_naflexvit(source: Any, pooling: str | None = None) -> Conversion:
    """Determine how a NaFlexVit is converted.

    Args:
        source: The module.
        pooling: The requested pooling; None for the module's own.

    Raises:
        ValueError: If the module uses an option that NaViT does not have; names it.
    """
    _check_parts(source)
    for block in source.blocks:
        _check_block(block)
    head, own = source.attn_pool, "map"
    if head is None:
        possible = ", ".join(map(repr, (*_POOLINGS, "map")))
        refuse_if(source.global_pool not in _POOLINGS, "global_pool", source.global_pool, f"NaViT has {possible}")
        own = _POOLINGS[source.global_pool]
    fields = {
        **_fields(source),
        **_position_fields(source.embeds),
        **pooling_fields(pooling, own, source.has_class_token, source.num_reg_tokens),
    }
    rules = dict(embedding_rules(source.embeds))
    for index, block in enumerate(source.blocks):
        rules |= block_rules(f"layers.{index}", f"blocks.{index}", block, fields)
    rules |= weight_and_bias("norm", "norm", bias=fields["layer_norm_bias"])
    if head is not None and fields["pooling"] == "map":
        _check_attention_pooling(head, fields)
        rules |= attention_pooling_rules(head)
    if isinstance(source.head, nn.Linear):
        rules |= weight_and_bias("classifier", "head")
        fields["num_labels"] = source.head.out_features
    left_out = () if "pooling.probe" in rules else ("attn_pool.",)
    return Conversion(fields, rules, _grid(source.embeds), "pos_embed_grid_size", left_out, _dropped(source))


def _check_parts(source: Any) -> None:
    """Refuse modules outside the blocks that have no counterpart."""
    embeds, norms = source.embeds, "NaViT has one normalization, between the blocks and the pooling"
    refuse_if(len(source.blocks) == 0, "depth", 0, "there must be a block")
    refuse_if(source.rope is not None, "rope_type", type(source.rope).__name__, "NaViT's rotary positions differ")
    refuse_if(_exists(source.norm_pre), "pre_norm", True, norms)
    refuse_if(_exists(source.fc_norm), "fc_norm", True, norms)
    refuse_if(not _exists(source.norm), "final_norm", False, norms)
    refuse_if(_exists(embeds.norm), "embed_norm_layer", type(embeds.norm).__name__, norms)
    refuse_if(embeds.norm_input is not None, "input_norm_layer", type(embeds.norm_input).__name__, norms)
    pools_prefix = source.pool_include_prefix and source.num_prefix_tokens > 0
    refuse_if(pools_prefix, "pool_include_prefix", True, "NaViT pools patches only")


def _check_block(block: Any) -> None:
    """Refuse a block that computes something other than NaViT's."""
    for option, name, expected in (
        ("block_fn", "", "Block"),
        ("attn_layer", "attn", "Attention"),
        ("mlp_layer", "mlp", "Mlp"),
    ):
        kind = type(getattr(block, name) if name else block).__name__
        refuse_if(kind != expected, option, kind, f"only {expected} has a counterpart")
    attention = block.attn
    refuse_if(_exists(attention.norm), "scale_attn_inner_norm", True, "NaViT has no such normalization")
    refuse_if(_exists(block.mlp.norm), "scale_mlp_norm", True, "NaViT has no such normalization")
    has_bias = any(getattr(norm, "bias", None) is not None for norm in (attention.q_norm, attention.k_norm))
    refuse_if(has_bias, "qk_norm", True, "NaViT's normalizations of queries and keys have no biases")


def _check_attention_pooling(head: Any, fields: dict[str, Any]) -> None:
    heads, width = fields["num_attention_heads"], fields["intermediate_size"]
    reason = f"NaViT's pooling has the {heads} heads of its blocks"
    refuse_if(head.num_heads != heads, "attn_pool_num_heads", head.num_heads, reason)
    hidden = head.mlp.fc1.out_features
    reason = f"NaViT's pooling has the MLP width {width} of its blocks"
    refuse_if(hidden != width, "attn_pool_mlp_ratio", f"{hidden} channels", reason)


def _exists(module: nn.Module) -> bool:
    return not isinstance(module, nn.Identity)


def _fields(source: Any) -> dict[str, Any]:
    first = source.blocks[0]
    return {
        "hidden_size": source.embed_dim,
        "intermediate_size": first.mlp.fc1.out_features,
        "num_hidden_layers": len(source.blocks),
        "num_attention_heads": first.attn.num_heads,
        "num_channels": source.in_chans,
        "patch_size": square_patch_size(source.embeds.patch_size),
        "hidden_act": _activation(first.mlp.act),
        "layer_norm_eps": _epsilon(source),
        "qkv_bias": first.attn.qkv.bias is not None or first.attn.proj.bias is not None,
        "mlp_bias": first.mlp.fc1.bias is not None,
        "layer_norm_bias": first.norm1.bias is not None,
        "use_qk_norm": _exists(first.attn.q_norm),
        "rotary_theta": None,
    }


def _activation(module: nn.Module) -> str:
    name = type(module).__name__
    refuse_if(name not in _ACTIVATIONS, "act_layer", name, f"NaViT has {', '.join(_ACTIVATIONS)}")
    return "gelu_pytorch_tanh" if getattr(module, "approximate", "none") == "tanh" else _ACTIVATIONS[name]


def _epsilon(source: Any) -> float:
    """The epsilon that all normalizations share."""
    norms = [source.norm] if source.attn_pool is None else [source.norm, source.attn_pool.norm]
    for block in source.blocks:
        norms += [block.norm1, block.norm2, *filter(_exists, (block.attn.q_norm, block.attn.k_norm))]
    kinds = {type(norm).__name__ for norm in norms if not isinstance(norm, nn.LayerNorm)}
    refuse_if(bool(kinds), "norm_layer", ", ".join(sorted(kinds)), "NaViT has layer normalizations")
    epsilons = sorted({norm.eps for norm in norms})
    refuse_if(len(epsilons) > 1, "norm_layer", epsilons, "NaViT has one epsilon for all normalizations")
    return float(epsilons[0])


def _position_fields(embeds: Any) -> dict[str, Any]:
    if embeds.pos_embed_type == "none":
        return {"position_kind": "none"}
    is_joint, interpolation = embeds.pos_embed_type == "learned", "bilinear"
    if is_joint:
        mode = embeds.pos_embed_interp_mode
        refuse_if(mode not in ("bilinear", "bicubic"), "pos_embed_interp_mode", mode, "NaViT has bilinear and bicubic")
        refuse_if(embeds.pos_embed_align_corners, "pos_embed_align_corners", True, "NaViT has no such interpolation")
        # With grid_sample, timm ignores the option for packed patches.
        is_smooth = embeds.pos_embed_antialias and not embeds.pos_embed_use_grid_sample
        interpolation = f"{mode}_antialias" if is_smooth else mode
    return {
        "position_kind": "learned",
        "position_combination": "joint" if is_joint else "add",
        "position_coordinates": "fractional_aspect" if embeds.pos_embed_ar_preserving else "fractional",
        "position_interpolation": interpolation,
    }


def _grid(embeds: Any) -> tuple[int, int] | None:
    if embeds.pos_embed_type == "none":
        return None
    if embeds.pos_embed_type == "learned":
        return tuple(embeds.pos_embed.shape[1:3])
    return embeds.pos_embed_y.shape[1], embeds.pos_embed_x.shape[1]


def _dropped(source: Any) -> list[str]:
    """Options that act in training only."""
    last = source.blocks[-1]
    uses = {
        "drop_rate": source.head_drop.p,
        "pos_drop_rate": source.embeds.pos_drop.p,
        "patch_drop_rate": source.patch_drop is not None,
        "proj_drop_rate": last.attn.proj_drop.p,
        "attn_drop_rate": last.attn.attn_drop.p,
        "drop_path_rate": _exists(last.drop_path1),
    }
    return [name for name, used in uses.items() if used]
