"""Numbers that stay finite: what was not is counted, and enough of it stops the run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from colabtools.report import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from colabtools.dreambooth.data import TrainingData
    from colabtools.dreambooth.networks import Networks
    from colabtools.dreambooth.order import Slot
    from colabtools.dreambooth.planner import MemoryPlan
    from colabtools.dreambooth.stages import Stage

__all__ = ["Health", "Metric", "Setback", "find_cause"]

# One bad example may pass; a row of them means that the weights or the rate are wrong.
_MOST_SKIPPED_IN_A_ROW = 3


@dataclass(frozen=True)
class Metric:
    """One update: its number counted over all stages, the loss before it, and whether it counted.

    A skipped update left the weights as they were; its loss or its gradients were not finite.
    """

    step: int
    stage: str
    loss: float
    grad_norm: float
    lr: float
    skipped: bool = False

    def as_json(self) -> dict[str, Any]:
        """Return the fields; JSON has no NaN and no infinity, so those become null."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }


class Setback(Exception):  # noqa: N818 - not an error: the run goes on from its last state
    """The run must go back to its last state; `memory` is the rung to go on with, if any."""

    def __init__(self, cause: str, *, memory: MemoryPlan | None = None) -> None:
        super().__init__(cause)
        self.cause = cause
        self.memory = memory


class Health:
    """The updates of a stage, fetched from the device a few at a time."""

    def __init__(self, stage: Stage, *, every: int) -> None:
        self._stage = stage
        self._every = every
        self._pending: list[tuple[int, float, torch.Tensor]] = []
        self._checked = 0
        self.metrics: list[Metric] = []

    def add(
        self,
        update: int,
        loss: torch.Tensor,
        norm: torch.Tensor,
        healthy: torch.Tensor,
        lr: float,
    ) -> None:
        """Take what the device computed for an update, without waiting for it."""
        values = torch.stack([loss.double(), norm.double(), healthy.double()])
        self._pending.append((update, lr, values))

    def fetch(self) -> None:
        """Wait for what is still on the device."""
        if not self._pending:
            return
        rows = torch.stack([values for _, _, values in self._pending]).tolist()
        for (update, lr, _), (loss, norm, healthy) in zip(self._pending, rows, strict=True):
            step = self._stage.first_step + update + 1
            metric = Metric(step, self._stage.name, loss, norm, lr, skipped=not healthy)
            self.metrics.append(metric)
            if metric.skipped:
                get_logger(__name__).warning(
                    "update %d was skipped, the weights are as before: loss %g, gradient norm %g",
                    *(step, loss, norm),
                )
        self._pending.clear()

    def check(self, find: Callable[[int], str], *, now: bool = False) -> None:
        """Raise if too many updates in a row were skipped.

        Raises:
            Setback: with what `find` says of the cause at that step.
        """
        if len(self._pending) < self._every and not now:
            return
        self.fetch()
        fresh = self.metrics[max(0, self._checked - _MOST_SKIPPED_IN_A_ROW + 1) :]
        self._checked = len(self.metrics)
        in_a_row = 0
        for metric in fresh:
            in_a_row = in_a_row + 1 if metric.skipped else 0
            if in_a_row >= _MOST_SKIPPED_IN_A_ROW:
                raise Setback(
                    f"{_MOST_SKIPPED_IN_A_ROW} updates in a row up to step {metric.step} were not "
                    f"finite while training the {self._stage.name}: {find(metric.step)} "
                    f"(loss {metric.loss:g}, gradient norm {metric.grad_norm:g})"
                )

    def check_weights(self, networks: Networks) -> None:
        """Refuse to take weights that are not finite for a state to go back to.

        Raises:
            Setback: with the name of one that is not.
        """
        for name, parameter in networks.named_weights():
            if not bool(parameter.detach().isfinite().all()):
                raise Setback(f"weight {name} is not finite while training the {self._stage.name}")

    def load(self, metrics: Sequence[dict[str, Any]]) -> None:
        """Take the updates of a saved state."""
        self.metrics = [Metric(**values) for values in metrics]
        self._pending.clear()
        self._checked = len(self.metrics)

    @property
    def summary(self) -> dict[str, float]:
        """What to show beside the progress: mean of the last losses, and skipped updates if any."""
        recent = [m.loss for m in self.metrics[-50:] if math.isfinite(m.loss)]
        skipped = sum(metric.skipped for metric in self.metrics)
        shown = {"loss": sum(recent) / len(recent)} if recent else {}
        return {**shown, "skipped": skipped} if skipped else shown


@torch.no_grad()
def find_cause(networks: Networks, data: TrainingData, slots: Sequence[Slot]) -> str:
    """Return what is not finite: a weight, the latents of a picture, or what follows from both."""
    for name, parameter in networks.named_weights():
        if not bool(parameter.isfinite().all()):
            return f"weight {name} is not finite"
    for slot in slots:
        if not data.is_finite(slot):
            return f"the latents of {data.file_name(slot)} are not finite"
    return "the loss or its gradients, while weights and latents are finite"
