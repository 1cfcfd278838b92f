"""The trained session as one file that the web UIs read."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colabtools import env
from colabtools.checkpoints.convert import WrittenFile, write_single
from colabtools.checkpoints.description import Description, describe_folder
from colabtools.checkpoints.headers import Header, TensorEntry
from colabtools.checkpoints.keymaps.families import FAMILIES, FamilyMap
from colabtools.checkpoints.lora import PEFT_METADATA, lora_from
from colabtools.checkpoints.lora_files import write_lora
from colabtools.checkpoints.plan import Target, plan_single
from colabtools.checkpoints.sources import (
    Tensors,
    live_tensors,
    read_folder,
    read_header,
    read_part,
)
from colabtools.dreambooth.generate import find_weights, load_trained_pipeline
from colabtools.dreambooth.session import open_session
from colabtools.drive import is_remote
from colabtools.errors import CheckpointError, ModelError
from colabtools.registry import find_base, resolve_base
from colabtools.report import get_logger

if TYPE_CHECKING:
    from collections.abc import Mapping

    from colabtools.dreambooth.config import ExportConfig
    from colabtools.dreambooth.saved import Saved
    from colabtools.dreambooth.session import Session
    from colabtools.drive import Workspace
    from colabtools.registry import Base

__all__ = ["export", "step_file", "write_step_file"]

_LORA = "_lora"


def export(workspace: Workspace, session_name: str, config: ExportConfig) -> list[WrittenFile]:
    """Write `<session>.safetensors` and, if asked for, `<session>.ckpt` into the session's folder.

    Every file is reopened and compared before it takes its name, an older one stays until then.
    Adapters are merged into the model. Of Flux the transformer alone is written, as its publisher
    does, unless a text encoder was trained as well. Of a step that is asked for, the files are
    `<session>_step_<n>`.

    Raises:
        CheckpointError: the session has no such trained weights, damaged ones, or some that do not
            fit.
        ModelError: the base model cannot be had.
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
    weights = find_weights(session, config.step)
    if not weights.finished and config.step == 0:
        get_logger(__name__).warning(
            "the training of %s is not finished; this is the model after %d steps, and train goes "
            "on from there",
            session.name,
            weights.step,
        )
    stem = step_file(session, weights).stem if config.step else session.name
    written: list[WrittenFile] = []
    if "lora" in config.formats:
        path = session.folder / f"{stem}_lora.safetensors"
        written.append(_write_lora(session, weights, path, config.dtype))
    whole = [name for name in config.formats if name != "lora"]
    if whole:
        targets, description = _model(weights, config.dtype)
        size_bytes = sum(target.size_bytes for target in targets)
        workspace.ensure_space(round(1.05 * size_bytes) * len(whole), "the exported model")
    for name in whole:
        path = session.folder / f"{stem}.{name}"
        metadata = _metadata(session, weights)
        written += write_single(path, targets, description, metadata).files
    digests = {file.path.name: file.sha256 for file in written}
    session.add_run({**asdict(config), "verb": "export", "step": weights.step, "sha256": digests})
    return written


def step_file(session: Session, weights: Saved) -> Path:
    """Return where the model file of a step of a run belongs."""
    return session.folder / f"{session.name}_step_{weights.step}.safetensors"


def write_step_file(session: Session, weights: Saved) -> Path:
    """Write `<session>_step_<n>.safetensors` of a saved state, in fp16.

    It is the whole model, or of adapters these alone by the names that web UIs have for them.

    Raises:
        CheckpointError: a tensor is not finite in fp16, or the state is damaged.
        ModelError: the base model cannot be had.
        WorkspaceError: the file cannot be written.
    """
    path = step_file(session, weights)
    if any(name.endswith(_LORA) for name in weights.trained):
        _write_lora(session, weights, path, "fp16")
    else:
        targets, description = _model(weights, "fp16")
        write_single(path, targets, description, _metadata(session, weights))
    return path


def _write_lora(session: Session, weights: Saved, path: Path, dtype: str) -> WrittenFile:
    """Write the adapters of a state by kohya's names.

    Raises:
        CheckpointError: every weight was trained, or the state is damaged.
        WorkspaceError: the file cannot be written.
    """
    names = [name for name in weights.trained if name.endswith(_LORA)]
    if not names:
        raise CheckpointError(
            f"session {session.name!r} was trained whole and has no adapters; export it as "
            "safetensors or ckpt, or train with method lora"
        )
    _check_whole(weights)
    tensors: dict[str, TensorEntry] = {}
    settings: dict[str, Any] = {}
    for stem in names:
        part, shape = stem.removesuffix(_LORA), weights.manifest["adapters"][stem]
        fields = {"r": "rank", "lora_alpha": "alpha", "use_dora": "use_dora"}
        settings |= {f"{part}.{field}": shape[name] for field, name in fields.items()}
        for entry in _saved_part(weights, stem).values():
            name = f"{part}.{entry.name}"
            tensors[name] = replace(entry, name=name)
    metadata = {**_metadata(session, weights), PEFT_METADATA: json.dumps(settings)}
    header = Header(path=weights.folder, tensors=tensors, metadata=metadata, size_bytes=0)
    family = resolve_base(find_base(weights.manifest["base_model"])).family
    return write_lora(path, lora_from(header, family), naming="kohya", dtype=dtype)


def _metadata(session: Session, weights: Saved) -> dict[str, str]:
    return {
        "base_model": str(weights.manifest["base_model"]),
        "sequence": str(weights.sequence),
        "session": session.name,
        "step": str(weights.step),
    }


def _model(weights: Saved, dtype: str) -> tuple[list[Target], Description]:
    """Return the tensors of the file of a whole model, and what the model is."""
    base = resolve_base(find_base(weights.manifest["base_model"]))
    parts, description = _trained_parts(base, weights)
    trained = {name.removesuffix(_LORA) for name in weights.trained}
    return _targets(FAMILIES[base.family], parts, trained, dtype), description


def _targets(
    family: FamilyMap, parts: dict[str, Tensors], trained: set[str], dtype: str
) -> list[Target]:
    """Return the tensors of the file: of the whole model, or of Flux's transformer alone."""
    denoiser = family.denoiser.name
    if family.name == "flux" and trained <= {denoiser}:
        return plan_single(family, {denoiser: parts[denoiser]}, dtype, bare=True)
    if missing := [part.name for part in family.parts if part.name not in parts]:
        raise CheckpointError(f"the base model lacks its {missing[0]}; download it again")
    return plan_single(family, parts, dtype)


def _trained_parts(base: Base, weights: Saved) -> tuple[dict[str, Tensors], Description]:
    """Return the parts of the model with the trained ones in place, and what the model is."""
    snr = bool(weights.manifest.get("settings", {}).get("zero_terminal_snr"))
    if any(name.endswith(_LORA) for name in weights.trained):
        pipeline = load_trained_pipeline(weights)
        parts: dict[str, Tensors] = {
            part.name: live_tensors(getattr(pipeline, part.name).state_dict())
            for part in FAMILIES[base.family].parts
        }
        description = _describe(base, parts, dict(pipeline.scheduler.config))
        return parts, replace(description, zero_terminal_snr=snr or description.zero_terminal_snr)
    _check_whole(weights)
    folder = _base_folder(base)
    parts = _base_parts(base)
    description = describe_folder(folder, FAMILIES[base.family], parts)
    for name in weights.trained:
        if name not in parts:
            raise CheckpointError(
                f"{weights.folder} holds {name}, which base model {base.name!r} does not have; "
                "train the session again with resume set to never"
            )
        parts[name] = dict(_saved_part(weights, name))
    return parts, replace(description, zero_terminal_snr=snr or description.zero_terminal_snr)


def _check_whole(weights: Saved) -> None:
    if damage := weights.damage():
        raise CheckpointError(f"{damage}; train the session again with resume set to never")


def _saved_part(weights: Saved, name: str) -> Mapping[str, TensorEntry]:
    return read_header(weights.folder / f"{name}.safetensors").tensors


def _describe(base: Base, parts: dict[str, Tensors], schedule: dict[str, Any]) -> Description:
    transformer = parts.get("transformer", {})
    return Description(
        family=base.family,
        prediction_type="flow"
        if base.family == "flux"
        else str(schedule.get("prediction_type", "epsilon")),
        zero_terminal_snr=bool(schedule.get("rescale_betas_zero_snr")),
        guided=any("guidance_embedder" in name for name in transformer),
    )


def _base_folder(base: Base) -> Path:
    """Return the folder of a base model's files, which are fetched if need be."""
    folder = Path(base.source).expanduser()
    if folder.is_dir():
        return folder
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(base.source, use_safetensors=True))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"base model {base.name!r} cannot be had from {base.source} ({error}); "
            "check the name and the connection, or give a local folder in diffusers' layout"
        ) from error


def _base_parts(base: Base) -> dict[str, Tensors]:
    """Return the tensors of a base model's files, its VAE replaced where the record says so."""
    known = {part.name for part in FAMILIES[base.family].parts}
    found = read_folder(_base_folder(base))
    parts: dict[str, Tensors] = {name: found[name] for name in found.keys() & known}
    if base.vae:
        folder = _base_folder(replace(base, source=base.vae, vae=""))
        parts["vae"] = read_part(folder) or parts["vae"]
    return parts


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
