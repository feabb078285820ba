"""Read the vision encoders of published Qwen2-VL, Qwen2.5-VL and Qwen3-VL folders."""

from .conversion import encoder_from_qwen_vl, image_processor_from_qwen_vl, merger_from_qwen_vl

__all__ = ["encoder_from_qwen_vl", "image_processor_from_qwen_vl", "merger_from_qwen_vl"]
