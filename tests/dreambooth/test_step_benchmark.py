"""What benchmarks/dreambooth_step.py compares: our own training, and a peer that does the same."""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

from colabtools import drive
from colabtools.dreambooth.config import PrepareConfig
from colabtools.dreambooth.dataset import prepare
from colabtools.dreambooth.train import train

from .tiny import make_tiny

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "dreambooth_step.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dreambooth_step", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: make_tiny(kind, folder / kind) for kind in ("sd1", "sdxl")}


@pytest.fixture(scope="module")
def photos(bench: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bench.write_photos(tmp_path_factory.mktemp("pictures") / "photos")


def make_job(bench: ModuleType, model: Path, photos: Path, **settings: Any) -> Any:
    return bench.Job(model=model, photos=photos, resolution=64, batch_size=2, **settings)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_both_sides_do_the_same_with_the_same_draws(
    bench: ModuleType, models: dict[str, Path], photos: Path, tmp_path: Path, method: str
) -> None:
    job = make_job(bench, models["sd1"], photos, method=method)
    ours, reference = bench.Ours(job, tmp_path), bench.Reference(job)
    _, input_ids = next(iter(reference._loader))
    batches = []
    data = ours._loop._feed.data
    draw = type(data).batch

    def kept(self: Any, *args: Any) -> Any:
        batches.append(draw(self, *args))
        return batches[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(data), "batch", kept)
        # Adapters begin with random numbers of their own, which count from the second step on.
        for _ in range(1 if method == "lora" else 3):
            ours.step()
    for batch in batches:
        reference.learn(batch.latents, batch.noise, batch.timesteps, input_ids)
    assert reference.losses == pytest.approx(ours.losses, rel=1e-5)
    if method == "full":
        theirs = dict(reference.unet.named_parameters())
        for name, weight in ours._loop.networks.parts["unet"].named_parameters():
            assert torch.allclose(weight, theirs[name], rtol=0, atol=bench.LEARNING_RATE / 10), name


def test_a_paused_run_takes_the_steps_of_a_training(
    bench: ModuleType, models: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    job = make_job(bench, models["sd1"], photos)
    ours = bench.Ours(job, tmp_path / "ours")
    for _ in range(3):
        ours.step()
    settings = PrepareConfig(
        images=str(photos), instance_prompt=bench.PROMPT, resolution=64, allow_resolution=True
    )
    workspace = drive.open_local(tmp_path / "whole")
    prepare(workspace, "step", settings)
    whole = train(workspace, "step", replace(bench.config_of(job), unet_steps=3))
    assert ours.losses == [metric.loss for metric in whole.metrics]
    assert ours.once_s > 0


@pytest.mark.parametrize(("kind", "method"), [("sd1", "full"), ("sdxl", "lora")])
def test_the_peer_trains_from_the_photos(
    bench: ModuleType, models: dict[str, Path], photos: Path, kind: str, method: str
) -> None:
    reference = bench.Reference(make_job(bench, models[kind], photos, method=method))
    learned = [p for p in reference.unet.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in learned]
    for _ in range(3):
        reference.step()
    assert all(math.isfinite(loss) and loss > 0 for loss in reference.losses)
    assert len(set(reference.losses)) == 3
    assert sum(not p.equal(old) for p, old in zip(learned, before, strict=True)) > len(learned) / 2


def test_the_sizes_are_those_of_the_published_models(bench: ModuleType, tmp_path: Path) -> None:
    """Source: the counts of the published weights; the FLOPs of a forward and a backward pass."""
    with torch.device("meta"):
        unet = bench.make_unet(bench.SHAPES["sd15"])
        vae = bench.make_vae(bench.SHAPES["sd15"])
        large = bench.make_unet(bench.SHAPES["sdxl"])
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    assert sum(p.numel() for p in large.parameters()) == 2_567_463_684
    unet.save_config(tmp_path / "unet")
    vae.save_config(tmp_path / "vae")
    transformers.CLIPTextConfig(hidden_size=64, num_attention_heads=1).save_pretrained(
        tmp_path / "text_encoder"
    )
    flops = bench.count_flops(bench.Job(model=tmp_path, photos=tmp_path, resolution=512))
    assert flops["step"] / 1e9 == pytest.approx(2_407, abs=1)
    assert flops["encode"] / 1e9 == pytest.approx(1_117, abs=1)
