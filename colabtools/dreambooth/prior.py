"""Pictures of the class, drawn by the base model before it learns: what it shall not forget."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from colabtools.dreambooth.drawing import draw
from colabtools.drive import atomic_path, sha256_of
from colabtools.errors import ConfigError
from colabtools.report import progress

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from diffusers import StableDiffusionPipeline

    from colabtools.dreambooth.plan import TrainPlan
    from colabtools.dreambooth.saved import Saved
    from colabtools.dreambooth.session import Session

__all__ = ["check_class_images", "ensure_class_images"]


def ensure_class_images(
    session: Session, plan: TrainPlan, pipeline: StableDiffusionPipeline
) -> list[Path]:
    """Return the class pictures of a run, drawing those that are not there yet.

    The file name holds a digest of base model and prompt, so pictures of another class never mix
    in.
    """
    if plan.num_class_images == 0:
        return []
    key = hashlib.sha256(f"{plan.base.name}\0{plan.class_prompt}".encode()).hexdigest()[:8]
    session.class_images_dir.mkdir(exist_ok=True)
    paths = [
        session.class_images_dir / f"{key}-{seed:04d}.png" for seed in range(plan.num_class_images)
    ]
    missing = [(seed, path) for seed, path in enumerate(paths) if not path.is_file()]
    if not missing:
        return paths
    for seed, path in progress(missing, desc="drawing class pictures", unit="pictures"):
        picture = draw(
            pipeline,
            plan.class_prompt,
            seed=seed,
            num_inference_steps=plan.base.num_inference_steps,
            guidance_scale=plan.base.guidance_scale,
        )
        with atomic_path(path) as partial:
            picture.save(partial, format="PNG")
    return paths


def check_class_images(paths: Sequence[Path], saved: Saved | None) -> dict[str, str]:
    """Return a digest of the class pictures, for the description of the run's states.

    Args:
        paths: all of them.
        saved: the state to go on from, if any.

    Raises:
        ConfigError: the state was trained with others.
        WorkspaceError: one cannot be read.
    """
    if not paths:
        return {}
    text = "\n".join(f"{path.name} {sha256_of(path)}" for path in paths)
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
    former = digest if saved is None else saved.description.get("class_pictures", digest)
    if former != digest:
        raise ConfigError(
            f"the class pictures in {paths[0].parent} are not those that the run began with; put "
            "them back, or set resume to never to start over"
        )
    return {"class_pictures": digest}
