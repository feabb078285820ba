"""One small configuration and its inputs for each kind of model that `vlparts` registers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPVisionConfig,
    FalconH1Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from tests.tiny import SIZES, navit_config, packed_images, windowfree_config
from vlparts import (
    DeepEncoderConfig,
    DeepEncoderModel,
    FusedVisionConfig,
    FusedVisionModel,
    MoGEConfig,
    MoGEForCausalLM,
    MoGEModel,
    NaViTDualEncoder,
    NaViTDualEncoderConfig,
    NaViTForImageClassification,
    NaViTModel,
    PanguEmbeddedConfig,
    PanguEmbeddedForCausalLM,
    PanguEmbeddedModel,
    VisionLanguageConfig,
    VisionLanguageForConditionalGeneration,
    VisionLanguageModel,
    WindowFreeViTModel,
)

TOKENS = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}
TEXT = {**SIZES, **TOKENS, "num_key_value_heads": 1, "head_dim": 16}
IMAGE_TOKEN = 4
BATCH = 7  # as in the comparison of attention implementations, which extends smaller batches by random grids


@dataclass(frozen=True)
class Setup:
    """What a model tester of transformers needs.

    Attributes:
        model: The class under test.
        config: Builds the configuration.
        inputs: Builds the inputs of `forward`.
        options: Attributes of the test class.
    """

    model: type[PreTrainedModel]
    config: Callable[[], PreTrainedConfig]
    inputs: Callable[[], dict[str, Tensor]]
    options: dict[str, Any]


def packed() -> dict[str, Tensor]:
    """Packed images of 4 x 4 patches."""
    pixels, grids = packed_images([(2, 2)] * BATCH)
    return {"pixel_values": pixels, "image_grid_thw": grids}


def views() -> dict[str, Tensor]:
    """Images of one view of 4 x 8 patches, which become two tokens, a newline and a separator."""
    pixels, grids = packed_images([(4, 8)] * BATCH, patch_width=768)
    return {"pixel_values": pixels, "image_grid_thw": grids}


def square() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(BATCH, 3, 8, 8)}


def ids(length: int = 7) -> dict[str, Tensor]:
    return {
        "input_ids": torch.randint(5, 80, (BATCH, length)),
        "attention_mask": torch.ones(BATCH, length, dtype=torch.int64),
    }


def with_placeholders(images: dict[str, Tensor]) -> dict[str, Tensor]:
    """Texts of 7 tokens after the 4 placeholders of an image each."""
    text = ids(11)
    text["input_ids"][:, :4] = IMAGE_TOKEN
    return {**text, **images}


def moe(**changes: Any) -> MoGEConfig:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "num_expert_groups": 2, "moe_intermediate_size": 16}
    return MoGEConfig(**TEXT, **experts, shared_expert_intermediate_size=24, **changes)


def falcon() -> FalconH1Config:
    mamba = {"mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
    return FalconH1Config(**TEXT, **mamba)


def clip() -> CLIPVisionConfig:
    return CLIPVisionConfig(**SIZES, image_size=8, patch_size=4)


def deepencoder() -> DeepEncoderConfig:
    return DeepEncoderConfig.from_preset("deepencoder_tiny")


def fused() -> FusedVisionConfig:
    encoder = CLIPVisionConfig(**SIZES | {"num_hidden_layers": 1}, image_size=8, patch_size=4)
    return FusedVisionConfig(general_config=encoder, feature_layers=[-1, -1], spatial_merge_size=1)


IMAGES: dict[Callable[[], PreTrainedConfig], Callable[[], dict[str, Tensor]]] = {
    clip: square,
    deepencoder: views,
    fused: square,
}


def of_encoder(model: type[PreTrainedModel], config: Callable[[], PreTrainedConfig]) -> Setup:
    images = IMAGES.get(config, packed)
    return Setup(
        model, config, images, {"test_resize_embeddings": False, "additional_model_inputs": ["image_grid_thw"]}
    )


def of_text(model: type[PreTrainedModel], config: Callable[[], PreTrainedConfig]) -> Setup:
    return Setup(model, config, ids, {})


def dual(vision: Callable[[], PreTrainedConfig], text: Callable[[], PreTrainedConfig], **changes: Any) -> Setup:
    images = IMAGES.get(vision, packed)
    return Setup(
        NaViTDualEncoder,
        lambda: NaViTDualEncoderConfig(
            vision_config=vision(), text_config=text(), projection_dim=24, chunk_size=2, **changes
        ),
        lambda: {**ids(), **images()},
        {"_is_composite": True, "test_resize_embeddings": False, "additional_model_inputs": list(images())},
    )


def composed(
    model: type[PreTrainedModel],
    vision: Callable[[], PreTrainedConfig],
    text: Callable[[], PreTrainedConfig],
    **changes: Any,
) -> Setup:
    images = IMAGES.get(vision, packed)
    return Setup(
        model,
        lambda: VisionLanguageConfig(
            vision_config=vision(), text_config=text(), image_token_id=IMAGE_TOKEN, **changes
        ),
        lambda: with_placeholders(images()),
        {
            "_is_composite": True,
            "additional_model_inputs": ["attention_mask", *images()],
            "test_all_params_have_gradient": False,  # the pooling of the vision tower has no part in the answer
        },
    )


LAYERS = {"num_hidden_layers": 2}
WINDOWS = {"attention_pattern": {"window_size": 8, "full_attention_layers": [1]}, "gated_mlp": True}
POSITIONS = {"position_grid_size": 3, "patch_bias": True, "norm_type": "layer_norm", "final_norm": False}

SETUPS: dict[str, Setup] = {
    "NaViT": of_encoder(NaViTModel, config=navit_config),
    "NaViTClassifier": of_encoder(NaViTForImageClassification, config=lambda: navit_config(num_labels=3)),
    "NaViTWithPrefixTokens": of_encoder(
        NaViTModel, config=lambda: navit_config(pooling="class_token", num_register_tokens=2, rotary_theta=100.0)
    ),
    "WindowFreeViT": of_encoder(WindowFreeViTModel, config=lambda: windowfree_config(**LAYERS)),
    "WindowFreeViTWithWindows": of_encoder(
        WindowFreeViTModel, config=lambda: windowfree_config(**LAYERS, **WINDOWS, pooling="mean")
    ),
    "DeepEncoder": of_encoder(DeepEncoderModel, config=deepencoder),
    "FusedVision": of_encoder(FusedVisionModel, config=fused),
    "WindowFreeViTWithPositions": of_encoder(
        WindowFreeViTModel, config=lambda: windowfree_config(**LAYERS, **POSITIONS, pooling="mean")
    ),
    "PanguEmbedded": of_text(PanguEmbeddedModel, config=lambda: PanguEmbeddedConfig(**TEXT)),
    "PanguEmbeddedHead": of_text(
        PanguEmbeddedForCausalLM, config=lambda: PanguEmbeddedConfig(**TEXT, tie_word_embeddings=True)
    ),
    "MoGE": of_text(MoGEModel, config=moe),
    "MoGEHead": of_text(MoGEForCausalLM, config=lambda: moe(mlp_only_layers=[0], router_aux_loss_coef=0.01)),
    "DualEncoderOfNaViT": dual(navit_config, lambda: Qwen3Config(**TEXT)),
    "DualEncoderOfCLIP": dual(
        clip, lambda: CLIPTextConfig(**SIZES, **TOKENS), loss="sigmoid", logit_bias_init_value=-10.0
    ),
    "VisionLanguage": composed(VisionLanguageModel, navit_config, lambda: LlamaConfig(**TEXT)),
    "VisionLanguageHead": composed(VisionLanguageForConditionalGeneration, navit_config, lambda: LlamaConfig(**TEXT)),
    "VisionLanguageHeadOfCLIPAndFalconH1": composed(VisionLanguageForConditionalGeneration, clip, falcon),
    "VisionLanguageHeadOfMoGE": composed(VisionLanguageForConditionalGeneration, navit_config, moe),
    "VisionLanguageHeadOfDeepEncoder": composed(
        VisionLanguageForConditionalGeneration, deepencoder, lambda: LlamaConfig(**TEXT), projector_type="deepseek_ocr"
    ),
    "VisionLanguageHeadOfFusedVision": composed(
        VisionLanguageForConditionalGeneration, fused, lambda: LlamaConfig(**TEXT), projector_type="fused_mlp2_gelu"
    ),
}
