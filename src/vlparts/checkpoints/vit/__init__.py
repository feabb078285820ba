"""Start a NaViT from the weights of another vision transformer."""

from .conversion import from_vit

__all__ = ["from_vit"]
