from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler

from colabtools.dreambooth import losses

SHAPE = (3, 4, 8, 8)


def scheduler(prediction_type: str) -> DDPMScheduler:
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
    )


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latents, noise = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    return latents, noise, torch.tensor([10, 500, 990]), torch.zeros(3, 77, 8)


def test_an_epsilon_model_is_asked_for_the_noise() -> None:
    latents, noise, timesteps, _ = batch()
    assert losses.prediction_target(scheduler("epsilon"), latents, noise, timesteps).equal(noise)


def test_a_v_model_is_asked_for_the_velocity() -> None:
    latents, noise, timesteps, _ = batch()
    alpha_bar = scheduler("v_prediction").alphas_cumprod[timesteps][:, None, None, None]
    expected = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents
    target = losses.prediction_target(scheduler("v_prediction"), latents, noise, timesteps)
    torch.testing.assert_close(target, expected)


def test_another_prediction_type_is_refused_by_name() -> None:
    latents, noise, timesteps, _ = batch()
    with pytest.raises(ValueError, match="'sample' cannot be trained"):
        losses.prediction_target(scheduler("sample"), latents, noise, timesteps)


def test_the_prior_part_is_weighted_and_the_instance_part_is_not() -> None:
    errors = torch.tensor([1.0, 3.0, 10.0, 20.0])
    assert losses.dreambooth_loss(errors, 2, 0.5).item() == 2.0 + 0.5 * 15.0
    assert losses.dreambooth_loss(errors[:2], 2, 0.5).item() == 2.0


def test_a_perfect_denoiser_has_no_error_and_a_silent_one_has_the_noise() -> None:
    latents, noise, timesteps, hidden = batch()

    def perfect(*_: object) -> SimpleNamespace:
        return SimpleNamespace(sample=noise)

    def silent(*_: object) -> SimpleNamespace:
        return SimpleNamespace(sample=torch.zeros(SHAPE))

    inputs = (latents, noise, timesteps, hidden)
    assert losses.denoising_errors(perfect, scheduler("epsilon"), inputs).tolist() == [0, 0, 0]
    errors = losses.denoising_errors(silent, scheduler("epsilon"), inputs)
    torch.testing.assert_close(errors, noise.square().mean(dim=(1, 2, 3)))


def test_the_denoiser_sees_noised_latents_of_the_right_level() -> None:
    latents, noise, timesteps, hidden = batch()
    seen = []

    def denoiser(noisy: torch.Tensor, *_: object) -> SimpleNamespace:
        seen.append(noisy)
        return SimpleNamespace(sample=noise)

    losses.denoising_errors(denoiser, scheduler("epsilon"), (latents, noise, timesteps, hidden))
    alpha_bar = scheduler("epsilon").alphas_cumprod[timesteps][:, None, None, None]
    torch.testing.assert_close(seen[0], alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise)


def test_the_heldout_loss_repeats_itself_and_depends_on_the_seed() -> None:
    latents, _, _, hidden = batch()

    def halved(noisy: torch.Tensor, *_: object) -> SimpleNamespace:
        return SimpleNamespace(sample=noisy / 2)

    first, again, other = (
        losses.heldout_loss(halved, scheduler("epsilon"), latents, hidden, seed=seed)
        for seed in (1, 1, 2)
    )
    assert first == again != other
