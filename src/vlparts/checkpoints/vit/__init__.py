"""Start a NaViT from the weights of another vision transformer."""

from .reading import from_vit

__all__ = ["from_vit"]
