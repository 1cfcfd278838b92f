"""Photos made ready: upright, RGB, cut to the shape that training wants round their subject."""

from colabtools.images.crop import Box, centre_crop, cut, find_crop, fit, square
from colabtools.images.decode import PHOTO_SUFFIXES, Encoded, load_upright, upright_size
from colabtools.images.faces import find_faces

__all__ = [
    "PHOTO_SUFFIXES",
    "Box",
    "Encoded",
    "centre_crop",
    "cut",
    "find_crop",
    "find_faces",
    "fit",
    "load_upright",
    "square",
    "upright_size",
]
