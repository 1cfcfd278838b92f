"""One stage of training, update by update: the part that moves weights."""

from __future__ import annotations

import gc
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from colabtools.dreambooth.families import denoising_errors
from colabtools.dreambooth.guard import Health, Setback, find_cause
from colabtools.dreambooth.losses import example_weights, loss_weights
from colabtools.dreambooth.optimizers import load_optimizer_state, make_optimizer
from colabtools.dreambooth.planner import next_rung
from colabtools.dreambooth.randomness import capture_rng, restore_rng
from colabtools.dreambooth.schedule import lr_factor
from colabtools.errors import CheckpointError, TrainingError
from colabtools.report import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterator

    from colabtools.dreambooth.data import PromptEncoder, TrainingData
    from colabtools.dreambooth.families import Models
    from colabtools.dreambooth.networks import Networks
    from colabtools.dreambooth.order import Order, Slot
    from colabtools.dreambooth.planner import MemoryNeed, MemoryPlan
    from colabtools.dreambooth.world import World

__all__ = ["Feed", "StageLoop"]


@dataclass(frozen=True, kw_only=True)
class Feed:
    """Where a stage's examples come from."""

    data: TrainingData
    embed: PromptEncoder
    photos: Order
    classes: Order

    def batches(self, update: int) -> Iterator[list[Slot]]:
        """Yield the batches of an update, of all processes together, photos before class pictures.

        Each holds examples of one shape.
        """
        others = iter(self.classes.batches(update))
        for batch in self.photos.batches(update):
            beside = next(others, [])
            if beside and self.data.shape(beside[0]) == self.data.shape(batch[0]):
                yield [*batch, *beside]
            else:
                yield batch
                if beside:
                    yield beside


class StageLoop:
    """A stage in progress: networks that learn, their optimizer, and how far it is."""

    def __init__(self, networks: Networks, models: Models, feed: Feed, memory: MemoryPlan) -> None:
        self.stage = networks.stage
        self.networks = networks
        self.memory = memory
        self.update = 0
        self.lr_scale = 1.0
        self._plan = plan = networks.plan
        self._models = models
        self._feed = feed
        networks.checkpoint_gradients(memory.gradient_checkpointing)
        self._optimizer = make_optimizer(
            memory.optimizer,
            self.networks.parameter_groups(),
            weight_decay=plan.config.weight_decay,
            device=models.device,
        )
        fp16 = self.networks.compute_dtype is torch.float16
        self._scaler = torch.amp.GradScaler(models.device.type, enabled=fp16)
        self.health = Health(self.stage, every=1 if models.device.type == "cpu" else 10)
        self._stepping = False
        self._compiled = False
        # What the stage holds, where it was measured.
        self.need: MemoryNeed | None = None

    @property
    def finished(self) -> bool:
        """Whether every update is done."""
        return self.update >= self.stage.steps

    def compile(self) -> None:
        """Compile the denoiser at its first call; where that fails it goes on as it is."""
        self._models.denoiser.compile()
        self._compiled = True

    def step(self, world: World) -> None:
        """Do the next update; where memory ends, one rung lower.

        Raises:
            Setback: the weights may be half-way between two updates, or three updates in a row were
                not finite; the run must go on from its last state.
            TrainingError: memory is not enough on any rung.
        """
        done = False
        while not done:
            failure = ""
            try:
                done = self._try_update(world)
            except torch.OutOfMemoryError as error:
                # Its traceback holds what fills the memory, so it must not be kept.
                failure = str(error).partition("\n")[0]
            except RuntimeError as error:
                if not (self._compiled and _is_of_compiler(error)):
                    raise
                self._stop_compiling(error)
            if failure:
                self._lower(world, failure)
        self.update += 1
        self.check()

    def _try_update(self, world: World) -> bool:
        """Return whether the update is done, rather than to be tried with a lower loss scale."""
        rate = self.lr_scale * lr_factor(
            self._plan.config.lr_schedule,
            self.update,
            steps=self.stage.steps,
            warmup_steps=self._plan.config.lr_warmup_steps,
        )
        rates = self.networks.set_rates(self._optimizer, rate)
        loss = self._accumulate(world)
        parameters = self.networks.parameters()
        world.add_up_gradients(parameters)
        world.add_up([loss])
        self._scaler.unscale_(self._optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self._plan.config.max_grad_norm)
        healthy = norm.isfinite() & loss.isfinite()
        if not self._apply(healthy, loss):
            return False
        if self._skips_on_device() or bool(healthy):
            self.networks.update_ema()
        self.health.add(self.update, loss, norm, healthy, max(rates))
        return True

    def _apply(self, healthy: torch.Tensor, loss: torch.Tensor) -> bool:
        """Move the weights if all is finite; return False to try again with a lower loss scale."""
        self._stepping = True
        try:
            if self._scaler.is_enabled():
                scale = self._scaler.get_scale()
                self._scaler.step(self._optimizer)
                self._scaler.update()
                overflow = self._scaler.get_scale() < scale
                # Gradients beyond fp16 say that the scale is too high, not that training is ill.
                if overflow and scale > 1 and bool(loss.isfinite()):
                    self._stepping = False
                    return False
            elif self._skips_on_device():
                # The optimizer looks at this flag on the device, so the host need not wait for it.
                self._optimizer.found_inf = (~healthy).float()  # type: ignore[attr-defined]
                self._optimizer.step()
            elif bool(healthy):
                self._optimizer.step()
        finally:
            self._optimizer.zero_grad(set_to_none=True)
        self._stepping = False
        return True

    def _skips_on_device(self) -> bool:
        fused = self._optimizer.defaults.get("fused") is True
        return fused and self._models.device.type == "cuda"

    def _accumulate(self, world: World) -> torch.Tensor:
        """Add up the gradients of an update and return its loss, both of this process's share."""
        slots = list(self._feed.batches(self.update))
        flat = [slot for batch in slots for slot in batch]
        weights = example_weights(
            [slot.kind == "class" for slot in flat], self._plan.config.prior_loss_weight
        )
        weight_of = dict(zip(flat, weights, strict=True))
        total = torch.zeros((), device=self._models.device)
        for batch in slots:
            share = world.share(batch)
            for first in range(0, len(share), self.memory.micro_batch):
                part = share[first : first + self.memory.micro_batch]
                total += self._backward(part, torch.stack([weight_of[slot] for slot in part]))
        return total

    def _backward(self, slots: list[Slot], weights: torch.Tensor) -> torch.Tensor:
        seeds = [self._feed.photos.seed_of(self.stage.number, self.update, slot) for slot in slots]
        # What draws from the global generator, such as dropout, repeats as well.
        torch.manual_seed(seeds[0])
        models, config = self._models, self._plan.config
        batch = self._feed.data.batch(slots, seeds, models)
        if config.min_snr_gamma:
            weights = weights * loss_weights(
                models.noise_scheduler, batch.timesteps, config.min_snr_gamma
            )
        batch = batch.to(models.device)
        with self.networks.autocast(), self.networks.saved_activations(self.memory):
            conditioning = self._feed.embed(batch.prompts)
            errors = denoising_errors(
                models, batch.latents, batch.noise, batch.timesteps, conditioning
            )  # (B,)
        loss = (errors * weights.to(models.device)).sum()
        self._scaler.scale(loss).backward()
        return loss.detach()

    def check(self, *, now: bool = False) -> None:
        """Look at the updates that the device is done with; all of them, if `now`.

        Raises:
            Setback: too many in a row were not finite.
        """
        self.health.check(self._find_cause, now=now)

    def _find_cause(self, step: int) -> str:
        batches = self._feed.batches(step - self.stage.first_step - 1)
        slots = [slot for batch in batches for slot in batch]
        return find_cause(self.networks, self._feed.data, slots)

    def _stop_compiling(self, error: RuntimeError) -> None:
        """Go on without the compiler; the update that it broke off is done again."""
        get_logger(__name__).warning(
            "the denoiser cannot be compiled (%s); going on without",
            " ".join(str(error).split())[:200],
        )
        self._optimizer.zero_grad(set_to_none=True)
        # What `Module.compile` sets; torch has no name for the way back.
        self._models.denoiser._compiled_call_impl = None
        self._compiled = False

    def _lower(self, world: World, failure: str) -> None:
        """Go one rung down, or give up."""
        self._optimizer.zero_grad(set_to_none=True)
        lower = None
        # Processes that run differently would wait for each other for ever.
        if world.size == 1:
            lower = next_rung(
                self.memory,
                batch_size=sum(len(batch) for batch in self._feed.batches(self.update)),
                optimizer_started=self.update > 0,
                can_8bit=self.networks.can_use_8bit,
                need=self.need,
            )
        if lower is None:
            raise TrainingError(
                f"out of memory at update {self.stage.first_step + self.update + 1} with "
                f"{self.memory.micro_batch} pictures a pass ({failure}); use a lower resolution, a "
                "smaller batch_size, method lora, or a larger card"
            )
        get_logger(__name__).warning("out of memory; going on with %s", lower.reasons[-1])
        if self._stepping or lower.optimizer != self.memory.optimizer:
            # Some weights may have moved already.
            raise Setback("out of memory while the weights were moved", memory=lower)
        self.memory = lower
        self.networks.checkpoint_gradients(lower.gradient_checkpointing)
        gc.collect()
        if self._models.device.type == "cuda":
            torch.cuda.empty_cache()

    def state(self) -> dict[str, Any]:
        """Return everything but the weights that the next update depends on."""
        self.health.fetch()
        return {
            "stage": self.stage.number,
            "update": self.update,
            # States are taken between updates only.
            "micro_batch_in_update": 0,
            "epoch": self._feed.photos.epoch_of(self.update),
            "lr_scale": self.lr_scale,
            "optimizer_name": self.memory.optimizer,
            "optimizer": self._optimizer.state_dict(),
            "grad_scaler": self._scaler.state_dict(),
            "ema": self.networks.ema_state(),
            "rng": capture_rng(),
            "memory": asdict(self.memory),
            "metrics": [asdict(metric) for metric in self.health.metrics],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a state of this stage; the weights must be in place already.

        Raises:
            CheckpointError: it does not fit; the message says what.
        """
        if state["optimizer_name"] != self.memory.optimizer:
            raise CheckpointError(
                f"the saved state is of optimizer {state['optimizer_name']}, this run has "
                f"{self.memory.optimizer}; install what the former needs, or set resume to never"
            )
        try:
            load_optimizer_state(self._optimizer, state["optimizer"])
            for group in self._optimizer.param_groups:
                group["weight_decay"] = self._plan.config.weight_decay
            # A state of a card that computes in bf16 has none.
            if self._scaler.is_enabled() and state["grad_scaler"]:
                self._scaler.load_state_dict(state["grad_scaler"])
            self.networks.load_ema_state(state["ema"])
            restore_rng(state["rng"])
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            raise CheckpointError(
                f"the saved state does not fit this run ({type(error).__name__}: {error}); "
                "use the same version of torch, or set resume to never"
            ) from error
        self.update = int(state["update"])
        self.health.load(state["metrics"])


def _is_of_compiler(error: RuntimeError) -> bool:
    """Whether an error is of torch.compile, which needs a C++ compiler, Triton and much memory."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import CppCompileError

    return isinstance(error, (TorchDynamoException, CppCompileError))
