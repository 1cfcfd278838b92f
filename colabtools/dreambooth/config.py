"""Settings of the DreamBooth verbs; a frozen record each, checked when it is made."""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from colabtools import registry
from colabtools.errors import ConfigError

if TYPE_CHECKING:
    from colabtools.registry import Base

__all__ = [
    "Auto",
    "ExportConfig",
    "GenerateConfig",
    "PrepareConfig",
    "TrainConfig",
    "TrainPlan",
    "plan_training",
]

Auto = Literal["auto"]

_LARGEST_SEED = 2**63 - 1
# Beyond this no Stable Diffusion draws anything but repetitions, and memory ends.
_LARGEST_RESOLUTION = 4096


def _check(name: str, value: object, ok: bool, want: str) -> None:
    if not ok:
        raise ConfigError(f"{name} is {value!r}; give {want}")


def _whole(name: str, value: object, least: int, most: float = math.inf, also: str = "") -> None:
    valid = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
    limit = "" if most == math.inf else f" and at most {most}"
    _check(name, value, valid, f"a whole number of at least {least}{limit}{also}")


def _positive(name: str, value: object, also: str = "") -> None:
    valid = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
    _check(name, value, valid, f"a number above 0{also}")


def _flag(name: str, value: object) -> None:
    # The text "false" would count as true.
    _check(name, value, isinstance(value, bool), "True or False")


def _text(name: str, value: object, want: str) -> None:
    _check(name, value, isinstance(value, str) and bool(value.strip()), want)


def _split(name: str, value: object, mark: str) -> tuple[Any, ...]:
    """Return the items of a sequence, its texts taken apart at the mark."""
    items = [value] if isinstance(value, str) else value
    _check(
        name, value, isinstance(items, (list, tuple)), f"a list, or a text with {mark!r} between"
    )
    parts: list[Any] = []
    for item in typing.cast("list[Any]", items):
        text = isinstance(item, str)
        parts += [part.strip() for part in item.split(mark)] if text else [item]
    return tuple(parts)


def _number(value: Any) -> Any:
    """Return the whole number that a text spells; anything else stays, for the check to refuse."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How photos become training pictures.

    Attributes:
        images: folder of photos, with optional captions as `<photo>.txt` or `<photo>.caption`
            beside them; "demo" for the five pictures that come with the package.
        base_model: decides the picture size where `resolution` is "auto".
        instance_prompt: the caption of photos that have no file of their own.
        resolution: side of the square pictures in pixels, a multiple of 8.
        replace: put the pictures in place of others that the session holds already; those are
            kept aside.
    """

    images: str
    base_model: str = "micro"
    instance_prompt: str = "a sks star"
    resolution: int | Auto = "auto"
    replace: bool = False

    def __post_init__(self) -> None:
        """Check every field."""
        _text("images", self.images, "a folder of photos")
        _text("base_model", self.base_model, "a name, a folder or a Hub repository")
        _text("instance_prompt", self.instance_prompt, "a prompt")
        if self.resolution != "auto":
            _whole("resolution", self.resolution, 64, _LARGEST_RESOLUTION, also=", or auto")
            _check("resolution", self.resolution, self.resolution % 8 == 0, "a multiple of 8")
        _flag("replace", self.replace)

    @property
    def side(self) -> int:
        """Side of the pictures in pixels.

        Raises:
            ModelError: it is that of a base model which is not known.
        """
        base = registry.find_base(self.base_model)
        return base.resolution if self.resolution == "auto" else self.resolution


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A two-stage training run; "auto" takes the value of the base model's reference run.

    Attributes:
        base_model: name in the registry, folder in diffusers' layout, or Hub repository.
        text_encoder_steps: updates of the first stage: the text encoder learns through the frozen
            UNet.
        unet_steps: updates of the second stage: the UNet learns with the text encoder frozen.
        text_encoder_lr: peak learning rate of the first stage, falling linearly to 0.
        unet_lr: the same for the second stage.
        batch_size: pictures per update.
        prior_preservation: learn pictures of the class next to the photos, so that the class stays
            what it was.
        class_prompt: prompt of the class pictures; needed with prior_preservation.
        num_class_images: how many of them to draw with the base model.
        prior_loss_weight: weight of their loss.
        seed: of data order, noise and timesteps.
        restart: train again although the session already holds the result of these settings.
    """

    base_model: str = "micro"
    text_encoder_steps: int | Auto = "auto"
    unet_steps: int | Auto = "auto"
    text_encoder_lr: float | Auto = "auto"
    unet_lr: float | Auto = "auto"
    batch_size: int | Auto = "auto"
    prior_preservation: bool = False
    class_prompt: str = ""
    num_class_images: int | Auto = "auto"
    prior_loss_weight: float = 1.0
    seed: int = 0
    restart: bool = False

    def __post_init__(self) -> None:
        """Check every field."""
        _text("base_model", self.base_model, "a name, a folder or a Hub repository")
        least = {"text_encoder_steps": 0, "unet_steps": 0, "batch_size": 1, "num_class_images": 1}
        for name in least:
            if getattr(self, name) != "auto":
                _whole(name, getattr(self, name), least[name], also=", or auto")
        for name in ("text_encoder_lr", "unet_lr"):
            if getattr(self, name) != "auto":
                _positive(name, getattr(self, name), also=", or auto")
        _check_some_steps(self.text_encoder_steps, self.unet_steps)
        _flag("prior_preservation", self.prior_preservation)
        _check("class_prompt", self.class_prompt, isinstance(self.class_prompt, str), "a prompt")
        if self.prior_preservation and not self.class_prompt.strip():
            raise ConfigError(
                f"class_prompt is {self.class_prompt!r}; prior_preservation needs one, "
                "such as 'a star'"
            )
        _positive("prior_loss_weight", self.prior_loss_weight)
        _whole("seed", self.seed, 0, _LARGEST_SEED)
        _flag("restart", self.restart)


def _check_some_steps(text_encoder_steps: object, unet_steps: object) -> None:
    if text_encoder_steps == 0 and unet_steps == 0:
        raise ConfigError(
            "text_encoder_steps and unet_steps are both 0; "
            "nothing would be trained, give one of them"
        )


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """A `TrainConfig` with every "auto" replaced by a number."""

    base: Base
    text_encoder_steps: int
    unet_steps: int
    text_encoder_lr: float
    unet_lr: float
    batch_size: int
    class_prompt: str
    num_class_images: int
    prior_loss_weight: float
    seed: int

    @property
    def total_steps(self) -> int:
        """Updates of both stages."""
        return self.text_encoder_steps + self.unet_steps


def plan_training(config: TrainConfig) -> TrainPlan:
    """Return the run that a config asks for, in numbers.

    Raises:
        ConfigError: there is no step to train.
        ModelError: the base model is not known.
    """
    base = registry.find_base(config.base_model)

    def chosen(name: str) -> Any:
        value = getattr(config, name)
        return getattr(base, name) if value == "auto" else value

    plan = TrainPlan(
        base=base,
        text_encoder_steps=chosen("text_encoder_steps"),
        unet_steps=chosen("unet_steps"),
        text_encoder_lr=chosen("text_encoder_lr"),
        unet_lr=chosen("unet_lr"),
        batch_size=chosen("batch_size"),
        class_prompt=config.class_prompt if config.prior_preservation else "",
        num_class_images=chosen("num_class_images") if config.prior_preservation else 0,
        prior_loss_weight=config.prior_loss_weight,
        seed=config.seed,
    )
    _check_some_steps(plan.text_encoder_steps, plan.unet_steps)
    return plan


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Pictures to draw with the trained session.

    Attributes:
        prompts: one picture each per seed; "|" in a text separates two prompts.
        seeds: starting noise; the same seed draws the same picture; a text with commas is split.
        num_inference_steps: denoising steps.
        guidance_scale: weight of the prompt (classifier-free guidance); 1 is off.
        compare: draw each picture with the base model too and show both.
    """

    prompts: tuple[str, ...] = (
        "a sks star on a white background",
        "a sks star on a sky background",
    )
    seeds: tuple[int, ...] = (0, 1, 2)
    num_inference_steps: int = 25
    guidance_scale: float = 3.5
    compare: bool = True

    def __post_init__(self) -> None:
        """Check every field, and split those that came as text."""
        prompts = _split("prompts", self.prompts, "|")
        _check("prompts", prompts, bool(prompts), "at least one prompt")
        for prompt in prompts:
            _text("prompts", prompt, "a prompt on each side of a '|'")
        seeds = tuple(_number(seed) for seed in _split("seeds", self.seeds, ","))
        _check("seeds", seeds, bool(seeds), "at least one seed")
        for seed in seeds:
            _whole("seeds", seed, 0, _LARGEST_SEED)
        # A picture that is asked for twice is the same picture.
        object.__setattr__(self, "prompts", tuple(dict.fromkeys(prompts)))
        object.__setattr__(self, "seeds", tuple(dict.fromkeys(seeds)))
        _whole("num_inference_steps", self.num_inference_steps, 1)
        _positive("guidance_scale", self.guidance_scale)
        _flag("compare", self.compare)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Files to write from the trained session.

    Attributes:
        formats: any of "safetensors" and "ckpt"; a text with commas is split.
        dtype: of every tensor in the file, one of "fp16", "bf16" and "fp32".
    """

    DTYPES: ClassVar[tuple[str, ...]] = ("fp16", "bf16", "fp32")
    FORMATS: ClassVar[tuple[str, ...]] = ("safetensors", "ckpt")

    formats: tuple[str, ...] = ("safetensors",)
    dtype: str = "fp16"

    def __post_init__(self) -> None:
        """Check every field, and split those that came as text."""
        formats = _split("formats", self.formats, ",")
        known = bool(formats) and all(name in self.FORMATS for name in formats)
        _check("formats", formats, known, f"one or more of {', '.join(self.FORMATS)}")
        object.__setattr__(self, "formats", tuple(dict.fromkeys(formats)))
        _check("dtype", self.dtype, self.dtype in self.DTYPES, f"one of {', '.join(self.DTYPES)}")
