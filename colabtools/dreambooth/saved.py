"""A checkpoint: one folder for one moment of a run, with a manifest that proves it whole.

The folder is built under a hidden name and takes its own once every file in it was flushed and read
back, so a folder `step-NNNNNN` is complete or was damaged later, and its digests tell which.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colabtools.checkpoints.streaming import (
    FileDigest,
    file_bytes,
    read_tensors,
    sync_folder,
    write_tensors,
    write_verified,
)
from colabtools.dreambooth.session import now_text
from colabtools.dreambooth.tree import pack_tree, unpack_tree
from colabtools.drive import sha256_of
from colabtools.errors import CheckpointError, WorkspaceError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import torch

__all__ = [
    "Saved",
    "Snapshot",
    "checkpoint_folders",
    "copy_saved",
    "find_saved",
    "pack_snapshot",
    "remove_folder",
    "remove_litter",
    "snapshot_bytes",
    "write_snapshot",
]

_SCHEMA_VERSION = 2
_MANIFEST = "manifest.json"
_STATE, _STATE_TENSORS = "state.json", "state.safetensors"
_FOLDER = re.compile(r"step-(\d{6,})")
# `.part` is being built, `.old` was replaced by one of the same step, `.gone` is being removed.
_LITTER = re.compile(r"\.(step-\d{6,})\.(part|old|gone)")
_PART_NAME = re.compile(r"[a-z0-9_]+")
_OWN_KEYS = frozenset(
    {"files", "finished", "saved", "schema_version", "sequence", "sha256", "step", "trained"}
)
_CHUNK_BYTES = 4 * 1024**2


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A moment of a run, as it is to be saved.

    Attributes:
        step: updates done, over all stages.
        finished: whether the run is over; then `state` is empty.
        parts: tensors by the name of their network, which names their file: letters, digits, _.
        trained: the parts that are the result; others are only needed to go on.
        state: what a run needs to go on, beside the parts; see `pack_tree`.
        description: how the weights came about; for JSON, kept in the manifest.
    """

    step: int
    finished: bool
    parts: Mapping[str, Mapping[str, torch.Tensor]]
    trained: tuple[str, ...]
    state: Mapping[str, Any] = field(default_factory=dict)
    description: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check what would make a checkpoint that cannot be read again."""
        for name in self.parts:
            if not _PART_NAME.fullmatch(name) or name == "state":
                raise CheckpointError(f"part {name!r} cannot name a file; use letters, digits, _")
        if unknown := set(self.trained) - self.parts.keys():
            raise CheckpointError(f"trained names {sorted(unknown)}, which are not in parts")
        if taken := _OWN_KEYS & self.description.keys():
            raise CheckpointError(f"description has the keys {sorted(taken)}; rename them")


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk and what its manifest says of it."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Updates that these weights have seen."""
        return int(self.manifest["step"])

    @property
    def finished(self) -> bool:
        """Whether it is the end of a run."""
        return bool(self.manifest["finished"])

    @property
    def sequence(self) -> int:
        """A number that grows with every save of a session."""
        return int(self.manifest["sequence"])

    @property
    def description(self) -> dict[str, Any]:
        """How the weights came about, as JSON holds it: tuples are lists."""
        return {name: value for name, value in self.manifest.items() if name not in _OWN_KEYS}

    @property
    def trained(self) -> tuple[str, ...]:
        """The parts that are the result."""
        return tuple(self.manifest["trained"])

    @property
    def files(self) -> dict[str, FileDigest]:
        """What each file must be."""
        rows = self.manifest["files"].items()
        return {name: FileDigest(row["size_bytes"], row["sha256"]) for name, row in rows}

    @property
    def size_bytes(self) -> int:
        """Length of all its files."""
        total = sum(digest.size_bytes for digest in self.files.values())
        with suppress(OSError):
            total += (self.folder / _MANIFEST).stat().st_size
        return total

    def load(self, names: Iterable[str] | None = None) -> dict[str, dict[str, torch.Tensor]]:
        """Return the tensors of these parts, those that are the result if None, digests compared.

        Raises:
            CheckpointError: a file is missing or damaged, or there is no such part.
        """
        return {
            name: self._read(f"{name}.safetensors")
            for name in (self.trained if names is None else names)
        }

    def load_all(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return the tensors of every part; see `load`."""
        stems = [Path(name).stem for name in self.files if name.endswith(".safetensors")]
        return self.load([stem for stem in stems if stem != "state"])

    def load_state(self) -> dict[str, Any]:
        """Return the state as it was given, digests compared; empty if the run was finished.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        if _STATE not in self.files:
            return {}
        tensors = self._read(_STATE_TENSORS)
        path = self.folder / _STATE
        try:
            text = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error})") from error
        if hashlib.sha256(text).hexdigest() != self.files[_STATE].sha256:
            raise CheckpointError(f"{path} is damaged: its bytes are not those that were saved")
        state: dict[str, Any] = unpack_tree(json.loads(text), tensors)
        return state

    def damage(self, *, quick: bool = False) -> str:
        """Return which file is not what was saved and why, or an empty text.

        Args:
            quick: compare lengths only, not every byte.
        """
        for name, meant in self.files.items():
            path = self.folder / name
            try:
                size_bytes = path.stat().st_size
                if size_bytes != meant.size_bytes:
                    return f"{path} has {size_bytes} bytes instead of {meant.size_bytes}"
                if not quick and sha256_of(path) != meant.sha256:
                    return f"{path} has other bytes than were saved"
            except FileNotFoundError:
                return f"{path} is missing"
            except OSError as error:
                return f"{path} cannot be read ({error})"
        return ""

    def _read(self, name: str) -> dict[str, torch.Tensor]:
        if name not in self.files:
            raise CheckpointError(f"{self.folder} holds no {name}; it holds {sorted(self.files)}")
        return read_tensors(self.folder / name, self.files[name].sha256)


def pack_snapshot(
    snapshot: Snapshot,
) -> tuple[dict[str, Mapping[str, torch.Tensor]], dict[str, bytes]]:
    """Return what a snapshot's files hold: tensors, and text, each by the name of its file.

    Raises:
        CheckpointError: its state holds what cannot be saved.
    """
    files = {f"{name}.safetensors": tensors for name, tensors in snapshot.parts.items()}
    if not snapshot.state:
        return files, {}
    structure, tensors = pack_tree(dict(snapshot.state))
    text = json.dumps(structure, separators=(",", ":")).encode()
    return {**files, _STATE_TENSORS: tensors}, {_STATE: text}


def snapshot_bytes(snapshot: Snapshot) -> int:
    """Return the length of all files that `write_snapshot` would make; meta tensors will do.

    Raises:
        CheckpointError: its state holds what cannot be saved.
    """
    tensors, texts = pack_snapshot(snapshot)
    sizes = {name: file_bytes(each) for name, each in tensors.items()}
    sizes.update({name: len(text) for name, text in texts.items()})
    files = {name: FileDigest(size, "0" * 64) for name, size in sizes.items()}
    # A sequence number is a time in milliseconds, which has 13 digits until the year 2286.
    return sum(sizes.values()) + len(_manifest(snapshot, 10**12, files))


def write_snapshot(place: Path, snapshot: Snapshot, sequence: int) -> Saved:
    """Write a snapshot as `<place>/step-NNNNNN`; a former one goes once the new one is whole.

    Raises:
        CheckpointError: the snapshot holds what cannot be saved.
        OSError: the storage failed; nothing is left of the attempt.
    """
    tensors, texts = pack_snapshot(snapshot)
    with _building(place, f"step-{snapshot.step:06d}") as (partial, folder):
        written = {name: write_tensors(each, partial / name) for name, each in tensors.items()}
        for name, text in texts.items():
            written[name] = write_verified(partial / name, [text])
        manifest = _manifest(snapshot, sequence, written)
        write_verified(partial / _MANIFEST, [manifest])
    return Saved(folder, json.loads(manifest))


def copy_saved(saved: Saved, place: Path) -> Saved:
    """Copy a checkpoint into another place, where it is read back and compared with its digests.

    Raises:
        OSError: the storage failed, or gave back other bytes; nothing is left of the attempt.
    """
    with _building(place, f"step-{saved.step:06d}") as (partial, folder):
        for name, meant in saved.files.items():
            if write_verified(partial / name, _chunks(saved.folder / name)) != meant:
                raise WorkspaceError(f"{saved.folder / name} has other bytes than were saved")
        # Not the file, which may be of the next save of this step by now.
        write_verified(partial / _MANIFEST, [_as_json(saved.manifest)])
    return Saved(folder, saved.manifest)


def find_saved(place: Path) -> tuple[list[Saved], list[str]]:
    """Return the checkpoints of a place in the order of saving, and what is wrong with others.

    Manifests are checked, other files are not.

    Raises:
        OSError: the place cannot be read.
    """
    found, problems = [], []
    for folder in checkpoint_folders(place):
        try:
            found.append(Saved(folder, _read_manifest(folder / _MANIFEST)))
        except CheckpointError as error:
            problems.append(str(error))
    return sorted(found, key=lambda saved: saved.sequence), problems


def remove_folder(folder: Path) -> None:
    """Remove a checkpoint so that a kill in the middle leaves nothing that looks like one.

    Raises:
        OSError: the storage failed.
    """
    gone = folder.with_name(f".{folder.name.strip('.').partition('.')[0]}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone)


def remove_litter(place: Path) -> None:
    """Remove what killed writes left; a checkpoint that was about to be replaced is put back.

    Raises:
        OSError: the place cannot be read.
    """
    for path in list(place.iterdir()):
        if (match := _LITTER.fullmatch(path.name)) is None:
            continue
        folder = place / match[1]
        if match[2] == "old" and not folder.exists():
            path.rename(folder)
        else:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _building(place: Path, name: str) -> Iterator[tuple[Path, Path]]:
    """A new folder, and the one that it becomes at the end of the block."""
    # Its parent is not made: that would hide a Drive that is no longer mounted.
    place.mkdir(exist_ok=True)
    remove_litter(place)
    folder, partial, former = place / name, place / f".{name}.part", place / f".{name}.old"
    try:
        partial.mkdir()
        yield partial, folder
        sync_folder(partial)
        if folder.exists():
            folder.rename(former)
        partial.rename(folder)
        sync_folder(place)
    except BaseException:
        with suppress(OSError):
            remove_litter(place)
        raise
    shutil.rmtree(former, ignore_errors=True)


def checkpoint_folders(place: Path) -> list[Path]:
    """Return the folders that may be checkpoints, whole or not, without those of other names.

    Raises:
        OSError: the place cannot be read.
    """
    try:
        names = {path.name for path in place.iterdir()}
    except FileNotFoundError:
        return []
    litter = [match for match in map(_LITTER.fullmatch, names) if match is not None]
    # A kill between the two renames of a save leaves the former one under its hidden name.
    former = {m[0] for m in litter if m[2] == "old" and m[1] not in names}
    return [place / name for name in sorted(names) if _FOLDER.fullmatch(name) or name in former]


def _manifest(snapshot: Snapshot, sequence: int, files: Mapping[str, FileDigest]) -> bytes:
    values = {
        **snapshot.description,
        "schema_version": _SCHEMA_VERSION,
        "sequence": sequence,
        "step": snapshot.step,
        "finished": snapshot.finished,
        "trained": list(snapshot.trained),
        "saved": now_text(),
        "files": {name: vars(digest) for name, digest in files.items()},
    }
    return _as_json({**values, "sha256": _digest(values)})


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_bytes())
        version = values["schema_version"]
        if version == 1:
            values = _from_version_1(values, path.parent)
        elif version == _SCHEMA_VERSION and values["sha256"] != _digest(values):
            raise CheckpointError(f"{path} has other bytes than were saved")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be read ({error!r})") from error
    if version not in (1, _SCHEMA_VERSION):
        raise CheckpointError(
            f"{path} has schema version {version!r}, this package reads up to {_SCHEMA_VERSION}; "
            "update colabtools"
        )
    return values


def _from_version_1(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the manifest of an older version, which saved finished runs only, as one of ours."""
    files = {}
    for name, sha256 in values["sha256"].items():
        path = folder / f"{name}.safetensors"
        # It kept no lengths; the digest alone has to do.
        size_bytes = path.stat().st_size if path.is_file() else 0
        files[path.name] = {"size_bytes": size_bytes, "sha256": sha256}
    return {
        **values,
        "sequence": int(datetime.fromisoformat(values["saved"]).timestamp() * 1000),
        "finished": True,
        "trained": list(values["sha256"]),
        "files": files,
    }


def _digest(values: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest without its own."""
    others = {name: value for name, value in values.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def _as_json(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, indent=1).encode()


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk
