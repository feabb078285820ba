"""Small timm NaFlexVits and the NaViTs converted from them; test_from_naflexvit.py runs it in a separate process.

timm imports torchvision, which does not work with a CPU build of torch. Nothing of it is used here, so that empty
modules are enough; they must not be visible to other tests.
"""

import enum
import json
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import is_torchvision_available

from tests.parity.inputs import channels_last, pictures
from tests.tiny import order_one, packed_images
from vlparts.checkpoints.vit import from_vit

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 1.5, "patch_size": 4, "pos_embed_grid_size": (4, 4)}
GRIDS = [(3, 5), (1, 1), (4, 4), (2, 7), (9, 6)]

# Options by case; without `num_classes` there is no classifier.
CASES: dict[str, dict[str, Any]] = {
    "map": {"act_layer": "gelu_tanh", "global_pool": "map", "pos_embed_interp_mode": "bilinear"},
    "map_with_scales": {
        "global_pool": "map",
        "init_values": 1e-5,
        "qkv_bias": False,
        "reg_tokens": 1,
        "num_classes": 3,
    },
    "token": {"global_pool": "token", "class_token": True, "reg_tokens": 2, "num_classes": 5},
    "mean": {
        "global_pool": "avg",
        "fc_norm": False,
        "class_token": True,
        "reg_tokens": 2,
        "pos_embed_ar_preserving": True,
        "num_classes": 3,
    },
    "max": {
        "global_pool": "max",
        "pos_embed": "factorized",
        "pos_embed_ar_preserving": True,
        "patchify_channels_last": False,
    },
    "no_positions": {"global_pool": "", "pos_embed": "none", "proj_bias": False, "act_layer": "quick_gelu"},
    "factorized": {
        "global_pool": "map",
        "pos_embed": "factorized",
        "pos_embed_use_grid_sample": True,
        "act_layer": partial(nn.GELU, approximate="tanh"),
    },
    "grid_sample": {"global_pool": "map", "pos_embed_use_grid_sample": True, "pos_embed_interp_mode": "bilinear"},
    "convolution": {"global_pool": "token", "class_token": True, "embed_proj_type": "conv", "num_classes": 3},
    "no_antialias": {"global_pool": "map", "pos_embed_antialias": False},
    "qk_norm": {
        "global_pool": "map",
        "qk_norm": True,
        "norm_layer": partial(nn.LayerNorm, eps=1e-3, bias=False),
        "drop_rate": 0.5,
    },
}
# Refused options, with the arguments that set them.
REFUSED: dict[str, dict[str, Any]] = {
    "rope_type": {"rope_type": "axial"},
    "pre_norm": {"pre_norm": True},
    "fc_norm": {"global_pool": "avg"},
    "final_norm": {"final_norm": False},
    "embed_norm_layer": {"embed_norm_layer": "layernorm"},
    "pool_include_prefix": {"pool_include_prefix": True, "class_token": True},
    "block_fn": {"swiglu_mlp": True},
    "attn_layer": {"attn_layer": "diff"},
    "mlp_layer": {"mlp_layer": "gated"},
    "scale_attn_inner_norm": {"scale_attn_inner_norm": True},
    "scale_mlp_norm": {"scale_mlp_norm": True},
    "qk_norm": {"qk_norm": True},
    "norm_layer": {"norm_layer": "rmsnorm"},
    "act_layer": {"act_layer": "mish"},
    "global_pool": {"global_pool": "avgmax", "fc_norm": False},
    "pos_embed_interp_mode": {"pos_embed_interp_mode": "area"},
    "pos_embed_align_corners": {"pos_embed_align_corners": True},
    "pos_embed_grid_size": {"pos_embed_grid_size": (4, 6)},
    "attn_pool_num_heads": {"attn_pool_num_heads": 4},
    "attn_pool_mlp_ratio": {"attn_pool_mlp_ratio": 2.0},
    "patch_size": {"patch_size": (4, 8)},
    "depth": {"depth": 0},
}


class InterpolationMode(enum.Enum):
    """The keys of a table that timm fills at import."""

    NEAREST, BILINEAR, BICUBIC, BOX, HAMMING, LANCZOS = range(6)


def provide_torchvision() -> None:
    """Register empty modules instead of torchvision."""
    if is_torchvision_available():  # which also makes transformers cache that it is missing
        raise RuntimeError("torchvision is installed")

    def nothing(name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})

    for name in ("", ".datasets", ".ops", ".ops.misc", ".transforms", ".transforms.functional"):
        module = types.ModuleType(f"torchvision{name}")
        vars(module).update(__path__=[], __getattr__=nothing, InterpolationMode=InterpolationMode)
        sys.modules[module.__name__] = module
        parent, _, child = module.__name__.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


def naflexvit(**options: Any) -> nn.Module:
    """A NaFlexVit with weights of order one."""
    from timm.layers import GluMlp
    from timm.models.naflexvit import NaFlexVit

    if options.get("mlp_layer") == "gated":
        options["mlp_layer"] = GluMlp
    classes = options.pop("num_classes", 0)
    return order_one(NaFlexVit(num_classes=classes, **{**TINY, **options})).double().eval()


def padded(patches: Tensor, grids: Tensor, is_channels_last: bool) -> dict[str, Tensor]:
    """Packed patches as timm takes them: padded to one row per image."""
    rows = channels_last(patches) if is_channels_last else patches
    lengths = grids.prod(-1).tolist()
    pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
    coordinates = [torch.cartesian_prod(torch.arange(h), torch.arange(w)) for _, h, w in grids.tolist()]
    return {
        "patches": pad(rows.split(lengths)),
        "patch_coord": pad([pairs.reshape(-1, 2) for pairs in coordinates]),
        "patch_valid": pad([torch.ones(length, dtype=torch.bool) for length in lengths]),
    }


def run_timm(source: Any, patches: Tensor, grids: Tensor) -> dict[str, Tensor]:
    """Outputs of a NaFlexVit for all images: in one batch, or one by one if it takes only images."""
    prefix, found = source.num_prefix_tokens, {}
    if source.embeds.is_linear:
        features = source.forward_features(**padded(patches, grids, source.embeds.channels_last))
        hidden, valid = features["patches"], features["patch_valid"]
        found = {"patches": hidden[:, prefix:][valid], "prefix": hidden[:, :prefix]}
        pool = partial(source.forward_head, **features)
    else:
        features = [source.forward_features(image) for image in pictures(patches, grids)]
        found["patches"] = torch.cat([hidden[0, prefix:] for hidden in features])
        found["prefix"] = torch.cat([hidden[:, :prefix] for hidden in features])

        def pool(pre_logits: bool) -> Tensor:
            return torch.cat([source.forward_head(hidden, pre_logits=pre_logits) for hidden in features])

    if source.global_pool:
        found["pooled"] = pool(pre_logits=True)
    if source.num_classes:
        found["logits"] = pool(pre_logits=False)
    return found


def run_vlparts(source: nn.Module, patches: Tensor, grids: Tensor) -> dict[str, Tensor]:
    """Outputs of the NaViT converted from a NaFlexVit, for all images at once."""
    model = from_vit(source)
    base = getattr(model, "navit", model)
    outputs = base(patches, grids)
    found = {"patches": outputs.last_hidden_state, "pooled": outputs.pooler_output}
    found["prefix"] = patches.new_empty(len(grids), 0, 32) if base.prefix is None else outputs.prefix_hidden_state
    if model is not base:
        found["logits"] = model(patches, grids).logits
    return {name: tensor for name, tensor in found.items() if tensor is not None}


@torch.no_grad()
def compare(options: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs of both for packed images, by the name of the output and "timm" or "vlparts"."""
    source, inputs = naflexvit(**options), packed_images(GRIDS, dtype=torch.float64)
    theirs, ours = run_timm(source, *inputs), run_vlparts(source, *inputs)
    return {
        f"{name}.{side}": tensor.contiguous()
        for side, found in (("timm", theirs), ("vlparts", ours))
        for name, tensor in found.items()
    }


def refusal(options: dict[str, Any]) -> str:
    """The error message for a NaFlexVit."""
    try:
        from_vit(naflexvit(**options))
    except ValueError as error:
        return str(error)
    return "not refused"


def main(folder: Path) -> None:
    """Write the tensors and messages of all cases into a folder."""
    provide_torchvision()
    for name, options in CASES.items():
        save_file(compare(options), folder / f"{name}.safetensors")
    messages = {name: refusal(options) for name, options in REFUSED.items()}
    (folder / "refused.json").write_text(json.dumps(messages), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
