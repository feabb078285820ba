"""Plugins for training frameworks. Each framework is imported by the file with its name alone."""

MODULES = {
    "vision": ["model.vision_tower"],
    "projector": ["model.projector"],
    "text": ["model.language_model", "lm_head"],
}
"""Modules of each part of a composed model. Every parameter is in one of them."""
