"""Frames: maps between the original image and the image that a model receives."""
