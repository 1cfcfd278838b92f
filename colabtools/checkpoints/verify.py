"""The proof that a file is what it was meant to be: reopened, complete, equal byte for byte."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from colabtools.checkpoints.copying import target_bytes
from colabtools.checkpoints.headers import one_line, open_regular
from colabtools.checkpoints.sources import read_header
from colabtools.drive import sha256_of
from colabtools.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from colabtools.checkpoints.copying import Readers
    from colabtools.checkpoints.headers import Header
    from colabtools.checkpoints.plan import Target

__all__ = ["WrittenFile", "check_header", "verify_file"]


@dataclass(frozen=True, kw_only=True)
class WrittenFile:
    """A file that was written, reopened and found equal to what was meant.

    Attributes:
        sha256: in hex; empty where the comparison was switched off.
    """

    path: Path
    size_bytes: int
    tensor_count: int
    sha256: str


def check_header(header: Header, shown: Path, targets: Sequence[Target]) -> Header:
    """Return the header of a file, found to have these tensors and no other.

    Args:
        header: of the finished file.
        shown: what messages call the file, which may have no name yet.
        targets: in any order.

    Raises:
        CheckpointError: it has other names, dtypes or shapes.
    """
    meant = {target.name: (target.dtype, target.shape) for target in targets}
    found = {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()}
    for name in itertools.chain(meant, found):
        if found.get(name) != meant.get(name):
            there = _text(found.get(name))
            raise CheckpointError(
                f"{one_line(shown)} has {there} as {one_line(name)} instead of "
                f"{_text(meant.get(name))}; convert again"
            )
    return header


def _text(found: tuple[str, tuple[int, ...]] | None) -> str:
    if found is None:
        return "nothing"
    dtype, shape = found
    return f"{dtype} of shape {'x'.join(map(str, shape)) or 'one number'}"


def verify_file(path: Path, targets: Sequence[Target], readers: Readers) -> WrittenFile:
    """Return what is known of a file once every tensor of it was found to be what it should.

    Raises:
        CheckpointError: a tensor is missing, too many, of another kind or has other bytes.
    """
    header = check_header(read_header(path), path, targets)
    with open_regular(path) as file:
        for target in targets:
            offset = header.tensors[target.name].begin
            for chunk in target_bytes(target, readers):
                if os.pread(file.fileno(), len(chunk), offset) != chunk:
                    raise CheckpointError(
                        f"{one_line(path)} has other numbers in {one_line(target.name)} than the "
                        "source; convert again"
                    )
                offset += len(chunk)
    size_bytes = path.stat().st_size
    return WrittenFile(
        path=path, size_bytes=size_bytes, tensor_count=len(targets), sha256=sha256_of(path)
    )
