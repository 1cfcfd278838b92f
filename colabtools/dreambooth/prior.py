"""Pictures of the class, drawn by the base model before it learns: what it shall not forget."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from colabtools.dreambooth.drawing import draw
from colabtools.drive import atomic_path
from colabtools.report import progress

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import StableDiffusionPipeline

    from colabtools.dreambooth.plan import TrainPlan
    from colabtools.dreambooth.session import Session

__all__ = ["ensure_class_images"]


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
