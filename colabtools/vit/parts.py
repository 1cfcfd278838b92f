"""The results of shards on disk: each part whole or absent, and all of them joined at the end."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from colabtools.errors import ConfigError, DatasetError
from colabtools.report import get_logger, progress
from colabtools.storage import atomic_path, remove_parts, workspace_error, write_atomic
from colabtools.vit.config import DTYPES, RunConfig
from colabtools.vit.engine import Results, Runner, Shard, plan_shards

if TYPE_CHECKING:
    import pyarrow as pa

    from colabtools.vit.backends.base import Ask
    from colabtools.vit.model import Model
    from colabtools.vit.sources import Source

__all__ = [
    "MEASURED",
    "Job",
    "describe_model",
    "ensure_apart",
    "is_whole",
    "item_columns",
    "read_part",
    "remove_folder",
    "settled",
    "shards_of",
    "write_table",
]

_RunConfig = TypeVar("_RunConfig", bound=RunConfig)
# What was measured when a run began. Measured again it could come out otherwise, and the parts that
# are there would count for nothing.
MEASURED = "measured.json"


@dataclass(frozen=True)
class Job:
    """A run over a source, whose parts lie in a folder.

    Attributes:
        config: what was asked for.
        source: the pictures.
        shards: all of them.
        folder: of the parts.
        is_done: whether the part of a shard is there and whole.
        write: writes the part of a shard.
    """

    config: RunConfig
    source: Source
    shards: Sequence[Shard]
    folder: Path
    is_done: Callable[[Shard], bool]
    write: Callable[[Results], object]

    def run(self, model: Model, ask: Ask, doing: str) -> None:
        """Make every part that is not there yet.

        Raises:
            ModelError: not even one picture fits in memory.
            WorkspaceError: the storage failed; what was written stays.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise workspace_error("make", self.folder, error) from error
        remove_parts(self.folder, older_than_s=3600.0)
        missing = [shard for shard in self.shards if not self.is_done(shard)]
        total = len(self.source.names)
        found = total - sum(map(len, missing))
        if found:
            get_logger(__name__).info("%s of %s pictures are done already", found, total)
        runner = Runner(model, ask, self._batch_size(), self.config.workers)
        with progress(desc=doing, unit="img", total=total) as bar:
            bar.update(found)
            for results in runner.run(self.source, missing, bar.update):
                self.write(results)
                self._remember(runner)

    def _batch_size(self) -> int:
        """Return the size to use; the one of an earlier run keeps every bit of the results."""
        found = _measured(self.folder).get("batch_size", 0)
        return self.config.batch_size or (found if isinstance(found, int) and found > 0 else 0)

    def _remember(self, runner: Runner) -> None:
        found = {"dtype": runner.model.backend.dtype, "batch_size": runner.batch_size}
        if _measured(self.folder) != found:
            write_atomic(self.folder / MEASURED, json.dumps(found).encode())

    def forget(self) -> None:
        """Remove what only a run under way needs."""
        (self.folder / MEASURED).unlink(missing_ok=True)

    @property
    def key(self) -> str:
        """A digest of everything that the results depend on."""
        names = "\n".join(shard.name for shard in self.shards)
        return hashlib.sha256(names.encode()).hexdigest()


def settled(config: _RunConfig, folder: Path, record: Path) -> _RunConfig:
    """Return the settings with the dtype that an earlier run of theirs had measured.

    Args:
        config: what is asked for.
        folder: of the parts of a run that was cut off.
        record: of a run that came to its end.
    """
    if config.dtype != "auto":
        return config
    made_with = _read_json(record).get("made_with", {})
    for known in (_measured(folder), made_with if isinstance(made_with, dict) else {}):
        if known.get("dtype") in DTYPES:
            return replace(config, dtype=known["dtype"])
    return config


def _measured(folder: Path) -> dict[str, Any]:
    return _read_json(folder / MEASURED)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def describe_model(model: Model, fingerprint: str) -> dict[str, Any]:
    """Return what results depend on of a model, as JSON values."""
    return {
        "model": model.files.name,
        "fingerprint": fingerprint,
        "backend": model.backend.name,
        "dtype": model.backend.dtype,
        "preprocessing": model.preprocessing.to_json(),
    }


def shards_of(source: Source, config: RunConfig, settings: dict[str, Any]) -> list[Shard]:
    """Return the shards of a run."""
    return plan_shards(source, config.shard_size, settings)


def ensure_apart(src: str, out: Path) -> None:
    """Refuse an output inside of the folder that is read, where the next run would find it.

    Raises:
        ConfigError: it is.
    """
    source = Path(src).expanduser().absolute()
    target = out.absolute()
    with suppress(OSError):
        source, target = source.resolve(), target.resolve()
    if source == target or (source.is_dir() and target.is_relative_to(source)):
        raise ConfigError(
            f"out is {str(out)!r}, inside of the pictures in {src}; give a place beside them"
        )


def item_columns(source: Source, results: Results) -> dict[str, Any]:
    """Return the columns path, status, error, and the table's own, of a shard."""
    import pyarrow as pa

    shard = results.shard
    numbers = range(shard.start, shard.stop)
    errors = [results.errors.get(number) for number in numbers]
    columns: dict[str, Any] = {
        "path": pa.array([_text(source.names[number]) for number in numbers], pa.string()),
        "status": pa.array(["ok" if error is None else "error" for error in errors], pa.string()),
        "error": pa.array(errors, pa.string()),
    }
    if source.columns is not None:
        own = source.columns.slice(shard.start, len(shard))
        columns |= {name: own.column(name) for name in own.column_names}
    return columns


def write_table(table: pa.Table, path: Path) -> None:
    """Write a part, whole or not at all.

    Raises:
        WorkspaceError: the storage failed.
    """
    import pyarrow.parquet as pq

    def verify(written: Path) -> None:
        if not read_part(written).equals(table):
            raise DatasetError(f"{path} was read back with other values")

    with atomic_path(path, verify=verify) as temporary:
        pq.write_table(table, temporary)


def is_whole(path: Path, rows: int) -> bool:
    """Whether a part is there and can be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return bool(pq.read_metadata(path).num_rows == rows)
    except (OSError, pa.ArrowException):
        return False


def read_part(path: Path) -> pa.Table:
    """Return the table of a part.

    Raises:
        DatasetError: it cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Not `read_table`, which would take the folder's name for a partition.
        return pq.ParquetFile(path).read()
    except (OSError, pa.ArrowException) as error:
        raise DatasetError(f"cannot read {path} ({error}); run this again") from error


def remove_folder(folder: Path) -> None:
    """Remove a folder of parts that were joined."""
    shutil.rmtree(folder, ignore_errors=True)


def _text(name: str) -> str:
    """Return a file's name as text that can be written; bytes that are none are marked."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
