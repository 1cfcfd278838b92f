from __future__ import annotations

import numpy as np
import pytest

from colabtools import drive, registry
from colabtools.dreambooth.config import GenerateConfig
from colabtools.dreambooth.generate import draw, generate, load_trained_pipeline
from colabtools.dreambooth.models import load_pipeline
from colabtools.dreambooth.train import Trained
from colabtools.errors import CheckpointError, ModelError
from colabtools.images import load_upright

from .conftest import SESSION

QUICK = GenerateConfig(prompts=("a sks star",), seeds=(4, 5), num_inference_steps=2)


def test_pictures_before_and_after_and_a_grid_are_written(
    trained: tuple[drive.Workspace, Trained],
) -> None:
    drawn = generate(trained[0], SESSION, QUICK)
    names = [path.name for path in drawn.pictures]
    assert names == [
        f"step-000007-{when}-00-seed{seed}.png" for when in ("before", "after") for seed in (4, 5)
    ]
    pictures = [np.asarray(load_upright(path)) for path in drawn.pictures]
    assert {picture.shape for picture in pictures} == {(64, 64, 3)}
    assert not np.array_equal(pictures[0], pictures[2])
    assert load_upright(drawn.grid).width > 2 * 160


def test_the_same_seed_draws_the_same_picture_whatever_came_before() -> None:
    pipeline = load_pipeline(registry.BASES["micro"])
    first = draw(pipeline, "a star", seed=3, num_inference_steps=3)
    draw(pipeline, "a red ring", seed=9, num_inference_steps=2)
    again = draw(pipeline, "a star", seed=3, num_inference_steps=3)
    other = draw(pipeline, "a star", seed=4, num_inference_steps=3)
    assert first.tobytes() == again.tobytes() != other.tobytes()


def test_the_trained_weights_are_in_the_pipeline(
    trained: tuple[drive.Workspace, Trained],
) -> None:
    weights = trained[1].weights
    pipeline = load_trained_pipeline(weights)
    for name, tensors in weights.load().items():
        loaded = getattr(pipeline, name).state_dict()
        assert all(loaded[key].equal(tensor) for key, tensor in tensors.items())


def test_an_untrained_session_is_refused(workspace: drive.Workspace) -> None:
    with pytest.raises(CheckpointError, match="no trained weights; run train first"):
        generate(workspace, SESSION, QUICK)


def test_a_base_model_that_is_not_there_is_one_clear_error(tmp_path: object) -> None:
    base = registry.Base(name="gone", source=str(tmp_path), resolution=64)
    with pytest.raises(ModelError, match="base model 'gone' cannot be loaded from"):
        load_pipeline(base)
