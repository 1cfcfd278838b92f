"""The stages of a training run, and what each of them trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from colabtools.errors import ConfigError

if TYPE_CHECKING:
    from colabtools.dreambooth.plan import TrainPlan

__all__ = ["Stage", "plan_stages"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage: which networks learn, for how many updates, from which peak learning rates.

    Networks that do not learn are frozen; gradients of a text encoder flow through the frozen UNet.

    Attributes:
        name: what the stage is for, as it stands in logs.
        rates: peak learning rate of each network that learns, by its name in the pipeline.
        keeps: those whose weights are the result; others go back to the base model's after it.
        steps: updates.
        first_step: updates of the stages before.
        number: 1 for the first; it takes part in the seeds of the stage.
    """

    name: str
    rates: dict[str, float]
    keeps: tuple[str, ...]
    steps: int
    first_step: int
    number: int

    @property
    def trains_text(self) -> bool:
        """Whether a text encoder learns, so that prompts must be encoded at every step."""
        return any(part.startswith("text_encoder") for part in self.rates)


def plan_stages(
    plan: TrainPlan, *, denoiser: str = "unet", text_encoders: tuple[str, ...] = ("text_encoder",)
) -> tuple[Stage, ...]:
    """Return the stages of a run in order, without empty ones.

    Args:
        plan: the run.
        denoiser: name of the UNet or transformer in the pipeline.
        text_encoders: names of those text encoders that can be trained.

    Raises:
        ConfigError: a text encoder shall learn that cannot.
    """
    kind = plan.config.stages
    if not text_encoders and (plan.text_encoder_steps > 0 or kind == "joint"):
        raise ConfigError(
            f"text_encoder_steps is {plan.text_encoder_steps} and stages {kind!r}; the text "
            f"encoders of {plan.base.name} are not trained, use stages separate with 0 steps"
        )
    encoder_rates = dict.fromkeys(text_encoders, plan.text_encoder_lr)
    if kind == "joint":
        rates = {**encoder_rates, denoiser: plan.unet_lr}
        return (_stage("joint", rates, tuple(rates), plan.unet_steps, (0, 1)),)
    first_rates = encoder_rates
    if kind == "classic":
        # One rate for both, and the UNet is thrown away afterwards.
        first_rates = {**encoder_rates, denoiser: plan.text_encoder_lr}
    first = _stage("text_encoder", first_rates, text_encoders, plan.text_encoder_steps, (0, 1))
    second = _stage(
        denoiser,
        {denoiser: plan.unet_lr},
        (denoiser,),
        plan.unet_steps,
        (plan.text_encoder_steps, 2),
    )
    return tuple(stage for stage in (first, second) if stage.steps > 0)


def _stage(
    name: str,
    rates: dict[str, float],
    keeps: tuple[str, ...],
    steps: int,
    place: tuple[int, int],
) -> Stage:
    first_step, number = place
    return Stage(
        name=name, rates=rates, keeps=keeps, steps=steps, first_step=first_step, number=number
    )
