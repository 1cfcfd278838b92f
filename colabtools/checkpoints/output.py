"""Plans become files: written, compared meanwhile, reopened, and only then named."""

from __future__ import annotations

import shutil
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from colabtools.checkpoints.copying import Checker, Copier, Readers
from colabtools.checkpoints.headers import one_line
from colabtools.checkpoints.placing import (
    Unplaced,
    claim,
    hidden_name,
    place_folder,
    sync,
    sync_folder,
)
from colabtools.checkpoints.verify import WrittenFile
from colabtools.checkpoints.writers import SafetensorsFormat, format_of
from colabtools.drive import workspace_error
from colabtools.errors import CheckpointError, ColabToolsError, WorkspaceError
from colabtools.report import progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from colabtools.checkpoints.plan import Target
    from colabtools.checkpoints.writers import FileFormat

__all__ = ["FolderPlan", "write_file", "write_folder"]

_MB = 10**6
_MODEL_INDEX = "model_index.json"


@dataclass(frozen=True)
class FolderPlan:
    """A folder to be.

    Attributes:
        files: the tensors of each weight file, by its path within the folder.
        texts: what the other files hold, by their paths within the folder.
    """

    files: Mapping[str, Sequence[Target]]
    texts: Mapping[str, bytes]


def write_file(
    path: Path, targets: Sequence[Target], metadata: Mapping[str, str], *, verify: bool = True
) -> WrittenFile:
    """Write one file, whose ending says in which format; an older one stays until this is whole.

    Args:
        path: ends in .safetensors or .ckpt.
        targets: what it holds.
        metadata: texts for the header of a .safetensors file.
        verify: compare and hash every byte while writing; the header is checked in any case.

    Raises:
        CheckpointError: a source is damaged, a number does not fit, or the file reads back changed.
        WorkspaceError: the storage failed, or another conversion is writing the same file.
    """
    path = path.absolute()
    plan = format_of(path.suffix, targets, metadata)
    if path.is_dir():
        raise CheckpointError(f"{one_line(path)} is a folder; give the name of a file")
    with _job(path, targets, verify=verify) as job, Unplaced(path.parent, hidden_name(path)) as new:
        written = job.fill(new, path, plan)
        new.place(path)
    return written


def write_folder(
    folder: Path, plan: FolderPlan, metadata: Mapping[str, str], *, verify: bool = True
) -> list[WrittenFile]:
    """Write a folder in diffusers' layout; an older one stays until this is whole.

    Raises:
        CheckpointError: a source is damaged, a number does not fit, a file reads back changed, or
            the folder holds something else than a model.
        WorkspaceError: the storage failed, or another conversion is writing the same folder.
    """
    folder = folder.absolute()
    _check_replaceable(folder)
    targets = [target for targets in plan.files.values() for target in targets]
    with _job(folder, targets, verify=verify) as job, ExitStack() as unnamed:
        new: dict[str, Unplaced] = {}
        written = []
        for number, (name, each) in enumerate(plan.files.items()):
            hidden = f"{hidden_name(folder)}-{number}"
            new[name] = unnamed.enter_context(Unplaced(folder.parent, hidden))
            format_ = SafetensorsFormat(each, metadata)
            written.append(job.fill(new[name], folder / name, format_))
        _assemble(folder, new, plan.texts)
    return written


def _check_replaceable(folder: Path) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise CheckpointError(f"{one_line(folder)} is no folder; give another name")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _MODEL_INDEX).is_file():
        raise CheckpointError(
            f"{one_line(folder)} holds something else than a model in diffusers' layout; "
            "give another name"
        )


def _assemble(folder: Path, new: Mapping[str, Unplaced], texts: Mapping[str, bytes]) -> None:
    """Name the verified files inside a hidden folder, and give that its name."""
    partial = folder.with_name(hidden_name(folder))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        for name, text in texts.items():
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text)
            if path.read_bytes() != text:
                raise WorkspaceError(f"{name} reads back changed; check the disk")
        for name, file in new.items():
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            file.place(path)
        sync_folder(partial)
        place_folder(partial, folder)
    except BaseException:
        with suppress(OSError):
            shutil.rmtree(partial, ignore_errors=True)
        raise


@dataclass(frozen=True)
class _Job:
    readers: Readers
    count: Callable[[int], object]
    verify: bool

    def fill(self, new: Unplaced, path: Path, format_: FileFormat) -> WrittenFile:
        """Write all of a file that has no name yet, and prove it."""
        size_bytes = format_.size_bytes
        new.reserve(size_bytes)
        checker = Checker(new.descriptor, self.readers, path) if self.verify else None
        sha256 = ""
        try:
            format_.write(Copier(new.descriptor, self.readers, checker, self.count))
            sync(new.descriptor)
            if checker is not None:
                sha256 = checker.finish()
        except BaseException:
            if checker is not None:
                checker.stop()
            raise
        format_.reopen(new.path, path)
        return WrittenFile(
            path=path,
            size_bytes=size_bytes,
            tensor_count=len(format_.targets),
            sha256=sha256,
        )


@contextmanager
def _job(path: Path, targets: Sequence[Target], *, verify: bool) -> Iterator[_Job]:
    """What writes the files of one target; failures of the storage name it."""
    total = sum(target.size_bytes for target in targets)
    try:
        with claim(path), Readers() as readers:
            bar = progress(total=total // _MB, desc=f"writing {path.name}", unit="MB")
            with bar:
                yield _Job(readers, _in_megabytes(bar.update), verify)
    except OSError as error:
        if isinstance(error, ColabToolsError):
            raise
        raise workspace_error("write", one_line(path), error) from error


def _in_megabytes(update: Callable[[int], object]) -> Callable[[int], None]:
    rest = 0

    def count(size_bytes: int) -> None:
        nonlocal rest
        whole, rest = divmod(rest + size_bytes, _MB)
        if whole:
            update(whole)

    return count
