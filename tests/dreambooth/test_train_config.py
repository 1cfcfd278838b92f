"""Settings of a training run: every refused value is named with its field."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError, asdict, fields
from typing import Any

import pytest

from colabtools.dreambooth.train_config import TrainConfig, check_some_steps
from colabtools.errors import ConfigError

NAN, INFINITE = float("nan"), float("inf")

NOT_CHOICES: list[Any] = ["", "AUTO", "other", None, 1, True, ["auto"]]
NOT_COUNTS: list[Any] = [0, -1, 2.0, True, "4", None]
NOT_FLAGS: list[Any] = ["False", "true", "", 0, 1, None]
NOT_NAMES: list[Any] = ["", " ", None, 7]
NOT_RATES: list[Any] = [0, -1e-6, NAN, INFINITE, True, "1e-6", "", None]
NOT_SEEDS: list[Any] = [-1, 2**63, 0.5, True, None]
NOT_STEPS: list[Any] = [-1, 1.0, True, "100", "Auto", "", None, NAN]
NOT_STRENGTHS: list[Any] = [-0.1, NAN, INFINITE, True, "0.1", "auto", None]
REFUSED: dict[str, list[Any]] = {
    "allow_changes": NOT_FLAGS,
    "allow_resolution": NOT_FLAGS,
    "attention": [*NOT_CHOICES, "auto", "flash"],
    "base_model": NOT_NAMES,
    "batch_size": NOT_COUNTS,
    "caption_dropout": [*NOT_STRENGTHS, 1.1],
    "checkpoint_every": NOT_COUNTS,
    "class_prompt": [None, 7],
    "compile": NOT_FLAGS,
    "crops": [*NOT_COUNTS, "auto"],
    "ema": NOT_FLAGS,
    "ema_decay": [*NOT_STRENGTHS, 1, 1.5],
    "gradient_accumulation_steps": [*NOT_COUNTS, "auto"],
    "gradient_checkpointing": [*NOT_CHOICES, False],
    "heldout_images": [*NOT_STEPS, "auto"],
    "keep_last": [*NOT_COUNTS, "auto"],
    "keep_tokens": [*NOT_STEPS, "auto"],
    "lora_alpha": NOT_RATES,
    "lora_dropout": [*NOT_STRENGTHS, 1, 1.5],
    "lora_rank": [*NOT_COUNTS, "auto"],
    "lr_schedule": [*NOT_CHOICES, "auto"],
    "lr_warmup_steps": [*NOT_STEPS, "auto"],
    "max_grad_norm": [*NOT_RATES, "auto"],
    "method": [*NOT_CHOICES, "lokr"],
    "min_snr_gamma": NOT_STRENGTHS,
    "num_class_images": NOT_COUNTS,
    "offset_noise": NOT_STRENGTHS,
    "optimizer": NOT_NAMES,
    "precision": [*NOT_CHOICES, "float16"],
    "prior_loss_weight": [*NOT_RATES, "auto"],
    "prior_preservation": NOT_FLAGS,
    "quantize": [*NOT_CHOICES, "int8"],
    "resume": [*NOT_CHOICES, "always", False],
    "sample_every": [*NOT_STEPS, "auto"],
    "sample_prompts": [None, 3, (3,), (True,)],
    "sample_seeds": ["", "x", "1,,2", "1, -2", "1.5", (), (-1,), (True,), (2**63,), None, 3],
    "save_every": [*NOT_STEPS, "auto"],
    "seed": [*NOT_SEEDS, "0", "auto"],
    "shuffle_tokens": NOT_FLAGS,
    "stages": [*NOT_CHOICES, "auto", "two"],
    "strict_captions": NOT_FLAGS,
    "tensorboard": NOT_FLAGS,
    "text_encoder_lr": NOT_RATES,
    "text_encoder_steps": NOT_STEPS,
    "unet_lr": NOT_RATES,
    "unet_steps": NOT_STEPS,
    "weight_decay": NOT_STRENGTHS,
    "zero_terminal_snr": NOT_FLAGS,
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values]
)
def test_a_value_that_cannot_work_is_refused_by_its_field(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} is .*; give ") as why:
        TrainConfig(**{name: value})  # type: ignore[arg-type]
    assert "\n" not in str(why.value)


def test_every_field_has_values_that_are_refused() -> None:
    assert [*REFUSED] == sorted(field.name for field in fields(TrainConfig))


EDGES: dict[str, list[Any]] = {
    "caption_dropout": [0, 1],
    "checkpoint_every": [1],
    "class_prompt": [""],
    "ema_decay": [0, 0.99999],
    "keep_last": [1],
    "lora_dropout": [0, 0.99],
    "lora_rank": [1],
    "max_grad_norm": [1e-9],
    "min_snr_gamma": [0],
    "offset_noise": [0],
    "seed": [0, 2**63 - 1],
    "text_encoder_steps": [0],
    "unet_steps": [0],
    "weight_decay": [0],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in EDGES.items() for value in values]
)
def test_the_last_value_that_works_is_kept_as_given(name: str, value: object) -> None:
    assert getattr(TrainConfig(**{name: value}), name) == value  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("gradient_checkpointing", ("auto", "on", "off")),
        ("lr_schedule", TrainConfig.SCHEDULES),
        ("method", TrainConfig.METHODS),
        ("precision", TrainConfig.PRECISIONS),
        ("quantize", ("auto", "none", "nf4")),
        ("resume", TrainConfig.RESUMES),
        ("stages", TrainConfig.STAGES),
    ],
)
def test_every_choice_can_be_made_and_is_told_in_the_refusal(
    name: str, choices: tuple[str, ...]
) -> None:
    for choice in choices:
        assert getattr(TrainConfig(**{name: choice}), name) == choice  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"give one of {', '.join(choices)}$"):
        TrainConfig(**{name: "other"})  # type: ignore[arg-type]


def test_it_is_frozen_by_keyword_only_and_knows_its_fields() -> None:
    with pytest.raises(FrozenInstanceError):
        TrainConfig().seed = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        TrainConfig("micro")  # type: ignore[misc]
    with pytest.raises(TypeError, match="restart"):
        TrainConfig(restart=True)  # type: ignore[call-arg]


def test_the_docstring_explains_every_field_in_order() -> None:
    _, _, section = (inspect.getdoc(TrainConfig) or "").partition("Attributes:\n")
    lines = [line for line in section.splitlines() if line.startswith("    ")]
    explained = [line.split(":")[0].strip() for line in lines if not line.startswith(" " * 5)]
    assert explained == [field.name for field in fields(TrainConfig)]


def test_samples_are_split_where_a_form_has_one_field_for_many() -> None:
    config = TrainConfig(sample_prompts=" a red star | a cat ", sample_seeds="3, 1")  # type: ignore[arg-type]
    assert (config.sample_prompts, config.sample_seeds) == (("a red star", "a cat"), (3, 1))
    listed = TrainConfig(sample_prompts=["a | b", "c"], sample_seeds=["2,5", 3])  # type: ignore[arg-type]
    assert (listed.sample_prompts, listed.sample_seeds) == (("a", "b", "c"), (2, 5, 3))


@pytest.mark.parametrize("nothing", ["", " ", "|", (), ("",)])
def test_no_sample_prompt_leaves_it_to_the_captions(nothing: Any) -> None:
    assert TrainConfig(sample_prompts=nothing).sample_prompts == ()


@pytest.mark.parametrize("prompt", ["", "  "])
def test_prior_preservation_needs_a_class_prompt(prompt: str) -> None:
    with pytest.raises(ConfigError, match="^class_prompt is .*prior_preservation needs one"):
        TrainConfig(prior_preservation=True, class_prompt=prompt)
    assert TrainConfig(class_prompt=prompt).class_prompt == prompt


def test_no_steps_in_both_stages_is_refused_and_in_one_is_not() -> None:
    with pytest.raises(ConfigError, match="text_encoder_steps and unet_steps are both 0"):
        TrainConfig(text_encoder_steps=0, unet_steps=0)
    check_some_steps(0, "auto")
    check_some_steps("auto", 0)


@pytest.mark.parametrize("steps", [0, 1, 350])
def test_joint_stages_have_no_steps_for_the_text_encoder_alone(steps: int) -> None:
    with pytest.raises(ConfigError, match=rf"^text_encoder_steps is {steps} with stages 'joint'"):
        TrainConfig(stages="joint", text_encoder_steps=steps, unet_steps=9)
    assert TrainConfig(stages="joint", unet_steps=9).text_encoder_steps == "auto"


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_classic_stages_train_every_weight(method: str) -> None:
    with pytest.raises(ConfigError, match=rf"^method is '{method}' with stages 'classic'"):
        TrainConfig(stages="classic", method=method)
    assert TrainConfig(stages="classic", method="full").method == "full"


def test_the_settings_are_plain_values_for_a_record() -> None:
    plain = asdict(TrainConfig())
    assert {type(value) for value in plain.values()} <= {bool, float, int, str, tuple}
    assert TrainConfig(**plain) == TrainConfig()
