"""A small synthetic world of coloured shapes, and a judge that reads pictures of it.

The embedded Stable Diffusion is trained on pictures rendered here. The judge looks only at pixels:
it shares the colour tables with the renderer and nothing else, so it can grade pictures that no
renderer made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from diffusers import StableDiffusionPipeline
    from numpy.typing import NDArray

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "LEFT_OUT",
    "SHAPES",
    "SUBJECT_TOKEN",
    "Scene",
    "Verdict",
    "all_scenes",
    "draw_scenes",
    "foreground_crop",
    "judge",
    "random_scene",
    "render",
    "render_subject",
]

IMG_SIZE = 64
_SUPERSAMPLING = 4
_DRAWN_TOGETHER = 25

COLOURS: dict[str, tuple[int, int, int]] = {
    "blue": (45, 85, 215),
    "green": (50, 160, 70),
    "orange": (245, 130, 30),
    "pink": (245, 130, 180),
    "purple": (130, 60, 175),
    "red": (214, 40, 40),
    "teal": (30, 175, 175),
    "yellow": (250, 210, 50),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (18, 18, 18),
    "brown": (105, 70, 45),
    "gray": (128, 128, 128),
    "sky": (165, 210, 245),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "cross", "ring", "square", "star", "triangle")
# Never shown in training, on any background: what the model draws for them it has put together
# itself.
LEFT_OUT = frozenset(
    {
        ("green", "triangle"),
        ("orange", "square"),
        ("pink", "ring"),
        ("purple", "star"),
        ("teal", "circle"),
        ("yellow", "cross"),
    }
)
SUBJECT_TOKEN = "sks"
_SUBJECT_LEFT, _SUBJECT_RIGHT, _SUBJECT_EYE = COLOURS["blue"], COLOURS["yellow"], COLOURS["red"]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One shape on one background.

    Positions and radius are in pixels of the 64 px picture, `angle` in degrees.
    """

    colour: str
    shape: str
    background: str
    centre: tuple[float, float] = (32.0, 32.0)
    radius: float = 19.0
    angle: float = 0.0
    tint: tuple[int, int, int] = (0, 0, 0)
    background_tint: tuple[int, int, int] = (0, 0, 0)

    @property
    def left_out(self) -> bool:
        """True if training never shows this colour on this shape."""
        return (self.colour, self.shape) in LEFT_OUT

    @property
    def caption(self) -> str:
        """The full caption: "a red circle on a white background"."""
        article = "an" if self.colour[0] in "aeiou" else "a"
        return f"{article} {self.colour} {self.shape} on a {self.background} background"


@dataclass(frozen=True)
class Verdict:
    """What the judge saw; a field is "?" where nothing was found."""

    colour: str
    shape: str
    background: str

    def agrees(self, scene: Scene) -> bool:
        """Whether colour, shape and background are all those of the scene."""
        return (self.colour, self.shape, self.background) == (
            scene.colour,
            scene.shape,
            scene.background,
        )


def all_scenes() -> Iterator[Scene]:
    """Yield one centred scene for each colour, shape and background, left-out ones included."""
    for colour in COLOURS:
        for shape in SHAPES:
            for background in BACKGROUNDS:
                yield Scene(colour=colour, shape=shape, background=background)


def random_scene(rng: np.random.Generator) -> Scene:
    """Return a scene with random attributes, place, size, turn and tint; never a left-out one."""
    while True:
        scene = Scene(
            colour=str(rng.choice(list(COLOURS))),
            shape=str(rng.choice(SHAPES)),
            background=str(rng.choice(list(BACKGROUNDS))),
        )
        if not scene.left_out:
            return _jittered(scene, rng)


def _jittered(
    scene: Scene, rng: np.random.Generator, radii: tuple[float, float] = (17.0, 24.0)
) -> Scene:
    radius = float(rng.uniform(*radii))
    slack = min(7.0, IMG_SIZE / 2 - radius - 2.0)
    return replace(
        scene,
        radius=radius,
        centre=(32.0 + float(rng.uniform(-slack, slack)), 32.0 + float(rng.uniform(-slack, slack))),
        angle=float(rng.uniform(-8.0, 8.0)),
        tint=_tint(rng),
        background_tint=_tint(rng),
    )


def _tint(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (int(v) for v in rng.integers(-8, 9, size=3))
    return red, green, blue


def render(scene: Scene) -> Image.Image:
    """Return the scene as a 64 x 64 RGB picture with smooth edges."""
    canvas = _Canvas(_shifted(BACKGROUNDS[scene.background], scene.background_tint))
    fill = _shifted(COLOURS[scene.colour], scene.tint)
    if scene.shape in ("circle", "ring"):
        canvas.disc(scene.centre, scene.radius, fill)
        if scene.shape == "ring":
            canvas.disc(scene.centre, scene.radius * 0.52, canvas.background)
    else:
        canvas.polygon(_outline(scene.shape, scene.centre, scene.radius, scene.angle), fill)
    return canvas.finish()


def render_subject(background: str, *, seed: int = 0) -> Image.Image:
    """Return a subject that the embedded model has never seen: a star of two halves with an eye.

    Every figure of the world has one colour; this one has three. The picture is 64 x 64 RGB.
    """
    plain = Scene(colour="red", shape="star", background=background)
    scene = _jittered(plain, np.random.default_rng(seed), radii=(21.0, 25.0))
    canvas = _Canvas(_shifted(BACKGROUNDS[background], scene.background_tint))
    outline = _outline("star", scene.centre, scene.radius, scene.angle)
    canvas.polygon(outline, _SUBJECT_LEFT)
    # A regular star is symmetric about the axis through its top point (0) and its bottom notch (5).
    canvas.polygon(outline[:6], _SUBJECT_RIGHT)
    canvas.disc(scene.centre, scene.radius * 0.24, _SUBJECT_EYE)
    return canvas.finish()


class _Canvas:
    """A supersampled drawing surface in pixel units of the final picture."""

    def __init__(self, background: tuple[int, int, int]) -> None:
        self.background = background
        self._image = Image.new("RGB", (IMG_SIZE * _SUPERSAMPLING,) * 2, background)
        self._draw = ImageDraw.Draw(self._image)

    def disc(self, centre: tuple[float, float], radius: float, fill: tuple[int, int, int]) -> None:
        (x, y), s = centre, _SUPERSAMPLING
        self._draw.ellipse(
            ((x - radius) * s, (y - radius) * s, (x + radius) * s, (y + radius) * s), fill=fill
        )

    def polygon(self, points: list[tuple[float, float]], fill: tuple[int, int, int]) -> None:
        self._draw.polygon([(x * _SUPERSAMPLING, y * _SUPERSAMPLING) for x, y in points], fill=fill)

    def finish(self) -> Image.Image:
        return self._image.resize((IMG_SIZE, IMG_SIZE), Image.Resampling.BOX)


def _outline(
    shape: str, centre: tuple[float, float], radius: float, angle: float
) -> list[tuple[float, float]]:
    """Return the corners of a polygonal shape, clockwise from the top, in pixels."""
    if shape == "cross":
        arm = 0.36
        unit = [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)]
        unit += [(-x, -y) for x, y in unit]
    elif shape == "square":
        unit = [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    else:
        radii = (1.0, 0.42) * 5 if shape == "star" else (1.0,) * 3
        unit = [
            (
                r * math.sin(2 * math.pi * i / len(radii)),
                -r * math.cos(2 * math.pi * i / len(radii)),
            )
            for i, r in enumerate(radii)
        ]
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return [
        (centre[0] + radius * (x * cos - y * sin), centre[1] + radius * (x * sin + y * cos))
        for x, y in unit
    ]


def _shifted(colour: tuple[int, int, int], tint: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, c + t)) for c, t in zip(colour, tint, strict=True))
    return red, green, blue


def draw_scenes(
    pipeline: StableDiffusionPipeline,
    scenes: Sequence[Scene],
    *,
    num_inference_steps: int = 25,
    guidance_scale: float = 3.5,
) -> list[Image.Image]:
    """Return what a text-to-image pipeline draws for the captions; the n-th picture with seed n."""
    import torch

    pictures: list[Image.Image] = []
    for first in range(0, len(scenes), _DRAWN_TOGETHER):
        batch = scenes[first : first + _DRAWN_TOGETHER]
        pictures += pipeline(
            [scene.caption for scene in batch],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(first + i) for i in range(len(batch))],
        ).images
    return pictures


def judge(image: Image.Image) -> Verdict:
    """Return the background colour, foreground colour and shape that the pixels of a picture show.

    Background: the median of the border. Foreground: the largest connected region that differs from
    it; its colour is the median of the region without its edge. Shape: see `_shape_of`.
    """
    from scipy import ndimage  # scipy takes 0.1 s to import and only the judge needs it

    lab, background, region = _segment(image)
    name = _nearest(background, BACKGROUNDS)
    if not region.any():
        return Verdict("?", "?", name)
    core = ndimage.binary_erosion(region, iterations=2)
    pixels = lab[core if core.any() else region]
    return Verdict(_nearest(np.median(pixels, axis=0), COLOURS), _shape_of(region), name)


def foreground_crop(image: Image.Image, side: int) -> NDArray[np.float64]:
    """Return the square around the foreground as (side, side, 3) L*a*b*; all if there is none.

    Place and size of the foreground are gone from it, so that two pictures can be compared by what
    they show.
    """
    region = _segment(image)[2]
    rows, columns = np.nonzero(region if region.any() else np.ones_like(region))
    half = (max(np.ptp(rows), np.ptp(columns)) + 1) / 2
    row, column = (rows.min() + rows.max() + 1) / 2, (columns.min() + columns.max() + 1) / 2
    box = (column - half, row - half, column + half, row + half)
    crop = image.convert("RGB").transform(
        (side, side), Image.Transform.EXTENT, box, Image.Resampling.BILINEAR
    )
    return _to_lab(np.asarray(crop))


def _segment(
    image: Image.Image,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Return the picture in L*a*b*, its background colour, and where its foreground is."""
    from scipy import ndimage

    lab = _to_lab(np.asarray(image.convert("RGB")))
    edge = np.zeros(lab.shape[:2], bool)
    edge[:2] = edge[-2:] = edge[:, :2] = edge[:, -2:] = True
    background = np.median(lab[edge], axis=0)
    distance = np.linalg.norm(lab - background, axis=-1)
    # 12 is a difference that anyone sees; half of the strongest keeps blurred edges out.
    regions, count = ndimage.label(distance > max(12.0, 0.5 * float(np.percentile(distance, 97))))
    if count == 0:
        return lab, background, np.zeros_like(edge)
    region = regions == 1 + int(np.bincount(regions.ravel())[1:].argmax())
    return lab, background, region if region.mean() >= 0.01 else np.zeros_like(edge)


def _shape_of(region: NDArray[np.bool_]) -> str:
    """Name the shape of a region from its hole and the Fourier series of its outline.

    The outline is the distance from the centroid as a function of the angle. A regular figure of n
    corners has its first strong harmonic at n: 3 triangle, 4 square or cross, 5 star; a disc has
    none. A square reaches furthest on its diagonals, a cross along the axes, so the sign of the
    fourth harmonic parts them, whatever the weight of the corners, while turned by less than 22.5
    degrees.
    """
    from scipy import ndimage

    filled = ndimage.binary_fill_holes(region)
    if region.sum() < 0.9 * filled.sum():
        return "ring"
    rows, columns = np.nonzero(filled)
    row, column = rows.mean(), columns.mean()
    angles = np.arctan2(rows - row, columns - column)
    bins = np.floor((angles + np.pi) / (2 * np.pi) * 72).astype(int) % 72
    outline = np.zeros(72)
    np.maximum.at(outline, bins, np.hypot(rows - row, columns - column))
    series = np.fft.rfft(outline) / 72 / max(float(outline.mean()), 1e-6)
    third, fourth, fifth = (float(v) for v in np.abs(series[3:6]))
    if max(third, fourth, fifth) < 0.028:
        return "circle"
    if fourth >= max(third, fifth):
        return "cross" if series[4].real > 0 else "square"
    return "triangle" if third > fifth else "star"


def _nearest(lab: NDArray[np.float64], table: dict[str, tuple[int, int, int]]) -> str:
    return min(
        table,
        key=lambda name: float(np.linalg.norm(lab - _to_lab(np.array([[table[name]]]))[0, 0])),
    )


def _to_lab(rgb: NDArray[np.uint8] | NDArray[np.int64]) -> NDArray[np.float64]:
    """Convert (..., 3) sRGB in [0, 255] to CIE L*a*b*, D65.

    Source: IEC 61966-2-1 (sRGB decoding and matrix) and CIE 15:2004 (L*a*b*).
    """
    encoded = rgb.astype(np.float64) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    matrix = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = linear @ matrix.T / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack(
        [116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])],
        axis=-1,
    )
