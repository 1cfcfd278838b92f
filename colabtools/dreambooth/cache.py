"""What the frozen VAE says of every picture, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import math
import random
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import safetensors.torch
import torch

from colabtools import images
from colabtools.drive import sha256_of, write_atomic
from colabtools.errors import TrainingError
from colabtools.report import get_logger, progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from diffusers import AutoencoderKL
    from PIL import Image

__all__ = [
    "Crop",
    "CropSet",
    "LatentCache",
    "crop_sets",
    "load_pixels",
    "scale_by_factor",
    "vae_digest",
]

# Part of every key: another number whenever the way from file to latent changes.
_KEY_VERSION = 1
# How much larger than its window a picture is made; more would blur it visibly.
_ZOOM = 1.125
# The parts of a VAE that only decoding uses; models that differ in them alone share their latents.
_DECODER = ("decoder.", "post_quant_conv.")


@dataclass(frozen=True)
class Crop:
    """A window on a picture, of the picture's own width and height.

    Attributes:
        zoom: how many times its size the picture is made before the window is cut.
        x: where in the room that zoom makes the window lies, 0 at the left to 1 at the right.
        y: the same from top to bottom.
        mirrored: whether left and right are exchanged afterwards.
    """

    zoom: float = 1.0
    x: float = 0.0
    y: float = 0.0
    mirrored: bool = False


_WHOLE = Crop()


@dataclass(frozen=True)
class CropSet:
    """A picture and the crops of it that are trained; the first is what evaluation looks at."""

    path: Path
    crops: tuple[Crop, ...] = (_WHOLE,)


def crop_sets(
    paths: Sequence[Path], *, crops: int = 1, flip: bool = False, seed: int = 0
) -> list[CropSet]:
    """Return each picture with its crops: first the whole of it, then windows on it enlarged.

    Training pictures are stored at the size that they are trained at, so the windows are cut from
    the picture made 1.125 times as large. They lie on an even grid; the seed and the file's name
    decide which places of the grid are taken.

    Args:
        paths: pictures.
        crops: how many of each, at least 1.
        flip: take each of them mirrored as well, so twice as many.
        seed: another one takes other places.
    """
    return [CropSet(path, _crops_of(path.name, crops, flip, seed)) for path in paths]


def _crops_of(name: str, count: int, flip: bool, seed: int) -> tuple[Crop, ...]:
    size = max(2, math.isqrt(max(0, count - 2)) + 1)  # the smallest grid with count - 1 places
    places = [(x / (size - 1), y / (size - 1)) for x in range(size) for y in range(size)]
    random.Random(f"{seed}\0{name}".encode("utf-8", "surrogateescape")).shuffle(places)
    chosen = (_WHOLE, *(Crop(_ZOOM, x, y) for x, y in places[: count - 1]))
    mirrored = (Crop(crop.zoom, crop.x, crop.y, mirrored=True) for crop in chosen)
    return (*chosen, *mirrored) if flip else chosen


def load_pixels(path: Path, crop: Crop = _WHOLE) -> torch.Tensor:
    """Return a picture, or a window on it, as pixel_values (1, 3, H, W) float32 in [-1, 1].

    Raises:
        ImageError: the picture cannot be decoded.
    """
    return _pixels(images.load_upright(path), crop)


def _pixels(picture: Image.Image, crop: Crop) -> torch.Tensor:
    from PIL import Image

    if crop.zoom != 1:
        width, height = picture.width / crop.zoom, picture.height / crop.zoom
        left, top = crop.x * (picture.width - width), crop.y * (picture.height - height)
        # Enlarging the window alone is enlarging the picture and cutting, in one resize.
        box = (left, top, left + width, top + height)
        picture = picture.resize(picture.size, Image.Resampling.LANCZOS, box)
    if crop.mirrored:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    values = np.array(picture)[None]  # (1, H, W, 3)
    return torch.from_numpy(values).permute(0, 3, 1, 2).float() / 127.5 - 1


def scale_by_factor(
    vae: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and deviation as Stable Diffusion's UNet knows latents: times a factor."""
    factor: float = vae.config.scaling_factor
    return mean * factor, std * factor


@dataclass(frozen=True)
class LatentCache:
    """Mean and standard deviation of the scaled latents of every crop of every picture.

    Sampling from them at each step is what encoding at each step would give.

    Attributes:
        means: of each picture (K, C, h, w) float32, K its crops; h and w may differ between
            pictures.
        stds: of the same shapes.
    """

    means: tuple[torch.Tensor, ...]
    stds: tuple[torch.Tensor, ...]

    @classmethod
    def encode(
        cls,
        vae: AutoencoderKL,
        pictures: Sequence[CropSet],
        *,
        folder: Path | None = None,
        scale: Callable[
            [AutoencoderKL, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]
        ] = scale_by_factor,
        desc: str = "encoding pictures",
    ) -> LatentCache:
        """Return the latents of pictures, on the CPU; only crops not seen before are encoded.

        What was encoded stays in `folder`, in one file for each folder of pictures. It is found
        again by the picture file's bytes (which hold its size and EXIF orientation), the crop, and
        the VAE's configuration, weights and their dtype: with any of these changed it is encoded
        anew. The VAE works in float32 whatever its weights are stored in; in half precision that of
        SDXL gives numbers that are not finite.

        Args:
            vae: encodes one crop at a time, on its own device.
            pictures: of one folder, with sides that the VAE divides by.
            folder: where to keep what the VAE says; None keeps nothing.
            scale: what the model family makes of mean and deviation.
            desc: what the progress says.

        Raises:
            ImageError: a picture cannot be decoded.
            TrainingError: a latent is not finite.
            WorkspaceError: a picture cannot be read.
        """
        weights = vae_digest(vae)
        keys = [_keys(picture, weights) for picture in pictures]
        kept = _Kept.open(_file_for(pictures, folder))
        missing = [
            (picture, row_keys)
            for picture, row_keys in zip(pictures, keys, strict=True)
            if not kept.entries.keys() >= set(row_keys)
        ]
        if missing:
            with _in_float32(vae):
                for picture, row_keys in progress(missing, desc=desc, unit="pictures"):
                    _encode_missing(vae, picture, row_keys, kept)
            kept.write({p.path: row_keys for p, row_keys in zip(pictures, keys, strict=True)})
        rows = [torch.stack([kept.entries[key] for key in row_keys], 1) for row_keys in keys]
        scaled = [scale(vae, row[0], row[1]) for row in rows]  # row: (2, K, C, h, w)
        return cls(tuple(mean for mean, _ in scaled), tuple(std for _, std in scaled))

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.means)

    def shape(self, row: int) -> tuple[int, int, int]:
        """Return the shape (C, h, w) of a picture's latents."""
        _, channels, height, width = self.means[row].shape
        return channels, height, width

    def sample(self, row: int, generator: torch.Generator, *, mode: bool = False) -> torch.Tensor:
        """Return latents (C, h, w) of a picture, drawn from the posterior of one of its crops.

        Args:
            row: number of the picture.
            generator: a CPU generator; draws the crop, if there is more than one, then the noise.
            mode: draw nothing and return the mean of the first crop.
        """
        mean, std = self.means[row], self.stds[row]
        if mode:
            return mean[0]
        crop = 0
        if len(mean) > 1:
            crop = int(torch.randint(len(mean), (1,), generator=generator))
        noise = torch.randn(mean.shape[1:], generator=generator).to(mean.device)
        return mean[crop] + std[crop] * noise

    def to(self, device: torch.device | str) -> LatentCache:
        """Return the cache on a device."""
        return LatentCache(
            tuple(mean.to(device) for mean in self.means),
            tuple(std.to(device) for std in self.stds),
        )


def vae_digest(vae: AutoencoderKL) -> str:
    """Return a digest of what makes a VAE's latents: its configuration and its encoder's weights.

    Stable Diffusion has 137 MB of them in float32, which take 0.1 s of a CPU.
    """
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        if not name.startswith(_DECODER):
            _update(digest, name, tensor)
    return digest.hexdigest()


def _update(digest: hashlib._Hash, name: str, tensor: torch.Tensor) -> None:
    digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy().data)


def _keys(picture: CropSet, weights: str) -> list[str]:
    content = sha256_of(picture.path)
    parts = [(_KEY_VERSION, weights, "float32", content, repr(crop)) for crop in picture.crops]
    return [hashlib.sha256(json.dumps(part).encode()).hexdigest() for part in parts]


@contextmanager
def _in_float32(vae: AutoencoderKL) -> Iterator[None]:
    """Encode in float32 within the block; half numbers go there and back unchanged."""
    tensors = [*vae.parameters(), *vae.buffers()]
    halves = [t for t in tensors if t.is_floating_point() and t.dtype != torch.float32]
    dtypes = [tensor.dtype for tensor in halves]
    try:
        for tensor in halves:
            tensor.data = tensor.data.float()
        with torch.no_grad(), torch.autocast(vae.device.type, enabled=False):
            yield
    finally:
        for tensor, dtype in zip(halves, dtypes, strict=True):
            tensor.data = tensor.data.to(dtype)


def _encode_missing(vae: AutoencoderKL, picture: CropSet, keys: list[str], kept: _Kept) -> None:
    image = images.load_upright(picture.path)
    for crop, key in zip(picture.crops, keys, strict=True):
        if key in kept.entries:
            continue
        posterior = vae.encode(_pixels(image, crop).to(vae.device)).latent_dist
        moments = torch.cat([posterior.mean, posterior.std]).cpu().contiguous()  # (2, C, h, w)
        if not bool(moments.isfinite().all()):
            raise TrainingError(
                f"{picture.path.name} encodes to numbers that are not finite; "
                "replace the picture, or take another base model if all do so"
            )
        kept.entries[key] = moments


def _file_for(pictures: Sequence[CropSet], folder: Path | None) -> Path | None:
    if folder is None or not pictures:
        return None
    return folder / f"{pictures[0].path.parent.name}.safetensors"


@dataclass
class _Kept:
    """Entries of a cache file: mean and deviation (2, C, h, w) by key, and whose they are.

    `owners` maps each key to the file name of the picture that it was last asked for.
    """

    path: Path | None
    entries: dict[str, torch.Tensor]
    owners: dict[str, str]

    @classmethod
    def open(cls, path: Path | None) -> _Kept:
        """Return what the file holds; nothing if there is none, or if it is damaged."""
        try:
            if path is None or not path.is_file():
                return cls(path, {}, {})
            # Not mapped into memory: a Drive that drops out would end the process.
            data = path.read_bytes()
            size = int.from_bytes(data[:8], "little")
            record = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["record"])
            kept = cls(path, safetensors.torch.load(data), record["owners"])
            if kept.digest() != record["sha256"]:
                raise ValueError("its checksum does not match")
        except Exception as error:  # a parser meets damage with whatever breaks first
            reason = " ".join(str(error).split()) or type(error).__name__
            get_logger(__name__).warning(
                "%s is damaged (%s); the pictures are encoded again", path, reason
            )
            return cls(path, {}, {})
        return kept

    def digest(self) -> str:
        """Return a digest of all that the file holds."""
        digest = hashlib.sha256(json.dumps(self.owners, sort_keys=True).encode())
        for name, tensor in sorted(self.entries.items()):
            _update(digest, name, tensor)
        return digest.hexdigest()

    def write(self, asked: dict[Path, list[str]]) -> None:
        """Write the entries; of the pictures asked for only these, of others while they are there.

        A cache that cannot be written costs time later, so the run goes on without it.
        """
        if self.path is None:
            return
        try:
            self._choose(asked)
            # One entry: safetensors writes several in an order that changes from time to time.
            record = json.dumps({"owners": self.owners, "sha256": self.digest()}, sort_keys=True)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path, safetensors.torch.save(self.entries, {"record": record}))
        except OSError as error:
            get_logger(__name__).warning("the latents are not kept: %s", error)

    def _choose(self, asked: dict[Path, list[str]]) -> None:
        pictures = next(iter(asked)).parent
        names = {path.name for path in asked}
        others = {
            key: name
            for key, name in self.owners.items()
            if name not in names and (pictures / name).is_file()
        }
        self.owners = others | {key: path.name for path, keys in asked.items() for key in keys}
        self.entries = {key: self.entries[key] for key in self.owners}
