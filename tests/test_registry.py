"""Base models: found by name, folder or repository; anything else refused in one line."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from colabtools import micro
from colabtools.errors import ModelError
from colabtools.registry import BASES, find_base


def write_model(folder: Path, *, sample_size: object, levels: int = 4) -> Path:
    """A folder in diffusers' layout, as far as the registry reads it."""
    (folder / "unet").mkdir(parents=True)
    (folder / "vae").mkdir()
    (folder / "model_index.json").write_text("{}")
    (folder / "unet" / "config.json").write_text(json.dumps({"sample_size": sample_size}))
    vae = {"block_out_channels": [8] * levels}
    (folder / "vae" / "config.json").write_text(json.dumps(vae))
    return folder


def test_each_base_is_listed_under_its_own_name() -> None:
    assert {"micro", "sd-1.5"} <= set(BASES)
    assert all(name == base.name for name, base in BASES.items())


@pytest.mark.parametrize("name", sorted(BASES))
def test_each_reference_run_can_be_trained(name: str) -> None:
    base = find_base(name)
    assert base is BASES[name]
    assert base.resolution % 8 == 0
    numbers = [
        getattr(base, field.name) for field in fields(base) if field.type in ("int", "float")
    ]
    assert len(numbers) == 7
    assert all(number > 0 for number in numbers)


def test_a_record_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        find_base("micro").resolution = 512  # type: ignore[misc]


def test_the_embedded_model_draws_what_its_record_says() -> None:
    assert find_base(str(micro.sd_path())).resolution == find_base("micro").resolution == 64
    assert find_base("micro").source == str(micro.sd_path())


def test_a_local_folder_is_a_base_of_its_own_native_size(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "my model", sample_size=96)
    base = find_base(str(folder))
    assert (base.name, base.source, base.resolution) == (str(folder), str(folder), 768)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_model(tmp_path / "model", sample_size=8)
    assert find_base("~/model").source == str(tmp_path / "model")


def test_a_folder_named_like_a_repository_comes_before_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "owner" / "name", sample_size=16)
    assert find_base("owner/name").resolution == 128


@pytest.mark.parametrize("name", ["stabilityai/stable-diffusion-2-1", "a/b", "me_2/my.model-v1.0"])
def test_an_owner_and_a_name_are_a_hub_repository(name: str) -> None:
    base = find_base(name)
    assert (base.name, base.source, base.resolution) == (name, name, 512)


@pytest.mark.parametrize(
    "name",
    [
        *("", "  ", "sd15", "Micro", "owner/", "/name", "a/b/c", "../name", "./name", "~/name"),
        *(
            "owner/na me",
            "-o/name",
            "owner/.name",
            "ö/name",
            "~no-such-user/x",
            "a\0b/c",
            "x" * 5000,
        ),
    ],
)
def test_anything_else_is_refused_with_what_is_known(name: str) -> None:
    with pytest.raises(ModelError, match=r"unknown base_model .*use one of micro, sd-1\.5") as why:
        find_base(name)
    assert repr(name) in str(why.value)
    assert "\n" not in str(why.value)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is a folder without model_index\.json"):
        find_base(str(tmp_path))


@pytest.mark.parametrize("damage", ["missing", "text", "list", "no size"])
def test_a_model_whose_configuration_cannot_be_read_is_refused(tmp_path: Path, damage: str) -> None:
    folder = write_model(tmp_path / "model", sample_size=None if damage == "no size" else 64)
    config = folder / "unet" / "config.json"
    if damage == "missing":
        config.unlink()
    elif damage != "no size":
        config.write_text({"text": "not json", "list": "[1]"}[damage])
    with pytest.raises(ModelError, match="no readable unet and vae configuration") as why:
        find_base(str(folder))
    assert "\n" not in str(why.value)
