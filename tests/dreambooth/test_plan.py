"""Every "auto" becomes a number: the base model's, the classic run's, or the optimizer's."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from colabtools.dreambooth.plan import plan_training
from colabtools.dreambooth.train_config import TrainConfig
from colabtools.errors import ConfigError, ModelError
from colabtools.registry import BASES

from .tiny import make_tiny

FULL = sorted(name for name, base in BASES.items() if base.method == "full")
ADAPTED = sorted(name for name, base in BASES.items() if base.method == "lora")
AUTO = ["text_encoder_steps", "unet_steps", "text_encoder_lr", "unet_lr", "batch_size"]


@pytest.mark.parametrize("name", FULL)
def test_auto_is_the_reference_run_of_the_base_model(name: str) -> None:
    base, plan = BASES[name], plan_training(TrainConfig(base_model=name))
    assert (plan.base, plan.method, plan.optimizer) == (base, "full", "auto")
    assert {field: getattr(plan, field) for field in AUTO} == {
        field: getattr(base, field) for field in AUTO
    }
    assert plan.total_steps == base.text_encoder_steps + base.unet_steps


@pytest.mark.parametrize("name", ADAPTED)
def test_auto_is_adapters_where_whole_weights_are_too_many(name: str) -> None:
    base, plan = BASES[name], plan_training(TrainConfig(base_model=name))
    assert (plan.method, plan.text_encoder_steps) == ("lora", 0)
    assert (plan.unet_steps, plan.unet_lr) == (base.lora_steps, base.lora_lr)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("name", FULL)
def test_adapters_learn_at_their_own_rates(name: str, method: str) -> None:
    base, plan = BASES[name], plan_training(TrainConfig(base_model=name, method=method))
    assert plan.method == method
    assert (plan.unet_lr, plan.text_encoder_lr) == (base.lora_lr, base.lora_text_encoder_lr)
    assert (plan.unet_steps, plan.text_encoder_steps) == (base.lora_steps, base.text_encoder_steps)
    # An adapter starts at nothing, and takes larger steps than weights that are good already.
    assert plan.unet_lr > base.unet_lr


@pytest.mark.parametrize("name", sorted(BASES))
def test_the_classic_run_is_what_users_of_the_established_notebook_get(name: str) -> None:
    plan = plan_training(TrainConfig(base_model=name, stages="classic"))
    assert plan.method == "full"
    assert (plan.text_encoder_steps, plan.text_encoder_lr) == (350, 1e-6)
    assert (plan.unet_steps, plan.unet_lr) == (1500, 2e-6)
    assert (plan.optimizer, plan.batch_size, plan.effective_batch) == ("adamw8bit", 1, 1)


def test_both_learn_for_the_steps_of_the_unet_in_joint_stages() -> None:
    plan = plan_training(TrainConfig(stages="joint"))
    assert (plan.text_encoder_steps, plan.unet_steps) == (0, BASES["micro"].unet_steps)
    assert plan.total_steps == plan.unet_steps
    assert plan.text_encoder_lr == BASES["micro"].text_encoder_lr


@pytest.mark.parametrize(
    ("optimizer", "factor"), [("adamw", 1.0), ("adamw8bit", 1.0), ("adafactor", 1.0), ("lion", 0.2)]
)
@pytest.mark.parametrize("stages", ["classic", "separate"])
def test_a_rate_fits_its_optimizer(optimizer: str, factor: float, stages: str) -> None:
    base = BASES["sd-1.5"]
    plan = plan_training(TrainConfig(base_model="sd-1.5", optimizer=optimizer, stages=stages))
    assert plan.optimizer == optimizer
    assert plan.unet_lr == pytest.approx(factor * base.unet_lr)
    assert plan.text_encoder_lr == pytest.approx(factor * base.text_encoder_lr)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_prodigy_finds_its_own_rate(method: str) -> None:
    plan = plan_training(TrainConfig(optimizer="prodigy", method=method))
    assert (plan.unet_lr, plan.text_encoder_lr) == (1.0, 1.0)


def test_a_number_wins_over_auto() -> None:
    chosen = {
        "text_encoder_steps": 0,
        "unet_steps": 3,
        "text_encoder_lr": 0.5,
        "unet_lr": 1,
        "batch_size": 7,
        "lora_alpha": 5,
        "num_class_images": 9,
        "checkpoint_every": 2,
    }
    plan = plan_training(
        TrainConfig(
            prior_preservation=True,
            class_prompt="a dog",
            optimizer="lion",
            gradient_accumulation_steps=3,
            **chosen,  # type: ignore[arg-type]
        )
    )
    assert {name: getattr(plan, name) for name in chosen} == chosen
    assert (plan.class_prompt, plan.total_steps, plan.effective_batch) == ("a dog", 3, 21)


@pytest.mark.parametrize("rank", [1, 16, 64])
def test_the_scale_of_adapters_is_their_rank(rank: int) -> None:
    assert plan_training(TrainConfig(lora_rank=rank)).lora_alpha == rank


def test_without_prior_preservation_there_are_no_class_pictures() -> None:
    plan = plan_training(TrainConfig(class_prompt="a dog", num_class_images=9))
    assert (plan.class_prompt, plan.num_class_images) == ("", 0)


def test_with_prior_preservation_auto_is_the_number_of_the_base_model() -> None:
    plan = plan_training(TrainConfig(prior_preservation=True, class_prompt="a dog"))
    assert plan.num_class_images == BASES["micro"].num_class_images


@pytest.mark.parametrize(
    ("steps", "apart"), [(1, 1), (4, 1), (5, 1), (50, 10), (1000, 200), (9000, 200)]
)
def test_states_are_a_fifth_of_the_run_apart_and_never_far(steps: int, apart: int) -> None:
    config = TrainConfig(text_encoder_steps=0, unet_steps=steps)
    assert plan_training(config).checkpoint_every == apart


WRONG: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "class prompt": (
        ConfigError,
        {"prior_preservation": True},
        "class_prompt is ''; prior_preservation needs one, such as 'a star'",
    ),
    "learning rate": (ConfigError, {"unet_lr": -2e-6}, "unet_lr is -2e-06; give a number above 0"),
    "model": (ModelError, {"base_model": "nope"}, "unknown base_model 'nope'; use one of "),
    "optimizer": (ConfigError, {"optimizer": "sgdw"}, "'sgdw'"),
    "rank": (
        ConfigError,
        {"lora_rank": 0, "method": "lora"},
        "lora_rank is 0; give a whole number of at least 1",
    ),
}


@pytest.mark.parametrize("what", sorted(WRONG))
def test_what_cannot_be_trained_is_one_clear_line(what: str) -> None:
    error, settings, message = WRONG[what]
    with pytest.raises(error) as why:
        plan_training(TrainConfig(**settings))
    assert message in str(why.value)
    assert "\n" not in str(why.value)


def test_an_unknown_optimizer_is_told_with_those_there_are() -> None:
    with pytest.raises(ConfigError) as why:
        plan_training(TrainConfig(optimizer="sgdw"))
    assert all(name in str(why.value) for name in ("adamw", "adamw8bit", "lion", "prodigy"))


def test_no_steps_because_auto_is_none_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    base = replace(BASES["micro"], name="still", unet_steps=0)
    monkeypatch.setitem(BASES, "still", base)
    with pytest.raises(ConfigError, match="are both 0"):
        plan_training(TrainConfig(base_model="still", text_encoder_steps=0))


def test_the_plan_of_a_folder_is_that_of_its_family(tmp_path: Path) -> None:
    folder = make_tiny("sdxl", tmp_path / "sdxl")
    plan = plan_training(TrainConfig(base_model=str(folder)))
    assert (plan.base.family, plan.method, plan.text_encoder_steps) == ("sdxl", "lora", 0)


# These change what is shown and kept, or how fast it goes, but no trained number.
NOT_TRAINED: dict[str, Any] = {
    "allow_changes": True,
    "allow_resolution": True,
    "attention": "xformers",
    "checkpoint_every": 7,
    "compile": True,
    "gradient_checkpointing": "on",
    "keep_last": 5,
    "resume": "require",
    "sample_every": 3,
    "sample_prompts": ("a cat",),
    "sample_seeds": (9,),
    "save_every": 4,
    "strict_captions": True,
    "tensorboard": True,
}
TRAINED: dict[str, Any] = {
    "batch_size": 3,
    "caption_dropout": 0.1,
    "class_prompt": "a cat",
    "crops": 2,
    "ema": True,
    "ema_decay": 0.9,
    "gradient_accumulation_steps": 2,
    "heldout_images": 1,
    "keep_tokens": 1,
    "lora_alpha": 3.0,
    "lora_dropout": 0.1,
    "lora_rank": 4,
    "lr_schedule": "cosine",
    "lr_warmup_steps": 2,
    "max_grad_norm": 2.0,
    "method": "lora",
    "min_snr_gamma": 5.0,
    "num_class_images": 3,
    "offset_noise": 0.1,
    "optimizer": "lion",
    "precision": "fp32",
    "prior_loss_weight": 0.5,
    "prior_preservation": False,
    "quantize": "none",
    "seed": 1,
    "shuffle_tokens": True,
    "stages": "joint",
    "text_encoder_lr": 1e-3,
    "text_encoder_steps": 2,
    "unet_lr": 1e-3,
    "unet_steps": 2,
    "weight_decay": 0.0,
    "zero_terminal_snr": True,
}
WITH_PRIOR = TrainConfig(prior_preservation=True, class_prompt="a star")


@pytest.mark.parametrize(("name", "value"), TRAINED.items())
def test_a_setting_that_changes_the_weights_changes_the_description(name: str, value: Any) -> None:
    changed = plan_training(replace(WITH_PRIOR, **{name: value}))
    assert changed.settings() != plan_training(WITH_PRIOR).settings()
    json.dumps(changed.settings(), allow_nan=False)


@pytest.mark.parametrize(("name", "value"), NOT_TRAINED.items())
def test_a_setting_of_what_is_shown_or_kept_does_not(name: str, value: Any) -> None:
    changed = plan_training(replace(WITH_PRIOR, **{name: value}))
    assert changed.settings() == plan_training(WITH_PRIOR).settings()


def test_every_setting_is_one_or_the_other() -> None:
    known = {*TRAINED, *NOT_TRAINED, "base_model"}
    assert known == {field.name for field in fields(TrainConfig)}
    assert not TRAINED.keys() & NOT_TRAINED.keys()


def test_auto_and_its_number_are_the_same_run() -> None:
    base = BASES["micro"]
    said = TrainConfig(unet_steps=base.unet_steps, unet_lr=base.unet_lr, batch_size=base.batch_size)
    assert plan_training(said).settings() == plan_training(TrainConfig()).settings()
