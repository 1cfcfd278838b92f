"""The processes that train together: one, or as many as `accelerate launch` started."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch

from colabtools.devices import torch_device

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["World", "join_world"]

_Item = TypeVar("_Item")
# Gradients travel in pieces of about this many numbers, so that no second copy of all is made.
_LONGEST_WAIT = timedelta(hours=6)
_NUMBERS_PER_MESSAGE = 16 * 1024**2


@dataclass(frozen=True, kw_only=True)
class World:
    """This process's rank among `size` processes, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def share(self, items: Sequence[_Item]) -> list[_Item]:
        """Return this process's part of what all of them do together."""
        return list(items[self.rank :: self.size])

    def wait(self) -> None:
        """Return once every process has come here."""
        if self.size > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process; all must ask."""
        if self.size == 1:
            return flag
        total = torch.tensor(float(flag), device=self.device)
        self.add_up([total])
        return bool(total > 0)

    def agree(self, value: _Item) -> _Item:
        """Return the value that the main process has."""
        if self.size == 1:
            return value
        from accelerate.utils import broadcast_object_list

        values = [value]
        broadcast_object_list(values)
        return values[0]

    def add_up_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Replace each gradient by its sum over all processes.

        A process whose share was empty has none; where others have one, it takes theirs.
        """
        if self.size == 1:
            return
        present = torch.tensor(
            [float(parameter.grad is not None) for parameter in parameters], device=self.device
        )
        self.add_up([present])
        learning = [p for p, count in zip(parameters, present.tolist(), strict=True) if count]
        for parameter in learning:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.add_up([parameter.grad for parameter in learning if parameter.grad is not None])

    def add_up(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.size == 1:
            return
        from accelerate.utils import reduce

        for group in _groups(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            total = reduce(flat, reduction="sum")
            parts = total.split([tensor.numel() for tensor in group])
            for tensor, part in zip(group, parts, strict=True):
                tensor.copy_(part.view_as(tensor))


def _groups(tensors: Iterable[torch.Tensor]) -> Iterable[list[torch.Tensor]]:
    group: list[torch.Tensor] = []
    count = 0
    for tensor in tensors:
        if group and count + tensor.numel() > _NUMBERS_PER_MESSAGE:
            yield group
            group, count = [], 0
        group.append(tensor)
        count += tensor.numel()
    if group:
        yield group


def join_world() -> World:
    """Return this process's place, after meeting the others if a launcher started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return World(rank=0, size=1, device=torch_device())
    from accelerate import PartialState

    # The others wait while one draws class pictures.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=_LONGEST_WAIT)
    return World(rank=state.process_index, size=state.num_processes, device=state.device)
