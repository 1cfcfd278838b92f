"""The networks of a base model, loaded for training or drawing."""

from __future__ import annotations

import gc
import importlib.util
import json
import logging
import sys
import types
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from colabtools.dreambooth.families import FAMILIES, Models
from colabtools.errors import ConfigError, MissingDependencyError, ModelError
from colabtools.registry import fetch_configs, resolve_base

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

    from torch import nn

    from colabtools.registry import Base

__all__ = [
    "load_models",
    "load_pipeline",
    "release",
    "suitable_threads",
    "to_trainable_fp32",
    "wrap_pipeline",
]


@contextmanager
def suitable_threads(base: Base) -> Iterator[None]:
    """Let torch use as many CPU threads as the model is worth, and restore the number after."""
    threads = torch.get_num_threads()
    torch.set_num_threads(base.cpu_threads or threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def load_pipeline(base: Base) -> Any:
    """Return the base model's diffusers pipeline in fp32 on the CPU, without a safety checker.

    Raises:
        ModelError: the files cannot be had, or are of no family that can be trained.
    """
    return _load(base, torch.device("cpu"), {"default": torch.float32})


def load_models(
    base: Base,
    device: torch.device,
    *,
    frozen_dtype: torch.dtype | None = None,
    trainable: Collection[str] = (),
    quantize: str | None = None,
) -> Models:
    """Return the parts of a base model on the device, frozen, in evaluation mode.

    Weights go to the device tensor by tensor in their final dtype, so that main memory never holds
    the whole model beside them.

    Args:
        base: its record.
        device: where to put them.
        frozen_dtype: of the networks; None is fp32. The VAE is fp32 always: SDXL's draws black
            pictures in fp16.
        trainable: names of parts that will be trained whole; they are fp32, because a file in fp32
            would lose what fp16 cannot hold.
        quantize: "nf4" packs the denoiser, and Flux's T5, into 4 bits; needs a GPU and
            bitsandbytes. Only adapters can be trained on it.

    Raises:
        ConfigError: `quantize` is neither None nor "nf4".
        MissingDependencyError: bitsandbytes is not installed.
        ModelError: see `load_pipeline`; or there is no GPU for `quantize`.
    """
    _check_quantize(quantize, device)
    base = resolve_base(base)
    dtypes = {"default": frozen_dtype or torch.float32, "vae": torch.float32}
    dtypes.update(dict.fromkeys(trainable, torch.float32))
    return wrap_pipeline(base, _load(base, device, dtypes, quantize=quantize), device)


def wrap_pipeline(base: Base, pipeline: Any, device: torch.device) -> Models:
    """Return the parts of a loaded pipeline on the device, frozen, in evaluation mode.

    Raises:
        ModelError: the base model is of a family that cannot be trained.
    """
    base = resolve_base(base)
    family = FAMILIES[base.family]
    networks = (*family.text_encoders, "vae", family.denoiser)
    for name in networks:
        part = getattr(pipeline, name).requires_grad_(False).eval()
        if not getattr(part, "is_loaded_in_4bit", False):
            part.to(device)
    diffusers = _import_diffusers()
    flow = base.prediction_type == "flow"
    kind = diffusers.FlowMatchEulerDiscreteScheduler if flow else diffusers.DDPMScheduler
    noise_scheduler = kind.from_config(pipeline.scheduler.config)
    if not flow:
        # The files know better than the table which of the two the weights are.
        base = replace(base, prediction_type=noise_scheduler.config.prediction_type)
    tokenizers = [name.replace("text_encoder", "tokenizer") for name in family.text_encoders]
    return Models(
        base=base,
        family=family,
        pipeline=pipeline,
        tokenizers={name: getattr(pipeline, name) for name in tokenizers},
        text_encoders={name: getattr(pipeline, name) for name in family.text_encoders},
        vae=pipeline.vae,
        denoiser=getattr(pipeline, family.denoiser),
        noise_scheduler=noise_scheduler,
        device=device,
    )


def to_trainable_fp32(module: nn.Module) -> nn.Module:
    """Return the module itself, every weight of it fp32 and trainable.

    The optimizer's small steps vanish in half precision; autocast does the arithmetic in it.
    """
    return module.float().requires_grad_(True)


def release(models: Models, names: Collection[str], *, drop: bool = False) -> None:
    """Free the device memory of parts that are done: move them to main memory, or drop them.

    A dropped part is gone from the pipeline too; main memory may be too small for Flux's T5.

    Raises:
        ModelError: there is no such part.
    """
    for name in names:
        part = models.part(name)
        if not drop:
            part.to("cpu")
            continue
        setattr(models.pipeline, name, None)
        if name in models.text_encoders:
            models.text_encoders[name] = None
        elif name == "vae":
            models.vae = None
        else:
            models.denoiser = None
        del part
    gc.collect()
    if models.device.type == "cuda":
        torch.cuda.empty_cache()


def _check_quantize(quantize: str | None, device: torch.device) -> None:
    if quantize is None:
        return
    if quantize != "nf4":
        raise ConfigError(f"quantize is {quantize!r}; give nf4, or nothing for whole weights")
    if device.type != "cuda":
        raise ModelError(
            f"quantize is 'nf4', which needs an NVIDIA GPU, and the device is {device.type}; "
            "choose a GPU runtime or leave quantize out"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingDependencyError(
            "quantize is 'nf4', which needs bitsandbytes; run pip install bitsandbytes"
        )


def _load(
    base: Base,
    device: torch.device,
    dtypes: dict[str, torch.dtype],
    *,
    quantize: str | None = None,
) -> Any:
    """Return the pipeline, each component on the device in its dtype.

    Raises:
        ModelError: the files cannot be had, or are of no family that can be trained.
    """
    class_name = _pipeline_class(base, fetch_configs(base))
    diffusers = _import_diffusers()
    # The argument was renamed in diffusers 0.40, which warns of the old name.
    old = tuple(int(part) for part in diffusers.__version__.split(".")[:2]) < (0, 40)
    dtype_name = "torch_dtype" if old else "dtype"
    options: dict[str, Any] = {dtype_name: dtypes, "use_safetensors": True}
    if class_name == "StableDiffusionPipeline":
        options.update(safety_checker=None, requires_safety_checker=False)
    if base.half_variant and torch.float32 not in (
        dtypes[name] for name in dtypes if name != "vae"
    ):
        options["variant"] = base.half_variant
    if device.type == "cuda":
        options["device_map"] = device.type
    if quantize is not None:
        options["quantization_config"] = _nf4(base, dtypes["default"])
    try:
        with _quiet_libraries():
            if base.vae:
                options["vae"] = diffusers.AutoencoderKL.from_pretrained(
                    base.vae, use_safetensors=True, **{dtype_name: torch.float32}
                )
            pipeline = diffusers.DiffusionPipeline.from_pretrained(base.source, **options)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"base model {base.name!r} cannot be loaded from {base.source} ({reason}); "
            "check the name and the connection, or give a local folder in diffusers' layout"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    _keep_vae_in_fp32(pipeline.vae)
    return pipeline


def _pipeline_class(base: Base, folder: Path) -> str:
    """Return the pipeline class that a model's index names, empty if it cannot be read."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        name = str(index["_class_name"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    known = {family.pipeline_class for family in FAMILIES.values()}
    if name not in known:
        raise ModelError(
            f"base model {base.name!r} is a {name}; only {', '.join(sorted(known))} can be trained"
        )
    return name


def _nf4(base: Base, dtype: torch.dtype) -> Any:
    """Return the 4-bit settings. Source: Dettmers et al. 2023, arXiv 2305.14314 (QLoRA)."""
    family = FAMILIES[base.family]
    flux = base.family == "flux"
    return _import_diffusers().PipelineQuantizationConfig(
        quant_backend="bitsandbytes_4bit",
        quant_kwargs={
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": dtype,
        },
        components_to_quantize=[family.denoiser, *(["text_encoder_2"] if flux else [])],
    )


def _keep_vae_in_fp32(vae: Any) -> None:
    """Let the VAE ignore autocast around it, which would run its convolutions in half precision."""
    # Bound methods, so that a copy of the VAE calls itself and not the original.
    vae.encode = types.MethodType(_encode_in_fp32, vae)
    vae.decode = types.MethodType(_decode_in_fp32, vae)


def _encode_in_fp32(vae: Any, pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    with torch.autocast(pixel_values.device.type, enabled=False):
        return type(vae).encode(vae, pixel_values.float(), *args, **kwargs)


def _decode_in_fp32(vae: Any, latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    with torch.autocast(latents.device.type, enabled=False):
        return type(vae).decode(vae, latents.float(), *args, **kwargs)


def _import_diffusers() -> types.ModuleType:
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
