"""Names and shapes of DeepSeek-OCR's 2,710 published tensors."""

from typing import Any

from torch import Tensor

from ...parts.modeling_vlm import VisionLanguageForConditionalGeneration
from .._weights import Slice, expert_slices, own_tensors, published_name
from .config import FAMILY

_SAM = r"model\.vision_tower\.sam\."
_CLIP = r"model\.vision_tower\.clip\."
_SAM_LAYER = _SAM + r"layers\.(\d+)\."
_CLIP_LAYER = _CLIP + r"layers\.(\d+)\."
# Name in the composed model, and published name.
_NAMES = (
    (_SAM + r"patch_embedding\.(.+)", r"model.sam_model.patch_embed.proj.\1"),
    (_SAM + r"position_embedding", r"model.sam_model.pos_embed"),
    (_SAM_LAYER + r"(norm[12]\..+)", r"model.sam_model.blocks.\1.\2"),
    (_SAM_LAYER + r"self_attn\.((?:qkv\.|rel_pos_).+)", r"model.sam_model.blocks.\1.attn.\2"),
    (_SAM_LAYER + r"self_attn\.o_proj\.(.+)", r"model.sam_model.blocks.\1.attn.proj.\2"),
    (_SAM_LAYER + r"mlp\.fc([12]\..+)", r"model.sam_model.blocks.\1.mlp.lin\2"),
    (_SAM + r"conv1\.(.+)", r"model.sam_model.neck.0.\1"),
    (_SAM + r"norm1\.(.+)", r"model.sam_model.neck.1.\1"),
    (_SAM + r"conv2\.(.+)", r"model.sam_model.neck.2.\1"),
    (_SAM + r"norm2\.(.+)", r"model.sam_model.neck.3.\1"),
    (_SAM + r"compress1\.(.+)", r"model.sam_model.net_2.\1"),
    (_SAM + r"compress2\.(.+)", r"model.sam_model.net_3.\1"),
    (_CLIP + r"class_embedding", r"model.vision_model.embeddings.class_embedding"),
    (_CLIP + r"position_embedding", r"model.vision_model.embeddings.position_embedding.weight"),
    (_CLIP + r"unused_patch_embedding", r"model.vision_model.embeddings.patch_embedding.weight"),
    (_CLIP + r"norm\.(.+)", r"model.vision_model.pre_layrnorm.\1"),
    (_CLIP_LAYER + r"norm([12]\..+)", r"model.vision_model.transformer.layers.\1.layer_norm\2"),
    (_CLIP_LAYER + r"self_attn\.qkv\.(.+)", r"model.vision_model.transformer.layers.\1.self_attn.qkv_proj.\2"),
    (_CLIP_LAYER + r"self_attn\.o_proj\.(.+)", r"model.vision_model.transformer.layers.\1.self_attn.out_proj.\2"),
    (_CLIP_LAYER + r"(mlp\..+)", r"model.vision_model.transformer.layers.\1.\2"),
    (r"model\.projector\.projection\.fc\.(.+)", r"model.projector.layers.\1"),
    (r"model\.projector\.projection\.image_newline", r"model.image_newline"),
    (r"model\.projector\.projection\.view_separator", r"model.view_seperator"),
    (r"model\.language_model\.(layers\.\d+\.mlp\.)shared_expert\.(.+)", r"model.\1shared_experts.\2"),
    (r"model\.language_model\.(.+)", r"model.\1"),
    (r"(lm_head\..+)", r"\1"),
)
# A buffer with the numbers of positions, which old versions of transformers saved.
BUFFERS = (r"model\.vision_model\.embeddings\.position_ids",)


def get_slices(model: VisionLanguageForConditionalGeneration) -> dict[str, Slice]:
    """The part of the model that each published tensor holds, by published name.

    Args:
        model: The composed model, on any device.
    """
    vision: Any = model.config.vision_config
    patch = (vision.num_channels, vision.patch_size, vision.patch_size)
    slices: dict[str, Slice] = {}
    for name, tensor in own_tensors(model).items():
        published = published_name(name, _NAMES, FAMILY)
        experts = expert_slices(name, published, tensor.shape[0])
        if experts:
            slices |= experts
        elif name.endswith("sam.patch_embedding.weight"):
            slices[published] = Slice(name, lambda weight: weight.unflatten(1, patch))
        elif name.endswith("sam.position_embedding"):
            slices[published] = Slice(name, _with_batch)
        else:
            slices[published] = Slice(name)
    return slices


def _with_batch(table: Tensor) -> Tensor:
    """A table `(rows, columns, c)` as `(1, rows, columns, c)`."""
    return table.unsqueeze(0)
