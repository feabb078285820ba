"""Read and write published Pangu Pro MoE folders."""

from .conversion import model_from_pangu_pro_moe, to_pangu_pro_moe

__all__ = ["model_from_pangu_pro_moe", "to_pangu_pro_moe"]
