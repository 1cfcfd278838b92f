"""Every field of a notebook reaches the verb it is for; the cells run here without their verbs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest

from colabtools import drive, micro, report
from colabtools.checkpoints.inspect import inspect
from colabtools.dreambooth import dataset, evaluate, export, generate, train, widgets
from colabtools.dreambooth.config import (
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    PrepareConfig,
)
from colabtools.dreambooth.train_config import TrainConfig
from colabtools.dreambooth.widgets.sessions import Choice

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "dreambooth_training.ipynb"
VERBS = {"prepare": dataset, "train": train, "generate": generate, "evaluate": evaluate}
VERBS["export"] = export
AGAIN = "prepare again"
Calls = dict[str, tuple[object, str, Any]]

# Another value than the default for every field, and the setting of the package that it becomes.
CHANGED: dict[str, tuple[Any, str]] = {
    "allow_changes": (True, "train.allow_changes"),
    "allow_resolution": (True, "prepare.allow_resolution train.allow_resolution"),
    "base_model": ("sd-1.5", "prepare.base_model train.base_model"),
    "buckets": (True, "prepare.buckets"),
    "caption_dropout": (0.1, "train.caption_dropout"),
    "class_name": ("dog", "evaluate.class_name"),
    "class_prompt": ("a photo of a dog", "train.class_prompt"),
    "crop": ("centre", "prepare.crop"),
    "disconnect_when_done": (True, "export.disconnect"),
    "export_dtype": ("bf16", "export.dtype"),
    "export_formats": (("ckpt",), "export.formats"),
    "images_folder": ("my photos", "prepare.images"),
    "instance_prompt": ("a photo of sks dog", "prepare.instance_prompt"),
    "lora_rank": (4, "train.lora_rank"),
    "method": ("lora", "train.method"),
    "optimizer": ("lion", "train.optimizer"),
    "prior_preservation": (True, "train.prior_preservation"),
    "prompts": (("a red dog", "a blue dog"), "generate.prompts"),
    "replace_images": (True, "prepare.replace"),
    "resolution": (576, "prepare.resolution"),
    "resume": ("require", "train.resume"),
    "sample_every": (50, "train.sample_every"),
    "sample_prompts": (("a dog", "a cat"), "train.sample_prompts"),
    "save_every": (100, "train.save_every"),
    "seed": (7, "train.seed"),
    "stages": ("joint", "train.stages"),
    "strict_captions": (True, "train.strict_captions"),
    "text_encoder_lr": (2e-6, "train.text_encoder_lr"),
    "text_encoder_steps": (5, "train.text_encoder_steps"),
    "token": ("xyz", "evaluate.token"),
    "unet_lr": (3e-6, "train.unet_lr"),
    "unet_steps": (9, "train.unet_steps"),
}
# These are no settings of a config; the last two turn a step on.
OTHERS = {
    "workspace_folder": "my work",
    "session_name": "dog",
    "convert_to": "model.safetensors",
    "evaluate_model": True,
    "convert_from": str(micro.sd_path()),
}


def sources() -> tuple[str, list[str]]:
    """The settings cell, and the cells after it."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    at = next(i for i, cell in enumerate(code) if "parameters" in cell.metadata.get("tags", []))
    return code[at].source, [cell.source for cell in code[at + 1 :]]


def default_settings() -> dict[str, Any]:
    values: dict[str, Any] = {}
    exec(sources()[0], values)
    return {name: value for name, value in values.items() if name != "__builtins__"}


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What each verb was called with, in the place of doing it; a second time as `verb again`."""
    calls: Calls = {}

    def stand_in(verb: str) -> Any:
        def call(workspace: object, session: str, config: Any) -> object:
            calls[f"{verb} again" if verb in calls else verb] = (workspace, session, config)
            return SimpleNamespace(contact_sheet="1", loss_curve="2", grid="3", sheet="4")

        return call

    for verb, module in VERBS.items():
        monkeypatch.setattr(module, verb, stand_in(verb))
    shown: list[str] = []
    monkeypatch.setattr(report, "show", shown.append)
    monkeypatch.setattr(drive, "mount", lambda folder: f"opened {folder}")
    calls["shown"] = ("", "", shown)
    return calls


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step writes by a relative path lands here."""
    monkeypatch.chdir(tmp_path)


def run_cells(settings: dict[str, Any], called: Calls) -> None:
    """Run all steps after the settings; what was called before is forgotten."""
    for verb in (*VERBS, AGAIN):
        called.pop(verb, None)
    values = dict(settings)
    for source in sources()[1]:
        exec(source, values)


def as_typed(value: Any) -> Any:
    """A value as a form gives it: one text for many."""
    return " | ".join(value) if isinstance(value, tuple) else value


def test_every_field_is_known_here() -> None:
    assert default_settings().keys() == CHANGED.keys() | OTHERS.keys()
    for name, value in {**{n: as_typed(v) for n, (v, _) in CHANGED.items()}, **OTHERS}.items():
        assert default_settings()[name] != value


@pytest.mark.parametrize("name", sorted(CHANGED))
def test_a_field_changes_its_settings_and_no_other(name: str, called: Calls) -> None:
    settings = {**default_settings(), "evaluate_model": True}
    run_cells(settings, called)
    before = {verb: called[verb][2] for verb in VERBS}
    value, places = CHANGED[name]
    run_cells({**settings, name: as_typed(value)}, called)
    changed = {
        f"{verb}.{field}": getattr(called[verb][2], field)
        for verb in VERBS
        for field in vars(before[verb])
        if getattr(called[verb][2], field) != getattr(before[verb], field)
    }
    assert changed == dict.fromkeys(places.split(), value)


def test_the_defaults_are_those_of_the_package(called: Calls) -> None:
    run_cells({**default_settings(), "evaluate_model": True}, called)
    configs = {verb: called[verb][2] for verb in VERBS}
    assert configs == {
        "evaluate": EvaluateConfig(),
        "export": ExportConfig(),
        "generate": GenerateConfig(),
        "prepare": PrepareConfig(images="demo"),
        # Shown as an example of one; without prior_preservation it counts for nothing.
        "train": TrainConfig(class_prompt="a star"),
    }


def test_every_step_works_on_the_session_and_shows_its_picture(called: Calls) -> None:
    run_cells({**default_settings(), **OTHERS}, called)
    assert {called[verb][:2] for verb in (*VERBS, AGAIN)} == {("opened my work", "dog")}
    assert called["shown"][2] == ["1", "1", "2", "3", "4"]


def test_photos_are_cut_again_as_they_were_prepared_in_place_of_those(called: Calls) -> None:
    changed = {
        n: as_typed(value) for n, (value, to) in CHANGED.items() if to.startswith("prepare.")
    }
    run_cells({**default_settings(), **changed, "replace_images": False}, called)
    assert called[AGAIN][2] == replace(called["prepare"][2], replace=True)
    assert not called["prepare"][2].replace


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What each form was opened with, in the place of showing it; another session is picked."""
    opened: list[tuple[Any, ...]] = []

    def pick(workspace: object, default: str) -> Choice:
        opened.append(("pick_session", workspace, default))
        return Choice("picked")

    monkeypatch.setattr(widgets, "pick_session", pick)
    for name in ("manage_space", "edit_crops", "edit_captions"):
        monkeypatch.setattr(widgets, name, lambda *given, name=name: opened.append((name, *given)))
    return opened


def test_the_session_that_is_picked_is_that_of_every_later_step(
    called: Calls, forms: list[tuple[Any, ...]]
) -> None:
    run_cells({**default_settings(), **OTHERS}, called)
    assert {called[verb][1] for verb in (*VERBS, AGAIN)} == {"picked"}
    assert forms == [
        ("pick_session", "opened my work", "dog"),
        ("manage_space", "opened my work"),
        ("edit_crops", "opened my work", "picked", called["prepare"][2]),
        ("edit_captions", "opened my work", "picked"),
    ]


def test_where_nobody_looks_each_form_says_in_a_line_what_is_done(
    called: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    run_cells(default_settings(), called)
    assert [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines()] == [
        "session 'my-subject' is used",
        "nothing is measured or freed",
        "crops stay as they were found",
        "captions stay as they are",
    ]


def test_the_encoders_of_the_hub_are_asked_for_only_when_told(called: Calls) -> None:
    run_cells(default_settings(), called)
    assert "evaluate" not in called
    assert "export" in called


def test_another_model_is_converted_only_when_told(called: Calls, tmp_path: Path) -> None:
    run_cells(default_settings(), called)
    assert list(tmp_path.iterdir()) == []
    run_cells({**default_settings(), **OTHERS}, called)
    converted = tmp_path / "model.safetensors"
    assert inspect(converted).family == "sd1"
    assert list(tmp_path.iterdir()) == [converted]
