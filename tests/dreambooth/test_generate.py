from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from colabtools import drive, registry
from colabtools.dreambooth import drawing, lora
from colabtools.dreambooth import generate as generating
from colabtools.dreambooth.config import GenerateConfig, PrepareConfig
from colabtools.dreambooth.dataset import prepare
from colabtools.dreambooth.drawing import Drawing, draw, draw_picture, read_settings
from colabtools.dreambooth.generate import Painter, find_weights, generate, load_trained_pipeline
from colabtools.dreambooth.models import load_pipeline
from colabtools.dreambooth.session import Session, open_session
from colabtools.dreambooth.train import Trained
from colabtools.errors import CheckpointError, ConfigError, ModelError
from colabtools.images import load_upright

from .conftest import SESSION
from .weights import save_weights

QUICK = GenerateConfig(prompts=("a sks star",), seeds=(4, 5), num_inference_steps=1)
ONE = replace(QUICK, seeds=(4,), compare=False)


def _disturbed(seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """Weights that some training might have left: the embedded UNet's, with noise."""
    generator = torch.Generator().manual_seed(seed)
    tensors = load_pipeline(registry.BASES["micro"]).unet.state_dict()
    noise = {name: torch.randn(t.shape, generator=generator) for name, t in tensors.items()}
    return {"unet": {name: t + 0.01 * noise[name] for name, t in tensors.items()}}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> drive.Workspace:
    workspace = drive.open_local(tmp_path_factory.mktemp("original"))
    session = prepare(workspace, SESSION, PrepareConfig(images="demo")).session
    save_weights(session, 5, _disturbed(5), {"base_model": "micro"})
    save_weights(session, 7, _disturbed(7), {"base_model": "micro"})
    return workspace


@pytest.fixture
def workspace(original: drive.Workspace, tmp_path: Path) -> drive.Workspace:
    """A workspace with a session that has weights of steps 5 and 7."""
    shutil.copytree(original.root, tmp_path / "work space")
    return drive.open_local(tmp_path / "work space")


@pytest.fixture
def session(workspace: drive.Workspace) -> Session:
    return open_session(workspace, SESSION)


def _pixels(path: Path) -> bytes:
    return load_upright(path).tobytes()


def test_pictures_before_and_after_and_a_grid_are_written(workspace: drive.Workspace) -> None:
    done = generate(workspace, SESSION, QUICK)
    starts = [path.name.split("-a-sks-star-")[0] for path in done.pictures]
    ends = [path.stem.rsplit("-", 1)[1] for path in done.pictures]
    assert starts == ["base", "base", "step-000007", "step-000007"]
    assert ends == ["seed4", "seed5"] * 2
    pictures = [np.asarray(load_upright(path)) for path in done.pictures]
    assert {picture.shape for picture in pictures} == {(64, 64, 3)}
    assert not np.array_equal(pictures[0], pictures[2])
    assert load_upright(done.grid).width > 2 * 160
    assert done.drawn == 4
    run = open_session(workspace, SESSION).read_record()["runs"][-1]
    assert (run["verb"], run["step"]) == ("generate", 7)


def test_a_session_that_was_really_trained_draws_what_it_learned(
    trained: tuple[drive.Workspace, Trained],
) -> None:
    workspace, result = trained
    done = generate(workspace, SESSION, replace(QUICK, seeds=(4,)))
    before, after = map(_pixels, done.pictures)
    assert before != after
    settings = read_settings(done.pictures[1]) or {}
    assert settings["step"] == result.weights.step


def test_the_same_seed_draws_the_same_picture_whatever_came_before() -> None:
    pipeline = load_pipeline(registry.BASES["micro"])
    first = draw(pipeline, "a star", seed=3, num_inference_steps=2)
    draw(pipeline, "a red ring", seed=9, num_inference_steps=1)
    again = draw(pipeline, "a star", seed=3, num_inference_steps=2)
    other = draw(pipeline, "a star", seed=4, num_inference_steps=2)
    assert first.tobytes() == again.tobytes() != other.tobytes()


def test_what_is_there_already_is_neither_drawn_again_nor_any_model_loaded(
    workspace: drive.Workspace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = generate(workspace, SESSION, ONE)
    written = [path.stat().st_mtime_ns for path in first.pictures]

    def refuse(base: registry.Base) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(generating, "load_pipeline", refuse)
    with caplog.at_level("INFO"):
        again = generate(workspace, SESSION, ONE)
    assert (again.pictures, again.drawn) == (first.pictures, 0)
    assert [path.stat().st_mtime_ns for path in again.pictures] == written
    assert "1 of 1 pictures were drawn with these settings before" in caplog.text


def test_only_the_missing_pictures_are_drawn(workspace: drive.Workspace) -> None:
    generate(workspace, SESSION, ONE)
    assert generate(workspace, SESSION, replace(ONE, seeds=(4, 5))).drawn == 1


def test_other_settings_are_another_picture_in_another_file(session: Session) -> None:
    base = registry.BASES["micro"]
    pipeline = load_pipeline(base)
    changes: list[dict[str, Any]] = [
        {},
        {"seed": 5},
        {"num_inference_steps": 2},
        {"guidance_scale": 2.0},
        {"negative_prompt": "a red ring"},
        {"resolution": 72},
        {"prompt": "a sks star!"},
    ]
    plain = Drawing(prompt="a sks star", seed=4, num_inference_steps=1, resolution=64)
    drawings = [replace(plain, **change) for change in changes]
    painters = [Painter(base=base), Painter(base=base, weights=find_weights(session, 5))]
    names = {painter.file_name(wanted) for painter in painters for wanted in drawings}
    assert len(names) == 2 * len(changes)
    assert len({draw_picture(pipeline, wanted).tobytes() for wanted in drawings}) == len(changes)


def test_weights_trained_anew_replace_the_pictures_of_the_former(
    workspace: drive.Workspace, session: Session
) -> None:
    config = replace(QUICK, seeds=(4,))
    first = generate(workspace, SESSION, config)
    before = [_pixels(path) for path in first.pictures]
    save_weights(session, 7, _disturbed(8), {"base_model": "micro"})
    again = generate(workspace, SESSION, config)
    assert (again.pictures, again.drawn) == (first.pictures, 1)
    after = [_pixels(path) for path in again.pictures]
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False]


def test_a_picture_can_be_drawn_again_from_what_its_file_says(workspace: drive.Workspace) -> None:
    config = replace(ONE, prompts=("a sks star, ünïcode 星",), negative_prompt="a ring")
    path = generate(workspace, SESSION, config).pictures[0]
    settings = read_settings(path) or {}
    origin = {name: settings.pop(name) for name in ("base_model", "step", "weights")}
    assert (origin["base_model"], origin["step"]) == ("micro", 7)
    wanted = Drawing(
        prompt=config.prompts[0],
        seed=4,
        negative_prompt="a ring",
        num_inference_steps=1,
        guidance_scale=3.5,
        resolution=64,
    )
    assert Drawing(**settings) == wanted
    weights = find_weights(open_session(workspace, SESSION), origin["step"])
    again = draw_picture(load_trained_pipeline(weights), Drawing(**settings))
    assert again.tobytes() == _pixels(path)


@pytest.mark.parametrize("damage", ["truncate", "replace"])
def test_a_damaged_or_foreign_picture_is_drawn_again(
    workspace: drive.Workspace, damage: str
) -> None:
    path = generate(workspace, SESSION, ONE).pictures[0]
    pixels = _pixels(path)
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-200])
    else:
        load_upright(path).rotate(90).save(path)
    assert read_settings(path) is None
    assert generate(workspace, SESSION, ONE).drawn == 1
    assert _pixels(path) == pixels


def test_weights_of_an_earlier_step_can_be_chosen(
    workspace: drive.Workspace, session: Session
) -> None:
    assert [find_weights(session, step).step for step in (0, 5, 7)] == [7, 5, 7]
    drawn = generate(workspace, SESSION, replace(ONE, step=5))
    assert {path.name[:11] for path in drawn.pictures} == {"step-000005"}
    with pytest.raises(CheckpointError, match="'robot' has no weights of step 6; there is 5, 7$"):
        generate(workspace, SESSION, replace(QUICK, step=6))


def test_without_a_prompt_the_captions_of_the_first_pictures_are_drawn(
    workspace: drive.Workspace,
) -> None:
    session = open_session(workspace, SESSION)
    for path in session.captions_dir.glob("*.txt"):
        path.write_text({"1": "a sks cat", "2": " ", "3": "a sks cat"}.get(path.stem, "a ring"))
    done = generate(workspace, SESSION, replace(ONE, prompts=()))
    drawn = [read_settings(path) for path in done.pictures]
    assert [settings["prompt"] for settings in drawn if settings] == ["a sks cat", "a ring"]


def test_a_file_of_prompts_takes_the_place_of_the_field(
    workspace: drive.Workspace, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa sks star\r\n\r\n # a remark\r\n  a ring, red \na sks star\n".encode())
    config = GenerateConfig(
        prompts_file=str(file), seeds=(1,), num_inference_steps=1, compare=False
    )
    assert config.load_prompts() == ("a sks star", "a ring, red")
    assert len(generate(workspace, SESSION, config).pictures) == 2
    with pytest.raises(ConfigError, match="^prompts_file is .*; give either this or prompts"):
        GenerateConfig(prompts=("a ring",), prompts_file=str(file))


@pytest.mark.parametrize("content", [None, b"", b"# only\n\n  # remarks\n", b"\xff\xfe\xfa"])
def test_a_file_without_prompts_is_refused_before_anything_is_loaded(
    workspace: drive.Workspace, tmp_path: Path, content: bytes | None
) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"^prompts_file is .*prompts\.txt'; .*give"):
        generate(workspace, SESSION, GenerateConfig(prompts_file=str(file)))


def test_a_negative_prompt_that_would_do_nothing_is_refused() -> None:
    import diffusers

    with pytest.raises(ConfigError, match="^negative_prompt is 'x'; give none, or a guidance"):
        GenerateConfig(negative_prompt="x", guidance_scale=1)
    flux = object.__new__(diffusers.FluxPipeline)
    plain, negative = Drawing(prompt="a", seed=0), Drawing(prompt="a", seed=0, negative_prompt="x")
    assert drawing._options(flux, plain) == {}
    with pytest.raises(ConfigError, match="'x'; give none, FluxPipeline has no use for it"):
        drawing._options(flux, negative)


@pytest.mark.parametrize(("resolution", "side"), [("auto", 72), (80, 80)])
def test_pictures_are_as_large_as_the_training_pictures_or_as_asked(
    workspace: drive.Workspace, session: Session, resolution: Any, side: int
) -> None:
    session.update_record(resolution=72)
    config = replace(ONE, resolution=resolution)
    (path,) = generate(workspace, SESSION, config).pictures
    assert load_upright(path).size == (side, side)


def test_the_trained_weights_are_in_the_pipeline(session: Session) -> None:
    weights = find_weights(session, 5)
    pipeline = load_trained_pipeline(weights)
    loaded = pipeline.unet.state_dict()
    assert all(loaded[key].equal(tensor) for key, tensor in weights.load()["unet"].items())


def _adapted_unet(config: lora.AdapterConfig) -> Any:
    unet = load_pipeline(registry.BASES["micro"]).unet
    generator = torch.Generator().manual_seed(1)
    for parameter in lora.add_adapter(unet, "unet", config):
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return unet.eval()


@torch.no_grad()
def test_an_adapter_is_merged_into_the_network(session: Session) -> None:
    config = lora.AdapterConfig(rank=2, alpha=3.0)
    unet = _adapted_unet(config)
    description = {"base_model": "micro", "adapters": {"unet_lora": asdict(config)}}
    parts = {"unet_lora": lora.adapter_state(unet)}
    pipeline = load_trained_pipeline(save_weights(session, 9, parts, description))
    base = load_pipeline(registry.BASES["micro"])
    assert pipeline.unet.state_dict().keys() == base.unet.state_dict().keys()
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn((1, unet.config.in_channels, 8, 8), generator=generator)
    hidden = torch.randn((1, 4, unet.config.cross_attention_dim), generator=generator)
    outputs = [network(latents, 500, hidden).sample for network in (unet, pipeline.unet, base.unet)]
    assert outputs[0].allclose(outputs[1], atol=1e-5)
    assert not outputs[1].allclose(outputs[2], atol=1e-2)


def test_weights_that_cannot_be_placed_are_refused(session: Session) -> None:
    some = {"a": torch.zeros(1)}
    cases = [
        ({"transformer": some}, "holds transformer, which base model 'micro' does not have"),
        ({"unet": some}, "unet in .* does not fit base model 'micro'"),
        ({"unet_lora": some}, "does not say how unet_lora was made"),
    ]
    for step, (parts, message) in enumerate(cases, start=20):
        weights = save_weights(session, step, parts, {"base_model": "micro"})
        with pytest.raises(CheckpointError, match=message):
            load_trained_pipeline(weights)


def test_an_untrained_session_is_refused(workspace: drive.Workspace) -> None:
    prepare(workspace, "new", PrepareConfig(images="demo"))
    with pytest.raises(CheckpointError, match="no trained weights; run train first"):
        generate(workspace, "new", QUICK)
    with pytest.raises(CheckpointError, match="there are none, run train first"):
        generate(workspace, "new", replace(QUICK, step=5))


def test_a_base_model_that_is_not_there_is_one_clear_error(tmp_path: object) -> None:
    base = registry.Base(name="gone", source=str(tmp_path), resolution=64)
    with pytest.raises(ModelError, match="base model 'gone'"):
        load_pipeline(base)
