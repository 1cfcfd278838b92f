"""Kill a training run again and again at random moments; see what of it survives.

    python benchmarks/kill_training.py --kills 50 [--seed 0] [--method full|lora]

Trains the embedded model undisturbed, then once more in a child process that is sent SIGKILL at
random moments of training and saving, and started again each time. After every kill the newest
valid checkpoint must load and at most one interval may be lost; at the end weights and losses must
be bit-equal to those of the undisturbed run. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import signal
import struct
import sys
import tempfile
import time
from pathlib import Path

from colabtools import drive, report
from colabtools.dreambooth import loop
from colabtools.dreambooth.config import PrepareConfig
from colabtools.dreambooth.dataset import prepare
from colabtools.dreambooth.session import open_session
from colabtools.dreambooth.state import CheckpointStore
from colabtools.dreambooth.train import train
from colabtools.dreambooth.train_config import TrainConfig

INTERVAL = 4


def config_of(method: str) -> TrainConfig:
    return TrainConfig(
        method=method,
        text_encoder_steps=14,
        unet_steps=30,
        batch_size=2,
        gradient_accumulation_steps=2,
        checkpoint_every=INTERVAL,
        ema=True,
        caption_dropout=0.2,
        lora_rank=4,
        lora_dropout=0.1,
    )


def make_workspace(folder: Path) -> drive.Workspace:
    workspace = drive.open_local(folder)
    prepare(workspace, "killed", PrepareConfig(images="demo"))
    return workspace


def start_child(workspace: drive.Workspace, config: TrainConfig, done: mmap.mmap) -> int:
    """Return the process number of a child that trains and says in `done` how far it is."""
    child = os.fork()
    if child:
        return child
    try:
        step = loop.StageLoop.step

        def counted(self: loop.StageLoop, world: object) -> None:
            step(self, world)  # type: ignore[arg-type]
            done[:4] = struct.pack("i", self.stage.first_step + self.update)

        loop.StageLoop.step = counted  # type: ignore[method-assign,assignment]
        train(workspace, "killed", config)
    except BaseException as error:  # noqa: BLE001 - a child of fork must never return
        sys.stderr.write(f"child failed: {type(error).__name__}: {error}\n")
        os._exit(1)
    os._exit(0)


def kill_until_done(
    workspace: drive.Workspace, config: TrainConfig, kills: int, chance: random.Random
) -> tuple[list[str], int]:
    """Return what went wrong, and how often a save was hit in its middle."""
    done = mmap.mmap(-1, 4)
    problems: list[str] = []
    hit = 0
    killed = 0
    session = open_session(workspace, "killed")
    while True:
        before = newest_step(session)
        done[:4] = struct.pack("i", before)
        child = start_child(workspace, config, done)
        if killed < kills:
            wait_for_moment(child, done, before, chance)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            if os.WEXITSTATUS(status):
                problems.append("a child failed on its own")
            if killed >= kills or os.WEXITSTATUS(status):
                return problems, hit
            # Done before the kill: once more from the start.
            CheckpointStore(session).remove_all()
            continue
        killed += 1
        hit += any(session.checkpoints_dir.glob(".*"))
        reached = struct.unpack("i", done[:4])[0]
        kept = newest_step(session)
        lost = reached - kept
        if lost > INTERVAL:
            problems.append(f"kill {killed}: {lost} updates lost, {reached} done and {kept} kept")
        print(f"kill {killed}: at step {reached}, goes on from {kept}", flush=True)


def wait_for_moment(child: int, done: mmap.mmap, before: int, chance: random.Random) -> None:
    """Wait for a random moment: of loading, of an update, or of the save that follows one."""
    target = before + chance.randint(0, 2 * INTERVAL)
    deadline = time.monotonic() + 120
    while struct.unpack("i", done[:4])[0] < target and time.monotonic() < deadline:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.002)
    time.sleep(chance.random() * 0.6)


def newest_step(session: object) -> int:
    saved = CheckpointStore(session).newest()  # type: ignore[arg-type]
    if saved is None:
        return 0
    saved.load_all()
    saved.load_state()
    return saved.step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", choices=("full", "lora", "dora"), default="full")
    args = parser.parse_args()
    report.set_quiet(True)
    config = config_of(args.method)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        calm = make_workspace(Path(folder) / "calm")
        # In a child as well: a fork of a process whose torch has run threads may hang.
        child = start_child(calm, config, mmap.mmap(-1, 4))
        if os.waitpid(child, 0)[1]:
            return 1
        stormy = make_workspace(Path(folder) / "stormy")
        problems, hit = kill_until_done(stormy, config, args.kills, random.Random(args.seed))
        problems += compare(calm, stormy)
    for problem in problems:
        print(problem)
    seconds = time.monotonic() - started
    print(
        f"{args.kills} kills, {hit} of them in the middle of a save, {seconds:.0f} s: "
        f"{'weights and losses bit-equal' if not problems else 'FAILED'}"
    )
    return 1 if problems else 0


def compare(calm: drive.Workspace, stormy: drive.Workspace) -> list[str]:
    """Return what differs between the two results."""
    results = [CheckpointStore(open_session(w, "killed")).newest() for w in (calm, stormy)]
    if any(result is None or not result.finished for result in results):
        return ["a run has no finished result"]
    first, second = (result.load() for result in results if result is not None)
    differing = [
        f"{part}.{name} differs"
        for part, tensors in first.items()
        for name, tensor in tensors.items()
        if part not in second or not tensor.equal(second[part][name])
    ]
    logs = [open_session(w, "killed").logs_dir / "metrics.jsonl" for w in (calm, stormy)]
    if logs[0].read_bytes() != logs[1].read_bytes():
        differing.append("the losses differ")
    return differing


if __name__ == "__main__":
    sys.exit(main())
