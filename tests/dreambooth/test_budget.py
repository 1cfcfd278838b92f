from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from colabtools.dreambooth import budget, saved
from colabtools.dreambooth.budget import DiskNeeds, plan_disk
from colabtools.dreambooth.session import Session
from colabtools.dreambooth.state import CheckpointStore, Snapshot, local_checkpoints_dir
from colabtools.drive import Workspace
from colabtools.errors import ConfigError, WorkspaceError


def network(width: int, depth: int) -> torch.nn.Module:
    layers = [torch.nn.Linear(width, width) for _ in range(depth)]
    return torch.nn.Sequential(*layers, torch.nn.LayerNorm(width))


def adapter(width: int, depth: int) -> torch.nn.Module:
    """Many small tensors with long names, as LoRA has them."""
    module = torch.nn.Module()
    for number in range(depth):
        for side in ("lora_A", "lora_B"):
            shape = (4, width) if side == "lora_A" else (width, 4)
            weight = torch.nn.Parameter(torch.randn(shape))
            name = f"down_blocks_{number}_attentions_0_transformer_blocks_0_attn1_to_q_{side}"
            module.register_parameter(name, weight)
    return module


SHAPES = {
    "few large tensors": lambda: network(400, 3),
    "many small tensors": lambda: network(24, 60),
    "an adapter": lambda: adapter(64, 48),
}
OPTIMIZERS = {
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=1e-3),
    "momentum": lambda weights: torch.optim.SGD(weights, lr=1e-3, momentum=0.9),
}


def snapshot_of(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer | None, step: int = 0
) -> Snapshot:
    state: dict[str, Any] = {
        "position": {"stage": 1, "step": step},
        "rng": [torch.get_rng_state(), np.random.get_state()],
        "optimizer": {} if optimizer is None else optimizer.state_dict(),
    }
    return Snapshot(
        step=step,
        finished=optimizer is None,
        parts={"unet": module.state_dict(), "kept": {"x": torch.zeros(1000)}},
        trained=("unet",),
        state={} if optimizer is None else state,
        description={"base_model": "micro", "settings": {"unet_lr": 2e-6}},
    )


def tensors_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    rows = optimizer.state.values()
    return [value for row in rows for value in row.values() if isinstance(value, torch.Tensor)]


def updated(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for weight in module.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "machine"))
    (tmp_path / "robot").mkdir()
    return Session("robot", tmp_path / "robot")


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_checkpoint_takes_what_was_foreseen(
    session: Session, shape: str, optimizer_name: str
) -> None:
    module = SHAPES[shape]()
    optimizer = OPTIMIZERS[optimizer_name](module.parameters())
    before = snapshot_of(module, optimizer)
    updated(module, optimizer)
    gained = tensors_of(optimizer)
    needs = DiskNeeds(
        snapshot=before,
        later_bytes=sum(t.numel() * t.element_size() for t in gained),
        later_tensors=len(gained),
        total_steps=500,
        checkpoint_every=100,
    )
    plan = plan_disk(needs)
    store = CheckpointStore(session)
    written = bytes_in(store.save(snapshot_of(module, optimizer, 100)).folder)
    assert plan.checkpoint_bytes == pytest.approx(written, rel=0.02)
    result = replace(snapshot_of(module, None, 500), parts={"unet": module.state_dict()})
    assert plan.finished_bytes == pytest.approx(bytes_in(store.save(result).folder), rel=0.02)


def test_the_shapes_above_differ_in_what_their_tensors_cost_beside_their_bytes() -> None:
    shares = []
    for make in SHAPES.values():
        parts = {"unet": make().state_dict()}
        payload = sum(t.numel() * t.element_size() for t in parts["unet"].values())
        whole = saved.snapshot_bytes(Snapshot(step=0, finished=True, parts=parts, trained=()))
        shares.append(whole / payload - 1)
    assert min(shares) < 0.02
    assert max(shares) > 0.05


def test_networks_on_the_meta_device_will_do() -> None:
    real, meta = network(8, 2), network(8, 2).to("meta")
    plans = [
        plan_disk(
            DiskNeeds(
                snapshot=Snapshot(
                    step=0, finished=False, parts={"unet": m.state_dict()}, trained=("unet",)
                ),
                total_steps=3,
                checkpoint_every=1,
            )
        )
        for m in (real, meta)
    ]
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "every", "total", "fresh"),
    [
        (2, 0, 10, 100, False),
        (1, 0, 10, 95, False),
        (2, 30, 10, 100, False),
        (3, 25, 10, 100, True),
        (2, 0, 15, 65, True),
        (2, 0, 15, 65, False),
        (5, 0, 50, 60, False),
        (2, 0, 1000, 60, False),
    ],
)
@pytest.mark.parametrize("staged", [False, True])
def test_the_peak_of_a_real_run_is_what_was_foreseen(  # noqa: PLR0913 - a table of runs
    session: Session,
    monkeypatch: pytest.MonkeyPatch,
    keep_last: int,
    keep_every: int,
    every: int,
    total: int,
    fresh: bool,
    staged: bool,
) -> None:
    parts = {"unet": {"a": torch.ones(20_000)}}
    with CheckpointStore(session) as store:
        store.save(Snapshot(step=20, finished=False, parts=parts, trained=("unet",)))
        store.save(Snapshot(step=40, finished=True, parts=parts, trained=("unet",)))
    middle = Snapshot(
        step=0, finished=False, parts=parts, trained=("unet",), state={"m": torch.ones(30_000)}
    )
    needs = DiskNeeds(
        snapshot=middle,
        total_steps=total,
        checkpoint_every=every,
        keep_last=keep_last,
        keep_every=keep_every,
        fresh=fresh,
    )
    places = {"session": session.checkpoints_dir, "machine": local_checkpoints_dir(session)}
    start = bytes_in(places["session"])
    peaks = dict.fromkeys(places, 0)
    sync_folder = saved.sync_folder

    def measuring_sync(folder: Path) -> None:
        # Called before the new one takes its name and after: what is held is the most then.
        place = folder.parent if folder.name.endswith(".part") else folder
        for name in [name for name, path in places.items() if path == place]:
            peaks[name] = max(peaks[name], bytes_in(place))
        sync_folder(folder)

    monkeypatch.setattr(saved, "sync_folder", measuring_sync)
    with CheckpointStore(
        session,
        keep_last=keep_last,
        keep_every=keep_every,
        fresh=fresh,
        staging=places["machine"] if staged else None,
    ) as store:
        plan = plan_disk(needs, store.in_session())
        for step in range(1, total):
            if step % every == 0 or (keep_every and step % keep_every == 0):
                store.save(replace(middle, step=step))
        store.save(replace(middle, step=total, finished=True, state={}))
    assert plan.peak_bytes == pytest.approx(peaks["session"] - start, rel=0.02)
    final = bytes_in(places["session"]) - start
    assert plan.final_bytes == pytest.approx(final, rel=0.02, abs=0.02 * plan.checkpoint_bytes)
    if staged:
        assert plan.staging_bytes == pytest.approx(peaks["machine"], rel=0.02)


def plan(**changes: Any) -> budget.DiskPlan:
    return plan_disk(needs(**changes))


def needs(**changes: Any) -> DiskNeeds:
    values = {
        "snapshot": Snapshot(
            step=0,
            finished=False,
            parts={"unet": {"a": torch.empty(10**6, device="meta")}},
            trained=("unet",),
            state={"m": torch.empty(2 * 10**6, device="meta")},
        ),
        "total_steps": 1000,
        "checkpoint_every": 100,
        **changes,
    }
    return DiskNeeds(**values)


def test_pictures_and_model_files_count() -> None:
    plain = plan()
    assert plan(sample_bytes=7).peak_bytes == plain.peak_bytes + 7
    assert plan(sample_bytes=7, export_bytes=5).final_bytes == plain.final_bytes + 12
    # The model file is written when the checkpoint of before is gone.
    assert plan(export_bytes=5).peak_bytes == plain.peak_bytes
    assert plan(export_bytes=10**9).peak_bytes == plain.final_bytes + 10**9
    with_models = plan(keep_every=250, milestone_bytes=10**6).final_bytes
    assert with_models == plan(keep_every=250).final_bytes + 4 * 10**6


def test_a_picture_is_never_larger_than_foreseen(tmp_path: Path) -> None:
    for side in (1, 64, 333):
        noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "noise.png", compress_level=0)
        size_bytes = (tmp_path / "noise.png").stat().st_size
        assert size_bytes <= budget.picture_bytes(side, 1) <= 1.02 * size_bytes + 1000


class Quota(Workspace):
    """A workspace with as much room as is said."""

    room = 0

    def free_bytes(self) -> int:
        return self.room


def workspace_with(tmp_path: Path, room: int) -> Workspace:
    workspace = Quota(tmp_path)
    object.__setattr__(workspace, "room", room)
    return workspace


def test_enough_room_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked = plan(keep_last=3)
    workspace = workspace_with(tmp_path, asked.peak_bytes)
    assert budget.fit_retention(workspace, needs(keep_last=3)) == asked
    assert caplog.messages == []


def test_too_little_room_keeps_one_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    workspace = workspace_with(tmp_path, plan(keep_last=3).peak_bytes - 1)
    assert budget.fit_retention(workspace, needs(keep_last=3)) == plan(keep_last=1)
    assert caplog.messages == [
        "keeping 1 checkpoint instead of 3: the workspace has 48.0 MB free, 3 need 48.0 MB"
    ]


def test_far_too_little_room_says_how_much_is_missing(tmp_path: Path) -> None:
    workspace = workspace_with(tmp_path, plan(keep_last=1).peak_bytes - 5_000_000)
    with pytest.raises(
        WorkspaceError, match=r"checkpoints of 12\.0 MB each, in .*; free at least 5 MB"
    ):
        budget.fit_retention(workspace, needs(keep_last=3))


@pytest.mark.parametrize("field", ["total_steps", "checkpoint_every", "keep_last"])
def test_a_run_without_steps_has_no_plan(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} is 0; give"):
        plan(**{field: 0})
