"""The two stages of a training run, and what each of them trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from colabtools.dreambooth.config import TrainPlan

__all__ = ["Stage", "plan_stages"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage: which network learns, for how many updates, from which peak learning rate.

    The other network is frozen, gradients of the text encoder flow through the frozen UNet.
    """

    trains: Literal["text_encoder", "unet"]
    steps: int
    learning_rate: float
    seed: int
    first_step: int


def plan_stages(plan: TrainPlan) -> tuple[Stage, ...]:
    """Return the stages of a run in order, without empty ones."""
    text_encoder = Stage(
        trains="text_encoder",
        steps=plan.text_encoder_steps,
        learning_rate=plan.text_encoder_lr,
        seed=plan.seed,
        first_step=0,
    )
    unet = Stage(
        trains="unet",
        steps=plan.unet_steps,
        learning_rate=plan.unet_lr,
        seed=plan.seed + 1,
        first_step=plan.text_encoder_steps,
    )
    return tuple(stage for stage in (text_encoder, unet) if stage.steps > 0)
