"""Read and write published DeepSeek-OCR folders."""

from .conversion import model_from_deepseek_ocr, processor_from_deepseek_ocr, to_deepseek_ocr

__all__ = ["model_from_deepseek_ocr", "processor_from_deepseek_ocr", "to_deepseek_ocr"]
