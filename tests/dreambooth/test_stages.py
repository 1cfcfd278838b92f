"""Which network learns when, and the established two-stage training reproduced."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from colabtools import drive
from colabtools.dreambooth.data import TrainingData
from colabtools.dreambooth.plan import plan_training
from colabtools.dreambooth.stages import plan_stages
from colabtools.dreambooth.train import train
from colabtools.dreambooth.train_config import TrainConfig
from colabtools.errors import ConfigError

from .conftest import SESSION

CLASSIC = TrainConfig(
    stages="classic",
    text_encoder_steps=3,
    unet_steps=4,
    text_encoder_lr=2e-4,
    unet_lr=3e-4,
    batch_size=2,
    optimizer="adamw",
)


def test_separate_stages_train_one_network_each_with_its_own_rate() -> None:
    plan = plan_training(TrainConfig(text_encoder_steps=7, unet_steps=9, unet_lr=1e-5))
    first, second = plan_stages(plan)
    assert (first.rates, first.keeps, first.steps, first.first_step, first.number) == (
        {"text_encoder": plan.text_encoder_lr}, ("text_encoder",), 7, 0, 1,
    )  # fmt: skip
    assert (second.rates, second.keeps, second.steps, second.first_step, second.number) == (
        {"unet": 1e-5}, ("unet",), 9, 7, 2,
    )  # fmt: skip
    assert first.trains_text
    assert not second.trains_text


@pytest.mark.parametrize(("steps", "numbers"), [((0, 5), [2]), ((5, 0), [1])])
def test_either_stage_may_be_empty(steps: tuple[int, int], numbers: list[int]) -> None:
    config = TrainConfig(text_encoder_steps=steps[0], unet_steps=steps[1])
    assert [stage.number for stage in plan_stages(plan_training(config))] == numbers


def test_joint_training_is_one_stage_with_two_rates() -> None:
    config = TrainConfig(stages="joint", unet_steps=5, unet_lr=1e-5, text_encoder_lr=1e-6)
    (stage,) = plan_stages(plan_training(config))
    assert stage.rates == {"text_encoder": 1e-6, "unet": 1e-5}
    assert stage.keeps == ("text_encoder", "unet")


def test_classic_holds_both_networks_at_first_and_keeps_the_encoder() -> None:
    first, second = plan_stages(plan_training(TrainConfig(stages="classic")))
    assert first.rates == {"text_encoder": 1e-6, "unet": 1e-6}
    assert (first.keeps, first.steps) == (("text_encoder",), 350)
    assert (second.rates, second.steps) == ({"unet": 2e-6}, 1500)


def test_several_encoders_learn_together_and_one_that_cannot_is_refused() -> None:
    plan = plan_training(TrainConfig(text_encoder_steps=2, unet_steps=2))
    first, _ = plan_stages(plan, text_encoders=("text_encoder", "text_encoder_2"))
    assert set(first.rates) == {"text_encoder", "text_encoder_2"}
    with pytest.raises(ConfigError, match="text_encoder_steps is 2.*are not trained"):
        plan_stages(plan, denoiser="transformer", text_encoders=())


def test_classic_is_the_established_training(
    workspace: drive.Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain loop, written from the description of that notebook, gives the same weights."""
    recorded = []
    batch = TrainingData.batch

    def recording(self: TrainingData, slots, seeds, models):  # type: ignore[no-untyped-def]
        made = batch(self, slots, seeds, models)
        recorded.append(made)
        return made

    with monkeypatch.context() as patch:
        patch.setattr(TrainingData, "batch", recording)
        ours = train(workspace, SESSION, CLASSIC).weights.load()
    theirs = established(recorded, CLASSIC)
    assert ours.keys() == theirs.keys() == {"text_encoder", "unet"}
    for part, tensors in theirs.items():
        for name, tensor in tensors.items():
            assert torch.allclose(tensor, ours[part][name], atol=1e-6), f"{part}.{name}"
    # The separate stages are another training, so this comparison can fail.
    other = replace(CLASSIC, stages="separate", resume="never")
    encoder = train(workspace, SESSION, other).weights.load()["text_encoder"]
    gap = max(
        float((tensor - encoder[name]).abs().max())
        for name, tensor in theirs["text_encoder"].items()
    )
    assert gap > 1e-5


def established(batches: list, config: TrainConfig) -> dict[str, dict[str, torch.Tensor]]:
    """Train as the established notebook does: as it is described.

    Stage 1 holds UNet and text encoder in one optimizer at the encoder's rate and keeps the encoder
    alone; stage 2 trains the UNet from the base model's weights. AdamW with weight decay 0.01,
    gradients clipped to norm 1, a rate that falls linearly to 0, plain squared error of the noise.
    """
    from diffusers import DDPMScheduler

    from colabtools import registry
    from colabtools.dreambooth.models import load_pipeline

    pipeline = load_pipeline(registry.BASES["micro"])
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    unet, encoder, tokenizer = pipeline.unet, pipeline.text_encoder, pipeline.tokenizer
    fresh = {name: tensor.clone() for name, tensor in unet.state_dict().items()}

    def run(parameters, steps, peak, made):  # type: ignore[no-untyped-def]
        optimizer = torch.optim.AdamW(
            # The kernel that ours has: where a gradient is rounding alone, so is its step.
            parameters,
            lr=peak,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=1e-2,
            fused=True,
        )
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        for one in made:
            tokens = tokenizer(
                one.prompts, padding="max_length", max_length=77, truncation=True,
                return_tensors="pt",
            )  # fmt: skip
            noisy = scheduler.add_noise(one.latents, one.noise, one.timesteps)
            predicted = unet(noisy, one.timesteps, encoder(tokens.input_ids)[0]).sample
            loss = torch.nn.functional.mse_loss(predicted, one.noise)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            falling.step()
            optimizer.zero_grad()

    unet.requires_grad_(True)
    encoder.requires_grad_(True)
    both = [*encoder.parameters(), *unet.parameters()]
    first = config.text_encoder_steps
    run(both, first, config.text_encoder_lr, batches[:first])
    unet.load_state_dict(fresh)
    encoder.requires_grad_(False)
    run(list(unet.parameters()), config.unet_steps, config.unet_lr, batches[first:])
    return {"text_encoder": encoder.state_dict(), "unet": unet.state_dict()}
