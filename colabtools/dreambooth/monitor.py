"""What a run shows while it trains: losses, the held-out loss, samples, events."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from colabtools.dreambooth.drawing import draw
from colabtools.dreambooth.families import heldout_loss
from colabtools.dreambooth.randomness import kept_rng
from colabtools.drive import atomic_path
from colabtools.report import get_logger, save_curve, save_grid, show

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from PIL import Image

    from colabtools.dreambooth.cache import LatentCache
    from colabtools.dreambooth.data import PromptEncoder
    from colabtools.dreambooth.families import Models
    from colabtools.dreambooth.guard import Metric
    from colabtools.dreambooth.plan import TrainPlan
    from colabtools.dreambooth.session import Session

__all__ = ["HeldOut", "Monitor"]


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Pictures that are not trained on, to see whether the subject is learned or the photos."""

    latents: LatentCache
    captions: tuple[str, ...]

    def loss(self, models: Models, embed: PromptEncoder) -> float:
        """Return the mean denoising loss on fixed noise; nothing of the training changes."""
        total = 0.0
        for row, caption in enumerate(self.captions):
            generator = torch.Generator().manual_seed(row)
            latents = self.latents.sample(row, generator, mode=True)[None].to(models.device)
            with torch.no_grad():
                total += heldout_loss(models, latents, embed([caption]), seed=row)
        return total / len(self.captions)


class Monitor:
    """Files of a run in progress: `logs/metrics.jsonl`, `logs/loss.png`, samples, events."""

    def __init__(self, session: Session, plan: TrainPlan) -> None:
        self._session = session
        self._plan = plan
        self._writer: Any = None
        self._written = 0
        self.metrics: list[Metric] = []
        self.heldout: list[tuple[int, float]] = []

    @property
    def curve(self) -> Path:
        """The picture of all losses."""
        return self._session.logs_dir / "loss.png"

    def start(
        self, metrics: Sequence[Metric], heldout: Sequence[Sequence[float]], *, events: bool = True
    ) -> None:
        """Begin, or go on after the updates of a saved state; `events` are for TensorBoard."""
        self.metrics = list(metrics)
        self.heldout = [(int(step), float(loss)) for step, loss in heldout]
        self._written = len(self.metrics)
        if events and self._plan.config.tensorboard:
            # Events behind this state, of before a setback, are to be forgotten.
            self.close()
            self._writer = _open_events(self._session.logs_dir / "tensorboard", len(self.metrics))

    def add_heldout(self, step: int, loss: float) -> None:
        """Take a held-out loss."""
        self.heldout.append((step, loss))
        if self._writer is not None:
            self._writer.add_scalar("heldout_loss", loss, step)

    def update(self, metrics: Sequence[Metric]) -> None:
        """Take all updates so far."""
        self.metrics = list(metrics)
        if self._writer is not None:
            for metric in self.metrics[self._written :]:
                for name in ("loss", "grad_norm", "lr"):
                    self._writer.add_scalar(name, getattr(metric, name), metric.step)
        self._written = len(self.metrics)

    def write(self) -> None:
        """Write the metrics and the loss curve."""
        self._session.logs_dir.mkdir(exist_ok=True)
        lines = [json.dumps(metric.as_json()) for metric in self.metrics]
        lines += [json.dumps({"step": step, "heldout_loss": loss}) for step, loss in self.heldout]
        with atomic_path(self._session.logs_dir / "metrics.jsonl") as partial:
            partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        self._draw_curve()
        if self._writer is not None:
            self._writer.flush()

    def _draw_curve(self) -> None:
        stages = list(dict.fromkeys(metric.stage for metric in self.metrics))
        series = {
            stage: [(m.step, m.loss) for m in self.metrics if m.stage == stage] for stage in stages
        }
        if self.heldout:
            series["held out"] = self.heldout
        series = {
            name: points
            for name, points in series.items()
            if any(map(math.isfinite, dict(points).values()))
        }
        if not series:
            return
        second = next((m.step for m in self.metrics if m.stage == stages[-1]), 0)
        save_curve(
            series,
            self.curve,
            title=f"DreamBooth training of {self._session.name}",
            x_label="update",
            y_label="denoising loss",
            marks={stages[-1]: second} if len(stages) > 1 else {},
        )

    def draw_samples(self, models: Models, step: int, prompts: Sequence[str]) -> Path:
        """Draw the prompts as a grid; no generator of the training moves."""
        config = self._plan.config
        folder = self._session.samples_dir / "training"
        folder.mkdir(parents=True, exist_ok=True)
        with kept_rng(), torch.no_grad(), _drawing(models):
            rows = [
                [self._draw(models, prompt, seed) for seed in config.sample_seeds]
                for prompt in prompts
            ]
        grid = save_grid(
            rows,
            folder / f"step-{step:06d}.png",
            row_titles=list(prompts),
            column_titles=[f"seed {seed}" for seed in config.sample_seeds],
        )
        show(grid)
        return grid

    def _draw(self, models: Models, prompt: str, seed: int) -> Image.Image:
        base = self._plan.base
        return draw(
            models.pipeline,
            prompt,
            seed=seed,
            num_inference_steps=base.num_inference_steps,
            guidance_scale=base.guidance_scale,
        )

    def close(self) -> None:
        """Close the events file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class _drawing:  # noqa: N801 - read as a statement
    """Networks in evaluation mode and all on the device while pictures are drawn."""

    def __init__(self, models: Models) -> None:
        parts = models.pipeline.components.values()
        self._modules = [part for part in parts if isinstance(part, torch.nn.Module)]

    def __enter__(self) -> None:
        self._modes = [module.training for module in self._modules]
        self._devices = [next(module.parameters()).device for module in self._modules]
        for module in self._modules:
            module.eval()

    def __exit__(self, *_: object) -> None:
        rows = zip(self._modules, self._modes, self._devices, strict=True)
        for module, training, device in rows:
            module.train(training)
            module.to(device)


def _open_events(folder: Path, done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        get_logger(__name__).warning(
            "tensorboard is not installed, so no events are written; pip install tensorboard"
        )
        return None
    return SummaryWriter(str(folder), purge_step=done + 1)
