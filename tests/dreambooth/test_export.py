from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from colabtools import drive, env, micro
from colabtools.dreambooth import export as exporting
from colabtools.dreambooth.config import ExportConfig
from colabtools.dreambooth.export import export
from colabtools.dreambooth.generate import draw, load_trained_pipeline
from colabtools.dreambooth.session import open_session
from colabtools.dreambooth.train import Trained
from colabtools.errors import CheckpointError, WorkspaceError

from .conftest import SESSION

BOTH = ExportConfig(formats="safetensors, ckpt", dtype="fp32")


def test_both_files_hold_the_trained_model_to_the_bit(
    trained: tuple[drive.Workspace, Trained],
) -> None:
    files = {file.path.suffix: file for file in export(trained[0], SESSION, BOTH)}
    assert {file.tensor_count for file in files.values()} == {1130}
    ckpt = torch.load(files[".ckpt"].path, weights_only=True)["state_dict"]
    with safe_open(files[".safetensors"].path, "pt") as reader:
        assert set(reader.keys()) == set(ckpt)
        assert all(reader.get_tensor(name).equal(ckpt[name]) for name in ckpt)
        assert reader.metadata()["base_model"] == "micro"
        assert reader.metadata()["step"] == "7"
    conv = ckpt["model.diffusion_model.out.2.weight"]
    assert conv.equal(trained[1].weights.load()["unet"]["conv_out.weight"])


@pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers' own argument names change
def test_the_exported_file_draws_what_the_session_draws(
    trained: tuple[drive.Workspace, Trained],
) -> None:
    (file,) = export(trained[0], SESSION, ExportConfig(dtype="fp32"))
    loaded = StableDiffusionPipeline.from_single_file(
        str(file.path), config=str(micro.sd_path()), local_files_only=True, safety_checker=None
    )
    loaded.set_progress_bar_config(disable=True)
    own = load_trained_pipeline(trained[1].weights)
    for part in ("text_encoder", "unet", "vae"):
        mine = getattr(own, part).state_dict()
        theirs = getattr(loaded.to(torch.float32), part).state_dict()
        assert mine.keys() == theirs.keys()
        assert all(mine[name].equal(theirs[name]) for name in mine)
    pictures = [draw(pipeline, "a sks star", seed=1) for pipeline in (own, loaded)]
    levels = [np.asarray(picture, dtype=int) for picture in pictures]
    # The same numbers at other addresses may take other kernels, which round otherwise.
    assert abs(levels[0] - levels[1]).max() <= 1


def test_fp16_is_the_default_and_half_the_size(trained: tuple[drive.Workspace, Trained]) -> None:
    full, half = (
        export(trained[0], SESSION, ExportConfig(dtype=dtype))[0].size_bytes
        for dtype in ("fp32", ExportConfig().dtype)
    )
    assert half < 0.52 * full


def test_the_record_tells_what_was_exported(trained: tuple[drive.Workspace, Trained]) -> None:
    (file,) = export(trained[0], SESSION, ExportConfig())
    record = open_session(trained[0], SESSION).read_record()
    assert record["runs"][-1]["sha256"] == {file.path.name: file.sha256}
    assert drive.sha256_of(file.path) == file.sha256
    json.dumps(record)


def test_too_little_room_is_said_before_anything_is_written(
    trained: tuple[drive.Workspace, Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drive.Workspace, "free_bytes", lambda _: 1000)
    with pytest.raises(WorkspaceError, match="no room for the exported model"):
        export(trained[0], SESSION, ExportConfig())


def test_an_untrained_session_is_refused(workspace: drive.Workspace) -> None:
    with pytest.raises(CheckpointError, match="run train first"):
        export(workspace, SESSION, ExportConfig())
    assert not list(open_session(workspace, SESSION).folder.glob("*.safetensors"))


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each time that the runtime was given back, which nothing here can be."""
    seen: list[str] = []

    def release() -> bool:
        seen.append("given back")
        return True

    monkeypatch.setattr(env, "release_runtime", release)
    return seen


@pytest.mark.parametrize("disconnect", [False, True])
def test_the_runtime_is_given_back_only_when_asked_for(
    trained: tuple[drive.Workspace, Trained], released: list[str], disconnect: bool
) -> None:
    export(trained[0], SESSION, ExportConfig(disconnect=disconnect))
    assert len(released) == disconnect


def test_the_runtime_is_kept_where_a_file_does_not_verify(
    trained: tuple[drive.Workspace, Trained],
    released: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def damaged(*_: object, **__: object) -> None:
        raise CheckpointError("the file reads back differently")

    monkeypatch.setattr(exporting, "write_single", damaged)
    with pytest.raises(CheckpointError, match="reads back differently"):
        export(trained[0], SESSION, ExportConfig(formats=("ckpt",), disconnect=True))
    assert released == []


@pytest.mark.parametrize("remote", [False, True])
def test_a_hosted_runtime_is_kept_where_its_disk_holds_the_files(
    trained: tuple[drive.Workspace, Trained],
    released: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    remote: bool,
) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(env, "where", lambda: env.Where(env.Place.COLAB, ("a test",)))
    monkeypatch.setattr(exporting, "is_remote", lambda folder: asked.append(folder) or remote)
    export(trained[0], SESSION, ExportConfig(disconnect=True))
    assert asked == [open_session(trained[0], SESSION).folder]
    assert len(released) == remote
    assert ("the runtime is kept" in caplog.text) is not remote
