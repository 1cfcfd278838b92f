from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from colabtools import drive, registry
from colabtools.dreambooth import generate as generating
from colabtools.dreambooth import scoreboard
from colabtools.dreambooth.config import EvaluateConfig, PrepareConfig
from colabtools.dreambooth.dataset import load_examples, prepare
from colabtools.dreambooth.drawing import read_settings
from colabtools.dreambooth.encoders import ClipEncoder, DinoEncoder
from colabtools.dreambooth.evaluate import Evaluated, evaluate
from colabtools.dreambooth.metrics import ClassDrift, Scores
from colabtools.dreambooth.models import load_pipeline
from colabtools.dreambooth.session import Session, open_session
from colabtools.errors import ConfigError, ModelError
from colabtools.images import load_upright

from .judges import make_clip, make_dino
from .weights import save_weights

SESSION = "robot"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EvaluateConfig:
    """The smallest evaluation that has a mean of everything, by tiny encoders."""
    folder = tmp_path_factory.mktemp("judges")
    return EvaluateConfig(
        prompts=("a {token} {class} on a white background", "a {class}, {token}"),
        seeds=(3, 4),
        class_images=2,
        num_inference_steps=1,
        dino_model=str(make_dino(folder / "dino")),
        clip_model=str(make_clip(folder / "clip")),
    )


@pytest.fixture(scope="module")
def done(
    config: EvaluateConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[drive.Workspace, Evaluated]:
    """A workspace with an evaluated session; only read it."""
    workspace = drive.open_local(tmp_path_factory.mktemp("evaluated"))
    session = prepare(workspace, SESSION, PrepareConfig(images="demo")).session
    unet = load_pipeline(registry.BASES["micro"]).unet.state_dict()
    generator = torch.Generator().manual_seed(0)
    weights = {n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in unet.items()}
    save_weights(session, 7, {"unet": weights}, {"base_model": "micro"})
    return workspace, evaluate(workspace, SESSION, config)


@pytest.fixture
def session(done: tuple[drive.Workspace, Evaluated]) -> Session:
    return open_session(done[0], SESSION)


@pytest.fixture
def copied(done: tuple[drive.Workspace, Evaluated], tmp_path: Path) -> drive.Workspace:
    shutil.copytree(done[0].root, tmp_path / "copy")
    return drive.open_local(tmp_path / "copy")


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(base: registry.Base) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(generating, "load_pipeline", refuse)


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


def test_the_scores_are_means_over_all_pairs_of_what_was_drawn_and_the_photos(
    done: tuple[drive.Workspace, Evaluated], session: Session, config: EvaluateConfig
) -> None:
    result = done[1]
    photos = [example.path for example in load_examples(session)]
    dino, clip = DinoEncoder.load(config.dino_model), ClipEncoder.load(config.clip_model)
    for encoder, score in ((dino, result.scores.dino), (clip, result.scores.clip_i)):
        drawn = encoder.embed_pictures(result.pictures, desc="looking")
        real = encoder.embed_pictures(photos, desc="looking")
        pairs = [_cosine(a, b) for a in drawn for b in real]
        assert score == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    pairs = [_cosine(real[i], real[j]) for i in range(5) for j in range(5) if i != j]
    assert result.scores.real_clip_i == pytest.approx(sum(pairs) / 20, abs=1e-6)
    # CLIP reads the prompts without the token.
    texts = clip.embed_prompts(["a star on a white background", "a star,"])
    pairs = [_cosine(drawn[i], texts[i // 2]) for i in range(4)]
    assert result.scores.clip_t == pytest.approx(sum(pairs) / 4, abs=1e-6)
    assert [v for row in result.prompts for v in row.clip_t] == pytest.approx(pairs, abs=1e-6)


def test_prompts_are_filled_in_and_drawn_with_each_seed(
    done: tuple[drive.Workspace, Evaluated],
) -> None:
    result = done[1]
    assert [row.prompt for row in result.prompts] == [
        "a sks star on a white background",
        "a star, sks",
    ]
    settings = [read_settings(path) or {} for path in result.pictures]
    assert [(s["prompt"], s["seed"], s["step"]) for s in settings] == [
        (row.prompt, seed, 7) for row in result.prompts for seed in (3, 4)
    ]


def test_the_class_is_drawn_from_the_same_noise_before_and_after(
    done: tuple[drive.Workspace, Evaluated], session: Session
) -> None:
    drift = done[1].drift
    assert drift is not None
    assert drift.prompt == "a star"
    files = session.samples_dir / "evaluation"
    settings = [read_settings(path) or {} for path in files.glob("*-a-star-??????-*")]
    drawn = sorted((s["step"], s["seed"]) for s in settings if s["prompt"] == "a star")
    assert drawn == [(0, 0), (0, 1), (7, 0), (7, 1)]
    assert drift.likeness_before != drift.likeness_after
    assert 0 < drift.diversity_before < 2


def test_everything_is_in_one_json_file_and_the_record(
    done: tuple[drive.Workspace, Evaluated], session: Session, config: EvaluateConfig
) -> None:
    result = done[1]
    report = json.loads(result.report.read_text(encoding="utf-8"))
    assert result.report == session.samples_dir / "evaluation.json"
    assert report["scores"] == asdict(result.scores)
    assert result.drift is not None
    assert report["class_drift"] == asdict(result.drift)
    # What was said to be found is written as it was found.
    asked = replace(config, token="sks", class_name="star")
    assert report["config"] == json.loads(json.dumps(asdict(asked)))
    assert (report["step"], report["base_model"], report["comparable"]) == (7, "micro", False)
    assert report["paper"]["DreamBooth, Stable Diffusion"] == {
        "dino": 0.668,
        "clip_i": 0.803,
        "clip_t": 0.305,
    }
    files = [session.samples_dir / name for name in report["pictures"]]
    assert files == list(result.pictures)
    assert all(file.is_file() for file in files)
    run = session.read_record()["runs"][-1]
    assert (run["verb"], run["step"], run["scores"]) == ("evaluate", 7, report["scores"])


def test_a_second_run_only_scores(
    done: tuple[drive.Workspace, Evaluated],
    copied: drive.Workspace,
    config: EvaluateConfig,
    no_drawing: None,
) -> None:
    again = evaluate(copied, SESSION, config)
    assert again.scores == done[1].scores
    assert again.prompts == done[1].prompts
    assert again.drift == done[1].drift


def test_class_pictures_can_be_left_out(
    copied: drive.Workspace, config: EvaluateConfig, no_drawing: None
) -> None:
    result = evaluate(copied, SESSION, replace(config, class_images=0))
    assert result.drift is None
    assert json.loads(result.report.read_text())["class_drift"] is None
    with pytest.raises(ConfigError, match="^class_images is 1; give 0, or 2 and more"):
        replace(config, class_images=1)


def test_one_photo_is_judged_without_others_to_compare_it_with(
    copied: drive.Workspace, config: EvaluateConfig, no_drawing: None
) -> None:
    session = open_session(copied, SESSION)
    for example in load_examples(session)[1:]:
        example.path.unlink()
        (session.captions_dir / f"{example.path.stem}.txt").unlink()
    result = evaluate(copied, SESSION, config)
    assert (result.scores.real_dino, result.scores.real_clip_i) == (None, None)
    assert json.loads(result.report.read_text())["scores"]["real_dino"] is None


def test_encoders_that_cannot_be_had_are_told_before_anything_is_drawn(
    copied: drive.Workspace, config: EvaluateConfig, no_drawing: None
) -> None:
    shutil.rmtree(open_session(copied, SESSION).samples_dir)
    with pytest.raises(ModelError, match="^clip_model 'no/such/folder' cannot be loaded"):
        evaluate(copied, SESSION, replace(config, clip_model="no/such/folder"))
    assert not open_session(copied, SESSION).samples_dir.exists()


@pytest.mark.parametrize("line", ["a star in the snow", "a {token} in the snow", "a {class}"])
def test_templates_need_both_placeholders(
    copied: drive.Workspace, config: EvaluateConfig, tmp_path: Path, line: str
) -> None:
    with pytest.raises(ConfigError, match=r"^prompts is .*; give templates that hold both"):
        replace(config, prompts=(line,))
    (tmp_path / "t.txt").write_text(f"a {{token}} {{class}}\n{line}\n")
    default = EvaluateConfig(prompts_file=str(tmp_path / "t.txt"))
    with pytest.raises(ConfigError, match=r"^prompts_file is .*; give templates that hold both"):
        evaluate(copied, SESSION, default)
    (tmp_path / "t.txt").write_text("# mine\na {class} like {token}\n")
    assert default.load_prompts() == ("a {class} like {token}",)


SCORES = Scores(dino=0.652, clip_i=0.791, clip_t=-0.1, real_dino=0.781, real_clip_i=None)
DRIFT = ClassDrift(
    prompt="a dog",
    likeness_before=0.34,
    likeness_after=0.49,
    diversity_before=0.55,
    diversity_after=0.05,
    clip_i=0.8,
    clip_i_before=0.83,
)


def _red_pixels(path: Path) -> int:
    picture = load_upright(path)
    # matplotlib's C3, the colour of the paper's DreamBooth line.
    return sum(count for count, color in picture.getcolors(10**6) if color == (214, 39, 40))


@pytest.mark.parametrize("drift", [DRIFT, None])
def test_the_chart_has_the_papers_lines_only_where_they_compare(tmp_path: Path, drift: Any) -> None:
    charts = [
        scoreboard.save_chart(SCORES, drift, tmp_path / f"{flag}.png", title="t", comparable=flag)
        for flag in (True, False)
    ]
    assert [_red_pixels(path) > 50 for path in charts] == [True, False]


def test_the_sheet_has_a_row_for_the_photos_each_prompt_and_the_class(
    done: tuple[drive.Workspace, Evaluated],
) -> None:
    sheet = load_upright(done[1].sheet)
    assert sheet.height > 5 * 160
    assert sheet.width > 5 * 160


def test_a_subject_that_nobody_named_is_asked_for(config: EvaluateConfig, tmp_path: Path) -> None:
    workspace = drive.open_local(tmp_path)
    prepare(workspace, SESSION, PrepareConfig(images="demo", instance_prompt="sks"))
    with pytest.raises(ConfigError, match=r"^class_name is 'auto', and the prompt 'sks' .*; give"):
        evaluate(workspace, SESSION, config)
