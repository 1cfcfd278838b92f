"""Settings of the DreamBooth verbs but training; a frozen record each, checked when made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from colabtools import registry
from colabtools.errors import ConfigError
from colabtools.fields import (
    LARGEST_SEED,
    check,
    check_choice,
    check_flag,
    check_number,
    check_text,
    check_whole,
    split_text,
    whole_from_text,
)

__all__ = ["Auto", "EvaluateConfig", "ExportConfig", "GenerateConfig", "PrepareConfig"]

Auto = Literal["auto"]

# Beyond this no Stable Diffusion draws anything but repetitions, and memory ends.
_LARGEST_RESOLUTION = 4096


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How photos become training pictures.

    Attributes:
        images: folder of photos, with optional captions as `<photo>.txt` or `<photo>.caption`
            beside them; "demo" for the five pictures that come with the package.
        base_model: decides the picture size where `resolution` is "auto".
        instance_prompt: the caption of photos that have no file of their own.
        resolution: side of the square pictures in pixels, a multiple of 8.
        buckets: keep each photo's shape as nearly as can be: pictures of several shapes, none
            larger than the square would be.
        crop: where a photo of another shape is cut: "subject" (what stands out from the photo's
            border, and faces where OpenCV 4 or scikit-image can find them) or "centre"; a box
            chosen by hand comes before either.
        replace: put the pictures in place of others that the session holds already; those are
            kept aside.
        allow_resolution: prepare at a size that the base model was not made for.
    """

    images: str
    base_model: str = "micro"
    instance_prompt: str = "a sks star"
    resolution: int | Auto = "auto"
    buckets: bool = False
    crop: str = "subject"
    replace: bool = False
    allow_resolution: bool = False

    def __post_init__(self) -> None:
        """Check every field."""
        check_text("images", self.images, "a folder of photos")
        check_text("base_model", self.base_model, "a name, a folder or a Hub repository")
        check_text("instance_prompt", self.instance_prompt, "a prompt")
        if self.resolution != "auto":
            check_whole("resolution", self.resolution, 64, _LARGEST_RESOLUTION, also=", or auto")
            check("resolution", self.resolution, self.resolution % 8 == 0, "a multiple of 8")
        check_choice("crop", self.crop, ("subject", "centre"))
        for name in ("buckets", "replace", "allow_resolution"):
            check_flag(name, getattr(self, name))

    @property
    def side(self) -> int:
        """Side of the pictures in pixels; with buckets, of the square of the same area.

        Raises:
            ConfigError: the base model was not made for it, and `allow_resolution` is off.
            ModelError: the base model is not known.
        """
        base = registry.find_base(self.base_model)
        if self.resolution == "auto":
            return base.resolution
        if not self.allow_resolution:
            registry.check_resolution(base, self.resolution)
        return self.resolution


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Pictures to draw with the trained session.

    Attributes:
        prompts: one picture each per seed; "|" in a text separates two prompts; empty takes the
            captions of the first pictures.
        prompts_file: a text file of prompts instead, one a line; lines that begin with # are
            remarks.
        negative_prompt: what the pictures shall not show.
        seeds: starting noise; the same seed draws the same picture; a text with commas is split.
        step: draw with the weights that were saved at this step; 0 for the newest.
        num_inference_steps: denoising steps; "auto" for what suits the base model.
        guidance_scale: weight of the prompt (classifier-free guidance), 1 is off; "auto" for what
            suits the base model.
        resolution: side of the pictures in pixels, a multiple of 8; "auto" for that of the
            training pictures.
        compare: draw each picture with the base model too and show both.
    """

    prompts: tuple[str, ...] = ()
    prompts_file: str = ""
    negative_prompt: str = ""
    seeds: tuple[int, ...] = (0, 1, 2)
    step: int = 0
    num_inference_steps: int | Auto = "auto"
    guidance_scale: float | Auto = "auto"
    resolution: int | Auto = "auto"
    compare: bool = True

    def __post_init__(self) -> None:
        """Check every field, and split those that came as text."""
        _check_drawing(self)
        negative = self.negative_prompt
        check("negative_prompt", negative, isinstance(negative, str), "a text, or an empty one")
        scale = self.guidance_scale
        useless = bool(negative.strip()) and scale != "auto" and scale <= 1
        check("negative_prompt", negative, not useless, "none, or a guidance_scale above 1")
        check_flag("compare", self.compare)

    def load_prompts(self) -> tuple[str, ...]:
        """Return the prompts of the file if there is one, else those of the field, maybe none.

        Raises:
            ConfigError: the file cannot be read, or holds no prompt.
        """
        return _read_prompts(self.prompts_file) if self.prompts_file else self.prompts


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How faithful the trained session is to its photos and to prompts.

    Attributes:
        token: the word that stands for the subject; "auto" for the first of it in the prompt that
            the pictures were prepared with, such as sks in "a photo of sks dog".
        class_name: what the subject is one of; "auto" for the words behind the token there.
        prompts: templates with "{token}" and "{class}"; "|" in a text separates two.
        prompts_file: a text file of templates instead, one a line; lines that begin with # are
            remarks.
        seeds: one picture each per prompt; a text with commas is split.
        class_images: pictures of "a {class}" to draw before and after training, to see what was
            forgotten; 0 for none.
        step: judge the weights that were saved at this step; 0 for the newest.
        num_inference_steps: denoising steps; "auto" for what suits the base model.
        guidance_scale: weight of the prompt (classifier-free guidance), 1 is off; "auto" for what
            suits the base model.
        resolution: side of the pictures in pixels, a multiple of 8; "auto" for that of the
            training pictures.
        dino_model: judges the subject; a Hub repository or a local folder.
        clip_model: judges subject and prompt; a Hub repository or a local folder.
    """

    token: str = "auto"
    class_name: str = "auto"
    prompts: tuple[str, ...] = (
        "a {token} {class} on a white background",
        "a {token} {class} on a wooden table",
        "a {token} {class} in a meadow",
        "a {token} {class} under a stormy sky",
        "a {token} {class} in front of a brick wall",
        "a {token} {class} beside a red bicycle",
        "a pencil drawing of a {token} {class}",
        "a {token} {class} made of glass",
    )
    prompts_file: str = ""
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    class_images: int = 8
    step: int = 0
    num_inference_steps: int | Auto = "auto"
    guidance_scale: float | Auto = "auto"
    resolution: int | Auto = "auto"
    dino_model: str = "facebook/dino-vits16"
    clip_model: str = "openai/clip-vit-base-patch32"

    def __post_init__(self) -> None:
        """Check every field, and split those that came as text."""
        check_text("token", self.token, "the word that stands for the subject")
        check_text("class_name", self.class_name, "what the subject is one of, such as dog")
        _check_drawing(self)
        if not self.prompts_file:
            _check_templates("prompts", self.prompts)
        check_whole("class_images", self.class_images, 0)
        check("class_images", self.class_images, self.class_images != 1, "0, or 2 and more")
        check_text("dino_model", self.dino_model, "a Hub repository or a local folder")
        check_text("clip_model", self.clip_model, "a Hub repository or a local folder")

    def load_prompts(self) -> tuple[str, ...]:
        """Return the templates of the file if there is one, else those of the field.

        Raises:
            ConfigError: the file cannot be read, holds none, or one lacks its placeholders.
        """
        if not self.prompts_file:
            return self.prompts
        templates = _read_prompts(self.prompts_file)
        _check_templates("prompts_file", templates)
        return templates


def _check_drawing(config: GenerateConfig | EvaluateConfig) -> None:
    """Check the fields that say what is drawn, and split those that came as text."""
    prompts = split_text("prompts", config.prompts, "|")
    if isinstance(config, EvaluateConfig):
        check("prompts", prompts, bool(prompts), "at least one prompt")
    elif prompts == ("",):
        prompts = ()
    for prompt in prompts:
        check_text("prompts", prompt, "a prompt on each side of a '|'")
    file = config.prompts_file
    check("prompts_file", file, isinstance(file, str), "a text file of prompts, or an empty text")
    chosen = prompts != type(config).prompts
    check("prompts_file", file, not (file and chosen), "either this or prompts, not both")
    seeds = tuple(whole_from_text(seed) for seed in split_text("seeds", config.seeds, ","))
    check("seeds", seeds, bool(seeds), "at least one seed")
    for seed in seeds:
        check_whole("seeds", seed, 0, LARGEST_SEED)
    # A picture that is asked for twice is the same picture.
    object.__setattr__(config, "prompts", tuple(dict.fromkeys(prompts)))
    object.__setattr__(config, "seeds", tuple(dict.fromkeys(seeds)))
    check_whole("step", config.step, 0)
    if config.num_inference_steps != "auto":
        check_whole("num_inference_steps", config.num_inference_steps, 1, also=", or auto")
    if config.guidance_scale != "auto":
        check_number("guidance_scale", config.guidance_scale, also=", or auto")
    if config.resolution != "auto":
        check_whole("resolution", config.resolution, 64, _LARGEST_RESOLUTION, also=", or auto")
        check("resolution", config.resolution, config.resolution % 8 == 0, "a multiple of 8")


def _check_templates(name: str, templates: tuple[str, ...]) -> None:
    for template in templates:
        complete = "{token}" in template and "{class}" in template
        check(name, template, complete, "templates that hold both {token} and {class}")


def _read_prompts(file: str) -> tuple[str, ...]:
    try:
        # Notepad begins its files with a byte order mark.
        lines = Path(file).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"prompts_file is {file!r}; it cannot be read ({error}), give a UTF-8 text file"
        ) from error
    prompts = [line.strip() for line in lines if not line.lstrip().startswith("#")]
    found = tuple(dict.fromkeys(filter(None, prompts)))
    check("prompts_file", file, bool(found), "a file with a prompt on each line; it holds none")
    return found


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Files to write from the trained session.

    Attributes:
        formats: any of "safetensors" and "ckpt", for the whole model, and "lora", for the adapters
            alone by the names that web UIs have for them; a text with commas is split.
        dtype: of every tensor in the file, one of "fp16", "bf16" and "fp32".
        step: write the weights that were saved at this step, as `<session>_step_<n>`; 0 for the
            newest.
        disconnect: give a hosted runtime back once the files are verified and on Google Drive.
    """

    DTYPES: ClassVar[tuple[str, ...]] = ("fp16", "bf16", "fp32")
    FORMATS: ClassVar[tuple[str, ...]] = ("safetensors", "ckpt", "lora")

    formats: tuple[str, ...] = ("safetensors",)
    dtype: str = "fp16"
    step: int = 0
    disconnect: bool = False

    def __post_init__(self) -> None:
        """Check every field, and split those that came as text."""
        formats = split_text("formats", self.formats, ",")
        known = bool(formats) and all(name in self.FORMATS for name in formats)
        check("formats", formats, known, f"one or more of {', '.join(self.FORMATS)}")
        object.__setattr__(self, "formats", tuple(dict.fromkeys(formats)))
        check("dtype", self.dtype, self.dtype in self.DTYPES, f"one of {', '.join(self.DTYPES)}")
        check_whole("step", self.step, 0)
        check_flag("disconnect", self.disconnect)
