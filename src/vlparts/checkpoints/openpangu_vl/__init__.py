"""Read and write published openPangu-VL folders."""

from .conversion import (
    encoder_from_openpangu_vl,
    model_from_openpangu_vl,
    processor_from_openpangu_vl,
    to_openpangu_vl,
)

__all__ = [
    "encoder_from_openpangu_vl",
    "model_from_openpangu_vl",
    "processor_from_openpangu_vl",
    "to_openpangu_vl",
]
