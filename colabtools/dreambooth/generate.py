"""Pictures from a trained session, next to the base model's for the same prompts and seeds.

Every file carries the settings that drew it, so a picture that is there already is not drawn again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from colabtools.devices import half_dtype, torch_device
from colabtools.dreambooth.dataset import first_captions, load_examples
from colabtools.dreambooth.drawing import (
    Drawing,
    draw,
    draw_picture,
    read_settings,
    save_picture,
)
from colabtools.dreambooth.losses import zero_terminal_snr
from colabtools.dreambooth.models import load_models, load_pipeline, suitable_threads
from colabtools.dreambooth.session import open_session
from colabtools.dreambooth.state import find_trained, latest_trained
from colabtools.errors import CheckpointError
from colabtools.images import load_upright
from colabtools.registry import find_base
from colabtools.report import get_logger, progress, save_grid

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from diffusers import DiffusionPipeline

    from colabtools.dreambooth.config import EvaluateConfig, GenerateConfig
    from colabtools.dreambooth.saved import Saved
    from colabtools.dreambooth.session import Session
    from colabtools.drive import Workspace
    from colabtools.registry import Base

__all__ = [
    "Generated",
    "Painter",
    "draw",
    "ensure_pictures",
    "find_weights",
    "generate",
    "load_trained_pipeline",
    "sampling_of",
    "scheduler_from_noise",
    "side_to_draw",
]

_LONGEST_SLUG = 48


@dataclass(frozen=True, kw_only=True)
class Painter:
    """The networks that draw: a base model with trained weights in place, or as it is."""

    base: Base
    weights: Saved | None = None

    @property
    def origin(self) -> dict[str, Any]:
        """What a picture's settings say of the networks; it changes with every training."""
        if self.weights is None:
            return {"base_model": self.base.name, "step": 0, "weights": ""}
        text = json.dumps(self.weights.manifest, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return {"base_model": self.base.name, "step": self.weights.step, "weights": digest}

    def load(self) -> DiffusionPipeline:
        """Return the pipeline, in half precision where it draws in that.

        Raises:
            CheckpointError: the weights are damaged.
            ModelError: the base model cannot be loaded.
        """
        dtype = half_dtype(torch_device())
        if self.weights is None:
            return _load_base(self.base, dtype)
        return load_trained_pipeline(self.weights, dtype)

    def file_name(self, drawing: Drawing) -> str:
        """Return the picture's name: the same for the same settings, another for others.

        It does not depend on the weights, so pictures of a repeated training replace the former.
        """
        who = "base" if self.weights is None else f"step-{self.weights.step:06d}"
        slug = re.sub(r"[^a-z0-9]+", "-", drawing.prompt.lower()).strip("-")[:_LONGEST_SLUG]
        settings = {**asdict(drawing), "seed": None, "base_model": self.base.name}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:6]
        return "-".join(filter(None, (who, slug, digest, f"seed{drawing.seed}"))) + ".png"


@dataclass(frozen=True, kw_only=True)
class Generated:
    """Files of the pictures asked for, how many had to be drawn, and one that shows them all."""

    pictures: tuple[Path, ...]
    drawn: int
    grid: Path


def ensure_pictures(
    painter: Painter, drawings: Sequence[Drawing], folder: Path
) -> tuple[tuple[Path, ...], int]:
    """Return the picture file of each drawing, and how many of them had to be drawn.

    The networks are loaded only if a picture is missing or was drawn with other settings.

    Raises:
        CheckpointError: the weights are damaged.
        ConfigError: the model takes no negative prompt, and one is given.
        ModelError: the base model cannot be loaded.
        WorkspaceError: a picture cannot be stored.
    """
    folder.mkdir(parents=True, exist_ok=True)
    origin = painter.origin
    paths = tuple(folder / painter.file_name(drawing) for drawing in drawings)
    settings = [{**origin, **asdict(drawing)} for drawing in drawings]
    jobs = [
        job
        for job in zip(drawings, settings, paths, strict=True)
        if read_settings(job[2]) != job[1]
    ]
    if len(jobs) < len(drawings):
        get_logger(__name__).info(
            "%d of %d pictures were drawn with these settings before, in %s",
            len(drawings) - len(jobs),
            len(drawings),
            folder,
        )
    if not jobs:
        return paths, 0
    pipeline = painter.load()
    who = "the base model" if painter.weights is None else f"step {painter.weights.step}"
    for drawing, description, path in progress(jobs, desc=f"drawing with {who}", unit="pictures"):
        with suitable_threads(painter.base):
            picture = draw_picture(pipeline, drawing)
        save_picture(picture, description, path)
    return paths, len(jobs)


def find_weights(session: Session, step: int) -> Saved:
    """Return the trained weights of a step, the newest for 0.

    Raises:
        CheckpointError: there are none.
    """
    if step == 0:
        return latest_trained(session)
    found = find_trained(session)
    for weights in reversed(found):
        if weights.step == step:
            return weights
    there = ", ".join(str(weights.step) for weights in found)
    raise CheckpointError(
        f"session {session.name!r} has no weights of step {step}; "
        f"there {'is ' + there if there else 'are none, run train first'}"
    )


def load_trained_pipeline(weights: Saved, dtype: torch.dtype | None = None) -> DiffusionPipeline:
    """Return the base model with the trained weights in place, adapters merged.

    Args:
        weights: those of a session.
        dtype: of the networks, which are on the device then; None is fp32 in main memory.

    Raises:
        CheckpointError: the weights are damaged, or do not fit the base model.
        ModelError: the base model cannot be loaded.
    """
    base = find_base(weights.manifest["base_model"])
    pipeline = _load_base(base, dtype)
    for name, tensors in weights.load().items():
        part = name.removesuffix("_lora")
        network = getattr(pipeline, part, None)
        if not isinstance(network, torch.nn.Module):
            raise CheckpointError(
                f"{weights.folder} holds {name}, which base model {base.name!r} does not have; "
                "train the session again with resume set to never"
            )
        if part != name:
            _merge_adapter(network, name, tensors, weights)
            continue
        try:
            network.load_state_dict(tensors)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"{name} in {weights.folder} does not fit base model {base.name!r} ({reason}); "
                "train the session again with resume set to never"
            ) from error
    if weights.manifest.get("settings", {}).get("zero_terminal_snr"):
        pipeline.scheduler = scheduler_from_noise(pipeline)
    return pipeline


def scheduler_from_noise(pipeline: DiffusionPipeline) -> Any:
    """Return a scheduler to draw with after training with a zero terminal SNR.

    The base model's own would never start from pure noise.
    """
    from diffusers import DDIMScheduler

    return zero_terminal_snr(DDIMScheduler.from_config(pipeline.scheduler.config))


def _load_base(base: Base, dtype: torch.dtype | None) -> DiffusionPipeline:
    if dtype is None:
        return load_pipeline(base)
    return load_models(base, torch_device(), frozen_dtype=dtype).pipeline


def _merge_adapter(
    network: torch.nn.Module,
    name: str,
    tensors: dict[str, torch.Tensor],
    weights: Saved,
) -> None:
    # Only sessions that were trained with adapters need PEFT installed.
    from colabtools.dreambooth import lora

    try:
        config = lora.AdapterConfig.from_dict(weights.manifest["adapters"][name])
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{weights.folder} does not say how {name} was made; "
            "train the session again with resume set to never"
        ) from error
    lora.add_adapter(network, name.removesuffix("_lora"), config)
    lora.load_adapter_state(network, tensors)
    lora.merge_adapter(network)


def side_to_draw(config: GenerateConfig | EvaluateConfig, session: Session, base: Base) -> int:
    """Return the side in pixels: as asked, else that of the training pictures."""
    if config.resolution != "auto":
        return config.resolution
    trained = session.read_record().get("resolution")
    return trained if isinstance(trained, int) else base.resolution


def sampling_of(config: GenerateConfig | EvaluateConfig, base: Base) -> dict[str, Any]:
    """Return denoising steps and guidance: as asked, else those of the base model."""
    names = ("num_inference_steps", "guidance_scale")
    asked = {name: getattr(config, name) for name in names}
    return {n: getattr(base, n) if value == "auto" else value for n, value in asked.items()}


def generate(workspace: Workspace, session_name: str, config: GenerateConfig) -> Generated:
    """Draw each prompt with each seed into the session's `samples` folder, and a grid of them.

    A picture that is there already with the same settings and weights is kept.

    Raises:
        CheckpointError: the session has no such trained weights, or damaged ones.
        ConfigError: the file of prompts cannot be read, or the model takes no negative prompt.
        DatasetError: no prompt is given, and there is no picture whose caption could be one.
        ModelError: the base model cannot be loaded.
        SessionError: there is no such session.
        WorkspaceError: a picture cannot be stored.
    """
    prompts = config.load_prompts()
    session = open_session(workspace, session_name)
    prompts = prompts or first_captions(load_examples(session))
    weights = find_weights(session, config.step)
    base = find_base(weights.manifest["base_model"])
    painters = {"before": Painter(base=base)} if config.compare else {}
    painters["after"] = Painter(base=base, weights=weights)
    side = side_to_draw(config, session, base)
    drawings = [
        Drawing(
            prompt=prompt,
            seed=seed,
            negative_prompt=config.negative_prompt,
            **sampling_of(config, base),
            resolution=side,
        )
        for prompt, seed in itertools.product(prompts, config.seeds)
    ]
    # One painter after the other: two models at once need not fit into the memory.
    results = {
        name: ensure_pictures(painter, drawings, session.samples_dir)
        for name, painter in painters.items()
    }
    files = {
        (name, drawing.prompt, drawing.seed): path
        for name, (paths, _) in results.items()
        for drawing, path in zip(drawings, paths, strict=True)
    }
    rows = [(name, prompt) for prompt in prompts for name in painters]
    grid = save_grid(
        [
            [load_upright(files[name, prompt, seed]) for seed in config.seeds]
            for name, prompt in rows
        ],
        session.samples_dir / "grid.png",
        row_titles=[f"{name}: {prompt}" for name, prompt in rows],
        column_titles=[f"seed {seed}" for seed in config.seeds],
    )
    drawn = sum(count for _, count in results.values())
    session.add_run({"verb": "generate", **asdict(config), "step": weights.step})
    pictures = tuple(files[name, prompt, seed] for name, prompt in rows for seed in config.seeds)
    return Generated(pictures=pictures, drawn=drawn, grid=grid)
