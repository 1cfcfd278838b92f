"""The networks of a base model, loaded for training."""

from __future__ import annotations

import logging
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from colabtools import env
from colabtools.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import ModuleType

    from diffusers import (
        AutoencoderKL,
        DDPMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel, CLIPTokenizer

    from colabtools.registry import Base

__all__ = [
    "Models",
    "encode_prompts",
    "half_dtype",
    "load_models",
    "load_pipeline",
    "suitable_threads",
    "torch_device",
]


@dataclass
class Models:
    """A Stable Diffusion and its parts, all on one device, none of them training yet."""

    pipeline: StableDiffusionPipeline
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    noise_scheduler: DDPMScheduler
    device: torch.device


def torch_device() -> torch.device:
    """Return the GPU if torch sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def half_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype to compute in: bf16 or fp16 by compute capability, None (fp32) on the CPU.

    torch claims bf16 on cards that only emulate it, so the capability decides.
    """
    if device.type != "cuda":
        return None
    gpu = env.gpu()
    return torch.bfloat16 if gpu is not None and gpu.supports_bf16 else torch.float16


@contextmanager
def suitable_threads(base: Base) -> Iterator[None]:
    """Let torch use as many CPU threads as the model is worth, and restore the number after."""
    threads = torch.get_num_threads()
    torch.set_num_threads(base.cpu_threads or threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def load_pipeline(base: Base) -> StableDiffusionPipeline:
    """Return the base model's pipeline in fp32, without the safety checker.

    Raises:
        ModelError: the files cannot be had, or are not a Stable Diffusion.
    """
    try:
        with _quiet_libraries():
            pipeline: StableDiffusionPipeline = (
                _import_diffusers().StableDiffusionPipeline.from_pretrained(
                    base.source,
                    use_safetensors=True,
                    safety_checker=None,
                    requires_safety_checker=False,
                )
            )
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"base model {base.name!r} cannot be loaded from {base.source} ({reason}); "
            "check the name and the connection, or give a local folder in diffusers' layout"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    # Cast here, because the argument for it has two names across the supported versions.
    for part in (pipeline.text_encoder, pipeline.vae, pipeline.unet):
        for parameter in part.parameters():
            parameter.data = parameter.data.float()
    return pipeline


def _import_diffusers() -> ModuleType:
    import diffusers

    # diffusers puts a lazy module in its own place while it is imported.
    return sys.modules[diffusers.__name__]


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep back the bars of single files, and transformers' notes on the unused torchvision."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.ERROR)
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in (diffusers_logging, transformers_logging):
            library.enable_progress_bar()
        log.setLevel(level)


def load_models(base: Base, device: torch.device) -> Models:
    """Return the parts of a base model in fp32 on the device, frozen, in evaluation mode.

    Raises:
        ModelError: see `load_pipeline`.
    """
    pipeline = load_pipeline(base)
    for part in (pipeline.text_encoder, pipeline.vae, pipeline.unet):
        part.requires_grad_(False).eval().to(device)
    return Models(
        pipeline=pipeline,
        tokenizer=pipeline.tokenizer,
        text_encoder=pipeline.text_encoder,
        vae=pipeline.vae,
        unet=pipeline.unet,
        noise_scheduler=_import_diffusers().DDPMScheduler.from_config(pipeline.scheduler.config),
        device=device,
    )


def encode_prompts(tokenizer: Any, text_encoder: Any, prompts: Sequence[str]) -> torch.Tensor:
    """Return the hidden states (B, T, D) of prompts, padded and cut to the tokenizer's length."""
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    hidden: torch.Tensor = text_encoder(tokens.input_ids.to(text_encoder.device)).last_hidden_state
    return hidden
