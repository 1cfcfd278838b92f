"""Every family leaves the trainer as the file that a conversion of the same weights gives."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from colabtools import drive
from colabtools.checkpoints.convert import ConvertConfig, convert
from colabtools.checkpoints.headers import read_safetensors_header
from colabtools.dreambooth import lora
from colabtools.dreambooth.config import ExportConfig, PrepareConfig
from colabtools.dreambooth.dataset import prepare
from colabtools.dreambooth.export import export, write_step_file
from colabtools.dreambooth.generate import load_trained_pipeline
from colabtools.dreambooth.models import load_pipeline
from colabtools.dreambooth.saved import Snapshot, write_snapshot
from colabtools.dreambooth.session import Session, open_session
from colabtools.dreambooth.state import latest_trained
from colabtools.errors import CheckpointError
from colabtools.registry import find_base

from .tiny import make_tiny

TRAINED = {
    "flux-dev": ("transformer",),
    "sd1": ("unet",),
    "sd2-v": ("text_encoder", "unet"),
    "sdxl": ("text_encoder", "text_encoder_2", "unet"),
}
COUNTS = {"flux-dev": 780, "sd1": 1130, "sd2-v": 1215, "sdxl": 2513}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("bases")

    def of(kind: str) -> Path:
        return root / kind if (root / kind).exists() else make_tiny(kind, root / kind)

    return of


@pytest.fixture
def workspace(tmp_path: Path) -> drive.Workspace:
    workspace = drive.open_local(tmp_path / "workspace")
    prepare(workspace, "any", PrepareConfig(images="demo"))
    return workspace


def weight_file(folder: Path, part: str) -> Path:
    (path,) = (folder / part).glob("*.safetensors")
    return path


def save_trained(session: Session, source: Path, parts: dict[str, Tensors], **more: Any) -> None:
    description = {"base_model": str(source), "settings": {}, **more}
    snapshot = Snapshot(step=3, finished=True, parts=parts, trained=tuple(parts),
                        description=description)  # fmt: skip
    write_snapshot(session.checkpoints_dir, snapshot, 1)


@pytest.mark.parametrize("kind", TRAINED)
def test_weights_trained_whole_are_exported_as_a_conversion_would(
    base: Callable[[str], Path], workspace: drive.Workspace, tmp_path: Path, kind: str
) -> None:
    session = open_session(workspace, "any")
    twin = Path(shutil.copytree(base(kind), tmp_path / "twin"))
    parts = {}
    for part in TRAINED[kind]:
        path = weight_file(twin, part)
        parts[part] = {name: tensor + 0.25 for name, tensor in load_file(path).items()}
        save_file(parts[part], path)
    save_trained(session, base(kind), parts)
    (file,) = export(workspace, "any", ExportConfig(dtype="fp16"))
    alone = "denoiser" if kind.startswith("flux") else "all"
    meant = convert(twin, tmp_path / "m.safetensors", ConvertConfig(dtype="fp16", parts=alone)).path
    assert file.tensor_count == COUNTS[kind]
    found, wanted = load_file(file.path), load_file(meant)
    assert found.keys() == wanted.keys()
    assert all(found[name].equal(wanted[name]) for name in wanted)
    assert file.path.with_suffix(".yaml").exists() == (kind == "sd2-v")
    metadata = read_safetensors_header(file.path).metadata
    assert (metadata["session"], metadata["step"]) == ("any", "3")


@pytest.mark.parametrize("kind", ["flux-schnell", "sdxl"])
def test_adapters_are_merged_into_the_exported_model(
    base: Callable[[str], Path], workspace: drive.Workspace, kind: str
) -> None:
    source = base(kind)
    session = open_session(workspace, "any")
    denoiser = "transformer" if kind.startswith("flux") else "unet"
    network = getattr(load_pipeline(find_base(str(source))), denoiser)
    lora.add_adapter(network, denoiser, lora.AdapterConfig(rank=2))
    state = {name: torch.randn_like(tensor) for name, tensor in lora.adapter_state(network).items()}
    adapters = {f"{denoiser}_lora": lora.adapter_config(network)}
    save_trained(session, source, {f"{denoiser}_lora": state}, adapters=adapters)
    (file,) = export(workspace, "any", ExportConfig(dtype="fp32"))
    found = load_file(file.path)
    merged = getattr(load_trained_pipeline(latest_trained(session)), denoiser).state_dict()
    plain = load_file(weight_file(source, denoiser))
    if denoiser == "unet":
        name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
        row = found["model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"]
    else:
        name = "transformer_blocks.0.attn.to_k.weight"
        row = found["double_blocks.0.img_attn.qkv.weight"].chunk(3)[1]
    assert row.equal(merged[name])
    assert not row.equal(plain[name])


def test_trained_weights_of_another_model_are_refused(
    base: Callable[[str], Path], workspace: drive.Workspace
) -> None:
    session = open_session(workspace, "any")
    save_trained(session, base("sd1"), {"unet": {"conv_in.weight": torch.zeros(1)}})
    with pytest.raises(CheckpointError, match="unet lacks "):
        export(workspace, "any", ExportConfig())
    save_trained(session, base("sd1"), {"text_encoder_2": {"a": torch.zeros(1)}})
    with pytest.raises(CheckpointError, match="text_encoder_2, which base model .* does not have"):
        export(workspace, "any", ExportConfig())
    assert not list(session.folder.glob("*.safetensors"))


def test_damaged_weights_are_not_exported(
    base: Callable[[str], Path], workspace: drive.Workspace
) -> None:
    session = open_session(workspace, "any")
    unet = load_file(weight_file(base("sd1"), "unet"))
    save_trained(session, base("sd1"), {"unet": unet})
    path = session.checkpoints_dir / "step-000003" / "unet.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="all 1 states of session 'any' are damaged"):
        export(workspace, "any", ExportConfig())


@pytest.mark.parametrize("kind", TRAINED)
def test_the_file_of_a_saved_step_is_a_conversion_of_its_weights(
    base: Callable[[str], Path], workspace: drive.Workspace, tmp_path: Path, kind: str
) -> None:
    source = base(kind)
    session = open_session(workspace, "any")
    parts = {part: load_file(weight_file(source, part)) for part in TRAINED[kind]}
    save_trained(session, source, parts)
    path = write_step_file(session, latest_trained(session))
    assert path.name == "any_step_3.safetensors"
    alone = "denoiser" if kind.startswith("flux") else "all"
    settings = ConvertConfig(dtype="fp16", parts=alone)
    meant = load_file(convert(source, tmp_path / "m.safetensors", settings).path)
    found = load_file(path)
    assert found.keys() == meant.keys()
    assert all(found[name].equal(meant[name]) for name in meant)


def test_a_step_is_exported_under_its_own_name(
    base: Callable[[str], Path], workspace: drive.Workspace
) -> None:
    session = open_session(workspace, "any")
    save_trained(session, base("sd1"), {"unet": load_file(weight_file(base("sd1"), "unet"))})
    (file,) = export(workspace, "any", ExportConfig(step=3, formats=("ckpt",)))
    assert file.path.name == "any_step_3.ckpt"
    with pytest.raises(CheckpointError, match="no weights of step 4; there is 3"):
        export(workspace, "any", ExportConfig(step=4))


@pytest.mark.parametrize(
    ("kind", "use_dora"),
    [(kind, False) for kind in ("sd1", "sd2-v", "sdxl", "flux-dev")] + [("sd1", True)],
)
def test_adapters_are_written_alone_for_the_web_uis(
    base: Callable[[str], Path],
    workspace: drive.Workspace,
    tmp_path: Path,
    kind: str,
    use_dora: bool,
) -> None:
    session = open_session(workspace, "any")
    pipeline = load_pipeline(find_base(str(base(kind))))
    denoiser = "transformer" if kind.startswith("flux") else "unet"
    states, adapters = {}, {}
    for part in (denoiser, "text_encoder"):
        network = getattr(pipeline, part)
        config = lora.AdapterConfig(rank=2, alpha=3.0, use_dora=use_dora)
        lora.add_adapter(network, part, config)
        states[f"{part}_lora"] = {
            name: 0.3 * torch.randn_like(tensor)
            for name, tensor in lora.adapter_state(network).items()
        }
        adapters[f"{part}_lora"] = asdict(config)
    save_trained(session, base(kind), states, adapters=adapters)
    (file,) = export(workspace, "any", ExportConfig(formats=("lora",), dtype="fp32"))
    assert file.path.name == "any_lora.safetensors"
    assert all(name.startswith("lora_") for name in load_file(file.path))
    metadata = read_safetensors_header(file.path).metadata
    assert (metadata["step"], metadata["ss_network_dim"]) == ("3", "2")
    step = write_step_file(session, latest_trained(session))
    assert set(load_file(step)) == set(load_file(file.path))
    merged = tmp_path / "merged.safetensors"
    convert(base(kind), merged, ConvertConfig(dtype="fp32", merge=(str(file.path),)))
    (whole,) = export(workspace, "any", ExportConfig(dtype="fp32"))
    meant, found = load_file(whole.path), load_file(merged)
    names = {name.removeprefix("model.diffusion_model."): name for name in found}
    for name, tensor in meant.items():
        other = found.get(name, found.get(names.get(name, "")))
        assert other is not None
        assert torch.allclose(other, tensor, atol=1e-5), name


def test_a_session_that_was_trained_whole_has_no_adapters(
    base: Callable[[str], Path], workspace: drive.Workspace
) -> None:
    session = open_session(workspace, "any")
    save_trained(session, base("sd1"), {"unet": load_file(weight_file(base("sd1"), "unet"))})
    with pytest.raises(CheckpointError, match="was trained whole and has no adapters"):
        export(workspace, "any", ExportConfig(formats=("lora",)))
