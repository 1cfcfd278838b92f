"""What a denoiser is asked to predict, and how much the error of each example counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from colabtools.errors import ConfigError, ModelError
from colabtools.fields import check_number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffusers import DDPMScheduler

__all__ = [
    "dreambooth_loss",
    "example_weights",
    "loss_weights",
    "prediction_target",
    "snr",
    "zero_terminal_snr",
]


def prediction_target(
    noise_scheduler: DDPMScheduler,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """Return what the UNet should predict, (B, C, h, w): the noise, or the velocity.

    Source: Salimans & Ho 2022, arXiv 2202.00512, v = alpha * noise - sigma * x.

    Raises:
        ModelError: the scheduler has a prediction type of another kind.
    """
    if _prediction_type(noise_scheduler) == "epsilon":
        return noise
    velocity: torch.Tensor = noise_scheduler.get_velocity(latents, noise, timesteps)
    return velocity


def dreambooth_loss(
    errors: torch.Tensor, num_instances: int, prior_loss_weight: float
) -> torch.Tensor:
    """Return the mean error of the instance part plus the weighted mean of the class part.

    Source: Ruiz et al. 2022, arXiv 2208.12242, equation 2.

    Args:
        errors: (B,) squared errors, the `num_instances` photos first and class pictures after them.
        num_instances: how many of them are photos.
        prior_loss_weight: weight of the class part; without class pictures it does not matter.
    """
    loss = errors[:num_instances].mean()
    if len(errors) > num_instances:
        loss = loss + prior_loss_weight * errors[num_instances:].mean()
    return loss


def example_weights(is_class: Sequence[bool], prior_loss_weight: float) -> torch.Tensor:
    """Return (B,) float32 weights whose dot product with the errors is `dreambooth_loss`.

    A sum can be split: an update that is computed a few examples at a time, in any order, has the
    same loss and gradient as one that is computed at once.

    Args:
        is_class: of every example of one update, whether it is a class picture.
        prior_loss_weight: weight of the mean over the class pictures.
    """
    classes = torch.tensor(is_class, dtype=torch.bool)
    num_classes = int(classes.sum())
    num_instances = len(classes) - num_classes
    # Neither divisor is used where it is 0.
    of_instance = 1 / max(num_instances, 1)
    of_class = prior_loss_weight / max(num_classes, 1)
    return torch.where(classes, torch.tensor(of_class), torch.tensor(of_instance))


def snr(noise_scheduler: DDPMScheduler, timesteps: torch.Tensor) -> torch.Tensor:
    """Return the signal-to-noise ratio alpha_bar / (1 - alpha_bar), (B,) float32.

    Source: Kingma et al. 2021, arXiv 2107.00630.

    Raises:
        ConfigError: the model has no discrete noise schedule (flow matching).
    """
    alphas_cumprod = getattr(noise_scheduler, "alphas_cumprod", None)
    if alphas_cumprod is None:
        raise ConfigError(
            f"min_snr_gamma cannot be used with {type(noise_scheduler).__name__}, which has no "
            "signal-to-noise ratio per timestep; set it to 0"
        )
    alpha_bar: torch.Tensor = alphas_cumprod.to(timesteps.device)[timesteps].float()
    return alpha_bar / (1 - alpha_bar)


def loss_weights(
    noise_scheduler: DDPMScheduler, timesteps: torch.Tensor, min_snr_gamma: float | None
) -> torch.Tensor:
    """Return the min-SNR weight of each example's squared error, (B,) float32.

    min(snr, gamma) / snr for a model that predicts the noise, min(snr, gamma) / (snr + 1) for one
    that predicts the velocity; both are the same weight min(snr, gamma) of the error in x. At the
    last timestep of a zero-terminal-SNR schedule, where the input holds no picture, snr is 0: the
    velocity's weight is then 0, so that step is not learned at all, and the noise's is its limit 1.

    Source: Hang et al. 2023, arXiv 2303.09556.

    Args:
        noise_scheduler: the noise schedule; not looked at when the weights are all 1.
        timesteps: (B,).
        min_snr_gamma: the limit gamma, 5 in the paper; None or 0 gives every example weight 1.

    Raises:
        ConfigError: gamma is negative, or the model has no discrete noise schedule.
        ModelError: the scheduler has a prediction type of another kind.
    """
    if not min_snr_gamma:
        return torch.ones(timesteps.shape, dtype=torch.float32, device=timesteps.device)
    check_number("min_snr_gamma", min_snr_gamma, also=", or 0 for off")
    ratios = snr(noise_scheduler, timesteps)
    if _prediction_type(noise_scheduler) == "epsilon":
        # The same as min(snr, gamma) / snr, without its 0 / 0.
        return (min_snr_gamma / ratios).clamp(max=1)
    return ratios.clamp(max=min_snr_gamma) / (ratios + 1)


def zero_terminal_snr(noise_scheduler: DDPMScheduler) -> DDPMScheduler:
    """Return a new scheduler like this one whose last timestep is pure noise.

    sqrt(alpha_bar) is shifted and stretched so that its first value stays and its last is exactly
    0. diffusers' DDPMScheduler and DDIMScheduler keep that 0; its Euler and DPM-Solver schedulers,
    built from the same configuration to draw pictures, put 2**-24 there to avoid an infinite sigma.
    The configuration also asks for trailing timesteps, or drawing would never start at that last
    one.

    Source: Lin et al. 2023, arXiv 2305.08891, algorithm 1 and section 3.3.

    Raises:
        ConfigError: the model does not predict the velocity: from pure noise, the noise says
            nothing about the picture.
    """
    prediction_type = noise_scheduler.config.get("prediction_type", "flow")
    if prediction_type != "v_prediction":
        raise ConfigError(
            f"zero_terminal_snr needs a v-prediction base, and this one predicts {prediction_type};"
            " turn it off, or train from a base such as sd-2.1-768"
        )
    scheduler: DDPMScheduler = type(noise_scheduler).from_config(
        noise_scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    return scheduler


def _prediction_type(noise_scheduler: DDPMScheduler) -> str:
    prediction_type = str(noise_scheduler.config.prediction_type)
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ModelError(
            f"prediction_type {prediction_type!r} cannot be trained; use epsilon or v_prediction"
        )
    return prediction_type
