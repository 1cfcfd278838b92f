"""Base models: found by name, folder or repository; anything else refused in one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, fields, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from colabtools import micro
from colabtools.dreambooth.buckets import bucket_shapes, bucket_step
from colabtools.errors import ConfigError, ModelError
from colabtools.registry import (
    BASES,
    Base,
    check_resolution,
    fetch_configs,
    find_base,
    resolve_base,
    weights_digest,
)


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
    assert list(BASES) == [
        *("flux-dev", "flux-schnell", "micro", "sd-1.5", "sd-2.1-512", "sd-2.1-768", "sdxl")
    ]
    assert all(name == base.name for name, base in BASES.items())


@pytest.mark.parametrize("name", sorted(BASES))
def test_each_reference_run_can_be_trained(name: str) -> None:
    base = find_base(name)
    assert base is BASES[name]
    numbers = {
        field.name: getattr(base, field.name)
        for field in fields(base)
        if field.type in ("int", "float")
    }
    assert len(numbers) == 12
    # The text encoders of the large ones stay as they are unless asked for.
    left_out = {"text_encoder_steps"} if base.method == "lora" else set()
    assert {name for name, number in numbers.items() if number <= 0} == left_out
    assert base.prediction_type == {"flux": "flow", "sd-2.1-768": "v_prediction"}.get(
        base.family if base.family == "flux" else name, "epsilon"
    )
    check_resolution(base, base.resolution)
    for side in base.resolutions:
        check_resolution(base, side)


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
    assert base.family == ""


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
    with pytest.raises(
        ModelError, match=r"unknown base_model .*use one of .*micro, sd-1\.5"
    ) as why:
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


REFUSED = [
    ("sd-1.5", 768, "resolution is 768; sd-1.5 was trained at 512 and repeats the subject there"),
    ("sd-1.5", 384, "resolution is 384; sd-1.5 was trained at 512 and draws broken pictures there"),
    ("sd-2.1-512", 768, "trained at 512 and repeats"),
    ("sd-2.1-768", 512, "trained at 768 and draws broken"),
    ("sdxl", 512, "trained at 1024 and draws broken"),
    ("flux-dev", 2048, "trained at 1024 and repeats"),
    ("flux-dev", 520, "needs a multiple of 16, such as 512"),
    ("sd-1.5", 516, "needs a multiple of 8, such as 512"),
    ("micro", 512, "trained at 64 and repeats"),
    ("micro", 40, "trained at 64 and draws broken"),
]


@pytest.mark.parametrize(("name", "side", "reason"), REFUSED)
def test_a_size_that_the_model_cannot_draw_is_refused_with_the_reason(
    name: str, side: int, reason: str
) -> None:
    with pytest.raises(ConfigError) as why:
        check_resolution(BASES[name], side)
    assert reason in str(why.value)


def test_the_refusal_says_which_sizes_work_and_how_to_insist() -> None:
    with pytest.raises(ConfigError, match="use 448 to 640 or set allow_resolution$"):
        check_resolution(BASES["sd-1.5"], 768)


@pytest.mark.parametrize(
    ("name", "side"),
    [("sd-1.5", 576), ("sd-2.1-768", 640), ("sdxl", 768), ("flux-schnell", 528), ("micro", 72)],
)
def test_sizes_around_the_native_one_are_allowed(name: str, side: int) -> None:
    check_resolution(BASES[name], side)


@pytest.mark.parametrize("name", BASES)
def test_every_shape_of_the_buckets_is_allowed(name: str) -> None:
    base = BASES[name]
    for side in (base.resolutions[0], base.resolution, base.resolutions[1]):
        for shape in bucket_shapes(side, bucket_step(side)):
            if all(length % (16 if base.family == "flux" else 8) == 0 for length in shape):
                check_resolution(base, *shape)
    with pytest.raises(ConfigError, match="^resolution is 70x48; .* multiple of"):
        check_resolution(base, 70, 48)


def describe_model(folder: Path, **changes: dict[str, object]) -> Path:
    """A folder with the configuration files of an SD 1.5, some entries changed."""
    files: dict[str, dict[str, object]] = {
        "model_index.json": {"_class_name": "StableDiffusionPipeline"},
        "scheduler/scheduler_config.json": {"prediction_type": "epsilon"},
        "text_encoder/config.json": {"hidden_size": 768, "hidden_act": "quick_gelu"},
        "unet/config.json": {"sample_size": 64},
        "vae/config.json": {"block_out_channels": [8] * 4},
    }
    for name, entries in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps(
                entries | changes.get("model" if path.parent == folder else path.parent.name, {})
            )
        )
    return folder


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ("sd1", "epsilon", 512, (448, 640), "full")),
        (
            {
                "text_encoder": {"hidden_size": 1024},
                "scheduler": {"prediction_type": "v_prediction"},
                "unet": {"sample_size": 96},
            },
            ("sd2", "v_prediction", 768, (672, 960), "full"),
        ),
        (
            {"model": {"_class_name": "StableDiffusionXLPipeline"}, "unet": {"sample_size": 128}},
            ("sdxl", "epsilon", 1024, (768, 1280), "lora"),
        ),
        (
            {"model": {"_class_name": "FluxPipeline"}},
            ("flux", "flow", 1024, (512, 1408), "lora"),
        ),
    ],
)
def test_a_local_folder_says_its_family(
    tmp_path: Path, changes: dict[str, dict[str, object]], expected: tuple[object, ...]
) -> None:
    folder = describe_model(tmp_path / "model", **changes)
    base = find_base(str(folder))
    found = (base.family, base.prediction_type, base.resolution, base.resolutions, base.method)
    assert found == expected
    assert resolve_base(base) is base


def test_the_embedded_model_is_recognised_by_its_files() -> None:
    assert find_base(str(micro.sd_path())).family == find_base("micro").family == "sd1"


def test_a_pipeline_of_another_kind_is_refused_by_its_name(tmp_path: Path) -> None:
    folder = describe_model(tmp_path / "m", model={"_class_name": "PixArtAlphaPipeline"})
    with pytest.raises(ModelError, match="is a PixArtAlphaPipeline; only FluxPipeline, Stable"):
        find_base(str(folder))


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as a download of small files asks for."""

    folder: Path

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        is_listing = parts[:2] == ["api", "models"]
        owner, *_ = parts[2:] if is_listing else parts
        if owner in ("gated", "missing"):
            code = {"gated": "GatedRepo", "missing": "RepoNotFound"}[owner]
            return self.send(403 if owner == "gated" else 404, b"", {"X-Error-Code": code})
        if is_listing:
            return self.send(200, json.dumps(self.listing(tree="tree" in parts)).encode(), {})
        path = self.folder / "/".join(parts[4:])
        if not path.is_file():
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
        body = path.read_bytes()
        return self.send(200, body, {"ETag": f'"{len(body)}"', "X-Repo-Commit": "1" * 40})

    def listing(self, *, tree: bool) -> object:
        files = [*self.folder.rglob("*.json"), self.folder / "unet" / "weights.safetensors"]
        names = [path.relative_to(self.folder).as_posix() for path in files]
        if tree:
            return [{"type": "file", "path": name, "size": 1, "oid": "2" * 40} for name in names]
        siblings = [{"rfilename": name} for name in names]
        return {"id": "owner/name", "sha": "1" * 40, "siblings": siblings}

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    handler = type("OneModelHub", (Hub,), {"folder": describe_model(tmp_path / "hub")})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_repository_says_its_family_without_its_weights_or_why_it_cannot_be_had(
    tmp_path: Path, hub: str
) -> None:
    script = """
from pathlib import Path
from colabtools.errors import ModelError
from colabtools.registry import Base, fetch_configs, find_base, resolve_base
base = resolve_base(find_base("owner/name"))
print(base.family, base.resolution, base.resolutions, len([*fetch_configs(base).rglob("*.*")]))
for name in ("gated/model", "missing/model"):
    try:
        resolve_base(find_base(name))
    except ModelError as error:
        print(error)
"""
    environ = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "cache")}
    environ |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stderr == "", done.stderr
    found, gated, missing = done.stdout.splitlines()
    assert found == "sd1 512 (448, 640) 5"
    assert "'gated/model' is behind a licence; accept it on" in gated
    assert "HF_TOKEN" in gated
    assert "no such repository, or it is private" in missing


def test_a_known_record_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("colabtools.registry.fetch_configs", None)
    assert resolve_base(BASES["sdxl"]) is BASES["sdxl"]


def test_the_configuration_of_a_folder_is_the_folder(tmp_path: Path) -> None:
    assert fetch_configs(Base(name="x", source=str(tmp_path), resolution=64)) == tmp_path


def test_weights_that_change_anywhere_change_the_digest(tmp_path: Path) -> None:
    assert weights_digest(BASES["sd-1.5"]) == ""
    digest = weights_digest(BASES["micro"])
    assert len(digest) == 64
    copy = Path(shutil.copytree(BASES["micro"].source, tmp_path / "copy"))
    base = replace(BASES["micro"], source=str(copy))
    assert weights_digest(base) == digest
    (copy / "README.md").write_text("other words")
    assert weights_digest(base) == digest
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {name: 1.5 * tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    assert weights_digest(base) != digest
