"""Settings: every refused value is named with its field, every other is kept as given."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest

from colabtools.dreambooth.config import (
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    PrepareConfig,
)
from colabtools.errors import ConfigError, ModelError
from colabtools.registry import BASES

CONFIGS = [EvaluateConfig, ExportConfig, GenerateConfig, PrepareConfig]
NEEDED = {PrepareConfig: {"images": "photos"}}
NAN, INFINITE = float("nan"), float("inf")

NOT_FLAGS: list[Any] = ["False", "true", "", 0, 1, None]
NOT_COUNTS: list[Any] = [0, -1, 2.0, True, "4", None]
NOT_RATES: list[Any] = [0, -1e-6, NAN, INFINITE, True, "5", "", None]
NOT_NAMES: list[Any] = ["", "   ", None, 7]
NOT_PROMPTS: list[Any] = ["", " ", "a||b", "a|", (), ("a", ""), (3,), None, 3]
NOT_SEEDS: list[Any] = ["", "x", "1,,2", "1, -2", "1.5", (), (-1,), (True,), None, 3]
NOT_SEEDS += [(2**63,), str(2**63), (0.5,), ([0],)]
NOT_SIDES: list[Any] = [0, 63, 65, 100, -64, 4104, 10**9, 512.0, True, "512", None]
NOT_STEPS: list[Any] = [-1, 1.0, True, "100", "auto", "", None, NAN]
REFUSED: list[tuple[type[Any], str, list[Any]]] = [
    (EvaluateConfig, "class_images", [*NOT_STEPS, 1]),
    (EvaluateConfig, "class_name", NOT_NAMES),
    (EvaluateConfig, "clip_model", NOT_NAMES),
    (EvaluateConfig, "dino_model", NOT_NAMES),
    (EvaluateConfig, "guidance_scale", NOT_RATES),
    (EvaluateConfig, "num_inference_steps", NOT_COUNTS),
    (EvaluateConfig, "prompts", [*NOT_PROMPTS, "a dog", "a {token}", "a {class}", "{token class}"]),
    (EvaluateConfig, "prompts_file", [None, 3]),
    (EvaluateConfig, "resolution", NOT_SIDES),
    (EvaluateConfig, "seeds", NOT_SEEDS),
    (EvaluateConfig, "step", NOT_STEPS),
    (EvaluateConfig, "token", NOT_NAMES),
    (ExportConfig, "disconnect", NOT_FLAGS),
    (ExportConfig, "dtype", ["fp8", "", "FP16", None, 16]),
    (ExportConfig, "formats", ["", "onnx", "safetensors, onnx", (), (1,), [["ckpt"]], None, 3]),
    (ExportConfig, "step", NOT_STEPS),
    (GenerateConfig, "compare", NOT_FLAGS),
    (GenerateConfig, "guidance_scale", NOT_RATES),
    (GenerateConfig, "negative_prompt", [None, 3]),
    (GenerateConfig, "num_inference_steps", NOT_COUNTS),
    (GenerateConfig, "prompts", [p for p in NOT_PROMPTS if p not in ("", " ", ())]),
    (GenerateConfig, "prompts_file", [None, 3]),
    (GenerateConfig, "resolution", NOT_SIDES),
    (GenerateConfig, "seeds", NOT_SEEDS),
    (GenerateConfig, "step", NOT_STEPS),
    (PrepareConfig, "allow_resolution", NOT_FLAGS),
    (PrepareConfig, "base_model", ["", " ", None]),
    (PrepareConfig, "buckets", NOT_FLAGS),
    (PrepareConfig, "crop", ["", "center", None, 3]),
    (PrepareConfig, "images", NOT_NAMES),
    (PrepareConfig, "instance_prompt", NOT_NAMES),
    (PrepareConfig, "replace", NOT_FLAGS),
    (PrepareConfig, "resolution", NOT_SIDES),
]


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [(config, name, value) for config, name, values in REFUSED for value in values],
)
def test_a_value_that_cannot_work_is_refused_by_its_field(
    config: type[Any], name: str, value: object
) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} is .*; give ") as why:
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
    with pytest.raises(TypeError, match="stepz"):
        config(**NEEDED.get(config, {}), stepz=1)


@pytest.mark.parametrize("config", CONFIGS)
def test_the_docstring_explains_every_field_in_order(config: type[Any]) -> None:
    _, _, section = (inspect.getdoc(config) or "").partition("Attributes:\n")
    lines = [line for line in section.splitlines() if line.startswith("    ")]
    explained = [line.split(":")[0].strip() for line in lines if not line.startswith(" " * 5)]
    assert explained == [field.name for field in fields(config)]


def test_text_values_are_split_where_a_form_has_one_field_for_many() -> None:
    assert GenerateConfig(prompts="").prompts == GenerateConfig().prompts == ()  # type: ignore[arg-type]
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
    assert GenerateConfig(seeds=(seed,)).seeds == (seed,)


@pytest.mark.parametrize("config", [EvaluateConfig, GenerateConfig])
def test_prompts_and_a_file_of_prompts_are_not_given_both(config: type[Any]) -> None:
    assert config(prompts_file="mine.txt").prompts_file == "mine.txt"
    with pytest.raises(ConfigError, match="^prompts_file is 'mine.txt'; give either this or"):
        config(prompts_file="mine.txt", prompts="a {token} {class} on Mars")


def test_a_negative_prompt_needs_guidance() -> None:
    assert GenerateConfig(negative_prompt="rain", guidance_scale=1.5).negative_prompt == "rain"
    with pytest.raises(ConfigError, match="^negative_prompt is 'rain'; give none, or a guidance"):
        GenerateConfig(negative_prompt="rain", guidance_scale=1)


@pytest.mark.parametrize(("base", "resolution"), [("micro", 64), ("micro", 96), ("sd-1.5", 640)])
def test_a_size_that_the_base_model_knows_is_the_side_of_the_pictures(
    base: str, resolution: int
) -> None:
    config = PrepareConfig(images="x", base_model=base, resolution=resolution)
    assert config.side == resolution


@pytest.mark.parametrize(("base", "resolution"), [("micro", 512), ("sd-1.5", 64), ("sd-1.5", 768)])
def test_a_size_that_the_base_model_was_not_made_for_must_be_allowed(
    base: str, resolution: int
) -> None:
    config = PrepareConfig(images="x", base_model=base, resolution=resolution)
    with pytest.raises(ConfigError, match=rf"^resolution is {resolution}; .* set allow_resolution"):
        _ = config.side
    allowed = PrepareConfig(
        images="x", base_model=base, resolution=resolution, allow_resolution=True
    )
    assert allowed.side == resolution


@pytest.mark.parametrize("base", sorted(BASES))
def test_an_automatic_resolution_is_that_of_the_base_model(base: str) -> None:
    assert PrepareConfig(images="x", base_model=base).side == BASES[base].resolution


@pytest.mark.parametrize("resolution", ["auto", 64])
def test_a_side_needs_a_base_model_that_is_known(resolution: Any) -> None:
    with pytest.raises(ModelError, match="unknown base_model 'nope'"):
        _ = PrepareConfig(images="x", base_model="nope", resolution=resolution).side


def test_prompts_of_a_file_are_its_lines_without_remarks_and_doubles(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    # Notepad begins its files with a byte order mark and ends lines with \r\n.
    file.write_bytes("\ufeffa red star\r\n\r\n  # later\r\n a cat|dog \r\na red star\r\n".encode())
    assert GenerateConfig(prompts_file=str(file)).load_prompts() == ("a red star", "a cat|dog")
    with pytest.raises(ConfigError, match=r"^prompts_file is 'a red star'; give templates"):
        EvaluateConfig(prompts_file=str(file)).load_prompts()


def test_without_a_file_the_prompts_are_those_of_the_field() -> None:
    assert GenerateConfig(prompts=("a cat",)).load_prompts() == ("a cat",)
    assert EvaluateConfig().load_prompts() == EvaluateConfig.prompts


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "it cannot be read"), (b"\xff\xfe\x00", "it cannot be read"), (b"# a\n\n", "none")],
)
def test_a_file_without_prompts_is_named(
    tmp_path: Path, content: bytes | None, expected: str
) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^prompts_file is .*prompts\.txt'.*{expected}"):
        GenerateConfig(prompts_file=str(file)).load_prompts()


def test_the_settings_are_made_without_loading_a_heavy_library() -> None:
    code = (
        "import sys\n"
        "from colabtools.dreambooth import config, train_config\n"
        "train_config.TrainConfig(), config.PrepareConfig(images='x').side\n"
        "config.EvaluateConfig(), config.ExportConfig(), config.GenerateConfig()\n"
        "print(sorted({'torch', 'diffusers', 'transformers', 'peft'} & {*sys.modules}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
