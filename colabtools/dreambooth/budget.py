"""What a run will write, known before it begins, so that no disk is full in the middle of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from colabtools.dreambooth.saved import snapshot_bytes
from colabtools.dreambooth.state import LOCAL_KEEP, retained
from colabtools.fields import check_whole
from colabtools.report import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from colabtools.dreambooth.saved import Saved, Snapshot
    from colabtools.drive import Workspace

__all__ = ["DiskNeeds", "DiskPlan", "fit_retention", "picture_bytes", "plan_disk"]

# What a tensor of the state costs beside its bytes: its row in the header, its mention in the JSON.
# Measured with AdamW, Adafactor, Lion, Prodigy and momentum on 60 to 2,000 weights: 97 to 123.
_BYTES_PER_STATE_TENSOR = 104


@dataclass(frozen=True, kw_only=True)
class DiskNeeds:
    """What decides how much a run writes.

    Attributes:
        snapshot: what the run would save now; its tensors may be on the meta device.
        later_bytes: of the tensors that its state gains with the first update, the optimizer's.
        later_tensors: how many these are.
        total_steps: updates of the whole run.
        checkpoint_every: updates between two checkpoints.
        keep_last: how many of the last stay.
        keep_every: those whose step is a multiple of it are saved and stay too; 0 for none.
        fresh: whether the first checkpoint replaces those of former runs.
        milestone_bytes: of other files that each of those that stay brings, such as a model file.
        sample_bytes: of all pictures that the run draws; see `picture_bytes`.
        export_bytes: of the model files that follow the last update.
    """

    snapshot: Snapshot
    later_bytes: int = 0
    later_tensors: int = 0
    total_steps: int
    checkpoint_every: int
    keep_last: int = 2
    keep_every: int = 0
    fresh: bool = False
    milestone_bytes: int = 0
    sample_bytes: int = 0
    export_bytes: int = 0

    def __post_init__(self) -> None:
        """Check what would make the plan meaningless."""
        check_whole("total_steps", self.total_steps, 1)
        check_whole("checkpoint_every", self.checkpoint_every, 1)
        check_whole("keep_last", self.keep_last, 1)
        check_whole("keep_every", self.keep_every, 0)


@dataclass(frozen=True, kw_only=True)
class DiskPlan:
    """How much a run writes.

    Attributes:
        checkpoint_bytes: of one checkpoint in the middle of the run.
        finished_bytes: of the last one, which holds the result only.
        peak_bytes: the most that the workspace will hold beyond what it holds now.
        final_bytes: what it will hold beyond that when the run is over; less than 0 if the run
            replaces more than it leaves.
        staging_bytes: the most that the machine will hold, if checkpoints are staged there.
        keep_last: how many of the last checkpoints stay.
    """

    checkpoint_bytes: int
    finished_bytes: int
    peak_bytes: int
    final_bytes: int
    staging_bytes: int
    keep_last: int


class _Row(NamedTuple):
    step: int
    finished: bool
    size_bytes: int


def picture_bytes(side_px: int, count: int) -> int:
    """Return the most that these square RGB pictures can take: PNG at its worst stores them."""
    # Source: PNG specification (third edition), 9.2 and 10: a filter byte a line, zlib's stored
    # blocks; the rest of the file is below 1 kB.
    return count * (side_px * (3 * side_px + 1) * 1001 // 1000 + 1000)


def plan_disk(needs: DiskNeeds, existing: Sequence[Saved] = ()) -> DiskPlan:
    """Return what the run will write, by going through all its saves.

    Args:
        needs: what it saves and when.
        existing: the session's checkpoints of before, oldest first.

    Raises:
        CheckpointError: the snapshot holds what cannot be saved.
    """
    finished = replace(
        needs.snapshot,
        finished=True,
        parts={name: needs.snapshot.parts[name] for name in needs.snapshot.trained},
        state={},
    )
    later_bytes = needs.later_bytes + needs.later_tensors * _BYTES_PER_STATE_TENSOR
    checkpoint_bytes = snapshot_bytes(needs.snapshot) + later_bytes
    saves = list(_saves(needs, checkpoint_bytes, snapshot_bytes(finished)))
    before = [_Row(saved.step, saved.finished, saved.size_bytes) for saved in existing]
    peak, final = _go_through(needs, saves, before)
    on_machine = replace(needs, keep_last=min(LOCAL_KEEP, needs.keep_last), keep_every=0)
    staging, _ = _go_through(on_machine, saves, [])
    return DiskPlan(
        checkpoint_bytes=checkpoint_bytes,
        finished_bytes=saves[-1].size_bytes,
        peak_bytes=needs.sample_bytes + max(peak, final + needs.export_bytes),
        final_bytes=needs.sample_bytes + final + needs.export_bytes,
        staging_bytes=staging,
        keep_last=needs.keep_last,
    )


def fit_retention(
    workspace: Workspace, needs: DiskNeeds, existing: Sequence[Saved] = ()
) -> DiskPlan:
    """Return the plan that fits into the workspace: as asked, or with one checkpoint kept.

    Raises:
        CheckpointError: the snapshot holds what cannot be saved.
        WorkspaceError: there is not even room for that; the message says how much is missing.
    """
    plan = plan_disk(needs, existing)
    free_bytes = workspace.free_bytes()
    if plan.peak_bytes <= free_bytes:
        return plan
    least = plan_disk(replace(needs, keep_last=1), existing)
    each = f"{least.checkpoint_bytes / 1e6:.1f} MB each"
    workspace.ensure_space(least.peak_bytes, f"what the run writes, checkpoints of {each},")
    get_logger(__name__).warning(
        "keeping 1 checkpoint instead of %d: the workspace has %.1f MB free, %d need %.1f MB",
        needs.keep_last,
        free_bytes / 1e6,
        needs.keep_last,
        plan.peak_bytes / 1e6,
    )
    return least


def _saves(needs: DiskNeeds, checkpoint_bytes: int, finished_bytes: int) -> Iterator[_Row]:
    """Each save that is still to come, the last one of the result."""
    for step in range(needs.snapshot.step + 1, needs.total_steps):
        if step % needs.checkpoint_every == 0 or (
            needs.keep_every and step % needs.keep_every == 0
        ):
            yield _Row(step, False, checkpoint_bytes)
    yield _Row(needs.total_steps, True, finished_bytes)


def _go_through(needs: DiskNeeds, saves: list[_Row], rows: list[_Row]) -> tuple[int, int]:
    """Return the most that is held during the saves and what is left, beyond what was there."""
    before = sum(row.size_bytes for row in rows)
    beside, peak = 0, 0
    for number, row in enumerate(saves):
        # The new one is complete before an old one goes.
        peak = max(peak, beside + row.size_bytes + sum(old.size_bytes for old in rows))
        others = [old for old in rows if old.step != row.step]
        if needs.fresh and number == 0:
            # Of former runs the last result stays until this run has one.
            others = [old for old in others if old.finished][-1:]
        rows = [*others, row]
        rows = retained(rows, needs.keep_last, needs.keep_every)
        if needs.keep_every and row.step % needs.keep_every == 0:
            beside += needs.milestone_bytes
            peak = max(peak, beside + sum(old.size_bytes for old in rows))
    return peak - before, beside + sum(row.size_bytes for row in rows) - before
