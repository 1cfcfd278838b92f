"""A run that is stopped anywhere goes on to the same weights and losses, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from colabtools import drive
from colabtools.dreambooth import loop, networks, run
from colabtools.dreambooth.config import PrepareConfig
from colabtools.dreambooth.dataset import prepare
from colabtools.dreambooth.session import open_session
from colabtools.dreambooth.state import CheckpointStore, find_trained
from colabtools.dreambooth.train import train
from colabtools.dreambooth.train_config import TrainConfig
from colabtools.errors import CheckpointError, ConfigError

from .conftest import SESSION

KILL_SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "kill_training.py"
# Two passes of two pictures: five pictures make epochs end inside updates and between passes.
CONFIG = TrainConfig(
    text_encoder_steps=4,
    unet_steps=5,
    batch_size=2,
    gradient_accumulation_steps=2,
    checkpoint_every=2,
    ema=True,
    caption_dropout=0.3,
)
LORA = replace(CONFIG, method="lora", lora_rank=2, lora_dropout=0.2, optimizer="prodigy")
PASSES = 2


class Killed(BaseException):
    """Nothing in the package catches this."""


def make_workspace(folder: Path) -> drive.Workspace:
    workspace = drive.open_local(folder)
    prepare(workspace, SESSION, PrepareConfig(images="demo"))
    return workspace


def result_of(workspace: drive.Workspace) -> tuple[dict[str, Any], bytes]:
    session = open_session(workspace, SESSION)
    saved = CheckpointStore(session).newest()
    assert saved is not None
    assert saved.finished
    return saved.files, (session.logs_dir / "metrics.jsonl").read_bytes()


@pytest.fixture(scope="module", params=[CONFIG, LORA], ids=["full", "lora"])
def undisturbed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainConfig, tuple[dict[str, Any], bytes]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    workspace = make_workspace(tmp_path_factory.mktemp("undisturbed"))
    train(workspace, SESSION, request.param)
    torch.set_num_threads(threads)
    return request.param, result_of(workspace)


def stop_after(passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the run die before the forward pass of that number."""
    backward = loop.StageLoop._backward
    left = [passes]

    def counted(self: loop.StageLoop, *args: Any) -> torch.Tensor:
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return backward(self, *args)

    monkeypatch.setattr(loop.StageLoop, "_backward", counted)


# In passes of the whole run, two to an update: inside an update's passes, between two updates that
# have no state, right after a state, at the boundary of the stages; and several in one run.
KILLS = {
    "inside an update": [PASSES * 3 + 1],
    "first update": [1],
    "boundary of the stages": [PASSES * 4],
    "second stage": [PASSES * 7 + 1],
    "three times": [PASSES * 3, PASSES * 4 - 1, PASSES * 3 + 1],
}


@pytest.mark.slow
@pytest.mark.parametrize("kills", KILLS.values(), ids=KILLS)
def test_a_stopped_run_ends_bit_equal(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: tuple[TrainConfig, Any],
    kills: list[int],
) -> None:
    config, expected = undisturbed
    workspace = make_workspace(tmp_path)
    for passes in kills:
        with monkeypatch.context() as patch:
            stop_after(passes, patch)
            with pytest.raises(Killed):
                train(workspace, SESSION, config)
    # What others draw in between must not matter.
    torch.rand(7)
    assert len(train(workspace, SESSION, replace(config, resume="auto")).metrics) == 9
    assert result_of(workspace) == expected


@pytest.mark.parametrize("lost", ["optimizer", "weights", "position"])
def test_a_state_that_lacks_anything_would_be_noticed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: tuple[TrainConfig, Any],
    lost: str,
) -> None:
    """The comparison above can fail: without one part of the state the result is another."""
    config, expected = undisturbed
    if config.method == "lora":
        pytest.skip("once is enough")
    workspace = make_workspace(tmp_path)
    with monkeypatch.context() as patch:
        stop_after(PASSES * 7 + 1, patch)
        with pytest.raises(Killed):
            train(workspace, SESSION, config)
    load_state = loop.StageLoop.load_state

    def forgetful(self: loop.StageLoop, state: dict[str, Any]) -> None:
        load_state(self, state)
        if lost == "optimizer":
            self._optimizer.state.clear()
        elif lost == "weights":
            for parameter in self.networks.parameters():
                parameter.data = parameter.data.half().float()
        else:
            self.update += 1

    monkeypatch.setattr(loop.StageLoop, "load_state", forgetful)
    train(workspace, SESSION, config)
    assert result_of(workspace)[0] != expected[0]


def test_require_goes_on_and_changes_need_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, text_encoder_steps=0, unet_steps=6, ema=False)
    workspace = make_workspace(tmp_path)
    with pytest.raises(CheckpointError, match="holds no state to go on from"):
        train(workspace, SESSION, replace(config, resume="require"))
    with monkeypatch.context() as patch:
        stop_after(PASSES * 3, patch)
        with pytest.raises(Killed):
            train(workspace, SESSION, config)
    with pytest.raises(ConfigError, match=r"unfinished run \(step 2\).*unet_lr 0.0003 -> 0.001"):
        train(workspace, SESSION, replace(config, unet_lr=1e-3))
    changed = replace(config, unet_lr=1e-3, allow_changes=True, resume="require")
    metrics = train(workspace, SESSION, changed).metrics
    assert [m.lr for m in metrics[:2]] == pytest.approx([3e-4, 3e-4 * 5 / 6])
    assert metrics[2].lr == pytest.approx(1e-3 * 4 / 6)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_state_under_way_holds_the_average_as_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    config = replace(CONFIG, method=method, text_encoder_steps=0, unet_steps=2, ema_decay=0.5)
    config = replace(config, lr_schedule="constant")
    short = make_workspace(tmp_path / "short")
    train(short, SESSION, config)
    (result,) = find_trained(open_session(short, SESSION))
    workspace = make_workspace(tmp_path / "longer")
    with monkeypatch.context() as patch:
        stop_after(PASSES * 3, patch)
        with pytest.raises(Killed):
            train(workspace, SESSION, replace(config, unet_steps=5))
    (saved,) = find_trained(open_session(workspace, SESSION))
    assert saved.step == 2
    assert not saved.finished
    (stem,) = saved.trained
    average, learning = saved.load()[stem], saved.load_state()["ema"]["learning"]
    expected = result.load()[stem]
    assert all(torch.equal(average[name], expected[name]) for name in expected)
    assert sum(t.numel() for t in learning) == sum(t.numel() for t in average.values())
    kinds = (learning, average.values())
    norms = [sum(float(t.double().square().sum()) for t in tensors) for tensors in kinds]
    assert norms[0] != norms[1]


def test_a_damaged_state_is_passed_over_for_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(CONFIG, text_encoder_steps=0, unet_steps=6)
    calm = make_workspace(tmp_path / "calm")
    train(calm, SESSION, config)
    workspace = make_workspace(tmp_path / "damaged")
    with monkeypatch.context() as patch:
        stop_after(PASSES * 5, patch)
        with pytest.raises(Killed):
            train(workspace, SESSION, config)
    newest = find_trained(open_session(workspace, SESSION))[-1]
    assert newest.step == 4
    file = newest.folder / "state.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    train(workspace, SESSION, config)
    assert "state.safetensors" in caplog.text
    assert result_of(workspace) == result_of(calm)


@pytest.mark.parametrize(
    ("dtype", "method"), [(torch.float16, "full"), (torch.bfloat16, "lora")], ids=["fp16", "bf16"]
)
def test_a_run_in_half_precision_ends_bit_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, method: str
) -> None:
    # torch computes in both on a CPU, slowly, so cards need not be at hand to hold the loss scale.
    for module in (networks, run):
        monkeypatch.setattr(module, "compute_dtype", lambda *_: dtype)
    config = replace(CONFIG, method=method, text_encoder_steps=0, unet_steps=5, ema=False)
    calm = make_workspace(tmp_path / "calm")
    train(calm, SESSION, config)
    workspace = make_workspace(tmp_path / "stopped")
    with monkeypatch.context() as patch:
        stop_after(PASSES * 3, patch)
        with pytest.raises(Killed):
            train(workspace, SESSION, config)
    state = find_trained(open_session(workspace, SESSION))[-1].load_state()
    assert bool(state["grad_scaler"]) == (dtype is torch.float16)
    train(workspace, SESSION, config)
    assert result_of(workspace) == result_of(calm)


def test_an_interrupt_saves_the_state_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    config = replace(CONFIG, text_encoder_steps=0, unet_steps=5, checkpoint_every=100)
    calm = make_workspace(tmp_path / "calm")
    train(calm, SESSION, config)
    workspace = make_workspace(tmp_path / "interrupted")
    backward = loop.StageLoop._backward
    calls = [0]

    def interrupted(self: loop.StageLoop, *args: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == PASSES * 2 + 1:
            os.kill(os.getpid(), signal.SIGINT)
        return backward(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(loop.StageLoop, "_backward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(workspace, SESSION, config)
    assert find_trained(open_session(workspace, SESSION))[-1].step == 3
    train(workspace, SESSION, config)
    assert result_of(workspace) == result_of(calm)


@pytest.mark.heavy
@pytest.mark.timeout(1200)
def test_a_run_that_is_killed_at_random_moments_loses_nothing() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(KILL_SCRIPT), "--kills", "12"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 kills" in done.stdout
    assert "weights and losses bit-equal" in done.stdout
