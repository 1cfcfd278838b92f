"""Numbers and memory that fail in the middle of a stage, and what two passes make of one update."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from colabtools import drive
from colabtools.dreambooth.loop import StageLoop
from colabtools.dreambooth.session import open_session
from colabtools.dreambooth.state import find_trained
from colabtools.dreambooth.train import train
from colabtools.dreambooth.train_config import TrainConfig
from colabtools.errors import TrainingError

from .conftest import SESSION

CONFIG = TrainConfig(text_encoder_steps=0, unet_steps=6, batch_size=4, checkpoint_every=2)


def spoil(
    monkeypatch: pytest.MonkeyPatch, how: str, updates: tuple[int, ...], times: int = 10**9
) -> list[dict[str, torch.Tensor]]:
    """Make the loss NaN or a gradient infinite in these updates; return the weights after each."""
    backward, attempt = StageLoop._backward, StageLoop._try_update
    left = [times]
    around: list[dict[str, torch.Tensor]] = []

    def copy(self: StageLoop) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.networks.named_weights()}

    def spoiled_backward(self: StageLoop, *args: Any) -> torch.Tensor:
        loss = backward(self, *args)
        if self.update in updates and left[0] > 0:
            left[0] -= 1
            if how == "loss":
                return loss * float("nan")
            next(iter(self.networks.parameters())).grad.fill_(math.inf)  # type: ignore[union-attr]
        return loss

    def watched(self: StageLoop, world: Any) -> bool:
        if self.update not in updates or left[0] <= 0:
            return attempt(self, world)
        before = copy(self)
        done = attempt(self, world)
        after = copy(self)
        assert all(after[name].equal(before[name]) for name in before)
        around.append(after)
        return done

    monkeypatch.setattr(StageLoop, "_backward", spoiled_backward)
    monkeypatch.setattr(StageLoop, "_try_update", watched)
    return around


@pytest.mark.parametrize("decides", ["host", "device"])
@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_an_update_that_is_not_finite_leaves_the_weights_and_is_counted(
    workspace: drive.Workspace,
    how: str,
    decides: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # torch's fused AdamW looks at the flag on a CPU as it does on a card.
    monkeypatch.setattr(StageLoop, "_skips_on_device", lambda _: decides == "device")
    around = spoil(monkeypatch, how, (1, 4))
    result = train(workspace, SESSION, CONFIG)
    assert len(around) == 2
    assert [m.step for m in result.metrics if m.skipped] == [2, 5]
    assert "update 2 was skipped" in caplog.text
    runs = open_session(workspace, SESSION).read_record()["runs"]
    assert runs[-1]["skipped_updates"] == 2
    lines = (open_session(workspace, SESSION).logs_dir / "metrics.jsonl").read_text()
    assert "NaN" not in lines
    assert "Infinity" not in lines


def test_a_first_update_that_is_skipped_ends_nothing(
    workspace: drive.Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, "loss", (0,))
    metrics = train(workspace, SESSION, replace(CONFIG, unet_steps=3, checkpoint_every=1)).metrics
    assert [m.step for m in metrics if m.skipped] == [1]


def test_three_in_a_row_go_back_to_the_last_state_with_half_the_rate(
    workspace: drive.Workspace,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Once only: the second time they are as they should be.
    spoil(monkeypatch, "loss", (2, 3, 4), times=3)
    metrics = train(workspace, SESSION, replace(CONFIG, unet_lr=1e-3)).metrics
    assert "going back to step 4 with half the learning rate" in caplog.text
    rates = [m.lr for m in metrics]
    full = [1e-3 * (1 - i / 6) for i in range(6)]
    # The state of step 4 was taken between two of the three, so those two stay skipped.
    assert rates == pytest.approx([*full[:4], full[4] / 2, full[5] / 2])
    assert [m.step for m in metrics if m.skipped] == [3, 4]


def test_what_happens_again_stops_with_its_cause_and_keeps_the_last_state(
    workspace: drive.Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, "gradient", (3, 4, 5))
    with pytest.raises(TrainingError, match="3 updates in a row.*gradients.*half the learning"):
        train(workspace, SESSION, CONFIG)
    assert find_trained(open_session(workspace, SESSION))[-1].step == 4


def test_a_weight_that_is_not_finite_is_named_and_never_saved(
    workspace: drive.Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = StageLoop.step

    def poisoned(self: StageLoop, world: Any) -> None:
        if self.update == 1:
            with torch.no_grad():
                self.networks.parameters()[0][0] = math.nan
        step(self, world)

    monkeypatch.setattr(StageLoop, "step", poisoned)
    with pytest.raises(TrainingError, match=r"weight unet\.conv_in\.weight is not finite"):
        train(workspace, SESSION, CONFIG)
    assert find_trained(open_session(workspace, SESSION)) == []


def fail_with_more_than(monkeypatch: pytest.MonkeyPatch, examples: int) -> list[int]:
    """Let memory end in any pass of more than that many examples; return the sizes tried."""
    backward = StageLoop._backward
    tried: list[int] = []

    def limited(self: StageLoop, slots: Any, weights: torch.Tensor) -> torch.Tensor:
        tried.append(len(slots))
        if len(slots) > examples:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return backward(self, slots, weights)

    monkeypatch.setattr(StageLoop, "_backward", limited)
    return tried


def test_out_of_memory_splits_the_batch_and_changes_nothing_else(
    workspace: drive.Workspace,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = train(workspace, SESSION, CONFIG)
    first = whole.weights.load()["unet"]
    tried = fail_with_more_than(monkeypatch, 1)
    split = train(workspace, SESSION, replace(CONFIG, resume="never"))
    assert tried[:3] == [4, 2, 1]
    assert set(tried[3:]) == {1}
    assert "out of memory; going on with" in caplog.text
    assert [m.loss for m in split.metrics] == pytest.approx(
        [m.loss for m in whole.metrics], abs=1e-5
    )
    second = split.weights.load()["unet"]
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-3


def test_memory_that_never_suffices_is_an_error_after_every_rung(
    workspace: drive.Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = fail_with_more_than(monkeypatch, 0)
    with pytest.raises(TrainingError, match="out of memory at update 1 .*lower resolution"):
        train(workspace, SESSION, CONFIG)
    # Halved twice, checkpointed, offloaded.
    assert tried == [4, 2, 1, 1, 1]


def test_memory_that_ends_while_weights_move_goes_back_to_the_last_state(
    workspace: drive.Workspace,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    calm = train(workspace, SESSION, CONFIG)
    apply, failures = StageLoop._apply, [0]

    def failing(self: StageLoop, *args: Any) -> bool:
        if self.update == 3 and failures[0] == 0:
            failures[0] = 1
            self._stepping = True
            with torch.no_grad():
                self.networks.parameters()[0].zero_()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return apply(self, *args)

    monkeypatch.setattr(StageLoop, "_apply", failing)
    again = train(workspace, SESSION, replace(CONFIG, resume="never"))
    assert "going back to step 2" in caplog.text
    assert [m.loss for m in again.metrics] == pytest.approx(
        [m.loss for m in calm.metrics], abs=1e-5
    )


def test_gradient_checkpointing_changes_no_number(workspace: drive.Workspace) -> None:
    config = replace(CONFIG, text_encoder_steps=1, unet_steps=2)
    plain = train(workspace, SESSION, config)
    other = train(workspace, SESSION, replace(config, resume="never", gradient_checkpointing="on"))
    assert [m.loss for m in other.metrics] == pytest.approx(
        [m.loss for m in plain.metrics], abs=1e-6
    )


def test_passes_add_up_to_the_batch(workspace: drive.Workspace) -> None:
    together = train(workspace, SESSION, replace(CONFIG, unet_steps=3))
    apart = replace(CONFIG, unet_steps=3, batch_size=1, gradient_accumulation_steps=4)
    split = train(workspace, SESSION, replace(apart, resume="never"))
    assert [m.loss for m in split.metrics] == pytest.approx(
        [m.loss for m in together.metrics], abs=1e-5
    )
