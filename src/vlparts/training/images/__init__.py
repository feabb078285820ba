"""Packed training on images of mixed sizes."""
