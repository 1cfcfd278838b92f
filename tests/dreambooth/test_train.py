"""Whole runs on the embedded model: what they train, leave alone, write and refuse."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from colabtools import drive, registry
from colabtools.dreambooth import lease, loop
from colabtools.dreambooth import train as training
from colabtools.dreambooth.config import PrepareConfig
from colabtools.dreambooth.dataset import load_examples, prepare
from colabtools.dreambooth.models import load_pipeline
from colabtools.dreambooth.session import open_session
from colabtools.dreambooth.state import CheckpointStore, find_trained
from colabtools.dreambooth.train_config import TrainConfig
from colabtools.errors import (
    ColabToolsError,
    ConfigError,
    DatasetError,
    SessionBusyError,
    SessionError,
)

from .conftest import SESSION

SHORT = TrainConfig(text_encoder_steps=2, unet_steps=2, batch_size=2)


def train(workspace: drive.Workspace, config: TrainConfig = SHORT, **changes: Any) -> Any:
    return training.train(workspace, SESSION, replace(config, **changes))


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, tensor in after.items() if not tensor.equal(before[name])]


@pytest.fixture(scope="module")
def base() -> dict[str, dict[str, torch.Tensor]]:
    pipeline = load_pipeline(registry.BASES["micro"])
    return {part: getattr(pipeline, part).state_dict() for part in ("text_encoder", "unet")}


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


def test_a_finished_run_leaves_only_its_result(
    trained: tuple[drive.Workspace, training.Trained],
) -> None:
    workspace, result = trained
    folders = list(open_session(workspace, SESSION).checkpoints_dir.iterdir())
    assert folders == [result.weights.folder]
    assert result.weights.finished
    assert result.weights.load_state() == {}


@pytest.mark.parametrize(
    ("steps", "parts"), [((2, 0), {"text_encoder"}), ((0, 2), {"unet"})], ids=["text", "unet"]
)
def test_a_separate_stage_changes_its_own_network_only(
    workspace: drive.Workspace,
    base: dict[str, Any],
    steps: tuple[int, int],
    parts: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[loop.StageLoop] = []
    step = loop.StageLoop.step
    monkeypatch.setattr(
        loop.StageLoop, "step", lambda self, world: (seen.append(self), step(self, world))
    )
    result = train(workspace, text_encoder_steps=steps[0], unet_steps=steps[1]).weights.load()
    assert result.keys() == parts
    (part,) = parts
    assert len(changed(base[part], result[part])) > 0.9 * len(result[part])
    (other,) = {"text_encoder", "unet"} - parts
    frozen = seen[-1]._models.part(other)
    assert changed(base[other], frozen.state_dict()) == []
    assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())


def test_joint_training_moves_both_networks_in_one_stage(
    workspace: drive.Workspace, base: dict[str, Any]
) -> None:
    run = train(workspace, stages="joint", text_encoder_steps="auto", text_encoder_lr=1e-3)
    assert [(m.step, m.stage) for m in run.metrics] == [(1, "joint"), (2, "joint")]
    result = run.weights.load()
    assert all(len(changed(base[p], result[p])) > 100 for p in ("text_encoder", "unet"))


def test_the_same_seed_trains_the_same_weights_and_another_seed_others(
    workspace: drive.Workspace,
) -> None:
    runs = [train(workspace, seed=seed, resume="never") for seed in (1, 1, 2)]
    losses = [[metric.loss for metric in run.metrics] for run in runs]
    assert losses[0] == losses[1] != losses[2]


def test_a_session_that_is_trained_already_is_left_alone(
    workspace: drive.Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    first = train(workspace)
    manifest = first.weights.folder / "manifest.json"
    written = manifest.stat().st_mtime_ns
    with caplog.at_level("INFO"):
        again = train(workspace)
    assert (again.metrics, manifest.stat().st_mtime_ns) == ((), written)
    assert "trained with these settings already" in caplog.text
    with pytest.raises(ConfigError, match="trained already with other settings: seed 0 -> 5"):
        train(workspace, seed=5)
    assert manifest.stat().st_mtime_ns == written
    assert train(workspace, seed=5, resume="never").metrics


def test_changed_pictures_are_a_change(workspace: drive.Workspace) -> None:
    train(workspace)
    caption = open_session(workspace, SESSION).captions_dir / "3.txt"
    caption.write_text("a sks star in the snow")
    with pytest.raises(ConfigError, match="other settings: pictures"):
        train(workspace)


def test_class_pictures_are_drawn_once_for_each_prompt(
    trained: tuple[drive.Workspace, training.Trained],
) -> None:
    folder = open_session(trained[0], SESSION).class_images_dir
    pictures = sorted(folder.iterdir())
    assert len(pictures) == 2
    assert len({path.name.split("-")[0] for path in pictures}) == 1


def test_the_prior_adds_the_class_pictures_to_the_loss(workspace: drive.Workspace) -> None:
    prior = {"prior_preservation": True, "class_prompt": "a star", "num_class_images": 2}

    def loss(weight: float) -> float:
        steps = {"text_encoder_steps": 0, "unet_steps": 1, "resume": "never"}
        return float(train(workspace, **prior, **steps, prior_loss_weight=weight).metrics[0].loss)

    one, two, four = (loss(weight) for weight in (1.0, 2.0, 4.0))
    assert four - two == pytest.approx(2 * (two - one), rel=1e-4)
    assert two > one


def test_samples_are_drawn_and_change_nothing(workspace: drive.Workspace) -> None:
    plain = train(workspace)
    sampled = train(
        workspace, sample_every=2, sample_prompts="a sks star|a star", sample_seeds=(4,),
        resume="never",
    )  # fmt: skip
    folder = open_session(workspace, SESSION).samples_dir / "training"
    assert [path.name for path in sorted(folder.iterdir())] == [
        "step-000002.png",
        "step-000004.png",
    ]
    assert sampled.metrics == plain.metrics
    first, second = plain.weights, sampled.weights
    assert first.files == second.files


def test_heldout_pictures_are_measured_and_not_trained_on(workspace: drive.Workspace) -> None:
    train(workspace, heldout_images=2, checkpoint_every=1)
    session = open_session(workspace, SESSION)
    text = (session.logs_dir / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    measured = {row["step"]: row["heldout_loss"] for row in rows if "heldout_loss" in row}
    assert measured.keys() == {1, 2, 3, 4}
    assert len(set(measured.values())) == 4
    with pytest.raises(ConfigError, match="heldout_images is 5"):
        train(workspace, heldout_images=5, resume="never")


def test_events_for_tensorboard_hold_the_losses(workspace: drive.Workspace) -> None:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    result = train(workspace, tensorboard=True)
    folder = open_session(workspace, SESSION).logs_dir / "tensorboard"
    events = event_accumulator.EventAccumulator(str(folder)).Reload()
    scalars = events.Scalars("loss")
    assert [event.step for event in scalars] == [1, 2, 3, 4]
    assert [event.value for event in scalars] == pytest.approx([m.loss for m in result.metrics])


def test_states_are_kept_for_good_every_so_often(workspace: drive.Workspace) -> None:
    train(workspace, unet_steps=4, save_every=2, checkpoint_every=1, keep_last=1)
    session = open_session(workspace, SESSION)
    kept = find_trained(session)
    assert [(saved.step, saved.finished) for saved in kept] == [(2, False), (4, False), (6, True)]
    # What is called step 4 has seen four updates, no more and no fewer.
    assert kept[1].load_state()["metrics"][-1]["step"] == 4
    files = sorted(path.name for path in session.folder.glob("*.safetensors"))
    assert files == [f"{SESSION}_step_{step}.safetensors" for step in (2, 4, 6)]
    single = load_file(session.folder / files[1])
    unet = kept[1].load()["unet"]["conv_in.weight"]
    assert single["model.diffusion_model.input_blocks.0.0.weight"].equal(unet.half())


def test_where_compiling_fails_the_run_goes_on_without(
    workspace: drive.Workspace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = train(workspace, text_encoder_steps=0, unet_steps=2).metrics

    def broken(graph: Any, inputs: Any) -> None:
        raise OSError("no C++ compiler here")

    def compile_broken(module: torch.nn.Module) -> None:
        module._compiled_call_impl = torch.compile(module._call_impl, backend=broken)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_broken)
    again = train(workspace, text_encoder_steps=0, unet_steps=2, compile=True, resume="never")
    assert again.metrics == plain
    assert "the denoiser cannot be compiled" in caplog.text
    assert "no C++ compiler here" in caplog.text


@pytest.mark.heavy
@pytest.mark.timeout(900)
# The compiler's own imports use what torch.jit no longer wants to be used.
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_compiled_run_learns_what_a_plain_one_does(
    workspace: drive.Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"text_encoder_steps": 0, "unet_steps": 4}
    plain = train(workspace, **settings).metrics
    compiled = train(workspace, **settings, compile=True, resume="never").metrics
    if "cannot be compiled" in caplog.text:
        # No C++ compiler, or a folder whose name holds a space, which torch does not quote.
        pytest.skip("torch.compile does not work here")
    assert [m.loss for m in compiled] == pytest.approx([m.loss for m in plain], rel=1e-4)
    assert compiled != plain


def test_model_files_of_a_former_run_are_named_and_stay(
    workspace: drive.Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    session = open_session(workspace, SESSION)
    former = [session.folder / f"{SESSION}{end}" for end in (".ckpt", "_step_500.safetensors")]
    for path in former:
        path.write_bytes(b"former")
    train(workspace)
    assert f"{former[0].name}, {former[1].name} of session {SESSION} hold what was" in caplog.text
    assert [path.read_bytes() for path in former] == [b"former"] * 2


def test_pictures_of_several_shapes_are_trained(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, size in enumerate([(160, 80), (64, 64), (70, 120), (100, 90)]):
        Image.new("RGB", size, (20 * number, 90, 160)).save(photos / f"{number}.png")
    workspace = drive.open_local(tmp_path / "work")
    prepare(workspace, SESSION, PrepareConfig(images=str(photos), buckets=True))
    shapes = {example.size for example in load_examples(open_session(workspace, SESSION))}
    assert len(shapes) > 2
    assert len(train(workspace, prior_preservation=False).metrics) == 4


def test_other_class_pictures_than_the_run_began_with_are_noticed(
    workspace: drive.Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"prior_preservation": True, "class_prompt": "a star", "num_class_images": 2}
    settings |= {"checkpoint_every": 1, "unet_steps": 4}
    step = loop.StageLoop.step

    def until(self: loop.StageLoop, world: Any) -> None:
        if self.stage.first_step + self.update == 3:
            raise KeyboardInterrupt
        step(self, world)

    with monkeypatch.context() as patch:
        patch.setattr(loop.StageLoop, "step", until)
        with pytest.raises(KeyboardInterrupt):
            train(workspace, **settings)
    picture = sorted(open_session(workspace, SESSION).class_images_dir.glob("*.png"))[0]
    drawn = picture.read_bytes()
    Image.new("RGB", (64, 64), "red").save(picture)
    with pytest.raises(ConfigError, match="are not those that the run began with; put them back"):
        train(workspace, **settings)
    picture.write_bytes(drawn)
    assert len(train(workspace, **settings).metrics) == 6


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("optimizer", {"optimizer": "adma"}, "adma"),
    ("rank", {"method": "lora", "lora_rank": 0}, "lora_rank is 0"),
    ("rate", {"unet_lr": -1e-4}, "unet_lr is -0.0001"),
    ("class prompt", {"prior_preservation": True}, "class_prompt is ''"),
    ("zero snr", {"zero_terminal_snr": True}, "zero_terminal_snr"),
    ("base", {"base_model": "nowhere"}, "unknown base_model 'nowhere'"),
    ("prodigy rates", {"optimizer": "prodigy", "stages": "joint", "text_encoder_steps": "auto",
                       "unet_lr": 0.5}, "prodigy"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"), [row[1:] for row in BAD], ids=[row[0] for row in BAD]
)
def test_what_cannot_work_is_refused_in_one_line_before_any_step(
    workspace: drive.Workspace,
    changes: dict[str, Any],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loop.StageLoop, "step", lambda *_: pytest.fail("a step was done"))
    with pytest.raises(ColabToolsError, match=words) as why:
        train(workspace, **changes)
    assert "\n" not in str(why.value)
    assert find_trained(open_session(workspace, SESSION)) == []


def test_damaged_pictures_and_captions_are_refused_before_any_step(
    workspace: drive.Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop.StageLoop, "step", lambda *_: pytest.fail("a step was done"))
    session = open_session(workspace, SESSION)
    (session.captions_dir / "orphan.txt").write_text("nobody")
    with pytest.raises(DatasetError, match="orphan"):
        train(workspace, strict_captions=True)
    (session.captions_dir / "orphan.txt").unlink()
    (session.captions_dir / "1.txt").write_text("")
    with pytest.raises(DatasetError, match=r"1\.txt|empty"):
        train(workspace, strict_captions=True)
    picture = load_examples(session)[2].path
    picture.write_bytes(picture.read_bytes()[:200])
    with pytest.raises(ColabToolsError, match=picture.name):
        train(workspace)


def test_a_session_without_pictures_or_without_a_folder_is_refused(
    workspace: drive.Workspace,
) -> None:
    with pytest.raises(SessionError, match="no session 'nobody'.*there is robot"):
        training.train(workspace, "nobody", SHORT)
    for picture in open_session(workspace, SESSION).instance_images_dir.iterdir():
        picture.unlink()
    with pytest.raises(DatasetError, match="no training pictures; run prepare"):
        train(workspace)


def test_one_picture_is_enough(tmp_path_factory: pytest.TempPathFactory) -> None:
    from colabtools.micro import world

    photos = tmp_path_factory.mktemp("photos")
    world.render_subject("white").save(photos / "only.png")
    workspace = drive.open_local(tmp_path_factory.mktemp("workspace"))
    prepare(workspace, "one", PrepareConfig(images=str(photos)))
    assert len(training.train(workspace, "one", SHORT).metrics) == 4


def test_adapters_are_kept_for_good_with_a_file_of_their_own(workspace: drive.Workspace) -> None:
    train(workspace, method="lora", lora_rank=2, save_every=1)
    session = open_session(workspace, SESSION)
    assert [saved.step for saved in find_trained(session)] == [1, 2, 3, 4]
    files = sorted(session.folder.glob("*.safetensors"))
    assert [path.name for path in files] == [f"{SESSION}_step_{n}.safetensors" for n in range(1, 5)]
    saved = find_trained(session)[2].load()["unet_lora"]
    down = next(name for name in saved if name.endswith("attn1.to_q.lora_A.weight"))
    module = "lora_unet_" + down.removesuffix(".lora_A.weight").replace(".", "_")
    assert load_file(files[2])[f"{module}.lora_down.weight"].equal(saved[down].half())


def test_attention_that_is_not_there_is_said_and_torchs_own_does_it(
    workspace: drive.Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    plain = train(workspace)
    other = train(workspace, attention="xformers", resume="never")
    assert "attention is torch's own instead of xformers'" in caplog.text
    assert other.metrics == plain.metrics


def test_all_the_extras_train_together(workspace: drive.Workspace) -> None:
    config = TrainConfig(
        method="dora", lora_rank=2, lora_dropout=0.1, text_encoder_steps=2, unet_steps=2,
        batch_size=1, gradient_accumulation_steps=2, optimizer="lion", lr_schedule="cosine",
        lr_warmup_steps=1, prior_preservation=True, class_prompt="a star", num_class_images=1,
        caption_dropout=0.5, shuffle_tokens=True, keep_tokens=1, offset_noise=0.1,
        min_snr_gamma=5.0, ema=True, crops=2, checkpoint_every=1, gradient_checkpointing="on",
    )  # fmt: skip
    result = train(workspace, config)
    assert result.weights.load().keys() == {"text_encoder_lora", "unet_lora"}
    assert CheckpointStore(open_session(workspace, SESSION)).newest() is not None


def test_a_session_that_another_process_writes_to_is_not_trained(
    workspace: drive.Workspace,
) -> None:
    folder = open_session(workspace, SESSION).folder
    before = sorted(folder.rglob("*"))
    code = (
        "import sys, time; from pathlib import Path; from colabtools.dreambooth.lease import hold\n"
        "with hold(Path(sys.argv[1]), 'train'):\n    print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(SessionBusyError, match=f"train on this machine, process {other.pid}"):
            train(workspace)
        assert sorted(folder.rglob("*")) == before
    finally:
        other.kill()
        other.wait()
        other.stdout.close()


def test_a_run_whose_session_was_taken_over_stops_and_saves_nothing(
    workspace: drive.Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session(workspace, SESSION)
    monkeypatch.setattr(lease, "_TIMING", lease.Timing(beat_s=0.01))
    steps: list[int] = []
    step = loop.StageLoop.step

    def counted(self: loop.StageLoop, world: Any) -> None:
        step(self, world)
        steps.append(1)
        if len(steps) == 2:
            (claim,) = (session.folder.parent / ".leases" / SESSION).iterdir()
            claim.unlink()
            time.sleep(0.2)

    monkeypatch.setattr(loop.StageLoop, "step", counted)
    with pytest.raises(SessionBusyError, match="not this runtime's any more"):
        train(workspace, text_encoder_steps=0, unet_steps=30)
    assert len(steps) == 2
    assert not list(session.checkpoints_dir.glob("*"))
    assert [run["verb"] for run in session.read_record()["runs"] if run["verb"] == "train"] == []
