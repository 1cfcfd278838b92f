"""The stages of a run one after the other, with a state that survives between any two updates."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from colabtools import registry
from colabtools.dreambooth.byproducts import ensure_step_files, spared
from colabtools.dreambooth.cache import LatentCache, crop_sets
from colabtools.dreambooth.data import PromptEncoder, TrainingData, rules_of
from colabtools.dreambooth.dataset import first_captions, split_heldout
from colabtools.dreambooth.disk import ensure_disk
from colabtools.dreambooth.families import scale_latents
from colabtools.dreambooth.generate import scheduler_from_noise
from colabtools.dreambooth.guard import Metric
from colabtools.dreambooth.interrupt import deferred_interrupt
from colabtools.dreambooth.loop import Feed, StageLoop
from colabtools.dreambooth.losses import zero_terminal_snr
from colabtools.dreambooth.memory import choose_quantization, measure_stage, plan_stage_memory
from colabtools.dreambooth.models import load_models, release
from colabtools.dreambooth.monitor import HeldOut
from colabtools.dreambooth.networks import (
    Networks,
    adapter_settings,
    compute_dtype,
    ensure_adapter,
    file_stem,
    load_weights,
    use_attention,
)
from colabtools.dreambooth.order import Order
from colabtools.dreambooth.prior import check_class_images, ensure_class_images
from colabtools.dreambooth.saved import Snapshot
from colabtools.dreambooth.stages import plan_stages
from colabtools.errors import ConfigError
from colabtools.report import get_logger, progress

if TYPE_CHECKING:
    from pathlib import Path

    from colabtools.dreambooth.dataset import Example
    from colabtools.dreambooth.families import Models
    from colabtools.dreambooth.monitor import Monitor
    from colabtools.dreambooth.plan import TrainPlan
    from colabtools.dreambooth.planner import MemoryPlan
    from colabtools.dreambooth.saved import Saved
    from colabtools.dreambooth.session import Session
    from colabtools.dreambooth.stages import Stage
    from colabtools.dreambooth.state import CheckpointStore
    from colabtools.dreambooth.world import World

__all__ = ["Run", "Surroundings", "check_run"]


def check_run(plan: TrainPlan, examples: tuple[Example, ...]) -> None:
    """Refuse what cannot be trained, before anything large is loaded.

    Raises:
        ConfigError: the pictures have a size that the base model does not support, or a setting
            does not fit the base model.
    """
    if not plan.config.allow_resolution:
        for example in examples:
            registry.check_resolution(plan.base, *example.size)
    if plan.config.quantize == "nf4" and plan.method == "full":
        raise ConfigError(
            "quantize is 'nf4' with method 'full'; weights in 4 bits cannot be trained, use lora"
        )
    if plan.config.min_snr_gamma and plan.base.prediction_type == "flow":
        raise ConfigError(
            f"min_snr_gamma is {plan.config.min_snr_gamma} and {plan.base.name} has no "
            "signal-to-noise ratio per timestep; set it to 0"
        )
    predicts = plan.base.prediction_type
    if plan.config.zero_terminal_snr and predicts not in ("", "v_prediction"):
        raise ConfigError(
            f"zero_terminal_snr is for v-prediction models, and {plan.base.name} predicts "
            f"{predicts}; turn it off"
        )


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a run works with: processes, checkpoints and logs."""

    world: World
    store: CheckpointStore
    monitor: Monitor


class Run:
    """A run in progress.

    Attributes:
        lr_scale: part of the learning rates that is used; lower after a setback.
        memory: how stages run, where a setback has decided that; None to plan each.
    """

    def __init__(
        self,
        session: Session,
        plan: TrainPlan,
        examples: tuple[Example, ...],
        description: dict[str, Any],
        around: Surroundings,
    ) -> None:
        self.lr_scale = 1.0
        self.memory: MemoryPlan | None = None
        self._session = session
        self._plan = plan
        self._description = description
        self._around = around
        count = plan.config.heldout_images
        self._examples, self._heldout = split_heldout(examples, count, plan.config.seed)
        # Tensors of finished stages, or of all parts of the state to go on from.
        self._done: dict[str, dict[str, torch.Tensor]] = {}

    def attempt(self, saved: Saved | None) -> None:
        """Train from a saved state, or from the base model, to the end.

        Raises:
            KeyboardInterrupt: it was asked for; the state was saved.
            Setback: the run must go on from its last state.
        """
        models = self._load_models()
        use_attention(models, self._plan.config.attention)
        if self._plan.config.zero_terminal_snr:
            models.noise_scheduler = zero_terminal_snr(models.noise_scheduler)
            models.pipeline.scheduler = scheduler_from_noise(models.pipeline)
        stages = plan_stages(
            self._plan,
            denoiser=models.family.denoiser,
            text_encoders=models.family.trainable_text_encoders,
        )
        if self._around.world.is_main:
            done = saved.step if saved is not None else 0
            ensure_disk(self._plan, models, stages, self._around.store, done)
        data, heldout = self._prepare_data(models, saved)
        state = saved.load_state() if saved is not None else {}
        self._done = saved.load_all() if saved is not None else {}
        # A rate that was lowered stays so, in the stages that follow as well.
        self.lr_scale = min(self.lr_scale, state.get("lr_scale", 1.0))
        if saved is not None:
            get_logger(__name__).info("going on from step %d", saved.step)
        events = self._around.world.is_main
        with spared("the events for TensorBoard"):
            self._around.monitor.start(_metrics(state), state.get("heldout", ()), events=events)
        if saved is not None:
            # A kill may have come before the last of them was written.
            self._write_step_files()
        for stage in stages:
            if stage.number < state.get("stage", 0):
                continue
            current = state if stage.number == state.get("stage") else {}
            self._run_stage(stage, models, data, heldout, current)
            self._save_boundary(stage, last=stage is stages[-1])

    def _save_boundary(self, stage: Stage, *, last: bool) -> None:
        """Save what a stage leaves, as the result of the run or for the next stage."""
        step = stage.first_step + stage.steps
        following = {
            "stage": stage.number + 1,
            "update": 0,
            "lr_scale": self.lr_scale,
            "metrics": [asdict(metric) for metric in self._around.monitor.metrics],
            "heldout": self._around.monitor.heldout,
        }
        self._save(step, self._done, tuple(sorted(self._done)), {} if last else following)

    def _load_models(self) -> Models:
        plan, device = self._plan, self._around.world.device
        full = plan.method == "full"
        return load_models(
            plan.base,
            device,
            frozen_dtype=compute_dtype(plan.config.precision, device),
            # Which of them learn is known with the family; a few fp32 weights too many do no harm.
            trainable=("unet", "transformer", "text_encoder", "text_encoder_2") if full else (),
            quantize=choose_quantization(plan, device),
        )

    def _prepare_data(
        self, models: Models, saved: Saved | None
    ) -> tuple[TrainingData, HeldOut | None]:
        """Draw what is missing, encode all pictures once, and take the VAE off the device."""
        if self._around.world.is_main:
            ensure_class_images(self._session, self._plan, models.pipeline)
        self._around.world.wait()
        class_paths = ensure_class_images(self._session, self._plan, models.pipeline)
        self._description.update(check_class_images(class_paths, saved))
        config = self._plan.config
        data = TrainingData(
            instances=self._encode(
                models, [e.path for e in self._examples], "training", crops=config.crops
            ),
            captions=tuple(example.caption for example in self._examples),
            classes=self._encode(models, class_paths, "class") if class_paths else None,
            class_prompt=self._plan.class_prompt,
            rules=rules_of(self._plan),
            offset_noise=config.offset_noise,
        )
        heldout = None
        if self._heldout:
            heldout = HeldOut(
                latents=self._encode(models, [e.path for e in self._heldout], "held-out"),
                captions=tuple(example.caption for example in self._heldout),
            )
        release(models, ["vae"])
        return data, heldout

    def _encode(
        self, models: Models, paths: list[Path], kind: str, *, crops: int = 1
    ) -> LatentCache:
        # Two processes that fill one folder would do each other's work again.
        folder = self._session.folder / ".cache" / "latents" if self._around.world.is_main else None
        return LatentCache.encode(
            models.vae,
            crop_sets(paths, crops=crops, seed=self._plan.config.seed),
            folder=folder,
            scale=scale_latents,
            desc=f"encoding {kind} pictures",
        )

    def _order(self, kind: str, cache: LatentCache | None) -> Order:
        shapes = [cache.shape(row) for row in range(len(cache))] if cache is not None else []
        return Order(
            kind,
            shapes,
            batch_size=self._plan.batch_size * self._around.world.size,
            batches_per_update=self._plan.config.gradient_accumulation_steps,
            seed=self._plan.config.seed,
        )

    def _run_stage(
        self,
        stage: Stage,
        models: Models,
        data: TrainingData,
        heldout: HeldOut | None,
        state: dict[str, Any],
    ) -> None:
        """Train one stage, from a state inside it where there is one."""
        self._place_done(models, stage)
        embed = PromptEncoder(models, learning=stage.trains_text)
        feed = Feed(
            data=data,
            embed=embed,
            photos=self._order("instance", data.instances),
            classes=self._order("class", data.classes),
        )
        networks = Networks(stage, self._plan, models)
        need = measure_stage(networks, models, data)
        memory = self.memory or plan_stage_memory(
            networks, data, need, saved_optimizer=state.get("optimizer_name")
        )
        loop = StageLoop(networks, models, feed, memory)
        loop.need = need
        loop.lr_scale = self.lr_scale
        # Between two stages nothing is under way.
        if "optimizer" in state:
            own = {file_stem(part, self._plan.method) for part in stage.rates}
            load_weights(models, {stem: t for stem, t in self._done.items() if stem in own})
            loop.load_state(state)
        else:
            loop.health.load([asdict(metric) for metric in self._around.monitor.metrics])
        if not stage.trains_text:
            self._encode_prompts(models, embed, data, heldout)
        if self._plan.config.compile:
            loop.compile()
        self._update_all(loop, models, embed, heldout)
        loop.check(now=True)
        loop.health.check_weights(networks)
        self._keep(networks)
        with spared("the events for TensorBoard"):
            self._around.monitor.update(loop.health.metrics)

    def _place_done(self, models: Models, stage: Stage) -> None:
        """Put the results of former stages in place, where they come from a saved state."""
        own = {file_stem(part, self._plan.method) for part in stage.rates}
        for stem, tensors in self._done.items():
            if stem in own:
                continue
            part = stem.removesuffix("_lora")
            if stem != part:
                ensure_adapter(models.part(part), part, self._plan)
            load_weights(models, {stem: tensors})
            models.part(part).requires_grad_(False).eval()

    def _encode_prompts(
        self,
        models: Models,
        embed: PromptEncoder,
        data: TrainingData,
        heldout: HeldOut | None,
    ) -> None:
        """Encode every prompt once and let the text encoders go, where that is possible."""
        prompts = data.prompts()
        if prompts is None:
            return
        embed.prepare({*prompts, *(heldout.captions if heldout else ())})
        release(models, list(models.text_encoders))

    def _update_all(
        self, loop: StageLoop, models: Models, embed: PromptEncoder, heldout: HeldOut | None
    ) -> None:
        stage = loop.stage
        desc = f"training the {stage.name.replace('_', ' ')}"
        with (
            deferred_interrupt() as asked,
            progress(total=stage.steps, desc=desc, unit="steps") as bar,
        ):
            bar.update(loop.update)
            while not loop.finished:
                loop.step(self._around.world)
                step = stage.first_step + loop.update
                self._measure(loop, models, embed, heldout)
                stop = self._around.world.any(asked.is_set())
                # Before the state: whoever goes on from it would not draw them any more.
                self._draw_samples(loop, models)
                if stop or (self._is_due(step) and not loop.finished):
                    self._save_progress(loop)
                if stop:
                    raise KeyboardInterrupt(
                        f"stopped after step {step}; its state is saved, the same command goes on"
                    )
                bar.set_postfix(**loop.health.summary)
                bar.update()
            loop.health.fetch()
            bar.set_postfix(**loop.health.summary)

    def _is_due(self, step: int) -> bool:
        config = self._plan.config
        often = step % self._plan.checkpoint_every == 0
        return often or (config.save_every > 0 and step % config.save_every == 0)

    def _keep(self, networks: Networks) -> None:
        """Take the results of a stage, and put the base model's weights back where none is kept."""
        networks.finish()
        stage = networks.stage
        results = networks.weights()
        for part in stage.rates:
            stem = file_stem(part, self._plan.method)
            if part in stage.keeps:
                self._done[stem] = {name: t.cpu().clone() for name, t in results[stem].items()}
            else:
                self._done.pop(stem, None)
                networks.reset(part)

    def _measure(
        self, loop: StageLoop, models: Models, embed: PromptEncoder, heldout: HeldOut | None
    ) -> None:
        """Measure the held-out loss where it is due; it is a part of the state."""
        step = loop.stage.first_step + loop.update
        due = self._is_due(step) or loop.finished
        if heldout is None or not due or not self._around.world.is_main:
            return
        try:
            with loop.networks.resting(), loop.networks.autocast():
                loss = heldout.loss(models, embed)
        except torch.OutOfMemoryError:
            get_logger(__name__).warning(
                "memory is too short to measure the held-out loss at step %d beside the training",
                step,
            )
            return
        with spared("the events for TensorBoard"):
            self._around.monitor.add_heldout(step, loss)

    def _draw_samples(self, loop: StageLoop, models: Models) -> None:
        """Draw what is due; neither the training nor its end depends on it."""
        step = loop.stage.first_step + loop.update
        every = self._plan.config.sample_every
        if not (self._around.world.is_main and every and step % every == 0):
            return
        prompts = self._plan.config.sample_prompts or first_captions(self._examples)
        try:
            with spared(f"the samples of step {step}"), loop.networks.resting():
                self._around.monitor.draw_samples(models, step, prompts)
        except torch.OutOfMemoryError:
            get_logger(__name__).warning(
                "memory is too short to draw samples at step %d beside the training", step
            )
        if models.device.type == "cuda":
            torch.cuda.empty_cache()

    def _save_progress(self, loop: StageLoop) -> None:
        """Save everything that the rest of the run depends on."""
        step = loop.stage.first_step + loop.update
        state = {**loop.state(), "heldout": self._around.monitor.heldout}
        weights = {**self._done, **loop.networks.weights()}
        loop.health.check_weights(loop.networks)
        kept = {stem for stem in self._done if stem not in loop.networks.weights()}
        trained = {*kept, *(file_stem(part, self._plan.method) for part in loop.stage.keeps)}
        with spared("the events for TensorBoard"):
            self._around.monitor.update(loop.health.metrics)
        self._save(step, weights, tuple(sorted(trained)), state)

    def _write_step_files(self) -> None:
        every = self._plan.config.save_every
        if self._around.world.is_main and every:
            with spared("the model file of a saved step"):
                ensure_step_files(self._session, self._around.store.of_run(), every)

    def _save(
        self,
        step: int,
        parts: dict[str, dict[str, torch.Tensor]],
        trained: tuple[str, ...],
        state: dict[str, Any],
    ) -> None:
        if self._around.world.is_main:
            # Before the state: after the last one nobody would write them again.
            with spared("the log of losses"):
                self._around.monitor.write()
            shape = asdict(adapter_settings(self._plan))
            adapters = {stem: shape for stem in trained if stem.endswith("_lora")}
            self._around.store.save(
                Snapshot(
                    step=step,
                    finished=not state,
                    parts=parts,
                    trained=trained,
                    state=state,
                    description={**self._description, "adapters": adapters},
                )
            )
            if self._plan.config.save_every and step % self._plan.config.save_every == 0:
                self._write_step_files()
        self._around.world.wait()


def _metrics(state: dict[str, Any]) -> list[Metric]:
    return [Metric(**values) for values in state.get("metrics", ())]
