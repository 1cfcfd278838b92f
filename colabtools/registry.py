"""Base models as frozen records: where their files are, and what training on them starts from."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from colabtools import micro
from colabtools.errors import ModelError

__all__ = ["BASES", "Base", "find_base"]

# Source: huggingface_hub 1.x, utils/_validators.py, REPO_ID_REGEX, with the owner required.
_HUB_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base model.

    `source` is a folder in diffusers' layout or a repository of the Hub; `resolution` the native
    picture side in pixels. The other fields are the reference training run, used wherever a setting
    is "auto"; and `cpu_threads`, how many threads the model is worth on a CPU (None: all).
    """

    name: str
    source: str
    resolution: int
    batch_size: int = 1
    text_encoder_steps: int = 350
    text_encoder_lr: float = 1e-6
    unet_steps: int = 1500
    unet_lr: float = 2e-6
    num_class_images: int = 200
    cpu_threads: int | None = None


BASES = {
    base.name: base
    for base in (
        Base(
            name="micro",
            source=str(micro.sd_path()),
            resolution=64,
            batch_size=4,
            text_encoder_steps=50,
            text_encoder_lr=3e-4,
            unet_steps=200,
            unet_lr=3e-4,
            num_class_images=24,
            # Two would gain nothing and wait for each other for ages where another program runs.
            cpu_threads=1,
        ),
        # Steps and rates: the defaults that users of the established two-stage notebook know.
        Base(name="sd-1.5", source="stable-diffusion-v1-5/stable-diffusion-v1-5", resolution=512),
    )
}


def find_base(name: str) -> Base:
    """Return the record of a base model by name, local folder or Hub repository ("owner/name").

    Raises:
        ModelError: the name is none of these.
    """
    if name in BASES:
        return BASES[name]
    folder = _local_folder(name)
    if folder is not None and (folder / "model_index.json").is_file():
        return Base(name=name, source=str(folder), resolution=_native_resolution(folder))
    if folder is not None:
        raise ModelError(
            f"base_model {name!r} is a folder without model_index.json; "
            "give a folder in diffusers' layout"
        )
    if _HUB_REPOSITORY.fullmatch(name):
        return Base(name=name, source=name, resolution=512)
    raise ModelError(
        f"unknown base_model {name!r}; use one of {', '.join(sorted(BASES))}, "
        "a folder in diffusers' layout, or a Hub repository as owner/name"
    )


def _local_folder(name: str) -> Path | None:
    try:
        folder = Path(name).expanduser()
        return folder if name.strip() and folder.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # too long, of an unknown user, with a NUL
        return None


def _native_resolution(folder: Path) -> int:
    """Return the side in pixels of what a local model draws: latent size times VAE scale."""
    try:
        unet = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
        vae = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
        scale: int = 2 ** (len(vae["block_out_channels"]) - 1)
        return int(unet["sample_size"]) * scale
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"base_model {str(folder)!r} has no readable unet and vae configuration "
            f"({type(error).__name__}: {error}); download it again"
        ) from error
