"""Models that come as pickles: .ckpt files and folders of .bin, read without unpickling them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from colabtools.checkpoints.convert import ConvertConfig, convert
from colabtools.errors import CheckpointError

from .conftest import ModelOf, file_content, folder_content
from .test_convert import back, part_file


def as_bin(folder: Path, *, shards: bool = False) -> None:
    """Save every part anew as older versions of the libraries did."""
    for part in ("unet", "vae", "text_encoder"):
        path = part_file(folder, part)
        state = load_file(path)
        path.unlink()
        stem = "pytorch_model" if part == "text_encoder" else "diffusion_pytorch_model"
        if not shards:
            torch.save(state, path.with_name(f"{stem}.bin"))
            continue
        names, weight_map = list(state), {}
        for number, chosen in enumerate((names[::2], names[1::2]), 1):
            shard = path.with_name(f"{stem}-0000{number}-of-00002.bin")
            torch.save({name: state[name] for name in chosen}, shard)
            weight_map |= dict.fromkeys(chosen, shard.name)
        index = path.with_name(f"{stem}.bin.index.json")
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("shards", [False, True])
def test_a_folder_of_bin_files_gives_the_same_tensors(
    sd1: Path, tmp_path: Path, shards: bool
) -> None:
    meant = file_content(convert(sd1, tmp_path / "a.safetensors").path)
    as_bin(sd1, shards=shards)
    assert file_content(convert(sd1, tmp_path / "b.safetensors").path) == meant


@pytest.mark.parametrize("kind", ["sd1", "sd2-v", "sdxl"])
def test_our_ckpt_becomes_the_folder_and_the_file_that_it_was_made_of(
    model: ModelOf, tmp_path: Path, kind: str
) -> None:
    ckpt = convert(model(kind), tmp_path / "m.ckpt").path
    folder = back(ckpt, tmp_path / "folder", model(kind))
    assert folder_content(folder.path) == folder_content(model(kind))
    direct = convert(model(kind), tmp_path / "a.safetensors").path
    other = convert(ckpt, tmp_path / "m.safetensors").path
    meant = file_content(direct)
    meant.pop("cond_stage_model.model.text_projection", None)
    assert file_content(other) == meant
    only = ConvertConfig(verify_only=True)
    assert convert(model(kind), ckpt, only).files[0].path == ckpt


def test_a_training_file_with_averages_and_counters_is_read(model: ModelOf, tmp_path: Path) -> None:
    """As the first releases were: all kinds of values beside the weights, and EMA."""
    state = load_file(convert(model("sd1"), tmp_path / "m.safetensors").path)
    unet = "model.diffusion_model."
    averages = {
        f"model_ema.{name.removeprefix('model.').replace('.', '')}": tensor + 1
        for name, tensor in state.items()
        if name.startswith(unet)
    }
    more = {"model_ema.num_updates": torch.tensor(5), "betas": torch.zeros(1000)}
    pickled = {"epoch": 3, "global_step": 470_000, "state_dict": {**state, **averages, **more}}
    torch.save(pickled, tmp_path / "full.ckpt")
    back(tmp_path / "full.ckpt", tmp_path / "folder", model("sd1"), ema=True)
    found = load_file(part_file(tmp_path / "folder", "unet"))
    assert found["conv_out.bias"].equal(state[f"{unet}out.2.bias"] + 1)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("was run",)


def test_a_ckpt_that_would_run_code_is_refused_and_runs_nothing(
    model: ModelOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1), "b": Evil()}}, tmp_path / "m.ckpt")
    with pytest.raises(CheckpointError, match=r"builtins.print|__builtin__.print"):
        convert(tmp_path / "m.ckpt", tmp_path / "folder")
    folder = Path(shutil.copytree(model("sd1"), tmp_path / "sd1"))
    path = part_file(folder, "vae")
    path.unlink()
    shutil.copy(tmp_path / "m.ckpt", path.with_name("diffusion_pytorch_model.bin"))
    with pytest.raises(CheckpointError, match="print"):
        convert(folder, tmp_path / "n.safetensors")
    assert "was run" not in capsys.readouterr().out
    assert not (tmp_path / "n.safetensors").exists()
