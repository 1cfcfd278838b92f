"""The training loop: the text encoder learns the word, then the UNet learns the subject."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from colabtools.dreambooth.cache import LatentCache
from colabtools.dreambooth.config import plan_training
from colabtools.dreambooth.dataset import fingerprint, load_examples
from colabtools.dreambooth.losses import denoising_errors, dreambooth_loss
from colabtools.dreambooth.models import (
    encode_prompts,
    half_dtype,
    load_models,
    suitable_threads,
    torch_device,
)
from colabtools.dreambooth.prior import ensure_class_images
from colabtools.dreambooth.session import open_session
from colabtools.dreambooth.stages import plan_stages
from colabtools.dreambooth.state import TrainedWeights, find_trained, save_trained
from colabtools.drive import atomic_path
from colabtools.errors import TrainingError
from colabtools.report import get_logger, progress, save_curve

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from colabtools.dreambooth.config import TrainConfig, TrainPlan
    from colabtools.dreambooth.dataset import Example
    from colabtools.dreambooth.models import Models
    from colabtools.dreambooth.session import Session
    from colabtools.dreambooth.stages import Stage
    from colabtools.drive import Workspace

__all__ = ["Metric", "Trained", "train"]

# Losses stay on the device until this many are fetched together, so that a step does not wait for
# the last.
_STEPS_PER_FETCH = 10


@dataclass(frozen=True)
class Metric:
    """One update: its number counted over both stages, and the loss before it."""

    step: int
    stage: str
    loss: float
    lr: float


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training run left behind; `metrics` is empty if an earlier run had done it already."""

    weights: TrainedWeights
    metrics: tuple[Metric, ...]
    loss_curve: Path


def train(workspace: Workspace, session_name: str, config: TrainConfig) -> Trained:
    """Train the session's pictures in two stages and save the trained weights.

    A session that holds the result of the same settings and pictures already is left alone unless
    `restart` is set.

    Raises:
        DatasetError: the session has no training pictures.
        ModelError: the base model cannot be loaded.
        SessionError: there is no such session.
        TrainingError: the loss is no longer finite.
    """
    session = open_session(workspace, session_name)
    examples = load_examples(session)
    plan = plan_training(config)
    description = _describe(plan, examples)
    curve = session.logs_dir / "loss.png"
    if not config.restart and (done := _already_trained(session, description)) is not None:
        get_logger(__name__).info(
            "%s is trained with these settings already; set restart to do it again", done.folder
        )
        return Trained(weights=done, metrics=(), loss_curve=curve)
    with suitable_threads(plan.base):
        metrics, parts = _run_stages(session, plan, examples)
    weights = save_trained(session, plan.total_steps, parts, description)
    _write_logs(session, metrics, curve)
    session.add_run(
        {"verb": "train", "step": weights.step, **asdict(config), "final_loss": metrics[-1].loss}
    )
    return Trained(weights=weights, metrics=tuple(metrics), loss_curve=curve)


def _run_stages(
    session: Session, plan: TrainPlan, examples: tuple[Example, ...]
) -> tuple[list[Metric], dict[str, dict[str, torch.Tensor]]]:
    """Return the loss of every update, and the tensors of each network that was trained."""
    models = load_models(plan.base, torch_device())
    data = _Data.prepare(session, plan, models, examples)
    metrics: list[Metric] = []
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for stage in plan_stages(plan):
        metrics += _run_stage(stage, plan, models, data)
        trained = getattr(models, stage.trains)
        parts[stage.trains] = {
            name: t.detach().cpu().contiguous() for name, t in trained.state_dict().items()
        }
    return metrics, parts


def _describe(plan: TrainPlan, examples: tuple[Example, ...]) -> dict[str, Any]:
    settings = {name: value for name, value in asdict(plan).items() if name != "base"}
    return {"base_model": plan.base.name, "settings": settings, "pictures": fingerprint(examples)}


def _already_trained(session: Session, description: dict[str, Any]) -> TrainedWeights | None:
    found = find_trained(session)[-1:]
    same = [weights for weights in found if description.items() <= weights.manifest.items()]
    return same[0] if same else None


@dataclass(frozen=True)
class _Data:
    """Latents and captions of the photos, and of the class pictures if there are any."""

    instances: LatentCache
    captions: tuple[str, ...]
    classes: LatentCache | None
    class_prompt: str

    @classmethod
    def prepare(
        cls, session: Session, plan: TrainPlan, models: Models, examples: tuple[Example, ...]
    ) -> _Data:
        """Draw what is missing, encode everything once, and move the VAE off the device."""
        class_paths = ensure_class_images(session, plan, models.pipeline)
        instances = LatentCache.encode(
            models.vae, [e.path for e in examples], desc="encoding training pictures"
        )
        classes = (
            LatentCache.encode(models.vae, class_paths, desc="encoding class pictures")
            if class_paths
            else None
        )
        models.vae.to("cpu")
        return cls(instances, tuple(e.caption for e in examples), classes, plan.class_prompt)

    def draw_latents(
        self, rows: torch.Tensor, class_rows: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Return latents (B, C, h, w): photos first, class pictures after them."""
        latents = self.instances.sample(rows, generator)
        if self.classes is None:
            return latents
        return torch.cat([latents, self.classes.sample(class_rows, generator)])

    def prompts(self, rows: torch.Tensor, class_rows: torch.Tensor) -> list[str]:
        """Return the captions that belong to `draw_latents`."""
        return [self.captions[row] for row in rows.tolist()] + [self.class_prompt] * len(class_rows)


def _run_stage(stage: Stage, plan: TrainPlan, models: Models, data: _Data) -> list[Metric]:
    """Train one network in place and return the loss of each update."""
    trained = getattr(models, stage.trains).requires_grad_(True).train()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=stage.learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=stage.steps)
    dtype = half_dtype(models.device)
    scaler = torch.amp.GradScaler(models.device.type, enabled=dtype is torch.float16)
    generator = torch.Generator().manual_seed(stage.seed)
    instance_rows = _batches(len(data.instances), plan.batch_size, generator)
    class_rows = _batches(len(data.classes or ()), plan.batch_size, generator)
    embed = _Embedder(models, cached=stage.trains != "text_encoder")
    log = _LossLog(stage)
    with progress(
        total=stage.steps, desc=f"training the {stage.trains.replace('_', ' ')}", unit="steps"
    ) as bar:
        for _ in range(stage.steps):
            rows, others = next(instance_rows), next(class_rows)
            latents = data.draw_latents(rows, others, generator)  # (B, C, h, w)
            noise = torch.randn(latents.shape, generator=generator).to(models.device)
            timesteps = _timesteps(models, len(latents), generator)
            with torch.autocast(models.device.type, dtype=dtype, enabled=dtype is not None):
                hidden = embed(data.prompts(rows, others))  # (B, T, D)
                errors = denoising_errors(
                    models.unet, models.noise_scheduler, (latents, noise, timesteps, hidden)
                )
            loss = dreambooth_loss(errors, len(rows), plan.prior_loss_weight)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            log.add(loss, float(schedule.get_last_lr()[0]))
            schedule.step()
            bar.set_postfix(**log.summary)
            bar.update()
        metrics = log.finish()
        bar.set_postfix(**log.summary)
    trained.requires_grad_(False).eval()
    return metrics


def _timesteps(models: Models, count: int, generator: torch.Generator) -> torch.Tensor:
    steps = models.noise_scheduler.config.num_train_timesteps
    return torch.randint(0, steps, (count,), generator=generator).to(models.device)


def _batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yield row numbers (B,) without end; every row comes once before any comes again."""
    queue = torch.empty(0, dtype=torch.long)
    while True:
        while count and len(queue) < batch_size:
            queue = torch.cat([queue, torch.randperm(count, generator=generator)])
        yield queue[:batch_size]
        queue = queue[batch_size:]


class _Embedder:
    """Prompts to hidden states (B, T, D); computed once each unless the encoder learns."""

    def __init__(self, models: Models, *, cached: bool) -> None:
        self._models = models
        self._cache: dict[str, torch.Tensor] | None = {} if cached else None

    def __call__(self, prompts: list[str]) -> torch.Tensor:
        """Return the hidden states of prompts."""
        if self._cache is None:
            return encode_prompts(self._models.tokenizer, self._models.text_encoder, prompts)
        with torch.no_grad():
            for prompt in prompts:
                if prompt not in self._cache:
                    self._cache[prompt] = encode_prompts(
                        self._models.tokenizer, self._models.text_encoder, [prompt]
                    )
        return torch.cat([self._cache[prompt] for prompt in prompts])


class _LossLog:
    """Losses of a stage, fetched from the device a few at a time."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._pending: list[torch.Tensor] = []
        self._rates: list[float] = []
        self._losses: list[float] = []

    def add(self, loss: torch.Tensor, lr: float) -> None:
        """Take the loss of the next update."""
        self._pending.append(loss.detach())
        self._rates.append(lr)
        if len(self._pending) >= _STEPS_PER_FETCH:
            self._fetch()

    def _fetch(self) -> None:
        if not self._pending:
            return
        values = torch.stack(self._pending).tolist()
        self._pending.clear()
        for value in values:
            step = self._stage.first_step + len(self._losses) + 1
            if value != value or abs(value) == float("inf"):
                raise TrainingError(
                    f"the loss is {value} at step {step} while training the {self._stage.trains}; "
                    "nothing was saved, lower its learning rate and train again"
                )
            self._losses.append(value)

    @property
    def summary(self) -> dict[str, float]:
        """Return the mean of the last losses that were fetched, to show beside the progress."""
        recent = self._losses[-50:]
        return {"loss": sum(recent) / len(recent)} if recent else {}

    def finish(self) -> list[Metric]:
        """Return all of them."""
        self._fetch()
        return [
            Metric(self._stage.first_step + i + 1, self._stage.trains, loss, lr)
            for i, (loss, lr) in enumerate(zip(self._losses, self._rates, strict=True))
        ]


def _write_logs(session: Session, metrics: list[Metric], curve: Path) -> None:
    session.logs_dir.mkdir(exist_ok=True)
    with atomic_path(session.logs_dir / "metrics.jsonl") as partial:
        partial.write_text(
            "".join(json.dumps(asdict(metric)) + "\n" for metric in metrics), encoding="utf-8"
        )
    stages = list(dict.fromkeys(metric.stage for metric in metrics))
    save_curve(
        {stage: [(m.step, m.loss) for m in metrics if m.stage == stage] for stage in stages},
        curve,
        title=f"DreamBooth training of {session.name}",
        x_label="update",
        y_label="denoising loss",
        marks={"UNet": next(m.step for m in metrics if m.stage == "unet")}
        if len(stages) == 2
        else {},
    )
