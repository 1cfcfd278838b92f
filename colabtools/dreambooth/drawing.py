"""One picture from a pipeline, and the file that says how it was drawn."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from colabtools.devices import half_dtype, torch_device
from colabtools.drive import atomic_path
from colabtools.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from diffusers import DiffusionPipeline
    from PIL import Image

__all__ = ["Drawing", "draw", "draw_picture", "read_settings", "save_picture"]

# The PNG text chunk that holds a picture's settings as JSON.
_SETTINGS_KEY = "colabtools"


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """All that decides a picture beside the networks that draw it.

    `resolution` is the side in pixels; None is the pipeline's own.
    """

    prompt: str
    seed: int
    negative_prompt: str = ""
    num_inference_steps: int = 25
    guidance_scale: float = 3.5
    resolution: int | None = None


def draw(
    pipeline: DiffusionPipeline,
    prompt: str,
    *,
    seed: int,
    num_inference_steps: int = 25,
    guidance_scale: float = 3.5,
) -> Image.Image:
    """Return one picture; see `draw_picture`, which takes more settings."""
    drawing = Drawing(
        prompt=prompt,
        seed=seed,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
    )
    return draw_picture(pipeline, drawing)


def draw_picture(pipeline: DiffusionPipeline, drawing: Drawing) -> Image.Image:
    """Return one picture; the same drawing gives the same picture, whatever was drawn before.

    Raises:
        ConfigError: the model takes no negative prompt, and one is given.
    """
    device = torch_device()
    dtype = half_dtype(device)
    pipeline.to(device)
    options = _options(pipeline, drawing)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        output = pipeline(
            drawing.prompt,
            num_inference_steps=drawing.num_inference_steps,
            guidance_scale=drawing.guidance_scale,
            generator=torch.Generator().manual_seed(drawing.seed),
            **options,
        )
    picture: Image.Image = output.images[0]
    return picture


def _options(pipeline: DiffusionPipeline, drawing: Drawing) -> dict[str, Any]:
    """Return the arguments that not every family takes, if they are given at all."""
    options: dict[str, Any] = {}
    if drawing.resolution is not None:
        options |= {"height": drawing.resolution, "width": drawing.resolution}
    if drawing.negative_prompt.strip():
        known = inspect.signature(pipeline.__call__).parameters
        # Where guidance is distilled into the model (Flux), a negative prompt is accepted and
        # does nothing, unless each step is computed twice.
        if "negative_prompt" not in known or "true_cfg_scale" in known:
            raise ConfigError(
                f"negative_prompt is {drawing.negative_prompt!r}; give none, "
                f"{type(pipeline).__name__} has no use for it"
            )
        options["negative_prompt"] = drawing.negative_prompt
    return options


def read_settings(path: Path) -> dict[str, Any] | None:
    """Return the settings that drew a picture; None if it is missing, damaged or not ours."""
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as picture:
            picture.load()
            settings = json.loads(picture.info[_SETTINGS_KEY])
    except (OSError, SyntaxError, ValueError, KeyError, TypeError):
        return None
    return settings if isinstance(settings, dict) else None


def save_picture(picture: Image.Image, settings: Mapping[str, Any], path: Path) -> None:
    """Write a PNG that carries its settings.

    Raises:
        WorkspaceError: it cannot be written.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(_SETTINGS_KEY, json.dumps(settings))
    with atomic_path(path) as partial:
        picture.save(partial, format="PNG", pnginfo=info)
