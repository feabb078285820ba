"""Load a model and its processor for documents."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..checkpoints._folder import CONFIG, read_json
from ..checkpoints.deepseek_ocr import model_from_deepseek_ocr, processor_from_deepseek_ocr
from ..checkpoints.deepseek_ocr.config import ARCHITECTURE

__all__ = ["load_ocr_model"]


def load_ocr_model(
    folder: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load a model that reads documents, and its processor.

    Args:
        folder: A folder with DeepSeek-OCR's published files, or one that `save_pretrained` wrote with the processor.
        device: The device; None for an accelerator if there is one, else the CPU.
        dtype: Dtype of the weights, or its name; "auto" for that of the files.
        trust_remote_code: Whether to run code that is in the folder. Folders of composed models do not need it.

    Returns:
        The model in evaluation mode, and the processor.

    Raises:
        ValueError: If it is no such folder, or the dtype is unknown.
    """
    path = Path(folder)
    if not (path / CONFIG).is_file():
        raise ValueError(f"`model` must be a folder with a {CONFIG}, got {path}.")
    if isinstance(dtype, str) and dtype != "auto":
        named = getattr(torch, dtype, None)
        if not isinstance(named, torch.dtype) or not named.is_floating_point:
            raise ValueError(f"`dtype` must be 'auto' or the name of a floating-point dtype, got {dtype!r}.")
        dtype = named
    if device is None:
        device = torch.accelerator.current_accelerator() or "cpu"
    if ARCHITECTURE in (read_json(path / CONFIG).get("architectures") or ()):
        model = model_from_deepseek_ocr(path, dtype=None if isinstance(dtype, str) else dtype)
        return model.to(device), processor_from_deepseek_ocr(path)
    try:
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, trust_remote_code=trust_remote_code)
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise ValueError(f"`model` {path} cannot be loaded: {error}") from error
    return model.eval().to(device), processor
