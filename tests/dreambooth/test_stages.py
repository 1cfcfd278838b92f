from __future__ import annotations

import pytest

from colabtools.dreambooth.config import TrainConfig, plan_training
from colabtools.dreambooth.stages import plan_stages


def test_the_text_encoder_comes_first_and_the_unet_goes_on_counting() -> None:
    stages = plan_stages(plan_training(TrainConfig(text_encoder_steps=7, unet_steps=9)))
    assert [(s.trains, s.first_step, s.steps) for s in stages] == [
        ("text_encoder", 0, 7),
        ("unet", 7, 9),
    ]


@pytest.mark.parametrize(("text", "unet", "left"), [(0, 5, "unet"), (5, 0, "text_encoder")])
def test_an_empty_stage_is_left_out(text: int, unet: int, left: str) -> None:
    stages = plan_stages(plan_training(TrainConfig(text_encoder_steps=text, unet_steps=unet)))
    assert [stage.trains for stage in stages] == [left]


def test_the_stages_draw_different_noise() -> None:
    stages = plan_stages(plan_training(TrainConfig(seed=3)))
    assert stages[0].seed != stages[1].seed
