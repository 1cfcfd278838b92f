"""A training run in numbers: every "auto" replaced by a value."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from colabtools import registry
from colabtools.dreambooth.optimizers import check_optimizer, reference_lr
from colabtools.dreambooth.train_config import check_some_steps

if TYPE_CHECKING:
    from colabtools.dreambooth.train_config import TrainConfig
    from colabtools.registry import Base

__all__ = ["TrainPlan", "plan_training"]

# What users of the established two-stage notebook get, whatever the base model.
# Source: fast-DreamBooth.ipynb of TheLastBen/fast-stable-diffusion, training cell.
_CLASSIC = {
    "text_encoder_steps": 350,
    "text_encoder_lr": 1e-6,
    "unet_steps": 1500,
    "unet_lr": 2e-6,
    "batch_size": 1,
    "optimizer": "adamw8bit",
}
_MOST_CHECKPOINTS_APART = 200

# These change what is shown and kept, or the speed, but not what is trained.
_NOT_TRAINED = frozenset(
    {
        "allow_changes",
        "allow_resolution",
        "attention",
        "base_model",
        "checkpoint_every",
        "compile",
        "gradient_checkpointing",
        "keep_last",
        "resume",
        "sample_every",
        "sample_prompts",
        "sample_seeds",
        "save_every",
        "strict_captions",
        "tensorboard",
    }
)


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """A `TrainConfig` with every "auto" replaced by a value."""

    base: Base
    config: TrainConfig
    method: str
    text_encoder_steps: int
    unet_steps: int
    text_encoder_lr: float
    unet_lr: float
    batch_size: int
    lora_alpha: float
    optimizer: str
    class_prompt: str
    num_class_images: int
    checkpoint_every: int

    @property
    def total_steps(self) -> int:
        """Updates of all stages."""
        return self.text_encoder_steps + self.unet_steps

    @property
    def effective_batch(self) -> int:
        """Pictures per update and process."""
        return self.batch_size * self.config.gradient_accumulation_steps

    def settings(self) -> dict[str, Any]:
        """Return what the trained numbers depend on, as JSON."""
        own = {f.name for f in fields(self)} - {"base", "config", "checkpoint_every"}
        asked = {k: v for k, v in asdict(self.config).items() if k not in _NOT_TRAINED}
        return {**asked, **{name: getattr(self, name) for name in own}}


def plan_training(config: TrainConfig) -> TrainPlan:
    """Return the run that a config asks for, in numbers.

    Raises:
        ConfigError: there is no step to train, or no such optimizer.
        MissingDependencyError: the optimizer's library is not installed.
        ModelError: the base model is not known.
    """
    base = registry.resolve_base(registry.find_base(config.base_model))
    reference = _reference(config, base)

    def chosen(name: str) -> Any:
        value = getattr(config, name)
        return reference[name] if value == "auto" else value

    if (optimizer := chosen("optimizer")) != "auto":
        check_optimizer(optimizer)
    numbers = {
        name: chosen(name) for name in reference if name not in ("optimizer", "checkpoint_every")
    }
    if config.stages == "joint":
        numbers["text_encoder_steps"] = 0
    total = numbers["text_encoder_steps"] + numbers["unet_steps"]
    check_some_steps(numbers["text_encoder_steps"], numbers["unet_steps"])
    apart = max(1, min(_MOST_CHECKPOINTS_APART, total // 5))
    prior = config.prior_preservation
    return TrainPlan(
        **{**numbers, "num_class_images": numbers["num_class_images"] if prior else 0},
        base=base,
        config=config,
        optimizer=optimizer,
        class_prompt=config.class_prompt if prior else "",
        checkpoint_every=apart if config.checkpoint_every == "auto" else config.checkpoint_every,
    )


def _reference(config: TrainConfig, base: Base) -> dict[str, Any]:
    """Return what "auto" stands for in each field that may be it."""
    classic = config.stages == "classic"
    method = config.method
    if method == "auto":
        method = "full" if classic else base.method
    full = method == "full"
    values: dict[str, Any] = {
        "batch_size": base.batch_size,
        "lora_alpha": float(config.lora_rank),
        "method": method,
        "num_class_images": base.num_class_images,
        "optimizer": "auto",
        "text_encoder_lr": base.text_encoder_lr if full else base.lora_text_encoder_lr,
        "text_encoder_steps": base.text_encoder_steps,
        "unet_lr": base.unet_lr if full else base.lora_lr,
        "unet_steps": base.unet_steps if full else base.lora_steps,
    }
    if classic:
        values.update(_CLASSIC)
    optimizer = values["optimizer"] if config.optimizer == "auto" else config.optimizer
    if optimizer != "auto":
        for name in ("text_encoder_lr", "unet_lr"):
            values[name] = reference_lr(optimizer, values[name])
    return values
