"""What a denoiser is asked to predict, and how far off it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, UNet2DConditionModel

__all__ = ["denoising_errors", "dreambooth_loss", "heldout_loss", "prediction_target"]

# Spread evenly over the whole schedule, the same for every picture.
_HELDOUT_TIMESTEPS = 16


def prediction_target(
    noise_scheduler: DDPMScheduler,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """Return what the UNet should predict, (B, C, h, w): the noise, or the velocity.

    Source: Salimans & Ho 2022, arXiv 2202.00512, v = alpha * noise - sigma * x.

    Raises:
        ValueError: the scheduler has a prediction type of another kind.
    """
    prediction_type = noise_scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        velocity: torch.Tensor = noise_scheduler.get_velocity(latents, noise, timesteps)
        return velocity
    raise ValueError(
        f"prediction_type {prediction_type!r} cannot be trained; use epsilon or v_prediction"
    )


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


def denoising_errors(
    unet: UNet2DConditionModel,
    noise_scheduler: DDPMScheduler,
    batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Return the mean squared error (B,) of each picture, in float32.

    Args:
        unet: the denoiser.
        noise_scheduler: its noise schedule and prediction type.
        batch: latents (B, C, h, w), noise (B, C, h, w), timesteps (B,),
            encoder_hidden_states (B, T, D).
    """
    latents, noise, timesteps, encoder_hidden_states = batch
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    model_pred = unet(noisy_latents, timesteps, encoder_hidden_states).sample
    target = prediction_target(noise_scheduler, latents, noise, timesteps)
    return F.mse_loss(model_pred.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))


@torch.no_grad()
def heldout_loss(
    unet: UNet2DConditionModel,
    noise_scheduler: DDPMScheduler,
    latents: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    *,
    seed: int = 0,
) -> float:
    """Return the mean denoising loss of pictures on fixed noise and evenly spaced timesteps.

    The same arguments give the same number, so that two models can be compared.

    Args:
        unet: the denoiser.
        noise_scheduler: its noise schedule.
        latents: (N, C, h, w) of pictures that were not trained on.
        encoder_hidden_states: (N, T, D) of their captions.
        seed: of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = noise_scheduler.config.num_train_timesteps
    losses = []
    for draw in range(_HELDOUT_TIMESTEPS):
        timestep = int((draw + 0.5) * steps / _HELDOUT_TIMESTEPS)
        timesteps = torch.full((len(latents),), timestep, device=latents.device)
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        losses.append(
            denoising_errors(
                unet, noise_scheduler, (latents, noise, timesteps, encoder_hidden_states)
            )
        )
    return float(torch.stack(losses).mean())
