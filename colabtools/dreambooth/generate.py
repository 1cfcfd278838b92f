"""Pictures from a trained session, next to the base model's for the same prompts and seeds."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from colabtools.dreambooth.models import (
    half_dtype,
    load_pipeline,
    suitable_threads,
    torch_device,
)
from colabtools.dreambooth.session import open_session
from colabtools.dreambooth.state import latest_trained
from colabtools.drive import atomic_path
from colabtools.registry import find_base
from colabtools.report import progress, save_grid

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import StableDiffusionPipeline
    from PIL import Image

    from colabtools.dreambooth.config import GenerateConfig
    from colabtools.dreambooth.state import TrainedWeights
    from colabtools.drive import Workspace

__all__ = ["Generated", "draw", "generate", "load_trained_pipeline"]


@dataclass(frozen=True, kw_only=True)
class Generated:
    """Files of drawn pictures, and one that shows them all."""

    pictures: tuple[Path, ...]
    grid: Path


def draw(
    pipeline: StableDiffusionPipeline,
    prompt: str,
    *,
    seed: int,
    num_inference_steps: int = 25,
    guidance_scale: float = 3.5,
) -> Image.Image:
    """Return one picture; the same arguments give the same picture, whatever was drawn before."""
    device = torch_device()
    dtype = half_dtype(device)
    pipeline.to(device)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        output = pipeline(
            prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(seed),
        )
    picture: Image.Image = output.images[0]
    return picture


def load_trained_pipeline(weights: TrainedWeights) -> StableDiffusionPipeline:
    """Return the base model with the trained weights in place.

    Raises:
        CheckpointError: the weights are damaged.
        ModelError: the base model cannot be loaded.
    """
    pipeline = load_pipeline(find_base(weights.manifest["base_model"]))
    for name, tensors in weights.load().items():
        getattr(pipeline, name).load_state_dict(tensors)
    return pipeline


def generate(workspace: Workspace, session_name: str, config: GenerateConfig) -> Generated:
    """Draw each prompt with each seed into the session's `samples` folder, and a grid of them.

    Raises:
        CheckpointError: the session has no trained weights, or damaged ones.
        SessionError: there is no such session.
    """
    session = open_session(workspace, session_name)
    weights = latest_trained(session)
    base = find_base(weights.manifest["base_model"])
    pipelines = {"before": load_pipeline(base)} if config.compare else {}
    pipelines["after"] = load_trained_pipeline(weights)
    session.samples_dir.mkdir(exist_ok=True)
    drawn: dict[tuple[str, str, int], Image.Image] = {}
    pictures = []
    jobs = list(itertools.product(config.prompts, pipelines, config.seeds))
    for prompt, name, seed in progress(jobs, desc="drawing", unit="pictures"):
        with suitable_threads(base):
            picture = draw(
                pipelines[name],
                prompt,
                seed=seed,
                num_inference_steps=config.num_inference_steps,
                guidance_scale=config.guidance_scale,
            )
        drawn[name, prompt, seed] = picture
        number = config.prompts.index(prompt)
        path = session.samples_dir / f"step-{weights.step:06d}-{name}-{number:02d}-seed{seed}.png"
        with atomic_path(path) as partial:
            picture.save(partial, format="PNG")
        pictures.append(path)
    rows = [(name, prompt) for prompt in config.prompts for name in pipelines]
    grid = save_grid(
        [[drawn[name, prompt, seed] for seed in config.seeds] for name, prompt in rows],
        session.samples_dir / "grid.png",
        row_titles=[f"{name}: {prompt}" for name, prompt in rows],
        column_titles=[f"seed {seed}" for seed in config.seeds],
    )
    session.add_run({"verb": "generate", "step": weights.step, **asdict(config)})
    return Generated(pictures=tuple(pictures), grid=grid)
