from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from colabtools import drive, registry
from colabtools.dreambooth import train as training
from colabtools.dreambooth.config import PrepareConfig, TrainConfig
from colabtools.dreambooth.dataset import prepare
from colabtools.dreambooth.models import load_pipeline
from colabtools.dreambooth.session import open_session
from colabtools.dreambooth.state import find_trained
from colabtools.errors import DatasetError, SessionError, TrainingError

from .conftest import SESSION

SHORT = TrainConfig(text_encoder_steps=2, unet_steps=2, batch_size=2)


def test_the_loss_of_every_update_is_logged_and_drawn(
    trained: tuple[drive.Workspace, training.Trained],
) -> None:
    workspace, result = trained
    assert [m.step for m in result.metrics] == list(range(1, 8))
    assert [m.stage for m in result.metrics] == ["text_encoder"] * 3 + ["unet"] * 4
    session = open_session(workspace, SESSION)
    lines = (session.logs_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [m.loss for m in result.metrics]
    assert result.loss_curve.is_file()
    assert [run["verb"] for run in session.read_record()["runs"]] == ["train"]


def test_the_learning_rate_falls_linearly_in_each_stage(
    trained: tuple[drive.Workspace, training.Trained],
) -> None:
    base = registry.BASES["micro"]
    rates = [m.lr for m in trained[1].metrics]
    expected = [base.text_encoder_lr * (1 - i / 3) for i in range(3)]
    expected += [base.unet_lr * (1 - i / 4) for i in range(4)]
    assert rates == pytest.approx(expected)


def test_each_stage_changes_its_own_network_only(workspace: drive.Workspace) -> None:
    base = load_pipeline(registry.BASES["micro"])
    text_only = replace(SHORT, unet_steps=0)
    parts = training.train(workspace, SESSION, text_only).weights.load()
    assert parts.keys() == {"text_encoder"}
    before = base.text_encoder.state_dict()
    changed = [name for name, t in parts["text_encoder"].items() if not t.equal(before[name])]
    assert len(changed) > 100
    unet_only = training.train(workspace, SESSION, replace(SHORT, text_encoder_steps=0))
    assert unet_only.weights.load().keys() == {"unet"}


def test_the_same_seed_trains_the_same_weights_and_another_seed_others(
    workspace: drive.Workspace,
) -> None:
    runs = [
        training.train(workspace, SESSION, replace(SHORT, seed=seed, restart=True))
        for seed in (1, 1, 2)
    ]
    losses = [[metric.loss for metric in run.metrics] for run in runs]
    assert losses[0] == losses[1] != losses[2]


def test_a_session_that_is_trained_already_is_left_alone(
    workspace: drive.Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    first = training.train(workspace, SESSION, SHORT)
    manifest = first.weights.folder / "manifest.json"
    written = manifest.stat().st_mtime_ns
    with caplog.at_level("INFO"):
        again = training.train(workspace, SESSION, SHORT)
    assert (again.metrics, manifest.stat().st_mtime_ns) == ((), written)
    assert "trained with these settings already" in caplog.text
    assert training.train(workspace, SESSION, replace(SHORT, restart=True)).metrics
    assert training.train(workspace, SESSION, replace(SHORT, seed=5)).metrics


def test_a_changed_caption_is_trained_again(workspace: drive.Workspace) -> None:
    training.train(workspace, SESSION, SHORT)
    caption = open_session(workspace, SESSION).captions_dir / "3.txt"
    caption.write_text("a sks star in the snow")
    assert training.train(workspace, SESSION, SHORT).metrics


def test_class_pictures_are_drawn_once_for_each_prompt(
    trained: tuple[drive.Workspace, training.Trained],
) -> None:
    folder = open_session(trained[0], SESSION).class_images_dir
    pictures = sorted(folder.iterdir())
    assert len(pictures) == 2
    assert len({path.name.split("-")[0] for path in pictures}) == 1


def test_the_prior_adds_the_class_pictures_to_the_loss(workspace: drive.Workspace) -> None:
    def losses(weight: float) -> list[float]:
        config = replace(
            SHORT,
            text_encoder_steps=0,
            unet_steps=1,
            prior_preservation=True,
            class_prompt="a star",
            num_class_images=2,
            prior_loss_weight=weight,
            restart=True,
        )
        return [metric.loss for metric in training.train(workspace, SESSION, config).metrics]

    one, two, four = (losses(weight)[0] for weight in (1.0, 2.0, 4.0))
    assert four - two == pytest.approx(2 * (two - one), rel=1e-4)
    assert two > one


def test_a_loss_that_is_not_finite_stops_and_saves_nothing(
    workspace: drive.Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        training, "dreambooth_loss", lambda errors, *_: errors.mean() * float("nan")
    )
    with pytest.raises(TrainingError, match="loss is nan at step 1 while training the text_enc"):
        training.train(workspace, SESSION, SHORT)
    assert find_trained(open_session(workspace, SESSION)) == []


def test_every_picture_is_seen_once_before_any_is_seen_again() -> None:
    batches = training._batches(5, 2, torch.Generator().manual_seed(0))
    rows = torch.cat([next(batches) for _ in range(10)]).tolist()
    for epoch in range(4):
        assert sorted(rows[5 * epoch : 5 * epoch + 5]) == [0, 1, 2, 3, 4]
    assert rows[:5] != rows[5:10]


def test_a_session_without_pictures_or_without_a_folder_is_refused(
    workspace: drive.Workspace,
) -> None:
    with pytest.raises(SessionError, match="no session 'nobody'.*there is robot"):
        training.train(workspace, "nobody", SHORT)
    for picture in open_session(workspace, SESSION).instance_images_dir.iterdir():
        picture.unlink()
    with pytest.raises(DatasetError, match="no training pictures; run prepare"):
        training.train(workspace, SESSION, SHORT)


def test_one_picture_is_enough(tmp_path_factory: pytest.TempPathFactory) -> None:
    from colabtools.micro import world

    photos = tmp_path_factory.mktemp("photos")
    world.render_subject("white").save(photos / "only.png")
    workspace = drive.open_local(tmp_path_factory.mktemp("workspace"))
    prepare(workspace, "one", PrepareConfig(images=str(photos)))
    assert len(training.train(workspace, "one", SHORT).metrics) == 4
