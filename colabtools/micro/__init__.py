"""The embedded models: a tiny Stable Diffusion and a tiny ViT, trained for this package.

Both are real: they load through the same code as the large ones, so everything runs without a
network or a GPU.
"""

from pathlib import Path

__all__ = ["sd_path", "subject_path", "vit_path"]

_FOLDER = Path(__file__).parent


def sd_path() -> Path:
    """Return the folder of the embedded Stable Diffusion, in diffusers' layout."""
    return _FOLDER / "sd"


def vit_path() -> Path:
    """Return the folder of the embedded ViT classifier, in transformers' layout."""
    return _FOLDER / "vit"


def subject_path() -> Path:
    """Return the folder of five captioned pictures of a subject unknown to the embedded model."""
    return _FOLDER / "subject"
