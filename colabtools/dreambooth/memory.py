"""How a stage of a run fits on the device at hand."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from colabtools import env
from colabtools.dreambooth.activations import copy_to_meta, measure_need
from colabtools.dreambooth.optimizers import resolve_optimizer, state_bytes
from colabtools.dreambooth.planner import MemoryNeed, MemoryPlan, plan_memory
from colabtools.report import get_logger

if TYPE_CHECKING:
    from colabtools.dreambooth.data import TrainingData
    from colabtools.dreambooth.families import Models
    from colabtools.dreambooth.networks import Networks
    from colabtools.dreambooth.plan import TrainPlan

__all__ = ["choose_quantization", "count_stage", "measure_stage", "plan_stage_memory"]

_ADAMW = ("adamw", "adamw8bit")
# Flux's transformer and T5 are 33 GB in bf16; adapters, activations and the rest need some more.
_ROOM_FOR_FLUX_BYTES = 38 * 10**9


def choose_quantization(plan: TrainPlan, device: torch.device) -> str | None:
    """Return how the frozen weights are packed: "nf4", or None for not at all."""
    if plan.config.quantize != "auto":
        return None if plan.config.quantize == "none" else plan.config.quantize
    if plan.base.family != "flux" or plan.method == "full" or device.type != "cuda":
        return None
    free = _free_bytes()
    return "nf4" if free is not None and free < _ROOM_FOR_FLUX_BYTES else None


def plan_stage_memory(
    networks: Networks,
    data: TrainingData,
    need: MemoryNeed | None,
    *,
    saved_optimizer: str | None,
) -> MemoryPlan:
    """Return how a stage runs on its device.

    Args:
        networks: those that learn in the stage.
        data: what it learns from.
        need: what it holds on a card; None where main memory is all there is.
        saved_optimizer: the optimizer of the state that the stage goes on from, which "auto" keeps.

    Raises:
        ConfigError: it cannot fit; the message says how much is missing.
    """
    plan = networks.plan
    # Class pictures ride in the same pass as the photos.
    batch = plan.batch_size * (2 if data.classes is not None else 1)
    accumulation = plan.config.gradient_accumulation_steps
    optimizer = plan.optimizer
    if saved_optimizer in _ADAMW and optimizer in ("auto", *_ADAMW):
        # The 8-bit form may have been chosen, or missing, when the state was saved.
        optimizer = saved_optimizer
    if optimizer != "auto":
        optimizer = resolve_optimizer(optimizer, networks.device)
    if need is None:
        return MemoryPlan(
            micro_batch=batch,
            accumulation=accumulation,
            gradient_checkpointing=plan.config.gradient_checkpointing == "on",
            optimizer="adamw" if optimizer == "auto" else optimizer,
            reasons=("everything as asked, main memory is not planned",),
        )
    free = _free_bytes()
    # What is loaded already counts in the plan, so it is no longer missing on the card.
    taken = torch.cuda.memory_reserved(networks.device)
    chosen = plan_memory(
        need,
        None if free is None else free + taken,
        batch_size=batch,
        accumulation=accumulation,
        optimizer=optimizer,
    )
    for reason in chosen.reasons:
        get_logger(__name__).info("memory: %s", reason)
    return chosen


def _free_bytes() -> int | None:
    gpu = env.gpu()
    return None if gpu is None else gpu.free_vram_bytes


def measure_stage(networks: Networks, models: Models, data: TrainingData) -> MemoryNeed | None:
    """Return what a stage holds on its card, counted for one of the largest pictures.

    None where there is no card, or where the networks cannot be counted because they are packed
    into 4 bits; then the ladder has to find what fits.
    """
    packed = getattr(models.denoiser, "is_loaded_in_4bit", False)
    return None if models.device.type != "cuda" or packed else count_stage(networks, models, data)


def count_stage(networks: Networks, models: Models, data: TrainingData) -> MemoryNeed:
    """Return what a stage would hold on a card; nothing is computed."""
    denoiser = models.family.denoiser
    encoders = models.text_encoders if networks.stage.trains_text else {}
    modules = {**encoders, denoiser: models.denoiser, **networks.parts}

    def build() -> torch.nn.Module:
        return torch.nn.ModuleDict({name: copy_to_meta(module) for name, module in modules.items()})

    def call(built: Any) -> torch.Tensor:
        on_meta = _with(models, dict(built.items()))
        if networks.stage.trains_text:
            conditioning = models.family.encode_prompts(on_meta, [""])
        else:
            with torch.no_grad():
                conditioning = models.family.encode_prompts(models, [""])
            conditioning = conditioning.to(torch.device("meta"))
        latents = torch.empty((1, *data.largest_shape()), device="meta")
        timesteps = torch.zeros(1, dtype=torch.long, device="meta")
        prediction = models.family.predict(on_meta, latents, timesteps, conditioning)
        return prediction.float().square().mean()

    shapes = [tuple(parameter.shape) for parameter in networks.parameters()]
    names = {networks.plan.optimizer, "adamw"} - {"auto"}
    if networks.can_use_8bit:
        names.add("adamw8bit")
    half = networks.compute_dtype is not None
    need = measure_need(
        build,
        call,
        optimizer_bytes={name: state_bytes(name, shapes) for name in names},
        # Where every weight is trained in some stage, all are loaded in fp32.
        frozen_bytes_per_param=2 if half and networks.plan.method != "full" else 4,
        half_precision=half,
    )
    average = 4 * need.trainable_params if networks.plan.config.ema else 0
    checkpointing = networks.plan.config.gradient_checkpointing
    return replace(need, other_bytes=average, gradient_checkpointing=checkpointing)


def _with(models: Models, parts: dict[str, Any]) -> Models:
    """Return the models with these parts in place of their own."""
    encoders = {name: parts.get(name, part) for name, part in models.text_encoders.items()}
    denoiser = parts.get(models.family.denoiser, models.denoiser)
    device = torch.device("meta")
    return replace(models, text_encoders=encoders, denoiser=denoiser, device=device)
