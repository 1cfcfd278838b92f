"""Training on the embedded model learns the subject, and the prior protects the class.

A shorter run than benchmarks/dreambooth_learning.py measures; what is compared is the same.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from diffusers import StableDiffusionPipeline

from colabtools import drive, registry
from colabtools.dreambooth.config import PrepareConfig
from colabtools.dreambooth.dataset import prepare
from colabtools.dreambooth.generate import load_trained_pipeline
from colabtools.dreambooth.models import load_pipeline
from colabtools.dreambooth.train import train
from colabtools.dreambooth.train_config import TrainConfig

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "dreambooth_learning.py"
SHORT = TrainConfig(
    text_encoder_steps=10,
    unet_steps=40,
    unet_lr=5e-4,
    class_prompt="a star",
    num_class_images=8,
)


@pytest.fixture(scope="module")
def measure() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dreambooth_learning", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def base() -> StableDiffusionPipeline:
    return load_pipeline(registry.BASES["micro"])


Pipelines = Callable[[int, bool], StableDiffusionPipeline]


@pytest.fixture(scope="module")
def trained_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipelines:
    """Train the subject with a seed, with or without the prior; each is trained once."""

    @functools.cache
    def trained(seed: int, prior: bool) -> StableDiffusionPipeline:
        workspace = drive.open_local(tmp_path_factory.mktemp("workspace"))
        prepare(workspace, "star", PrepareConfig(images="demo"))
        config = replace(SHORT, seed=seed, prior_preservation=prior)
        return load_trained_pipeline(train(workspace, "star", config).weights)

    return trained


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.heavy) for seed in range(1, 5))]
)
def test_the_subject_is_learned(
    seed: int,
    measure: ModuleType,
    base: StableDiffusionPipeline,
    trained_pipeline: Pipelines,
    tmp_path: Path,
) -> None:
    after = trained_pipeline(seed, False)
    heldout = measure.heldout_subject()
    assert heldout.loss(after, tmp_path) < 0.7 * heldout.loss(base, tmp_path)
    distances = [
        measure.subject_distance("white", measure.drawn_subject(pipeline, ["white"])["white"])
        for pipeline in (base, after)
    ]
    assert distances[1] < 0.9 * distances[0]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.heavy)])
def test_with_the_prior_the_class_loss_rises_less(
    seed: int,
    measure: ModuleType,
    base: StableDiffusionPipeline,
    trained_pipeline: Pipelines,
    tmp_path: Path,
) -> None:
    without_prior, with_prior = trained_pipeline(seed, False), trained_pipeline(seed, True)
    stars, subject = measure.heldout_class(), measure.heldout_subject()
    before, protected, unprotected = (
        stars.loss(pipeline, tmp_path) for pipeline in (base, with_prior, without_prior)
    )
    assert before < protected < unprotected
    # The subject is learned all the same.
    assert subject.loss(with_prior, tmp_path) < 0.7 * subject.loss(base, tmp_path)
