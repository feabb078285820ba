"""The weights of transformers' `UnlimitedOcrVisionModel`, which is DeepSeek-OCR's encoder, in a `DeepEncoderModel`."""

import torch
from transformers.models.unlimited_ocr.configuration_unlimited_ocr import UnlimitedOcrVisionConfig
from transformers.models.unlimited_ocr.modeling_unlimited_ocr import UnlimitedOcrVisionModel

from vlparts.parts.configuration_deepencoder import DeepEncoderConfig
from vlparts.parts.modeling_deepencoder import DeepEncoderModel

SAM = {
    "patch_embed.projection": "patch_embedding",
    "pos_embed": "position_embedding",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "attn.proj": "attn.o_proj",
    "attn.": "self_attn.",
    "mlp.lin": "mlp.fc",
    "neck.": "",
    "proj.conv": "compress",
}
CLIP = {
    "embeddings.": "",
    "position_embedding.weight": "position_embedding",
    "pre_layrnorm": "norm",
    "encoder.": "",
    "layer_norm": "norm",
    "out_proj": "o_proj",
}


def native_of(config: DeepEncoderConfig) -> UnlimitedOcrVisionModel:
    """The native model with the sizes of a configuration, and weights of order one."""
    sam = {
        "hidden_size": config.sam_hidden_size,
        "mlp_dim": config.sam_intermediate_size,
        "num_hidden_layers": config.sam_num_hidden_layers,
        "num_attention_heads": config.sam_num_attention_heads,
        "image_size": config.sam_position_size * config.patch_size,
        "patch_size": config.patch_size,
        "window_size": config.sam_window_size,
        "global_attn_indexes": config.sam_global_layers,
        "output_channels": config.neck_channels,
        "downsample_channels": config.compressor_channels,
    }
    clip = {
        "hidden_size": config.clip_hidden_size,
        "intermediate_size": config.clip_intermediate_size,
        "num_hidden_layers": config.clip_num_hidden_layers,
        "num_attention_heads": config.clip_num_attention_heads,
        "image_size": config.clip_position_size * 14,
    }
    model = UnlimitedOcrVisionModel(UnlimitedOcrVisionConfig(sam_config=sam, encoder_config=clip)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.normal_(0.0, fan_in**-0.5)
    return model


def ours_of(native: UnlimitedOcrVisionModel, config: DeepEncoderConfig) -> DeepEncoderModel:
    """The same model as a part."""
    state = {}
    for name, tensor in native.state_dict().items():
        room, _, rest = name.partition(".")
        names, target = (SAM, "sam") if room == "sam_encoder" else (CLIP, "clip")
        for old, new in names.items():
            rest = rest.replace(old, new)
        state[f"{target}.{rest}"] = tensor
    for layer in range(config.clip_num_hidden_layers):
        for kind in ("weight", "bias"):
            parts = [state.pop(f"clip.layers.{layer}.self_attn.{one}_proj.{kind}") for one in "qkv"]
            state[f"clip.layers.{layer}.self_attn.qkv.{kind}"] = torch.cat(parts)
    state["sam.patch_embedding.weight"] = state["sam.patch_embedding.weight"].flatten(1)
    state["sam.position_embedding"] = state["sam.position_embedding"][0]
    model = DeepEncoderModel(config).to(native.dtype).eval()
    model.load_state_dict(state)
    return model
