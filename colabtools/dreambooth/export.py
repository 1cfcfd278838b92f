"""The trained session as one file that the web UIs read."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from colabtools import env
from colabtools.checkpoints.single_file import (
    WrittenFile,
    assemble_sd1,
    save_ckpt,
    save_safetensors,
)
from colabtools.dreambooth.generate import load_trained_pipeline
from colabtools.dreambooth.session import open_session
from colabtools.dreambooth.state import latest_trained
from colabtools.drive import is_remote
from colabtools.report import get_logger

if TYPE_CHECKING:
    from pathlib import Path

    from colabtools.dreambooth.config import ExportConfig
    from colabtools.dreambooth.families import Models
    from colabtools.dreambooth.session import Session
    from colabtools.drive import Workspace

__all__ = ["export", "write_step_file"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def export(workspace: Workspace, session_name: str, config: ExportConfig) -> list[WrittenFile]:
    """Write `<session>.safetensors` and, if asked for, `<session>.ckpt` into the session's folder.

    Every file is reopened and compared before it takes its name, an older one stays until then.

    Raises:
        CheckpointError: the session has no trained weights, or is not a Stable Diffusion 1.x.
        SessionBusyError: another runtime is writing to the session.
        SessionError: there is no such session.
        WorkspaceError: there is not enough room.
    """
    session = open_session(workspace, session_name)
    with session.writing("export"):
        written = _write_files(workspace, session, config)
    # Drive is let go by this, so that the session must not be held any more.
    if config.disconnect:
        _disconnect(session.folder)
    return written


def _write_files(workspace: Workspace, session: Session, config: ExportConfig) -> list[WrittenFile]:
    weights = latest_trained(session)
    pipeline = load_trained_pipeline(weights)
    tensors = assemble_sd1(
        unet=pipeline.unet.state_dict(),
        vae=pipeline.vae.state_dict(),
        text_encoder=pipeline.text_encoder.state_dict(),
        dtype=_DTYPES[config.dtype],
    )
    size_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
    workspace.ensure_space(round(1.05 * size_bytes) * len(config.formats), "the exported model")
    written = []
    for name in config.formats:
        path = session.folder / f"{session.name}.{name}"
        if name == "ckpt":
            written.append(save_ckpt(tensors, path))
        else:
            metadata = {"base_model": str(weights.manifest["base_model"]), "session": session.name}
            written.append(save_safetensors(tensors, path, {**metadata, "step": str(weights.step)}))
        get_logger(__name__).info(
            "wrote and verified %s, %.1f MB", path, written[-1].size_bytes / 1e6
        )
    digests = {file.path.name: file.sha256 for file in written}
    session.add_run({"verb": "export", "step": weights.step, **asdict(config), "sha256": digests})
    return written


def write_step_file(session: Session, models: Models, step: int) -> Path | None:
    """Write `<session>_step_<n>.safetensors` of a run in progress, in fp16.

    Returns None for models that have no such file yet; their checkpoint is kept all the same.

    Raises:
        CheckpointError: a tensor is not finite in fp16.
        WorkspaceError: the file cannot be written.
    """
    networks = (models.denoiser, *models.text_encoders.values())
    if models.family.name != "sd1" or any(hasattr(n, "peft_config") for n in networks):
        return None
    tensors = assemble_sd1(
        unet=models.denoiser.state_dict(),
        vae=models.vae.state_dict(),
        text_encoder=models.text_encoders["text_encoder"].state_dict(),
        dtype=torch.float16,
    )
    path = session.folder / f"{session.name}_step_{step}.safetensors"
    metadata = {"base_model": models.base.name, "session": session.name, "step": str(step)}
    save_safetensors(tensors, path, metadata)
    get_logger(__name__).info("wrote and verified %s", path)
    return path


def _disconnect(folder: Path) -> None:
    """Give a hosted runtime back, unless the files would be lost with it."""
    if env.where().place is env.Place.COLAB and not is_remote(folder):
        get_logger(__name__).warning(
            "the runtime is kept: %s is on its own disk and would be lost with it; "
            "use a workspace on Google Drive to disconnect",
            folder,
        )
    else:
        env.release_runtime()
