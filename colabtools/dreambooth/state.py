"""Trained weights on disk: one folder for each saved step, with a manifest that proves it whole."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from colabtools.checkpoints.single_file import save_safetensors
from colabtools.dreambooth.session import now_text
from colabtools.drive import sha256_of, workspace_error, write_atomic
from colabtools.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from colabtools.dreambooth.session import Session

__all__ = ["TrainedWeights", "find_trained", "latest_trained", "save_trained"]

_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class TrainedWeights:
    """A folder of trained weights and what its manifest says of them."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Updates that these weights have seen."""
        return int(self.manifest["step"])

    def load(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return the float32 tensors of each trained part, after comparing files with digests.

        Raises:
            CheckpointError: a file is missing or changed.
        """
        from safetensors.torch import load_file

        parts = {}
        for name, digest in self.manifest["sha256"].items():
            path = self.folder / f"{name}.safetensors"
            if not path.is_file() or sha256_of(path) != digest:
                raise CheckpointError(
                    f"{path} is missing or damaged; train the session again with restart"
                )
            parts[name] = load_file(path)
        return parts


def save_trained(
    session: Session,
    step: int,
    parts: Mapping[str, Mapping[str, torch.Tensor]],
    description: dict[str, Any],
) -> TrainedWeights:
    """Write weights as `checkpoints/step-NNNNNN`; a former one goes once the new one is whole.

    Args:
        session: where to.
        step: updates that the weights have seen.
        parts: tensors by the name of their network.
        description: how they came about; kept in the manifest.

    Raises:
        WorkspaceError: they cannot be written.
    """
    folder = session.checkpoints_dir / f"step-{step:06d}"
    partial = folder.with_name(f".{folder.name}.part")
    former = folder.with_name(f".{folder.name}.old")
    try:
        for litter in session.checkpoints_dir.glob(".step-*.part"):
            shutil.rmtree(litter, ignore_errors=True)
        partial.mkdir(parents=True)
        digests = {
            name: save_safetensors(tensors, partial / f"{name}.safetensors").sha256
            for name, tensors in parts.items()
        }
        manifest = {
            **description,
            "schema_version": 1,
            "step": step,
            "saved": now_text(),
            "sha256": digests,
        }
        write_atomic(partial / _MANIFEST, json.dumps(manifest, indent=1).encode())
        if folder.exists():
            shutil.rmtree(former, ignore_errors=True)
            folder.rename(former)
        partial.rename(folder)
    except OSError as error:
        raise workspace_error("save the trained weights in", folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(former, ignore_errors=True)
    return TrainedWeights(folder, manifest)


def find_trained(session: Session) -> list[TrainedWeights]:
    """Return all trained weights of a session that have a manifest, the newest last."""
    found = []
    # A kill between the two renames of a save leaves the former weights under their hidden name.
    patterns = ("step-*", ".step-*.old")
    for folder in (path for p in patterns for path in session.checkpoints_dir.glob(p)):
        try:
            manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
            found.append(
                (str(manifest["saved"]), int(manifest["step"]), TrainedWeights(folder, manifest))
            )
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return [weights for _, _, weights in sorted(found, key=lambda row: row[:2])]


def latest_trained(session: Session) -> TrainedWeights:
    """Return the newest trained weights of a session.

    Raises:
        CheckpointError: there are none.
    """
    found = find_trained(session)
    if not found:
        raise CheckpointError(f"session {session.name!r} has no trained weights; run train first")
    return found[-1]
