"""How much room a run needs in the workspace, asked for before its first update."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from colabtools.dreambooth.activations import copy_to_meta
from colabtools.dreambooth.budget import DiskNeeds, fit_retention, picture_bytes, plan_disk
from colabtools.dreambooth.guard import Metric
from colabtools.dreambooth.lora import adapter_state
from colabtools.dreambooth.networks import ensure_adapter, file_stem
from colabtools.dreambooth.optimizers import resolve_optimizer, state_bytes
from colabtools.dreambooth.randomness import capture_rng
from colabtools.dreambooth.saved import Snapshot
from colabtools.drive import Workspace
from colabtools.report import get_logger

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from colabtools.dreambooth.budget import DiskPlan
    from colabtools.dreambooth.families import Models
    from colabtools.dreambooth.plan import TrainPlan
    from colabtools.dreambooth.stages import Stage
    from colabtools.dreambooth.state import CheckpointStore

__all__ = ["disk_needs", "ensure_disk", "model_file_bytes"]

_FP16_BYTES = 2
# AdamW and Adafactor keep two tensors and a counter of each weight, Prodigy four.
_STATE_TENSORS_PER_WEIGHT = {"adafactor": 3, "adamw": 3, "adamw8bit": 3, "lion": 1, "prodigy": 4}


def ensure_disk(
    plan: TrainPlan,
    models: Models,
    stages: Sequence[Stage],
    store: CheckpointStore,
    done: int = 0,
) -> DiskPlan:
    """Return what the run will still write, once it is known to fit.

    Args:
        plan: the run.
        models: its base model.
        stages: all of them.
        store: where checkpoints go; it keeps fewer of them if that is what fits.
        done: updates that were saved before; what led to them is on the disk already.

    Raises:
        WorkspaceError: there is no room; the message says how much is missing.
    """
    needs = disk_needs(plan, models, stages, fresh=store.fresh, done=done)
    fitting = fit_retention(Workspace(store.session_folder), needs, store.in_session())
    store.keep_last = fitting.keep_last
    if store.staging is not None:
        folder = next(path for path in (store.staging, *store.staging.parents) if path.exists())
        what = "the checkpoints on their way to the workspace"
        Workspace(folder).ensure_space(fitting.staging_bytes, what)
    get_logger(__name__).info(
        "a saved state takes %.1f MB, the run at most %.1f MB at a time",
        fitting.checkpoint_bytes / 1e6,
        max(0, fitting.peak_bytes) / 1e6,
    )
    return fitting


def disk_needs(
    plan: TrainPlan, models: Models, stages: Sequence[Stage], *, fresh: bool, done: int = 0
) -> DiskNeeds:
    """Return what decides how much the run still writes; its largest checkpoint counts for all."""
    needs = [_stage_needs(plan, models, stages, number) for number in range(len(stages))]
    largest = max(needs, key=lambda one: plan_disk(one).checkpoint_bytes)
    snapshot = replace(largest.snapshot, step=min(done, plan.total_steps - 1))
    return replace(largest, snapshot=snapshot, fresh=fresh, sample_bytes=_sample_bytes(plan, done))


def _sample_bytes(plan: TrainPlan, done: int) -> int:
    config = plan.config
    if not config.sample_every:
        return 0
    grids = plan.total_steps // config.sample_every - done // config.sample_every
    cells = grids * len(config.sample_seeds) * max(1, len(config.sample_prompts))
    return picture_bytes(plan.base.resolution, cells)


def _stage_needs(
    plan: TrainPlan, models: Models, stages: Sequence[Stage], number: int
) -> DiskNeeds:
    stage = stages[number]
    kept = {part for before in stages[:number] for part in before.keeps}
    parts = {
        file_stem(part, plan.method): _tensors(plan, models, part)
        for part in sorted({*kept, *stage.rates})
    }
    learning = [
        tensor
        for part in stage.rates
        for tensor in parts[file_stem(part, plan.method)].values()
        if tensor.is_floating_point()
    ]
    optimizer = "adamw" if plan.optimizer == "auto" else plan.optimizer
    optimizer = resolve_optimizer(optimizer, models.device)
    trained = {*kept, *stage.rates} & {part for one in stages for part in one.keeps}
    config = plan.config
    return DiskNeeds(
        snapshot=Snapshot(
            step=0,
            finished=False,
            parts=parts,
            trained=tuple(sorted(file_stem(part, plan.method) for part in trained)),
            state=_typical_state(plan, learning),
            description=plan.settings(),
        ),
        later_bytes=state_bytes(optimizer, [tuple(tensor.shape) for tensor in learning])
        - (_spared_by_zeros(plan, models, stage) if optimizer == "prodigy" else 0),
        later_tensors=len(learning) * _STATE_TENSORS_PER_WEIGHT[optimizer],
        total_steps=plan.total_steps,
        checkpoint_every=plan.checkpoint_every,
        keep_last=config.keep_last,
        keep_every=config.save_every,
        milestone_bytes=_milestone_bytes(plan, models, parts),
    )


def _spared_by_zeros(plan: TrainPlan, models: Models, stage: Stage) -> int:
    """Return what Prodigy saves on weights that begin as zeros: it keeps one number of where."""
    spared = 0
    for part in stage.rates:
        if plan.method == "full":
            learning = models.part(part).parameters()
            numbers = [p.numel() for p in learning if not bool(p.any())]
        else:
            twin = _tensors(plan, models, part)
            numbers = [tensor.numel() for name, tensor in twin.items() if "lora_B" in name]
        spared += sum(4 * (number - 1) for number in numbers)
    return spared


def _tensors(plan: TrainPlan, models: Models, part: str) -> Mapping[str, torch.Tensor]:
    """Return what is saved of a network, on the meta device."""
    twin = _unpacked(copy_to_meta(models.part(part)))
    if plan.method != "full":
        ensure_adapter(twin, part, plan)
        return adapter_state(twin)
    return twin.float().state_dict()


def _unpacked(twin: torch.nn.Module) -> torch.nn.Module:
    """Return a network on the meta device with plain layers in place of those in 4 bits."""
    for layer in list(twin.modules()):
        for name, child in list(layer.named_children()):
            if type(child).__name__ == "Linear4bit":
                size = (int(child.in_features), int(child.out_features))  # type: ignore[arg-type]
                plain = torch.nn.Linear(*size, bias=child.bias is not None, device="meta")
                setattr(layer, name, plain)
    return twin


def _typical_state(plan: TrainPlan, learning: list[torch.Tensor]) -> dict[str, Any]:
    """Return a state of the usual size, half of the run's metrics in it."""
    metric = asdict(Metric(plan.total_steps, "text_encoder", 0.123456789012345, 0.12345678, 1e-6))
    average = {"learning": learning} if plan.config.ema else None
    return {
        "ema": average,
        "metrics": [metric] * (plan.total_steps // 2),
        "rng": capture_rng(),
    }


def _milestone_bytes(
    plan: TrainPlan, models: Models, parts: Mapping[str, Mapping[str, torch.Tensor]]
) -> int:
    """Return the size of the model file of a step: of the whole model, or of the adapters alone."""
    if plan.config.save_every == 0:
        return 0
    if plan.method == "full":
        return model_file_bytes(models)
    return _FP16_BYTES * sum(t.numel() for part in parts.values() for t in part.values())


def model_file_bytes(models: Models) -> int:
    """Return the size of the whole model as one file in half precision."""
    networks = [*models.text_encoders.values(), models.vae, models.denoiser]
    numbers: int = sum(p.numel() for network in networks for p in network.parameters())
    return _FP16_BYTES * numbers
