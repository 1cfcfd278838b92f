"""Sessions with weights that no training made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from colabtools.dreambooth.saved import Saved, Snapshot
from colabtools.dreambooth.session import Session
from colabtools.dreambooth.state import CheckpointStore


def save_weights(
    session: Session,
    step: int,
    parts: Mapping[str, Mapping[str, torch.Tensor]],
    description: dict[str, Any],
) -> Saved:
    """Save a finished run beside those that are there."""
    snapshot = Snapshot(
        step=step, finished=True, parts=parts, trained=tuple(parts), description=description
    )
    with CheckpointStore(session, keep_every=1) as store:
        return store.save(snapshot)
