from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from colabtools.dreambooth.resume import choose_beginning, differences
from colabtools.dreambooth.saved import Saved
from colabtools.dreambooth.train_config import TrainConfig
from colabtools.errors import CheckpointError, ConfigError

ASKED = {
    "base_model": "micro",
    "pictures": "ab",
    "settings": {"unet_lr": 1e-4, "lora_rank": 4, "seed": 0},
}


def saved(*, finished: bool = False, **settings: Any) -> Saved:
    manifest = {**ASKED, "settings": {**ASKED["settings"], **settings}}  # type: ignore[dict-item]
    return Saved(Path("step-000007"), {**manifest, "step": 7, "finished": finished})


def choose(state: Saved | None, **config: Any) -> Any:
    return choose_beginning(state, ASKED, TrainConfig(**config))


def test_without_a_state_a_run_begins_unless_one_is_required() -> None:
    assert choose(None).saved is None
    with pytest.raises(CheckpointError, match="resume is 'require' and the session holds no state"):
        choose(None, resume="require")


@pytest.mark.parametrize("resume", ["auto", "require"])
def test_a_state_of_the_same_run_is_gone_on_from(resume: str) -> None:
    state = saved()
    beginning = choose(state, resume=resume)
    assert beginning.saved is state
    assert not beginning.done


def test_never_starts_over_and_a_finished_run_is_done() -> None:
    assert choose(saved(), resume="never").saved is None
    assert choose(saved(finished=True), resume="never").saved is None
    assert choose(saved(finished=True)).done


def test_changed_settings_are_listed_and_need_a_word() -> None:
    state = saved(unet_lr=5e-4, seed=3)
    with pytest.raises(ConfigError, match="seed 3 -> 0, unet_lr 0.0005 -> 0.0001") as why:
        choose(state)
    assert "unfinished run (step 7)" in str(why.value)
    assert "allow_changes" in str(why.value)
    assert "resume to never" in str(why.value)
    assert choose(state, allow_changes=True).saved is state


def test_a_setting_that_the_state_is_made_of_cannot_change() -> None:
    with pytest.raises(ConfigError, match="does not fit another lora_rank"):
        choose(saved(lora_rank=8), allow_changes=True)


def test_a_finished_run_with_other_settings_is_not_replaced_silently() -> None:
    with pytest.raises(ConfigError, match="trained already with other settings: unet_lr"):
        choose(saved(finished=True, unet_lr=1.0), allow_changes=True)


def test_a_session_that_was_trained_on_another_base_model_says_so() -> None:
    other = Saved(Path("x"), {**ASKED, "base_model": "sd-1.5", "step": 3, "finished": False})
    with pytest.raises(ConfigError, match="base_model sd-1.5 -> micro.*does not fit another base"):
        choose(other, allow_changes=True)


def test_settings_that_one_side_does_not_know_are_differences() -> None:
    before = {"settings": {"old": 1}}
    assert differences(before, {"settings": {"new": 2}}) == {
        "new": ("nothing", 2),
        "old": (1, "nothing"),
    }


def test_another_base_model_under_the_same_name_is_another_one() -> None:
    state = saved()
    for manifest, asked, refused in (("aa", "bb", True), ("aa", "aa", False), (None, "bb", False)):
        before = Saved(state.folder, {**state.manifest, "base_weights": manifest})
        settings = {**ASKED, "base_weights": asked}
        if not refused:
            assert choose_beginning(before, settings, TrainConfig()).saved is before
            continue
        with pytest.raises(ConfigError, match="does not fit another base_weights: put it back"):
            choose_beginning(before, settings, TrainConfig(allow_changes=True))


@pytest.mark.parametrize("unet_steps", [0, 2, 5])
def test_a_run_cannot_end_before_the_step_it_is_at(unet_steps: int) -> None:
    steps = {"text_encoder_steps": 2, "unet_steps": 9}
    state = saved(**steps)
    asked = {**ASKED, "settings": {**ASKED["settings"], **steps, "unet_steps": unet_steps}}  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="step 7 is done and the run would end at"):
        choose_beginning(state, asked, TrainConfig(allow_changes=True))
    asked["settings"]["unet_steps"] = 6  # type: ignore[index]
    assert choose_beginning(state, asked, TrainConfig(allow_changes=True)).saved is state
