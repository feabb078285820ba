"""Image processors of composed models: the one that came with the vision encoder, or that of its family."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor
from transformers.configuration_utils import PreTrainedConfig
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    PILImageResampling,
    SizeDict,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, cached_file

from .parts.configuration_deepencoder import DeepEncoderConfig
from .parts.configuration_fused_vision import FusedVisionConfig
from .parts.configuration_windowfree import WindowFreeViTConfig
from .parts.image_processing_catty import CattyImageProcessor
from .parts.image_processing_deepencoder import DeepEncoderImageProcessor
from .parts.image_processing_navit import NaViTImageProcessor
from .parts.image_processing_windowfree import WindowFreeViTImageProcessor

PathLike = str | os.PathLike[str]

_CLIP = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling.BICUBIC)
_IMAGENET = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling.BICUBIC)
_IMAGENET_BILINEAR = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling.BILINEAR)
_HALF = (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, PILImageResampling.BICUBIC)
_HALF_BILINEAR = (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, PILImageResampling.BILINEAR)
_HALF_LANCZOS = (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, PILImageResampling.LANCZOS)

# Mean, standard deviation and resampling of the published checkpoints of each family, by model type.
_FAMILIES = {
    "aimv2_vision_model": _CLIP,
    "altclip_vision_model": _CLIP,
    "chinese_clip_vision_model": _CLIP,
    "clip_vision_model": _CLIP,
    "metaclip_2_vision_model": _CLIP,
    "mlcd": _CLIP,
    "mlcd_vision_model": _CLIP,
    "blip_2_vision_model": _CLIP,
    "blip_vision_model": _CLIP,
    "instructblip_vision_model": _CLIP,
    "convnextv2": _IMAGENET,
    "deit": _IMAGENET,
    "dinov2": _IMAGENET,
    "dinov2_with_registers": _IMAGENET,
    "dinov3_vit": _IMAGENET_BILINEAR,
    "sam2_hiera_det_model": _IMAGENET_BILINEAR,
    "sapiens2": _IMAGENET_BILINEAR,
    "swin": _IMAGENET,
    "vit_msn": _IMAGENET_BILINEAR,
    "beit": _HALF,
    "data2vec-vision": _HALF,
    "dpt": _HALF,
    "idefics3_vision": _HALF_LANCZOS,
    "janus_vision_model": _HALF,
    "llama4_vision_model": _HALF_BILINEAR,
    "sam3_vit_model": _HALF_BILINEAR,
    "smolvlm_vision": _HALF_LANCZOS,
    "siglip_vision_model": _HALF,
    "vit": _HALF_BILINEAR,
}


def read_image_processor_config(source: PathLike) -> dict[str, Any] | None:
    """Read the settings of the image processor that a checkpoint comes with.

    Args:
        source: Folder, or id on the Hub.

    Returns:
        The content of preprocessor_config.json, or the image processor of processor_config.json; None if the
        checkpoint has neither. References to code in the checkpoint name the checkpoint.
    """
    for name in (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME):
        path = cached_file(str(source), name, _raise_exceptions_for_missing_entries=False)
        fields = json.loads(Path(path).read_text(encoding="utf-8")) if path is not None else {}
        fields = fields.get("image_processor") if name == PROCESSOR_NAME else fields
        if fields:
            code = fields.get("auto_map")
            if code:
                fields["auto_map"] = {key: _with_source(value, source) for key, value in code.items()}
            return fields
    return None


def _with_source(reference: str, source: PathLike) -> str:
    """The reference to a class in a checkpoint's code, as "checkpoint--module.Class"."""
    checkpoint = os.path.abspath(source) if os.path.isdir(source) else source
    return reference if "--" in reference else f"{checkpoint}--{reference}"


def load_image_processor(config: dict[str, Any] | PathLike, trust_remote_code: bool = False) -> Any:
    """Build the Pillow variant of an image processor; torchvision is not needed.

    Args:
        config: Its settings, as of [`read_image_processor_config`], or the folder of a checkpoint.
        trust_remote_code: Allow code that the checkpoint brings.

    Raises:
        ValueError: If it cannot be built.
    """
    try:
        if isinstance(config, (str, os.PathLike)):
            return AutoImageProcessor.from_pretrained(config, backend="pil", trust_remote_code=trust_remote_code)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / IMAGE_PROCESSOR_NAME).write_text(json.dumps(config), encoding="utf-8")
            return AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        kind = config.get("image_processor_type") if isinstance(config, dict) else config
        raise ValueError(
            f"The image processor {kind} of the vision encoder cannot be loaded: {error} Pass `image_processor`."
        ) from error


def fit_to_blocks(image_processor: Any, vision: PreTrainedConfig, merge_size: int) -> None:
    """Let Pixtral's image processor, as a folder has it, resize images to multiples of merged blocks."""
    if vision.model_type == "pixtral":
        side = vision.patch_size * merge_size
        image_processor.patch_size = SizeDict(height=side, width=side)


def show_whole_image(image_processor: Any) -> None:
    """Replace the centre crop of an image processor, if it has one, by resizing both sides to the size of the crop."""
    if getattr(image_processor, "do_center_crop", None):
        crop = image_processor.crop_size
        image_processor.do_center_crop = False
        image_processor.do_resize = True
        image_processor.size = SizeDict(height=crop["height"], width=crop["width"])


def default_image_processor(layout: str, vision: PreTrainedConfig, merge_size: int) -> Any:
    """Build the image processor of a new vision encoder.

    Args:
        layout: How the encoder takes images, see [`pixel_layout`].
        vision: Configuration of the encoder.
        merge_size: Side m of the block of patches that becomes one token.

    Raises:
        ValueError: If the family has no published statistics.
    """
    native = native_image_processor(vision, merge_size)
    if native is not None:
        return native
    if vision.model_type == WindowFreeViTConfig.model_type:
        sizes = {"patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size}
        return WindowFreeViTImageProcessor(**sizes, image_mean=vision.image_mean, image_std=vision.image_std)
    if vision.model_type == DeepEncoderConfig.model_type:
        return DeepEncoderImageProcessor(patch_size=vision.patch_size)
    if vision.model_type == FusedVisionConfig.model_type:
        mean, std, _ = _statistics(vision.general_config, vision.ocr_config)
        return CattyImageProcessor(tile_size=_pair(vision.image_size)[0], image_mean=mean, image_std=std)
    if layout == "packed":
        return NaViTImageProcessor(patch_size=vision.patch_size, merge_size=vision.spatial_merge_size)
    if layout == "naflex":
        return Siglip2ImageProcessorPil(
            patch_size=vision.patch_size, max_num_patches=vision.num_patches, do_convert_rgb=True
        )
    mean, std, resample = _statistics(vision)
    height, width = _pair(vision.image_size)
    return CLIPImageProcessorPil(
        size={"height": height, "width": width},
        do_center_crop=False,
        resample=resample,
        image_mean=list(mean),
        image_std=list(std),
    )


def _statistics(*encoders: PreTrainedConfig) -> tuple[list[float], list[float], PILImageResampling]:
    """Mean, standard deviation and resampling of the images of an encoder, or of several of one family."""
    kinds = [config.model_type for config in encoders]
    found = [_FAMILIES.get(kind) for kind in kinds]
    if found[0] is None or found.count(found[0]) != len(found):
        raise ValueError(
            f"`image_processor` must be given for a vision encoder of type {' and '.join(map(repr, kinds))}, whose "
            f"image statistics are not known or differ; known are {', '.join(sorted(_FAMILIES))}."
        )
    return found[0]


def native_image_processor(vision: PreTrainedConfig, merge_size: int) -> Any:
    """Return the native image processor of a vision encoder with options of its own, or None.

    Args:
        vision: Configuration of the vision encoder.
        merge_size: Side m of the block of patches that becomes one token.
    """
    kind = vision.model_type
    if kind == "pixtral":
        from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

        side = vision.patch_size * merge_size
        return PixtralImageProcessorPil(
            size={"longest_edge": vision.image_size}, patch_size={"height": side, "width": side}
        )
    if kind == "gemma4_vision":
        from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

        return Gemma4ImageProcessorPil(patch_size=vision.patch_size, pooling_kernel_size=merge_size)
    if kind == "radio":
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        side = vision.image_size
        # The encoder normalizes pixels itself.
        return CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}, do_normalize=False
        )
    if kind in ("sam_vision_model", "sam_hq_vision_model"):
        from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

        side = vision.image_size
        return SamImageProcessorPil(size={"longest_edge": side}, pad_size={"height": side, "width": side})
    if kind in ("internvl_vision", "qianfan_ocr_vision"):
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

        height, width = vision.image_size
        return GotOcr2ImageProcessorPil(
            size={"height": height, "width": width}, image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD
        )
    sizes = {"patch_size": vision.patch_size, "merge_size": merge_size} if hasattr(vision, "patch_size") else {}
    if kind in ("paddleocr_vl_vision", "kimi_k25_vision"):
        from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import PaddleOCRVLImageProcessorPil

        # Kimi K2.5's own needs torchvision; it has the same layout of patches.
        standard = {"image_mean": IMAGENET_STANDARD_MEAN, "image_std": IMAGENET_STANDARD_STD}
        return PaddleOCRVLImageProcessorPil(**sizes, **(standard if kind.startswith("kimi") else {}))
    if kind == "video_llama_3_vision":
        from transformers.models.video_llama_3.image_processing_pil_video_llama_3 import VideoLlama3ImageProcessorPil

        return VideoLlama3ImageProcessorPil(**sizes)
    if kind in ("glm4v_vision", "glm4v_moe_vision"):
        from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

        return Glm4vImageProcessorPil(**sizes, temporal_patch_size=vision.temporal_patch_size)
    if kind == "glm_ocr_vision":
        from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil

        return Glm46VImageProcessorPil(**sizes, temporal_patch_size=vision.temporal_patch_size)
    if kind == "exaone4_5_vision" or kind.startswith("qwen"):
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        # Published Qwen3-VL models have statistics of their own.
        standard = {"image_mean": IMAGENET_STANDARD_MEAN, "image_std": IMAGENET_STANDARD_STD}
        return Qwen2VLImageProcessorPil(
            **sizes,
            temporal_patch_size=vision.temporal_patch_size,
            **(standard if kind.startswith("qwen3") else {}),
        )
    return None


def check_image_processor(image_processor: Any, vision: PreTrainedConfig, merge_size: int) -> None:
    """Check that an image processor cuts the patches that the vision encoder and the projector take.

    Raises:
        ValueError: If it has another `patch_size`, `merge_size` or `pooling_kernel_size`. Pixtral's `patch_size` is
            that of a merged block.
    """
    patch_size = getattr(vision, "patch_size", None)
    if vision.model_type == "pixtral":
        patch_size = vision.patch_size * merge_size
    for name, expected in (
        ("patch_size", patch_size),
        ("merge_size", merge_size),
        ("pooling_kernel_size", merge_size),
    ):
        found = getattr(image_processor, name, None)
        if found is not None and expected is not None and _pair(found) != _pair(expected):
            raise ValueError(f"`image_processor` has {name}={found}, but the model has {expected}.")


def output_size(image_processor: Any, vision: PreTrainedConfig) -> tuple[int, int]:
    """Return height and width in pixels of all images of a square image processor.

    From its settings; the encoder's `image_size` if they do not determine it.
    """
    if getattr(image_processor, "tile_size", None):
        return image_processor.tile_size, image_processor.tile_size
    name = "crop_size" if getattr(image_processor, "do_center_crop", None) else "size"
    size = getattr(image_processor, name, None) or {}
    if not isinstance(size, int) and size.get("height") and size.get("width"):
        return size["height"], size["width"]
    return _pair(vision.image_size)


def _pair(side: Any) -> tuple[int, int]:
    if isinstance(side, (dict, SizeDict)):
        return int(side["height"]), int(side["width"])
    return (int(side), int(side)) if isinstance(side, (int, float)) else (int(side[0]), int(side[1]))
