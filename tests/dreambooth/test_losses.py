from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from colabtools.dreambooth import losses
from colabtools.errors import ConfigError, ModelError

SHAPE = (3, 4, 8, 8)
TIMESTEPS = torch.tensor([10, 500, 990])
ALL = torch.arange(1000)


def scheduler(prediction_type: str) -> DDPMScheduler:
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
    )


def latents_and_noise() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)


def closed_form_alpha_bar() -> torch.Tensor:
    """Stable Diffusion's schedule in float64, not through diffusers."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0)


def test_an_epsilon_model_is_asked_for_the_noise() -> None:
    latents, noise = latents_and_noise()
    assert losses.prediction_target(scheduler("epsilon"), latents, noise, TIMESTEPS).equal(noise)


def test_a_v_model_is_asked_for_the_velocity() -> None:
    latents, noise = latents_and_noise()
    alpha_bar = scheduler("v_prediction").alphas_cumprod[TIMESTEPS][:, None, None, None]
    expected = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents
    target = losses.prediction_target(scheduler("v_prediction"), latents, noise, TIMESTEPS)
    torch.testing.assert_close(target, expected)


def test_another_prediction_type_is_refused_by_name() -> None:
    latents, noise = latents_and_noise()
    with pytest.raises(ModelError, match="'sample' cannot be trained"):
        losses.prediction_target(scheduler("sample"), latents, noise, TIMESTEPS)
    with pytest.raises(ModelError, match="'sample' cannot be trained"):
        losses.loss_weights(scheduler("sample"), TIMESTEPS, 5.0)


def test_the_prior_part_is_weighted_and_the_instance_part_is_not() -> None:
    errors = torch.tensor([1.0, 3.0, 10.0, 20.0])
    assert losses.dreambooth_loss(errors, 2, 0.5).item() == 2.0 + 0.5 * 15.0
    assert losses.dreambooth_loss(errors[:2], 2, 0.5).item() == 2.0


def test_weights_by_example_add_up_to_the_dreambooth_loss_in_any_order() -> None:
    errors = torch.rand(7, generator=torch.Generator().manual_seed(0))
    is_class = [False] * 4 + [True] * 3
    whole = losses.dreambooth_loss(errors, 4, 0.3)
    weights = losses.example_weights(is_class, 0.3)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights @ errors, whole)
    order = [6, 0, 4, 3, 2, 5, 1]
    shuffled = losses.example_weights([is_class[i] for i in order], 0.3)
    assert shuffled.equal(weights[order])
    torch.testing.assert_close(
        sum((shuffled * errors[order]).split(2)[i].sum() for i in range(4)), whole
    )


def test_an_update_of_one_kind_only_is_a_plain_mean() -> None:
    assert losses.example_weights([False, False], 0.5).tolist() == [0.5, 0.5]
    assert losses.example_weights([True, True], 0.5).tolist() == [0.25, 0.25]


def test_the_signal_to_noise_ratio_is_that_of_the_closed_form() -> None:
    alpha_bar = closed_form_alpha_bar()
    expected = (alpha_bar / (1 - alpha_bar)).float()
    torch.testing.assert_close(losses.snr(scheduler("epsilon"), ALL), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20])
@pytest.mark.parametrize(("prediction_type", "shift"), [("epsilon", 0), ("v_prediction", 1)])
def test_min_snr_weights_are_those_of_the_paper(
    prediction_type: str, shift: int, gamma: float
) -> None:
    alpha_bar = closed_form_alpha_bar()
    ratio = alpha_bar / (1 - alpha_bar)
    expected = (torch.minimum(ratio, torch.tensor(gamma)) / (ratio + shift)).float()
    weights = losses.loss_weights(scheduler(prediction_type), ALL, gamma)
    assert weights.dtype == torch.float32
    assert weights.shape == ALL.shape
    torch.testing.assert_close(weights, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("gamma", [None, 0, 0.0])
def test_without_gamma_every_weight_is_one_whatever_the_scheduler(gamma: float | None) -> None:
    weights = losses.loss_weights(FlowMatchEulerDiscreteScheduler(), TIMESTEPS, gamma)
    assert weights.tolist() == [1.0, 1.0, 1.0]


def test_flow_matching_has_no_min_snr() -> None:
    with pytest.raises(ConfigError, match="min_snr_gamma cannot be used with FlowMatch"):
        losses.loss_weights(FlowMatchEulerDiscreteScheduler(), TIMESTEPS, 5.0)


@pytest.mark.parametrize("gamma", [-1.0, float("nan"), float("inf")])
def test_a_gamma_that_is_no_limit_is_refused(gamma: float) -> None:
    with pytest.raises(ConfigError, match="min_snr_gamma is"):
        losses.loss_weights(scheduler("epsilon"), TIMESTEPS, gamma)


def test_zero_terminal_snr_ends_at_exactly_zero_on_the_closed_form_curve() -> None:
    before = scheduler("v_prediction")
    after = losses.zero_terminal_snr(before)
    root = closed_form_alpha_bar().sqrt()
    expected = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
    assert after.alphas_cumprod[-1].item() == 0.0
    assert after.alphas_cumprod[-2].item() > 0.0
    torch.testing.assert_close(after.alphas_cumprod, expected.float(), rtol=2e-4, atol=1e-7)
    assert before.alphas_cumprod[-1].item() == pytest.approx(0.00466, rel=1e-2)
    again = losses.zero_terminal_snr(after)
    assert again.alphas_cumprod.equal(after.alphas_cumprod)


def test_at_zero_snr_the_input_is_the_noise_and_the_target_the_picture_turned_round() -> None:
    latents, noise = latents_and_noise()
    rescaled = losses.zero_terminal_snr(scheduler("v_prediction"))
    last = torch.full((3,), 999)
    assert rescaled.add_noise(latents, noise, last).equal(noise)
    assert losses.prediction_target(rescaled, latents, noise, last).equal(-latents)


def test_weights_at_zero_snr_are_finite() -> None:
    rescaled = losses.zero_terminal_snr(scheduler("v_prediction"))
    assert losses.loss_weights(rescaled, torch.tensor([999]), 5.0).tolist() == [0.0]
    epsilon = DDPMScheduler.from_config(rescaled.config, prediction_type="epsilon")
    assert losses.loss_weights(epsilon, torch.tensor([999]), 5.0).tolist() == [1.0]


@pytest.mark.parametrize(
    ("sampler", "last"),
    [
        (DDIMScheduler, 0.0),
        (EulerDiscreteScheduler, 2.0**-24),
        (DPMSolverMultistepScheduler, 2.0**-24),
    ],
)
# diffusers' own schedulers, with numpy 2.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_the_configuration_carries_over_to_the_schedulers_that_draw(
    sampler: type, last: float
) -> None:
    drawing = sampler.from_config(losses.zero_terminal_snr(scheduler("v_prediction")).config)
    assert drawing.alphas_cumprod[-1].item() == last
    drawing.set_timesteps(10)
    assert int(drawing.timesteps[0]) == 999


def test_zero_terminal_snr_needs_a_model_that_predicts_the_velocity() -> None:
    for other, named in [
        (scheduler("epsilon"), "predicts epsilon"),
        (FlowMatchEulerDiscreteScheduler(), "predicts flow"),
    ]:
        with pytest.raises(ConfigError, match=f"zero_terminal_snr needs a v-prediction .*{named}"):
            losses.zero_terminal_snr(other)
