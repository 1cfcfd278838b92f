"""Photos made ready: upright, RGB, cut to the shape that training wants round their subject."""

from colabtools.images.crop import Box, cut, find_crop, fit, square
from colabtools.images.decode import PHOTO_SUFFIXES, load_upright, upright_size

__all__ = [
    "PHOTO_SUFFIXES",
    "Box",
    "cut",
    "find_crop",
    "fit",
    "load_upright",
    "square",
    "upright_size",
]
