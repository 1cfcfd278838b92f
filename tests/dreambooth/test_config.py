"""Settings: every refused value is named with its field, every other is kept as given."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from colabtools.dreambooth.config import (
    ExportConfig,
    GenerateConfig,
    PrepareConfig,
    TrainConfig,
    plan_training,
)
from colabtools.errors import ConfigError, ModelError
from colabtools.registry import BASES

CONFIGS = [ExportConfig, GenerateConfig, PrepareConfig, TrainConfig]
NEEDED = {PrepareConfig: {"images": "photos"}}
NAN, INFINITE = float("nan"), float("inf")

NOT_FLAGS: list[Any] = ["False", "true", "", 0, 1, None]
NOT_STEPS: list[Any] = [-1, 1.0, True, "100", "Auto", "", None, NAN]
NOT_COUNTS: list[Any] = [0, -1, 2.0, True, "4", None]
NOT_RATES: list[Any] = [0, -1e-6, NAN, INFINITE, True, "1e-6", "", None]
NOT_SEEDS: list[Any] = [-1, 2**63, 0.5, True, "0", None]
NOT_PROMPTS: list[Any] = ["", "   ", None, 7]
REFUSED: list[tuple[type[Any], str, list[Any]]] = [
    (ExportConfig, "dtype", ["fp8", "", "FP16", None, 16]),
    (ExportConfig, "formats", ["", "onnx", "safetensors, onnx", (), (1,), [["ckpt"]], None, 3]),
    (GenerateConfig, "compare", NOT_FLAGS),
    (GenerateConfig, "guidance_scale", [*NOT_RATES, "5"]),
    (GenerateConfig, "num_inference_steps", [*NOT_COUNTS, "auto"]),
    (GenerateConfig, "prompts", ["", " ", "a||b", "a|", (), ("a", ""), (3,), None, 3]),
    (GenerateConfig, "seeds", ["", "x", "1,,2", "1, -2", "1.5", (), (-1,), (True,), None, 3]),
    (GenerateConfig, "seeds", [(2**63,), str(2**63), (0.5,), ([0],)]),
    (PrepareConfig, "base_model", ["", " ", None]),
    (PrepareConfig, "images", NOT_PROMPTS),
    (PrepareConfig, "instance_prompt", NOT_PROMPTS),
    (PrepareConfig, "replace", NOT_FLAGS),
    (PrepareConfig, "resolution", [0, 63, 65, 100, -64, 4104, 10**9, 512.0, True, "512", None]),
    (TrainConfig, "base_model", ["", " ", None]),
    (TrainConfig, "batch_size", NOT_COUNTS),
    (TrainConfig, "class_prompt", [None, 7]),
    (TrainConfig, "num_class_images", NOT_COUNTS),
    (TrainConfig, "prior_loss_weight", [*NOT_RATES, "auto"]),
    (TrainConfig, "prior_preservation", NOT_FLAGS),
    (TrainConfig, "restart", NOT_FLAGS),
    (TrainConfig, "seed", [*NOT_SEEDS, "auto"]),
    (TrainConfig, "text_encoder_lr", NOT_RATES),
    (TrainConfig, "text_encoder_steps", NOT_STEPS),
    (TrainConfig, "unet_lr", NOT_RATES),
    (TrainConfig, "unet_steps", NOT_STEPS),
]


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [(config, name, value) for config, name, values in REFUSED for value in values],
)
def test_a_value_that_cannot_work_is_refused_by_its_field(
    config: type[Any], name: str, value: object
) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} is .*; (give|prior)") as why:
        config(**{**NEEDED.get(config, {}), name: value})
    assert "\n" not in str(why.value)


def test_every_field_has_values_that_are_refused() -> None:
    refused = {(config, name) for config, name, _ in REFUSED}
    assert refused == {(config, field.name) for config in CONFIGS for field in fields(config)}


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_is_frozen_by_keyword_only_and_knows_its_fields(config: type[Any]) -> None:
    made = config(**NEEDED.get(config, {}))
    with pytest.raises(FrozenInstanceError):
        setattr(made, fields(config)[0].name, "x")
    with pytest.raises(TypeError):
        config("photos")
    with pytest.raises(TypeError, match="unet_stepz"):
        config(**NEEDED.get(config, {}), unet_stepz=1)


@pytest.mark.parametrize("config", CONFIGS)
def test_the_docstring_explains_every_field_in_order(config: type[Any]) -> None:
    _, _, section = (inspect.getdoc(config) or "").partition("Attributes:\n")
    lines = [line for line in section.splitlines() if line.startswith("    ")]
    explained = [line.split(":")[0].strip() for line in lines if not line.startswith(" " * 5)]
    assert explained == [field.name for field in fields(config)]


def test_text_values_are_split_where_a_form_has_one_field_for_many() -> None:
    config = GenerateConfig(prompts=" a red star | a cat ", seeds="3, 1,20")  # type: ignore[arg-type]
    assert config.prompts == ("a red star", "a cat")
    assert config.seeds == (3, 1, 20)
    assert ExportConfig(formats="safetensors, ckpt").formats == ("safetensors", "ckpt")  # type: ignore[arg-type]


def test_texts_in_a_sequence_are_split_as_well() -> None:
    config = GenerateConfig(prompts=["a | b", "c"], seeds=["1,2", 3])  # type: ignore[arg-type]
    assert (config.prompts, config.seeds) == (("a", "b", "c"), (1, 2, 3))


def test_what_is_asked_for_twice_is_done_once() -> None:
    config = GenerateConfig(prompts="a|b|a", seeds=[1, 0, 1, "0"])  # type: ignore[arg-type]
    assert (config.prompts, config.seeds) == (("a", "b"), (1, 0))
    assert ExportConfig(formats=("ckpt", "ckpt")).formats == ("ckpt",)


def test_a_list_becomes_a_tuple() -> None:
    assert GenerateConfig(seeds=[5]).seeds == (5,)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_the_smallest_and_the_largest_seed_are_allowed(seed: int) -> None:
    assert TrainConfig(seed=seed).seed == seed
    assert GenerateConfig(seeds=(seed,)).seeds == (seed,)


@pytest.mark.parametrize("resolution", [64, 72, 512, 4096])
def test_a_resolution_is_the_side_of_the_pictures(resolution: int) -> None:
    assert PrepareConfig(images="x", resolution=resolution).side == resolution


@pytest.mark.parametrize("base", sorted(BASES))
def test_an_automatic_resolution_is_that_of_the_base_model(base: str) -> None:
    assert PrepareConfig(images="x", base_model=base).side == BASES[base].resolution


@pytest.mark.parametrize("resolution", ["auto", 64])
def test_a_side_needs_a_base_model_that_is_known(resolution: Any) -> None:
    with pytest.raises(ModelError, match="unknown base_model 'nope'"):
        _ = PrepareConfig(images="x", base_model="nope", resolution=resolution).side


AUTO = ["text_encoder_steps", "unet_steps", "text_encoder_lr", "unet_lr", "batch_size"]


@pytest.mark.parametrize("base", sorted(BASES))
def test_auto_is_the_reference_run_of_the_base_model(base: str) -> None:
    plan = plan_training(TrainConfig(base_model=base))
    assert plan.base is BASES[base]
    assert {name: getattr(plan, name) for name in AUTO} == {
        name: getattr(BASES[base], name) for name in AUTO
    }
    assert plan.total_steps == BASES[base].text_encoder_steps + BASES[base].unet_steps


def test_a_number_wins_over_auto() -> None:
    chosen = {
        "text_encoder_steps": 0,
        "unet_steps": 3,
        "text_encoder_lr": 0.5,
        "unet_lr": 1,
        "batch_size": 7,
        "num_class_images": 9,
        "seed": 11,
        "prior_loss_weight": 0.25,
    }
    plan = plan_training(
        TrainConfig(prior_preservation=True, class_prompt="a dog", **chosen)  # type: ignore[arg-type]
    )
    assert {name: getattr(plan, name) for name in chosen} == chosen
    assert (plan.class_prompt, plan.total_steps) == ("a dog", 3)


def test_without_prior_preservation_there_are_no_class_pictures() -> None:
    plan = plan_training(TrainConfig(class_prompt="a dog", num_class_images=9))
    assert (plan.class_prompt, plan.num_class_images) == ("", 0)


def test_with_prior_preservation_auto_is_the_number_of_the_base_model() -> None:
    plan = plan_training(TrainConfig(prior_preservation=True, class_prompt="a dog"))
    assert plan.num_class_images == BASES["micro"].num_class_images


@pytest.mark.parametrize("prompt", ["", "  "])
def test_prior_preservation_needs_a_class_prompt(prompt: str) -> None:
    with pytest.raises(ConfigError, match="^class_prompt is .*prior_preservation needs one"):
        TrainConfig(prior_preservation=True, class_prompt=prompt)


def test_no_steps_in_both_stages_is_refused_and_in_one_is_not() -> None:
    with pytest.raises(ConfigError, match="text_encoder_steps and unet_steps are both 0"):
        TrainConfig(text_encoder_steps=0, unet_steps=0)
    assert TrainConfig(text_encoder_steps=0).unet_steps == "auto"
    assert TrainConfig(unet_steps=0).text_encoder_steps == "auto"


def test_no_steps_because_auto_is_none_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    base = replace(BASES["micro"], name="still", unet_steps=0)
    monkeypatch.setitem(BASES, "still", base)
    with pytest.raises(ConfigError, match="are both 0"):
        plan_training(TrainConfig(base_model="still", text_encoder_steps=0))


def test_a_plan_needs_a_base_model_that_is_known() -> None:
    with pytest.raises(ModelError, match="unknown base_model"):
        plan_training(TrainConfig(base_model="nope"))
