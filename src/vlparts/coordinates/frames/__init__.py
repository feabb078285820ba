"""Frames: maps between the original image and what a model sees."""
