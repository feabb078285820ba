"""Small configurations of every native vision encoder that composed models hold, and what their features are."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import vlparts
from tests.tiny import SIZES, order_one, text_config, tokenizer

SQUARE = {**SIZES, "image_size": 16, "patch_size": 4}
QWEN = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
MERGER = {**QWEN, "hidden_size": 32, "out_hidden_size": 24, "intermediate_size": 48}

# Number of tokens before the patches in images of one size.
PREFIXES = {
    "aimv2_vision_model": 0,
    "altclip_vision_model": 1,
    "beit": 1,
    "blip_2_vision_model": 1,
    "blip_vision_model": 1,
    "chinese_clip_vision_model": 1,
    "clip_vision_model": 1,
    "data2vec-vision": 1,
    "deit": 2,
    "dinov2": 1,
    "dinov2_with_registers": 5,
    "dinov3_vit": 3,
    "dpt": 1,
    "granite_docling_vision": 0,
    "pixio": 8,
    "qianfan_ocr_vision": 1,
    "radio": 10,
    "sam3_vit_model": 0,
    "sapiens2": 9,
    "tipsv2_vision_model": 2,
    "idefics3_vision": 0,
    "ijepa": 0,
    "instructblip_vision_model": 1,
    "internvl_vision": 1,
    "janus_vision_model": 0,
    "metaclip_2_vision_model": 1,
    "mlcd_vision_model": 1,
    "siglip_vision_model": 0,
    "smolvlm_vision": 0,
    "vit": 1,
    "vit_msn": 1,
    # A hierarchy, or a map of features.
    "convnextv2": 0,
    "llama4_vision_model": 0,
    "sam2_hiera_det_model": 0,
    "sam_hq_vision_model": 0,
    "sam_vision_model": 0,
    "swin": 0,
}
# Fields other than those of `SQUARE`.
SAM = {**SQUARE, "output_channels": 24, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 48}
FIELDS: dict[str, dict] = {
    "qianfan_ocr_vision": {**SIZES, "image_size": [16, 16], "patch_size": [4, 4]},
    "sam_hq_vision_model": SAM,
    "gemma4_vision": {
        **SIZES,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "patch_size": 4,
        "pooling_kernel_size": 2,
        "position_embedding_size": 64,
    },
    "exaone4_5_vision": {**MERGER, "window_size": 16, "fullatt_block_indexes": [1], "num_key_value_heads": 2},
    "glm_ocr_vision": {**MERGER, "image_size": 16},
    "qwen3_5_moe_vision": {**MERGER, "num_position_embeddings": 16},
    "qwen3_5_vision": {**MERGER, "num_position_embeddings": 16},
    "dinov3_vit": {**SQUARE, "num_register_tokens": 2},
    "internvl_vision": {**SIZES, "image_size": [16, 16], "patch_size": [4, 4]},
    "convnextv2": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 16, "patch_size": 2},
    "llama4_vision_model": {
        **SQUARE,
        "intermediate_size": 128,
        "projector_input_dim": 24,
        "projector_output_dim": 24,
        "vision_output_dim": 24,
    },
    "sam_vision_model": SAM,
    "sam2_hiera_det_model": {
        "hidden_size": 8,
        "image_size": [32, 32],
        "blocks_per_stage": [1, 2],
        "embed_dim_per_stage": [8, 16],
        "num_attention_heads_per_stage": [1, 2],
        "window_size_per_stage": [4, 4],
        "num_query_pool_stages": 1,
        "global_attention_blocks": [2],
    },
    "swin": {
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "window_size": 2,
        "image_size": 16,
        "patch_size": 2,
    },
    "siglip2_vision_model": {**SIZES, "num_patches": 16, "patch_size": 4},
    "pixtral": {**SIZES, "image_size": 64, "patch_size": 4},
    "kimi_k25_vision": {**SIZES, "patch_size": 4, "pos_emb_height": 4, "pos_emb_width": 4},
    "paddleocr_vl_vision": SQUARE,
    "video_llama_3_vision": {**SIZES, "patch_size": 4},
    "glm4v_vision": {**MERGER, "image_size": 16},
    "glm4v_moe_vision": {**MERGER, "image_size": 16},
    "qwen2_vl_vision": {**QWEN, "embed_dim": 32, "hidden_size": 24, "mlp_ratio": 2},
    "qwen2_5_vl_vision": {**MERGER, "window_size": 16, "fullatt_block_indexes": [1]},
    "qwen3_vl_vision": {**MERGER, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    "qwen3_vl_moe_vision": {**MERGER, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
}
FAMILIES = sorted({*PREFIXES, *FIELDS})
# Parameters without a gradient, since the encoder applies them to the class token's output, to masked patches only, or
# for its own text model, and has no option to leave them out.
CLIP_LIKE = ("altclip_vision_model", "chinese_clip_vision_model", "clip_vision_model", "metaclip_2_vision_model")
UNUSED = {
    **dict.fromkeys((*CLIP_LIKE, "mlcd_vision_model"), "post_layernorm."),
    **dict.fromkeys(("dinov2_with_registers", "dinov3_vit", "tipsv2_vision_model"), "embeddings.mask_token"),
    "convnextv2": "layernorm.",
    "granite_docling_vision": "connector.",
}
# Without a default image processor.
STRANGERS = ("granite_docling_vision", "ijepa", "pixio", "tipsv2_vision_model")
# Side of the blocks that a composed model merges, where the encoder's configuration does not say it.
MERGE_SIZES = {"clip_vision_model": 2, "sam_vision_model": 2, "pixtral": 2, "kimi_k25_vision": 2}
MERGE_SIZES |= {"video_llama_3_vision": 2, "internvl_vision": 2, "siglip2_vision_model": 1}


def native_config(kind: str, **changes: object):  # noqa: ANN201
    """A small configuration of a native vision encoder."""
    return CONFIG_MAPPING[kind](**{**FIELDS.get(kind, SQUARE), **changes})


def composed_tower(kind: str, seed: int = 0, **changes: object) -> tuple:
    """A composed model with a native vision encoder and weights of order one, and its processor."""
    words = tokenizer()
    if kind in MERGE_SIZES:
        changes = {"spatial_merge_size": MERGE_SIZES[kind], **changes}
    model = vlparts.compose(vision=native_config(kind), text=text_config("qwen3", words), **changes)
    given = (
        CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False) if kind in STRANGERS else None
    )
    processor = vlparts.compose_processor(model, words, given)
    size = getattr(processor.image_processor, "size", None)
    if size is not None and size.get("shortest_edge") and size.get("longest_edge"):
        processor.image_processor.size = {"shortest_edge": 64, "longest_edge": 4096}
    return order_one(model, seed).eval(), processor


def merge(patches: Tensor, rows: int, columns: int, side: int) -> Tensor:
    """Concatenate the patches `(rows * columns, D)` of each block."""
    width = patches.shape[-1]
    blocks = patches.view(rows // side, side, columns // side, side, width).permute(0, 2, 1, 3, 4)
    return blocks.reshape(-1, side * side * width)


def _square(tower: PreTrainedModel, inputs: dict, side: int, kind: str) -> list[Tensor]:
    tokens = []
    for image in inputs["pixel_values"]:
        found = tower(image[None]).last_hidden_state[0]
        if kind in ("sam_vision_model", "sam_hq_vision_model", "convnextv2"):
            found = found.permute(1, 2, 0).flatten(0, 1)
        elif kind == "sam2_hiera_det_model":
            found = found.flatten(0, 1)
        found = found[PREFIXES[kind] :]
        grid = int(len(found) ** 0.5)
        assert grid**2 == len(found)
        tokens.append(merge(found, grid, grid, side))
    return tokens


def _packed(
    call: Callable[[Tensor, Tensor], Tensor],
) -> Callable[[PreTrainedModel, dict, int, str], list[Tensor]]:
    def encode(tower: PreTrainedModel, inputs: dict, side: int, kind: str) -> list[Tensor]:
        start, tokens = 0, []
        for grid in inputs["image_grid_thw"]:
            _, rows, columns = grid.tolist()
            pixels = inputs["pixel_values"][start : start + rows * columns]
            start += len(pixels)
            tokens.append(call(tower, pixels, grid[None], side))
        return tokens

    return encode


def _naflex(tower: PreTrainedModel, inputs: dict, side: int, kind: str) -> list[Tensor]:
    tokens = []
    for pixels, mask, shape in zip(
        inputs["pixel_values"], inputs["pixel_attention_mask"], inputs["spatial_shapes"], strict=True
    ):
        rows, columns = shape.tolist()
        found = tower(pixels[None], mask[None], shape[None]).last_hidden_state[0]
        tokens.append(merge(found[: rows * columns], rows, columns, side))
    return tokens


def _pixtral(tower: PreTrainedModel, inputs: dict, side: int, kind: str) -> list[Tensor]:
    tokens = []
    for pixels, shape in zip(inputs["pixel_values"], inputs["spatial_shapes"], strict=True):
        rows, columns = shape.tolist()
        alone = pixels[None, :, : rows * 4, : columns * 4]
        tokens.append(merge(tower(alone).last_hidden_state[0], rows, columns, side))
    return tokens


def _rows(found: Tensor, grid: Tensor, side: int) -> Tensor:
    return merge(found.flatten(0, -2), *grid[0, 1:].tolist(), side)


def _gemma(tower: PreTrainedModel, inputs: dict, side: int, kind: str) -> list[Tensor]:
    """The image without padding; the encoder takes columns before rows."""
    tokens = []
    for pixels, (rows, columns) in zip(inputs["pixel_values"], inputs["spatial_shapes"].tolist(), strict=True):
        positions = [[column, row] for row in range(rows) for column in range(columns)]
        tokens.append(tower(pixels[None, : rows * columns], torch.tensor([positions])).last_hidden_state)
    return tokens


HANDS = {
    "gemma4_vision": _gemma,
    "siglip2_vision_model": _naflex,
    "pixtral": _pixtral,
    "kimi_k25_vision": _packed(
        # The encoder also returns the patches of each block, which the composed model does not use.
        lambda tower, pixels, grid, side: tower(pixels, grid).pooler_output.flatten(1)
    ),
    "paddleocr_vl_vision": _packed(
        lambda tower, pixels, grid, side: _rows(tower(pixels[None], grid_thw=grid).last_hidden_state, grid, side)
    ),
    "video_llama_3_vision": _packed(
        lambda tower, pixels, grid, side: tower(pixels, grid, torch.tensor([side])).last_hidden_state
    ),
    **dict.fromkeys(
        [kind for kind in FIELDS if kind.startswith(("qwen", "glm", "exaone"))],
        _packed(lambda tower, pixels, grid, side: tower(pixels, grid).pooler_output),
    ),
}


def by_hand(tower: PreTrainedModel, inputs: dict, side: int, kind: str) -> list[Tensor]:
    """The features `(tokens, width)` of each image, which the encoder sees alone."""
    return HANDS.get(kind, _square)(tower, inputs, side, kind)
