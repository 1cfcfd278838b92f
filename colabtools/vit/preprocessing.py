"""From a picture to the numbers that a model was trained on, by one rule for every step."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from colabtools.errors import ConfigError, ModelError
from colabtools.fields import check, check_choice, check_whole
from colabtools.images import Encoded, load_upright
from colabtools.vit.config import DECODINGS, FITS

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

__all__ = ["Preprocessing"]

# By Pillow's numbers, which configurations give.
# Source: PIL.Image.Resampling.
_INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
# A JPEG decoded at a half, a quarter or an eighth is a little smoother than one that is resized in
# a single step. From at least this many times the target on, both agree within 3 of 255.
_DRAFT_FACTOR = 2.0


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a picture becomes pixel values.

    Attributes:
        height: of what the model sees, in pixels.
        width: likewise.
        interpolation: "nearest", "box", "bilinear", "hamming", "bicubic" or "lanczos", with
            Pillow's antialiasing.
        fit: "resize" squashes the picture to the size, "crop" fills the size and cuts what is over
            on both sides, "pad" shows all of it between bars of the mean colour.
        side_before_cut: in pixels. With "crop" the shorter side is brought to it before the cut,
            0 for no more than the size needs. With "resize" the picture is squashed to a square
            of this side, whose centre is cut out; 0 for no cut.
        mean: of each channel, taken off after rescaling.
        std: of each channel, by which the rest is divided.
        rescale_factor: by which 0 to 255 is multiplied first.
        decoding: "exact" decodes every pixel; "fast" lets a large JPEG be decoded at a fraction of
            its size (mean difference below 0.25 of 255, greatest 3).
    """

    height: int
    width: int
    interpolation: str = "bilinear"
    fit: str = "resize"
    side_before_cut: int = 0
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255
    decoding: str = "exact"

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: a field has a value that cannot work.
        """
        for name in ("height", "width"):
            check_whole(name, getattr(self, name), 1)
        check_whole("side_before_cut", self.side_before_cut, 0)
        check_choice("interpolation", self.interpolation, _INTERPOLATIONS)
        check_choice("fit", self.fit, FITS)
        check_choice("decoding", self.decoding, DECODINGS)
        for name in ("mean", "std"):
            values = tuple(float(value) for value in getattr(self, name))
            valid = len(values) in (1, 3) and all(map(math.isfinite, values))
            check(name, values, valid and (name == "mean" or min(values) > 0), "1 or 3 numbers")
            object.__setattr__(self, name, values)
        check("std", self.std, len(self.std) == len(self.mean), "as many numbers as mean has")

    @property
    def channels(self) -> int:
        """1 for greys, 3 for RGB."""
        return len(self.mean)

    def read(self, photo: Path | Encoded) -> NDArray[np.uint8]:
        """Return the pixels (H, W, C) of a picture file, upright.

        Raises:
            ImageError: the file cannot be decoded to the end.
        """
        if self.decoding == "exact":
            return self.fit_picture(load_upright(photo))
        width, height = (max(side, self.side_before_cut) for side in (self.width, self.height))
        if self.fit != "resize":
            # Which side of the photo is the shorter is not known before it is opened.
            width = height = max(width, height)
        draft = (math.ceil(width * _DRAFT_FACTOR), math.ceil(height * _DRAFT_FACTOR))
        return self.fit_picture(load_upright(photo, draft=draft))

    def fit_picture(self, picture: Image.Image) -> NDArray[np.uint8]:
        """Return the pixels (H, W, C) of a picture."""
        mode = "L" if self.channels == 1 else "RGB"
        if picture.mode != mode:
            picture = picture.convert(mode)
        pixels = np.asarray(getattr(self, f"_{self.fit}")(picture))
        return pixels.reshape(self.height, self.width, self.channels)

    @functools.cached_property
    def table(self) -> NDArray[np.float32]:
        """The value of every level of every channel, (C, 256) float32.

        A pixel has 256 levels, so rescaling and normalising are looked up instead of computed. The
        arithmetic is that of transformers, and so are all bits of the result.
        Source: transformers 5.23, image_transforms.py, rescale and normalize.
        """
        levels = (np.arange(256, dtype=np.float64) * self.rescale_factor).astype(np.float32)
        mean, std = (np.array(v, dtype=np.float32)[:, None] for v in (self.mean, self.std))
        table: NDArray[np.float32] = (levels - mean) / std
        return table

    def normalize(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return pixel values (B, C, H, W) float32 of pixels (B, H, W, C) uint8."""
        values = [self.table[channel][pixels[..., channel]] for channel in range(self.channels)]
        return np.stack(values, axis=1)

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Return the specification that `to_json` wrote.

        Raises:
            ConfigError: a field is missing, unknown or has a value that cannot work.
        """
        names = {field.name for field in fields(cls)}
        if odd := sorted(values.keys() ^ names):
            raise ConfigError(f"a preprocessing with other fields than this version's: {odd}")
        return cls(**values)

    @classmethod
    def from_config(
        cls, processor: Mapping[str, Any], size: tuple[int, int], channels: int = 3
    ) -> Preprocessing:
        """Return what a model's own processor configuration says.

        Args:
            processor: the values of preprocessor_config.json; {} where a model brings none.
            size: height and width in pixels that the model was built for.
            channels: 1 or 3.

        Raises:
            ModelError: the configuration says something that cannot be done here.
        """
        if "input_size" in processor:
            return cls._from_timm(processor)
        fit, height, width, side_before_cut = _size_of(processor, size)
        off = [name for name in ("resize", "rescale") if processor.get(f"do_{name}") is False]
        if off:
            raise ModelError(
                f"the model's preprocessing has do_{off[0]} false; that is not supported"
            )
        plain = processor.get("do_normalize") is False
        mean = [0.0] * channels if plain else processor.get("image_mean", [0.5] * channels)
        std = [1.0] * channels if plain else processor.get("image_std", [0.5] * channels)
        number = processor.get("resample", 2)
        if number not in range(len(_INTERPOLATIONS)):
            raise ModelError(f"the model's preprocessing has resample {number!r}, which is unknown")
        return cls(
            height=height,
            width=width,
            side_before_cut=side_before_cut,
            fit=fit,
            interpolation=_INTERPOLATIONS[number],
            mean=tuple(mean)[:channels],
            std=tuple(std)[:channels],
            rescale_factor=processor.get("rescale_factor", 1 / 255),
        )

    @classmethod
    def _from_timm(cls, processor: Mapping[str, Any]) -> Preprocessing:
        """Source: timm 1.0, data/transforms_factory.py, transforms_imagenet_eval."""
        _, height, width = processor["input_size"]
        squash = processor.get("crop_mode") == "squash"
        return cls(
            height=height,
            width=width,
            side_before_cut=0 if squash else math.floor(height / processor.get("crop_pct", 0.875)),
            fit="resize" if squash else "crop",
            interpolation=processor.get("interpolation", "bicubic"),
            mean=tuple(processor["mean"]),
            std=tuple(processor["std"]),
        )

    def _filter(self) -> Image.Resampling:
        from PIL import Image

        return Image.Resampling[self.interpolation.upper()]

    def _resize(self, picture: Image.Image) -> Image.Image:
        side = self.side_before_cut
        size = (side, side) if side else (self.width, self.height)
        if picture.size != size:
            picture = picture.resize(size, self._filter())
        return self._cut(picture) if side else picture

    def _crop(self, picture: Image.Image) -> Image.Image:
        short = min(picture.size)
        # Source: transformers 5.23, get_resize_output_image_size: the longer side is cut to whole
        # pixels, not rounded.
        if self.side_before_cut:
            size = [int(self.side_before_cut * side / short) for side in picture.size]
        else:
            scale = max(self.width / picture.width, self.height / picture.height)
            size = [
                max(least, round(side * scale))
                for side, least in zip(picture.size, (self.width, self.height), strict=True)
            ]
        return self._cut(picture.resize((size[0], size[1]), self._filter()))

    def _cut(self, picture: Image.Image) -> Image.Image:
        left, top = (picture.width - self.width) // 2, (picture.height - self.height) // 2
        return picture.crop((left, top, left + self.width, top + self.height))

    def _pad(self, picture: Image.Image) -> Image.Image:
        from PIL import Image

        scale = min(self.width / picture.width, self.height / picture.height)
        width, height = (
            min(most, max(1, round(side * scale)))
            for side, most in zip(picture.size, (self.width, self.height), strict=True)
        )
        bars = tuple(round(min(255, max(0, mean / self.rescale_factor))) for mean in self.mean)
        page = Image.new(
            picture.mode, (self.width, self.height), bars if len(bars) > 1 else bars[0]
        )
        page.paste(
            picture.resize((width, height), self._filter()),
            ((self.width - width) // 2, (self.height - height) // 2),
        )
        return page


def _size_of(processor: Mapping[str, Any], size: tuple[int, int]) -> tuple[str, int, int, int]:
    """Return the fit, height, width and the side before the cut, 0 where nothing is cut."""
    wanted = _sides(processor.get("size", {"height": size[0], "width": size[1]}))
    cut = _sides(processor.get("crop_size", wanted)) if processor.get("do_center_crop") else {}
    short = wanted.get("shortest_edge", 0)
    if short and "height" in cut:
        return "crop", cut["height"], cut["width"], short
    if short:
        return "crop", *size, short
    if {"height", "width"} <= wanted.keys():
        sides = wanted["height"], wanted["width"]
        if cut in ({}, wanted):
            return "resize", *sides, 0
        if "height" in cut and sides[0] == sides[1]:
            return "resize", cut["height"], cut["width"], sides[0]
    raise ModelError(
        f"the model's preprocessing has size {wanted!r} and crop_size {cut!r}, which is unknown"
    )


def _sides(size: Any) -> dict[str, int]:
    return {"height": size, "width": size} if isinstance(size, int) else dict(size)
