"""Small models and inputs that many tests need, with weights of order one."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Siglip2VisionConfig,
)

from vlparts import NaViTConfig, NaViTModel, WindowFreeViTConfig, WindowFreeViTModel
from vlparts.training.tokenizer import train_tokenizer

TEXTS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def navit_config(**changes: object) -> NaViTConfig:
    """A NaViT of width 32 with patches of 4 pixels."""
    return NaViTConfig(**{**SIZES, "patch_size": 4, "max_grid_size": 8, **changes})


def vision_config(kind: str) -> PreTrainedConfig:
    """A small vision tower: ours ("navit") or native ("clip", "siglip2")."""
    if kind == "clip":
        return CLIPVisionConfig(**SIZES, image_size=16, patch_size=4)
    if kind == "siglip2":
        return Siglip2VisionConfig(**SIZES, num_patches=16, patch_size=4)
    return navit_config()


def text_config(kind: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """A small native text model of the given kind for a tokenizer."""
    special = {name: getattr(tokenizer, name) for name in ("eos_token_id", "pad_token_id", "bos_token_id")}
    return TEXTS[kind](**SIZES, num_key_value_heads=1, head_dim=16, vocab_size=len(tokenizer), **special)


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer."""
    return train_tokenizer(["Where is the cat?", "user\n", "assistant\n"])


def order_one(model: nn.Module, seed: int = 0) -> nn.Module:
    """Redraw all weights such that every layer's output is of order one, since small initial weights hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.5
            parameter.copy_(noise * scale + (1.0 if parameter.ndim == 1 else 0.0))
    return model


def assert_initialised(model: PreTrainedModel) -> None:
    """Check that transformers' initialisation, called again, changes no weight and no buffer."""
    tensors = {name: value.clone() for name, value in (*model.named_parameters(), *model.named_buffers())}
    model.post_init()
    model.post_init()
    model.init_weights()
    model._initialize_missing_keys(is_quantized=False)
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        assert torch.equal(value, tensors[name]), name


def navit(seed: int = 0, **changes: object) -> NaViTModel:
    """A small NaViT with weights of order one, ready for evaluation."""
    return order_one(NaViTModel(navit_config(**changes)), seed).eval()


WINDOWED = {"window_size": 16, "full_attention_layers": [1, 3]}  # windows of 2 x 2 cells of 2 x 2 patches


def windowfree_config(**changes: object) -> WindowFreeViTConfig:
    """A window-free ViT of width 32 with patches of 4 pixels."""
    return WindowFreeViTConfig(**{**SIZES, "num_hidden_layers": 4, "patch_size": 4, **changes})


def windowfree(seed: int = 0, **changes: object) -> WindowFreeViTModel:
    """A small window-free ViT with weights of order one, ready for evaluation."""
    return order_one(WindowFreeViTModel(windowfree_config(**changes)), seed).eval()


def packed_images(
    grids: list[tuple[int, ...]], patch_width: int = 48, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Random patches for images of the given (rows, columns) or (frames, rows, columns)."""
    full = [grid if len(grid) == 3 else (1, *grid) for grid in grids]
    grid_thw = torch.tensor(full, dtype=torch.int64).reshape(-1, 3)
    generator = torch.Generator().manual_seed(seed)
    total = int(grid_thw.prod(-1).sum())
    return torch.randn(total, patch_width, generator=generator, dtype=dtype), grid_thw


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A random RGB image."""
    noise = np.random.default_rng((seed, width, height)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


INVERSE_ORIENTATIONS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # as `Image.Transpose`


def save_turned(upright: Image.Image, path: Path, orientation: int) -> Path:
    """Save an image transformed by the inverse of an EXIF orientation, with that orientation."""
    stored = upright.transpose(Image.Transpose(INVERSE_ORIENTATIONS[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(path, exif=exif)
    return path
