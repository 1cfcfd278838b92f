"""Every family against diffusers' own pipeline and networks, on tiny models of true topology."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from colabtools.dreambooth.families import (
    FAMILIES,
    Conditioning,
    Models,
    count_tokens,
    denoising_errors,
    heldout_loss,
    scale_latents,
    token_limit,
)
from colabtools.dreambooth.models import load_models
from colabtools.errors import ModelError
from colabtools.registry import find_base

from .tiny import KINDS, WIDTH, make_tiny

CPU = torch.device("cpu")
# One of each way to be called.
each_call = pytest.mark.parametrize("models", ["sd1", "sdxl", "flux-dev"], indirect=True)
PROMPTS = ["a sks star on a photo", "a photo of a red star, 2"]


@pytest.fixture(scope="module", params=KINDS)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = make_tiny(request.param, tmp_path_factory.mktemp("tiny") / request.param)
    return load_models(find_base(str(folder)), CPU)


@pytest.fixture
def kind(models: Models) -> str:
    return Path(models.base.source).name


@pytest.fixture(autouse=True)
def _frozen_again(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "models" in request.fixturenames:
        loaded: Models = request.getfixturevalue("models")
        for name in (*loaded.text_encoders, loaded.family.denoiser):
            loaded.part(name).requires_grad_(False).zero_grad()


def latents_and_noise(models: Models, count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Not square, so that a swap of height and width shows."""
    generator = torch.Generator().manual_seed(5)
    shape = (count, models.vae.config.latent_channels, 4, 6)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def conditioning(models: Models, prompts: list[str] = PROMPTS) -> Conditioning:
    with torch.no_grad():
        return models.family.encode_prompts(models, prompts)


def timesteps(models: Models) -> torch.Tensor:
    return torch.stack([models.family.timestep_at(models, part) for part in (0.25, 0.9)])


GOLDEN = {
    "sd1": ("sd1", "epsilon", {"unet": 686, "vae": 248, "text_encoder": 196}),
    "sd2": ("sd2", "epsilon", {"unet": 686, "vae": 248, "text_encoder": 372}),
    "sd2-v": ("sd2", "v_prediction", {"unet": 686, "vae": 248, "text_encoder": 372}),
    "sdxl": (
        "sdxl",
        "epsilon",
        {"unet": 1680, "vae": 248, "text_encoder": 196, "text_encoder_2": 517},
    ),
    "flux-dev": ("flux", "flow", {"transformer": 1160, "vae": 244, "text_encoder": 196}),
    "flux-schnell": ("flux", "flow", {"transformer": 1156, "vae": 244, "text_encoder": 196}),
}


def test_a_tiny_model_has_the_tensors_of_the_real_one(models: Models, kind: str) -> None:
    """Source of the counts: the published weights."""
    family, prediction_type, counts = GOLDEN[kind]
    assert (models.family.name, models.base.prediction_type) == (family, prediction_type)
    assert {name: len(models.part(name).state_dict()) for name in counts} == counts


def pipeline_conditioning(models: Models, prompts: list[str]) -> Conditioning:
    pipeline: Any = models.pipeline
    with torch.no_grad():
        if models.family.name == "flux":
            hidden, pooled, _ = pipeline.encode_prompt(
                prompts, prompt_2=None, max_sequence_length=32
            )
            return Conditioning(hidden, pooled)
        outputs = pipeline.encode_prompt(
            prompts, device=CPU, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    return Conditioning(outputs[0], outputs[2] if models.family.name == "sdxl" else None)


def test_prompts_are_encoded_as_the_pipeline_does(models: Models) -> None:
    ours, theirs = conditioning(models), pipeline_conditioning(models, PROMPTS)
    assert ours.hidden.shape[:2] == (2, token_limit(models))
    torch.testing.assert_close(ours.hidden, theirs.hidden, rtol=0, atol=0)
    assert (ours.pooled is None) == (theirs.pooled is None)
    if ours.pooled is not None:
        assert ours.pooled.shape == (2, WIDTH)
        torch.testing.assert_close(ours.pooled, theirs.pooled, rtol=0, atol=0)


@each_call
def test_a_prompt_does_not_depend_on_its_neighbours(models: Models) -> None:
    both, alone = conditioning(models), conditioning(models, PROMPTS[1:])
    torch.testing.assert_close(both.select([1]).hidden, alone.hidden)


def call_as_the_example(models: Models, noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The call of diffusers' training example of the family, with the pipeline's own helpers."""
    said = conditioning(models)
    count, channels, height, width = noisy.shape
    if models.family.name == "flux":
        pipeline = type(models.pipeline)
        prediction = models.denoiser(
            hidden_states=pipeline._pack_latents(noisy, count, channels, height, width),
            timestep=t / 1000,
            guidance=torch.ones(count) if models.denoiser.config.guidance_embeds else None,
            pooled_projections=said.pooled,
            encoder_hidden_states=said.hidden,
            txt_ids=torch.zeros(said.hidden.shape[1], 3),
            img_ids=pipeline._prepare_latent_image_ids(
                count, height // 2, width // 2, CPU, torch.float32
            ),
            return_dict=False,
        )[0]
        return pipeline._unpack_latents(prediction, height * 8, width * 8, 8)
    added = None
    if models.family.name == "sdxl":
        size = (height * 8, width * 8)
        ids = models.pipeline._get_add_time_ids(size, (0, 0), size, torch.float32, WIDTH)
        added = {"text_embeds": said.pooled, "time_ids": ids.repeat(count, 1)}
    return models.denoiser(noisy, t, said.hidden, added_cond_kwargs=added).sample


def test_the_denoiser_is_called_as_in_the_training_example(models: Models) -> None:
    noisy, _ = latents_and_noise(models)
    with torch.no_grad():
        t = timesteps(models)
        ours = models.family.predict(models, noisy, t, conditioning(models))
        theirs = call_as_the_example(models, noisy, t)
    assert ours.shape == noisy.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@each_call
def test_every_input_of_the_denoiser_matters(models: Models) -> None:
    noisy, other_noise = latents_and_noise(models)
    t, said = timesteps(models), conditioning(models)
    with torch.no_grad():
        first = models.family.predict(models, noisy, t, said)
        others = [
            models.family.predict(models, other_noise, t, said),
            models.family.predict(models, noisy, t.flip(0), said),
            models.family.predict(models, noisy, t, said.select([1, 0])),
        ]
        if said.pooled is not None:
            swapped = Conditioning(said.hidden, said.pooled.flip(0))
            others.append(models.family.predict(models, noisy, t, swapped))
        if models.family.name == "sdxl":
            sizes = [(2000, 1000), (640, 480)]
            others.append(models.family.predict(models, noisy, t, said, sizes=sizes))
    assert all(not torch.equal(first, other) for other in others)


def test_the_target_and_the_noise_have_their_closed_forms(models: Models) -> None:
    latents, noise = latents_and_noise(models)
    t = timesteps(models)
    noisy = models.family.add_noise(models, latents, noise, t)
    target = models.family.target(models, latents, noise, t)
    if models.base.prediction_type == "flow":
        sigma = (t / 1000)[:, None, None, None]
        expected, expected_target = (1 - sigma) * latents + sigma * noise, noise - latents
    else:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        alpha_bar = (1 - betas).cumprod(0)[t][:, None, None, None]
        expected = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise
        velocity = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents
        expected_target = {"epsilon": noise, "v_prediction": velocity}[models.base.prediction_type]
    torch.testing.assert_close(noisy, expected)
    torch.testing.assert_close(target, expected_target)


@pytest.mark.parametrize("models", ["sd1", "flux-dev"], indirect=True)
def test_timesteps_are_drawn_from_the_family_s_distribution(models: Models) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([models.family.draw_timestep(models, generator) for _ in range(4000)])
    again = models.family.draw_timestep(models, torch.Generator().manual_seed(0))
    assert torch.equal(drawn[0], again)
    assert again.shape == ()
    if models.base.prediction_type == "flow":
        # The logit is normal with mean 0 and deviation 1; four standard errors of 4000 draws.
        logits = torch.logit(drawn / 1000)
        assert abs(logits.mean().item()) < 4 / 4000**0.5
        assert abs(logits.std().item() - 1) < 4 / 8000**0.5
    else:
        assert drawn.dtype == torch.long
        assert (drawn.min().item(), drawn.max().item()) >= (0, 990)
        assert drawn.max().item() <= 999
        assert abs(drawn.float().mean().item() - 499.5) < 4 * 1000 / 12**0.5 / 4000**0.5


@each_call
def test_errors_are_the_mean_squares_of_each_picture(models: Models) -> None:
    latents, noise = latents_and_noise(models)
    t, said = timesteps(models), conditioning(models)
    with torch.no_grad():
        errors = denoising_errors(models, latents, noise, t, said)
        noisy = models.family.add_noise(models, latents, noise, t)
        wrong = models.family.predict(models, noisy, t, said) - models.family.target(
            models, latents, noise, t
        )
    torch.testing.assert_close(errors, wrong.square().mean(dim=(1, 2, 3)))
    assert errors.dtype == torch.float32


def test_one_small_step_down_the_gradient_lowers_the_loss(models: Models) -> None:
    latents, noise = latents_and_noise(models)
    t, said = timesteps(models), conditioning(models)
    denoiser = models.part(models.family.denoiser).requires_grad_(True)
    before = {name: weight.clone() for name, weight in denoiser.state_dict().items()}
    loss = denoising_errors(models, latents, noise, t, said).mean()
    loss.backward()
    gradients = [w.grad for w in denoiser.parameters() if w.grad is not None]
    scale = 1e-3 / torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    with torch.no_grad():
        for weight in denoiser.parameters():
            if weight.grad is not None:
                weight -= scale * weight.grad
        after = denoising_errors(models, latents, noise, t, said).mean()
    denoiser.load_state_dict(before)
    assert after < loss.detach()


@each_call
def test_gradients_reach_every_text_encoder_that_is_trained(models: Models) -> None:
    latents, noise = latents_and_noise(models)
    for name in models.family.trainable_text_encoders:
        models.part(name).requires_grad_(True)
    said = models.family.encode_prompts(models, PROMPTS)
    denoising_errors(models, latents, noise, timesteps(models), said).mean().backward()
    for name in models.family.trainable_text_encoders:
        gradients = [w.grad for w in models.part(name).parameters() if w.grad is not None]
        assert sum(gradient.abs().sum().item() for gradient in gradients) > 0, name


@pytest.mark.parametrize("models", ["sd1", "flux-schnell"], indirect=True)
def test_the_heldout_loss_is_the_mean_over_sixteen_levels_of_noise(models: Models) -> None:
    latents, _ = latents_and_noise(models, 1)
    said = conditioning(models, PROMPTS[:1])
    generator = torch.Generator().manual_seed(3)
    errors = []
    with torch.no_grad():
        for draw in range(16):
            level = (draw + 0.5) / 16 * 1000
            flow = models.base.prediction_type == "flow"
            t = torch.full((1,), level if flow else int(level))
            noise = torch.randn(latents.shape, generator=generator)
            errors.append(denoising_errors(models, latents, noise, t, said).mean())
    expected = torch.stack(errors).mean().item()
    assert heldout_loss(models, latents, said, seed=3) == pytest.approx(expected, rel=1e-6)
    if not flow:
        assert heldout_loss(models, latents, said, seed=4) != pytest.approx(expected, rel=1e-6)


def test_latents_are_scaled_as_the_pipeline_undoes_it(models: Models, kind: str) -> None:
    factor, shift = {"sdxl": (0.13025, 0.0), "flux-dev": (0.3611, 0.1159)}.get(
        kind, (0.3611, 0.1159) if kind == "flux-schnell" else (0.18215, 0.0)
    )
    mean, std = scale_latents(models.vae, torch.tensor([1.0]), torch.tensor([2.0]))
    assert mean.item() == pytest.approx((1 - shift) * factor)
    assert std.item() == pytest.approx(2 * factor)


def test_tokens_are_counted_with_start_and_end(models: Models) -> None:
    flux = models.family.name == "flux"
    assert count_tokens(models, "") == (1 if flux else 2)
    assert count_tokens(models, "a star") == count_tokens(models, "") + 2
    assert token_limit(models) == (32 if flux else 77)
    assert count_tokens(models, "a star " * 60) > token_limit(models)


def record(models: Models, name: str) -> list[Any]:
    """What the denoiser is given under this name at each call; the hook stays until the end."""
    seen: list[Any] = []
    models.denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs[name]), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("models", ["sdxl"], indirect=True)
def test_sdxl_is_told_sizes_before_and_now_height_first(models: Models) -> None:
    noisy, _ = latents_and_noise(models)
    seen = record(models, "added_cond_kwargs")
    t, said = timesteps(models), conditioning(models)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        models.family.predict(models, noisy.bfloat16(), t, said)
        models.family.predict(models, noisy.bfloat16(), t, said, sizes=[(2003, 1001), (640, 480)])
    ids = [given["time_ids"].tolist() for given in seen]
    assert ids[0] == [[32, 48, 0, 0, 32, 48]] * 2
    assert ids[1] == [[1001, 2003, 0, 0, 32, 48], [480, 640, 0, 0, 32, 48]]


@pytest.mark.parametrize("models", ["flux-dev", "flux-schnell"], indirect=True)
def test_only_a_model_with_a_guidance_input_is_given_guidance(models: Models, kind: str) -> None:
    seen = record(models, "guidance")
    noisy, _ = latents_and_noise(models)
    with torch.no_grad():
        models.family.predict(models, noisy, timesteps(models), conditioning(models))
    given = None if seen[0] is None else seen[0].tolist()
    assert given == {"flux-dev": [1.0, 1.0], "flux-schnell": None}[kind]


def test_conditionings_are_cut_joined_and_moved_row_by_row() -> None:
    hidden = torch.arange(12.0).reshape(3, 2, 2)
    pooled = torch.arange(6.0).reshape(3, 2)
    said = Conditioning(hidden, pooled)
    assert len(said) == 3
    picked = said.select(torch.tensor([2, 0]))
    assert picked.hidden.equal(hidden[[2, 0]])
    assert picked.pooled is not None
    assert picked.pooled.equal(pooled[[2, 0]])
    joined = Conditioning.cat([said.select([0]), said.select([1, 2])])
    assert joined.hidden.equal(hidden)
    assert joined.pooled is not None
    assert joined.pooled.equal(pooled)
    half = said.to(CPU, torch.float16)
    assert half.pooled is not None
    assert (half.hidden.dtype, half.pooled.dtype) == (torch.float16, torch.float16)
    plain = Conditioning.cat([Conditioning(hidden), Conditioning(hidden)])
    assert plain.pooled is None
    assert plain.select([0]).to(CPU).pooled is None


@pytest.mark.parametrize("models", ["sdxl"], indirect=True)
def test_a_part_that_is_not_there_is_refused_with_those_that_are(models: Models) -> None:
    with pytest.raises(ModelError, match=r"has no 'text_encoder_9'; its parts are .*vae"):
        models.part("text_encoder_9")


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_family_is_found_under_its_own_name(name: str) -> None:
    family = FAMILIES[name]
    assert family.name == name
    assert set(family.trainable_text_encoders) <= set(family.text_encoders)
